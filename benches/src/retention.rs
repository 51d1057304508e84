use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use pillarbox::{Outbox, Relay, RetentionSettings};
use pillarbox_testkit::servers::Postgres;
use sqlx::{AssertSqlSafe, PgPool};

use crate::{
    Measured,
    discard::Discard,
    stage::{self, Counting, fill},
};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// Transactions a second.
const TRANSACTIONS: u32 = 20;
/// How long one slot of the log takes events here. The engine makes none shorter than half an hour by itself.
const SLOT: u32 = 30;

#[derive(Args)]
pub(crate) struct Retention {
    /// How long.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Events a second.
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
    /// How long events are kept, in seconds.
    #[arg(long, default_value_t = 60)]
    keep: u64,
    /// Where the plot goes (SVG).
    #[arg(long)]
    plot: Option<PathBuf>,
}

/// MiB at a moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) minute: f64,
    pub(crate) log: f64,
    pub(crate) rest: f64,
    pub(crate) written: f64,
}

impl Retention {
    pub(crate) async fn run(&self) -> Measured<()> {
        let postgres = Postgres::start().await?;
        let (_, pool) = stage::database(&postgres).await?;
        shorten_slots(&pool).await?;
        let retention = RetentionSettings {
            log: Duration::from_secs(self.keep),
            interval: Duration::from_secs(10),
            ..RetentionSettings::default()
        };
        let (transport, count) = Counting::new(Discard, u64::MAX);
        let running = Relay::new(&Outbox::new(&pool), transport)
            .source("bench")
            .retention(retention)
            .spawn();
        let end = Instant::now() + Duration::from_secs_f64(60.0 * self.minutes);
        let load = tokio::spawn(load(pool.clone(), self.rate, end));
        println!(
            "{} events a second of 450 bytes, kept for {} s, slots of {SLOT} s; MiB",
            self.rate, self.keep
        );
        println!(
            "{:>8} {:>10} {:>10} {:>16}",
            "minute", "log", "the rest", "written so far"
        );
        let (started, mut samples) = (Instant::now(), Vec::new());
        let mut looks = tokio::time::interval(LOOK);
        while Instant::now() < end {
            looks.tick().await;
            let written = count.stored() as f64 * 450.0 / f64::from(1 << 20);
            let sample = look(&pool, started.elapsed(), written).await?;
            if samples.len() % 12 == 0 {
                println!(
                    "{:>8.1} {:>10.1} {:>10.1} {:>16.1}",
                    sample.minute, sample.log, sample.rest, sample.written
                );
            }
            samples.push(sample);
        }
        load.await??;
        running.shutdown().await?;
        tell(&samples);
        if let Some(path) = &self.plot {
            crate::plot::sizes(path, &samples)?;
            println!("plot: {}", path.display());
        }
        pool.close().await;
        postgres.end().await;
        Ok(())
    }
}

/// The same slots as the engine's, only shorter.
async fn shorten_slots(pool: &PgPool) -> Measured<()> {
    let sql = format!(
        "ALTER TABLE pillarbox.outbox ALTER COLUMN slot SET DEFAULT
           ((extract(epoch FROM clock_timestamp())::bigint / {SLOT}) % 4)::smallint;
         UPDATE pillarbox.installation SET slot_seconds = {SLOT}"
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(pool).await?;
    Ok(())
}

async fn load(pool: PgPool, rate: u32, end: Instant) -> Measured<()> {
    let mut turns = tokio::time::interval(Duration::from_secs(1) / TRANSACTIONS);
    while Instant::now() < end {
        turns.tick().await;
        fill(&pool, (rate / TRANSACTIONS).max(1), 450, 1_000).await?;
    }
    Ok(())
}

async fn look(pool: &PgPool, since: Duration, written: f64) -> Measured<Sample> {
    let sql = "SELECT coalesce(sum(pg_total_relation_size(c.oid)) FILTER (WHERE c.relname LIKE 'outbox%'), 0)::float8,
                      coalesce(sum(pg_total_relation_size(c.oid)) FILTER (WHERE c.relname NOT LIKE 'outbox%'), 0)::float8
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname = 'pillarbox' AND c.relkind = 'r'";
    let (log, rest): (f64, f64) = sqlx::query_as(sql).fetch_one(pool).await?;
    let mib = f64::from(1 << 20);
    Ok(Sample {
        minute: since.as_secs_f64() / 60.0,
        log: log / mib,
        rest: rest / mib,
        written,
    })
}

/// The most in each quarter of the run.
fn tell(samples: &[Sample]) {
    let most = |of: fn(&Sample) -> f64| -> Vec<String> {
        samples
            .chunks(samples.len().div_ceil(4).max(1))
            .map(|quarter| {
                let most = quarter.iter().map(of).fold(0.0, f64::max);
                format!("{most:.1}")
            })
            .collect()
    };
    println!(
        "most in each quarter: log {:?}, the rest {:?} MiB",
        most(|s| s.log),
        most(|s| s.rest)
    );
}
