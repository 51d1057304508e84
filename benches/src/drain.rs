use std::time::{Duration, Instant};

use clap::Args;
use pillarbox::{Outbox, transport::Transport};
use pillarbox_amqp::QueueType;

use crate::{
    Measured, raw,
    stage::{Counting, Stage, amqp, relay},
};

/// Log partitions, each with a publisher of its own.
const PARTITIONS: u16 = 4;

#[derive(Args)]
pub(crate) struct Drain {
    /// Events in each run.
    #[arg(long, default_value_t = 100_000)]
    events: u32,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 450)]
    bytes: u32,
    /// Keys.
    #[arg(long, default_value_t = 1_000)]
    keys: u32,
    /// Unconfirmed events at most, the same for both.
    #[arg(long, default_value_t = 1_024)]
    in_flight: usize,
    /// Channels of each partition's publisher; the raw client has as many as all of them together.
    #[arg(long, default_value_t = 4)]
    channels: u16,
    /// Runs of each, in turn.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
}

impl Drain {
    pub(crate) async fn run(&self) -> Measured<()> {
        println!(
            "{} events of {} bytes, {} keys, {} in flight on {} channels",
            self.events,
            self.bytes,
            self.keys,
            self.in_flight,
            PARTITIONS * self.channels
        );
        println!(
            "{:<8} {:>14} {:>14} {:>8}",
            "queue", "raw client/s", "relay/s", "ratio"
        );
        for queue_type in [QueueType::Quorum, QueueType::Classic] {
            let mut ratios = Vec::new();
            for _ in 0..self.rounds {
                let raw = self.raw(queue_type).await?;
                let relayed = self.relay(queue_type).await?;
                let ratio = raw.as_secs_f64() / relayed.as_secs_f64();
                println!(
                    "{:<8} {:>14.0} {:>14.0} {ratio:>8.2}",
                    name(queue_type),
                    self.rate(raw),
                    self.rate(relayed)
                );
                ratios.push(ratio);
            }
            ratios.sort_by(f64::total_cmp);
            println!(
                "{:<8} median ratio {:.2}",
                name(queue_type),
                ratios[ratios.len() / 2]
            );
        }
        Ok(())
    }

    async fn raw(&self, queue_type: QueueType) -> Measured<Duration> {
        let stage = Stage::new().await?;
        // Declares exchange and queue; the raw client then finds what the relay would.
        drop(amqp(&stage.amqp_url, queue_type, 1)?.publisher().await?);
        raw::publish(
            &stage.amqp_url,
            self.events,
            self.bytes,
            PARTITIONS * self.channels,
            self.in_flight,
        )
        .await
    }

    async fn relay(&self, queue_type: QueueType) -> Measured<Duration> {
        let stage = Stage::new().await?;
        stage.fill(self.events, self.bytes, self.keys).await?;
        let amqp = amqp(&stage.amqp_url, queue_type, self.channels)?;
        drop(amqp.publisher().await?);
        let (transport, count) = Counting::new(amqp, u64::from(self.events));
        let outbox = Outbox::new(&stage.pool);
        let started = Instant::now();
        let running = relay(&outbox, transport, self.in_flight).spawn();
        count.reached().await;
        let took = started.elapsed();
        running.shutdown().await?;
        Ok(took)
    }

    fn rate(&self, took: Duration) -> f64 {
        f64::from(self.events) / took.as_secs_f64()
    }
}

fn name(queue_type: QueueType) -> &'static str {
    match queue_type {
        QueueType::Quorum => "quorum",
        QueueType::Classic => "classic",
    }
}
