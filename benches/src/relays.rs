use std::time::{Duration, Instant};

use clap::Args;
use pillarbox::transport::Transport as _;
use pillarbox_amqp::QueueType;

use crate::{
    Measured,
    process::Process,
    stage::{Stage, amqp, fill, median, spread},
};

/// Of the log, as it is made.
const PARTITIONS: usize = 4;
/// After this the partitions stay with whom they are.
const BALANCES: Duration = Duration::from_secs(60);

#[derive(Args)]
pub(crate) struct Relays {
    /// Events in each run.
    #[arg(long, default_value_t = 100_000)]
    events: u32,
    /// Runs of each, in turn.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// To a transport that discards, instead of RabbitMQ.
    #[arg(long)]
    discard: bool,
}

impl Relays {
    pub(crate) async fn run(&self) -> Measured<()> {
        println!(
            "{} events, {PARTITIONS} partitions, one relay process and two; events a second",
            self.events
        );
        println!(
            "{:>12} {:>12} {:>8}   partitions held by the two",
            "one", "two", "ratio"
        );
        let mut ratios = Vec::new();
        for round in 0..self.rounds {
            let mut rates = [0.0; 2];
            let mut held = Vec::new();
            for relays in if round % 2 == 0 { [1, 2] } else { [2, 1] } {
                let (rate, shares) = self.one(relays).await?;
                rates[relays - 1] = rate;
                if relays == 2 {
                    held = shares;
                }
            }
            let ratio = rates[1] / rates[0];
            println!(
                "{:>12.0} {:>12.0} {ratio:>8.2}   {held:?}",
                rates[0], rates[1]
            );
            ratios.push(ratio);
        }
        let (least, most) = spread(&ratios);
        println!(
            "median ratio {:.2} ({least:.2} to {most:.2}); asked: 0.9",
            median(&ratios)
        );
        Ok(())
    }

    /// The rate, and who held how many partitions.
    async fn one(&self, relays: usize) -> Measured<(f64, Vec<usize>)> {
        let stage = Stage::new().await?;
        drop(
            amqp(&stage.amqp_url, QueueType::Quorum, 1)?
                .publisher()
                .await?,
        );
        let broker = (!self.discard).then_some(stage.amqp_url.as_str());
        let mut all = Vec::new();
        for _ in 0..relays {
            all.push(Process::relay(&stage.database_url, broker)?);
        }
        let held = balanced(&all).await?;
        fill(&stage.pool, self.events, 450, 1_000).await?;
        let started = Instant::now();
        let mut looks = tokio::time::interval(Duration::from_millis(5));
        while all.iter().map(|p| p.progress().confirmed).sum::<u64>() < u64::from(self.events) {
            looks.tick().await;
        }
        let took = started.elapsed();
        for relay in all {
            relay.end().await?;
        }
        stage.clear().await?;
        Ok((f64::from(self.events) / took.as_secs_f64(), held))
    }
}

/// Waits until all partitions are held, and for a while until each has its share.
async fn balanced(relays: &[Process]) -> Measured<Vec<usize>> {
    let started = Instant::now();
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    loop {
        looks.tick().await;
        let held: Vec<usize> = relays.iter().map(|p| p.progress().held).collect();
        let (all, late) = (
            held.iter().sum::<usize>() == PARTITIONS,
            started.elapsed() > BALANCES,
        );
        let fair = held.iter().all(|h| *h == PARTITIONS / relays.len());
        if all && (fair || late) {
            return Ok(held);
        }
        if started.elapsed() > 2 * BALANCES {
            return Err(format!("the partitions are not all held: {held:?}").into());
        }
    }
}
