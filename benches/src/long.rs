use std::time::{Duration, Instant};

use clap::Args;
use pillarbox::{Outbox, Running};
use pillarbox_testkit::servers::Postgres;
use sqlx::PgPool;

use crate::{
    Measured,
    discard::Discard,
    stage::{self, Count, Counting, fill, median, relay, spread},
};

/// Events of one transaction.
const EACH: u32 = 100;

#[derive(Args)]
pub(crate) struct Long {
    /// How long the transactions stay open.
    #[arg(long, default_value_t = 6.0)]
    minutes: f64,
    /// Events in each slice.
    #[arg(long, default_value_t = 50_000)]
    events: u32,
}

/// A server with a relay to nowhere. One of the two has transactions that do not end.
struct Side {
    postgres: Postgres,
    pool: PgPool,
    count: std::sync::Arc<Count>,
    running: Running,
}

impl Side {
    /// A server of its own: snapshots name the transactions of all databases of a server.
    async fn start() -> Measured<Self> {
        let postgres = Postgres::start().await?;
        let (_, pool) = stage::database(&postgres).await?;
        let (transport, count) = Counting::new(Discard, u64::MAX);
        let running = relay(&Outbox::new(&pool), transport, 4_096).spawn();
        Ok(Self {
            postgres,
            pool,
            count,
            running,
        })
    }

    /// Writes a slice in many transactions while the relay works; events a second until the last one is confirmed.
    async fn slice(&self, events: u32) -> Measured<f64> {
        let wanted = self.count.stored() + u64::from(events / EACH * EACH);
        let started = Instant::now();
        for _ in 0..events / EACH {
            fill(&self.pool, EACH, 450, 1_000).await?;
        }
        self.count.until(wanted).await;
        Ok(f64::from(events / EACH * EACH) / started.elapsed().as_secs_f64())
    }

    /// Kilobytes of each table but the log, with its dead rows.
    async fn sizes(&self) -> Measured<Vec<(String, i64, i64)>> {
        let sql = "SELECT relname::text, pg_total_relation_size(relid) / 1024, n_dead_tup FROM pg_stat_user_tables
                   WHERE schemaname = 'pillarbox' AND relname NOT LIKE 'outbox%' AND n_tup_ins + n_tup_upd > 0
                   ORDER BY relname";
        Ok(sqlx::query_as(sql).fetch_all(&self.pool).await?)
    }

    async fn end(self) -> Measured<()> {
        self.running.shutdown().await?;
        self.pool.close().await;
        self.postgres.end().await;
        Ok(())
    }
}

impl Long {
    pub(crate) async fn run(&self) -> Measured<()> {
        let (calm, held) = (Side::start().await?, Side::start().await?);
        // Warms both up.
        calm.slice(self.events / 5).await?;
        held.slice(self.events / 5).await?;
        let mut id = held.pool.begin().await?;
        sqlx::raw_sql("SELECT pg_current_xact_id()")
            .execute(&mut *id)
            .await?;
        let mut horizon = held.pool.begin().await?;
        sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT 1")
            .execute(&mut *horizon)
            .await?;
        println!(
            "slices of {} events, one transaction open that holds an id and one that holds the horizon, for {} min; events a second",
            self.events, self.minutes
        );
        println!(
            "{:>8} {:>14} {:>14} {:>8}",
            "minute", "undisturbed", "held", "ratio"
        );
        let (started, mut ratios) = (Instant::now(), Vec::new());
        let end = started + Duration::from_secs_f64(60.0 * self.minutes);
        while Instant::now() < end || ratios.len() < 2 {
            let (first, second) = if ratios.len() % 2 == 0 {
                (&calm, &held)
            } else {
                (&held, &calm)
            };
            let mut rates = [
                first.slice(self.events).await?,
                second.slice(self.events).await?,
            ];
            if ratios.len() % 2 == 1 {
                rates.reverse();
            }
            let ratio = rates[1] / rates[0];
            let minute = started.elapsed().as_secs_f64() / 60.0;
            println!(
                "{minute:>8.1} {:>14.0} {:>14.0} {ratio:>8.2}",
                rates[0], rates[1]
            );
            ratios.push(ratio);
        }
        let (least, most) = spread(&ratios);
        let late = &ratios[ratios.len() * 3 / 4..];
        println!(
            "median ratio {:.2} ({least:.2} to {most:.2}), of the last quarter {:.2}; asked: 0.9",
            median(&ratios),
            median(late)
        );
        for (name, side) in [("undisturbed", &calm), ("held", &held)] {
            println!("{name}: table, KiB, dead rows: {:?}", side.sizes().await?);
        }
        id.rollback().await?;
        horizon.rollback().await?;
        calm.end().await?;
        held.end().await
    }
}
