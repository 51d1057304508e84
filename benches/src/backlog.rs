use std::time::{Duration, Instant};

use clap::Args;
use pillarbox::transport::Transport as _;
use pillarbox_amqp::QueueType;
use pillarbox_testkit::servers;

use crate::{
    Measured,
    process::Process,
    stage::{self, Stage, amqp, fill, median},
};

/// Events of one transaction of the backlog.
const CHUNK: u32 = 100_000;
/// Between two looks at the memory.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Args)]
pub(crate) struct Backlog {
    /// The small backlog.
    #[arg(long, default_value_t = 100_000)]
    small: u32,
    /// The large one for a transport that discards; 0 leaves it out.
    #[arg(long, default_value_t = 5_000_000)]
    discard: u32,
    /// The large one for RabbitMQ; 0 leaves it out.
    #[arg(long, default_value_t = 1_000_000)]
    rabbitmq: u32,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 450)]
    bytes: u32,
}

/// How one backlog drained.
struct Drained {
    rate: f64,
    /// Most MiB in the first tenth of it, and at all.
    early: f64,
    peak: f64,
}

impl Backlog {
    pub(crate) async fn run(&self) -> Measured<()> {
        println!(
            "{:<10} {:>10} {:>12} {:>24} {:>12}",
            "into", "events", "events/s", "MiB in the first tenth", "at most"
        );
        for (name, large) in [("nothing", self.discard), ("RabbitMQ", self.rabbitmq)] {
            if large == 0 {
                continue;
            }
            let into_broker = name == "RabbitMQ";
            let mut small = Vec::new();
            let mut of_large = None;
            // Small ones before and after.
            for events in [self.small, self.small, large, self.small, self.small] {
                let drained = self.drain(events, into_broker).await?;
                println!(
                    "{name:<10} {events:>10} {:>12.0} {:>24.1} {:>12.1}",
                    drained.rate, drained.early, drained.peak
                );
                if events == large {
                    of_large = Some(drained.rate);
                } else {
                    small.push(drained.rate);
                }
            }
            println!(
                "{name:<10} ratio {:.2}; asked: 0.9",
                of_large.unwrap_or(f64::NAN) / median(&small)
            );
        }
        Ok(())
    }

    async fn drain(&self, events: u32, into_broker: bool) -> Measured<Drained> {
        if !into_broker {
            let (url, pool) = stage::database(servers::postgres().await?).await?;
            self.fill(&pool, events).await?;
            let drained = drained(Process::relay(&url, None)?, events).await?;
            drop_database(&pool).await?;
            return Ok(drained);
        }
        let stage = Stage::new().await?;
        self.fill(&stage.pool, events).await?;
        drop(
            amqp(&stage.amqp_url, QueueType::Quorum, 1)?
                .publisher()
                .await?,
        );
        let process = Process::relay(&stage.database_url, Some(&stage.amqp_url))?;
        let drained = drained(process, events).await?;
        stage.clear().await?;
        drop_database(&stage.pool).await?;
        Ok(drained)
    }

    async fn fill(&self, pool: &sqlx::PgPool, events: u32) -> Measured<()> {
        let mut left = events;
        while left > 0 {
            let chunk = left.min(CHUNK);
            fill(pool, chunk, self.bytes, 1_000).await?;
            left -= chunk;
        }
        for sql in ["VACUUM ANALYZE pillarbox.outbox", "CHECKPOINT"] {
            sqlx::raw_sql(sql).execute(pool).await?;
        }
        Ok(())
    }
}

/// From the first confirm to the last: a start costs a small backlog more.
async fn drained(mut process: Process, events: u32) -> Measured<Drained> {
    let first = process.until(|p| p.confirmed > 0).await?.confirmed;
    let started = Instant::now();
    let (mut early, mut peak) = (0.0_f64, 0.0_f64);
    let events = u64::from(events);
    let took = loop {
        let confirmed = process.progress().confirmed;
        let took = started.elapsed();
        if confirmed >= events {
            break took;
        }
        let rss = process.rss()?;
        peak = peak.max(rss);
        if confirmed < events / 10 {
            early = early.max(rss);
        }
        let end = process.until(|p| p.confirmed >= events);
        // Whichever is first: the next look at its memory or its end.
        let _ = tokio::time::timeout(LOOK, end).await;
    };
    process.end().await?;
    let rate = (events - first) as f64 / took.as_secs_f64();
    Ok(Drained { rate, early, peak })
}

/// Gives the disk back.
async fn drop_database(pool: &sqlx::PgPool) -> Measured<()> {
    for sql in ["TRUNCATE pillarbox.outbox", "CHECKPOINT"] {
        sqlx::raw_sql(sql).execute(pool).await?;
    }
    pool.close().await;
    Ok(())
}
