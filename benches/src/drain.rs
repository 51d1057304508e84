use std::time::Duration;

use clap::{Args, ValueEnum};
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
    /// Into queues of this type alone.
    #[arg(long)]
    queue: Option<Kind>,
    /// The raw client or the relay alone, for a profiler.
    #[arg(long)]
    only: Option<Side>,
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
        for kind in [Kind::Quorum, Kind::Classic] {
            if self.queue.is_none_or(|only| only == kind) {
                self.compare(kind).await?;
            }
        }
        Ok(())
    }

    async fn compare(&self, kind: Kind) -> Measured<()> {
        let mut ratios = Vec::new();
        for round in 0..self.rounds {
            let mut rates = [f64::NAN; 2];
            // In turn: a broker that is warm, or has put work off, favours neither.
            let order = [[Side::Raw, Side::Relay], [Side::Relay, Side::Raw]];
            for side in order[round as usize % 2] {
                if self.only.is_none_or(|only| only == side) {
                    rates[side as usize] = self.rate(self.one(side, kind).await?);
                }
            }
            let [raw, relay] = rates;
            println!("{kind:<8?} {raw:>14.0} {relay:>14.0} {:>8.2}", relay / raw);
            ratios.push(relay / raw);
        }
        ratios.sort_by(f64::total_cmp);
        println!("{kind:<8?} median ratio {:.2}", ratios[ratios.len() / 2]);
        Ok(())
    }

    async fn one(&self, side: Side, kind: Kind) -> Measured<Duration> {
        let stage = Stage::new().await?;
        let took = match side {
            Side::Raw => self.raw(&stage, kind.into()).await,
            Side::Relay => self.relay(&stage, kind.into()).await,
        };
        stage.clear().await?;
        took
    }

    async fn raw(&self, stage: &Stage, queue_type: QueueType) -> Measured<Duration> {
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

    async fn relay(&self, stage: &Stage, queue_type: QueueType) -> Measured<Duration> {
        stage.fill(self.events, self.bytes, self.keys).await?;
        let amqp = amqp(&stage.amqp_url, queue_type, self.channels)?;
        drop(amqp.publisher().await?);
        let (transport, count) = Counting::new(amqp, u64::from(self.events));
        let outbox = Outbox::new(&stage.pool);
        let running = relay(&outbox, transport, self.in_flight).spawn();
        count.reached().await;
        let took = count.took();
        running.shutdown().await?;
        Ok(took)
    }

    fn rate(&self, took: Duration) -> f64 {
        f64::from(self.events) / took.as_secs_f64()
    }
}

/// What is published into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Quorum,
    Classic,
}

impl From<Kind> for QueueType {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Quorum => Self::Quorum,
            Kind::Classic => Self::Classic,
        }
    }
}

/// Who publishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Side {
    Raw,
    Relay,
}
