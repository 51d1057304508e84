use std::time::Duration;

use clap::Args;
use pillarbox::transport::Transport as _;
use pillarbox_amqp::QueueType;
use pillarbox_testkit::servers::{self, Postgres};
use sqlx::PgPool;

use crate::{
    Measured,
    process::Process,
    stage::{self, amqp},
};

/// What happens at a start is over.
const SETTLES: Duration = Duration::from_secs(15);

#[derive(Args)]
pub(crate) struct Idle {
    /// How long each is watched.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

impl Idle {
    pub(crate) async fn run(&self) -> Measured<()> {
        let counted = [("shared_preload_libraries", "pg_stat_statements")];
        let postgres = Postgres::start_with(&counted).await?;
        let amqp_url = servers::rabbitmq().await?.create_vhost().await?;
        // Declares the queue.
        drop(amqp(&amqp_url, QueueType::Quorum, 1)?.publisher().await?);
        println!("nothing to do, watched for {} s", self.seconds);
        println!(
            "{:<10} {:>12} {:>16} {:>14} {:>10}",
            "process", "queries/s", "transactions/s", "CPU of a core", "MiB"
        );
        for consumer in [false, true] {
            let (url, pool) = stage::database(&postgres).await?;
            let (name, mut process) = if consumer {
                sqlx::raw_sql("CREATE TABLE effect (n bigint)")
                    .execute(&pool)
                    .await?;
                ("consumer", Process::consumer(&url, &amqp_url)?)
            } else {
                ("relay", Process::relay(&url, Some(&amqp_url))?)
            };
            // What the observer does is not to be counted.
            let database = pool
                .connect_options()
                .get_database()
                .unwrap_or_default()
                .to_owned();
            pool.close().await;
            process.until(|p| p.held > 0).await?;
            tokio::time::sleep(SETTLES).await;
            self.watch(name, &postgres, &database, &process).await?;
            process.end().await?;
        }
        postgres.end().await;
        Ok(())
    }

    async fn watch(
        &self,
        name: &str,
        postgres: &Postgres,
        database: &str,
        process: &Process,
    ) -> Measured<()> {
        let observer = PgPool::connect(&postgres.url("postgres")).await?;
        sqlx::raw_sql("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
            .execute(&observer)
            .await?;
        let before = (counts(&observer, database).await?, process.cpu()?);
        tokio::time::sleep(Duration::from_secs(self.seconds)).await;
        let after = (counts(&observer, database).await?, process.cpu()?);
        let seconds = Duration::from_secs(self.seconds).as_secs_f64();
        println!(
            "{name:<10} {:>12.1} {:>16.1} {:>12.2} % {:>10.1}",
            (after.0.0 - before.0.0) / seconds,
            (after.0.1 - before.0.1) / seconds,
            100.0 * (after.1 - before.1) / seconds,
            process.rss()?
        );
        Ok(())
    }
}

/// Statements and transactions of a database so far.
async fn counts(observer: &PgPool, database: &str) -> Measured<(f64, f64)> {
    let sql = "SELECT (SELECT coalesce(sum(s.calls), 0)::float8 FROM pg_stat_statements s WHERE s.dbid = d.datid),
                      d.xact_commit::float8
               FROM pg_stat_database d WHERE d.datname = $1";
    let counts = sqlx::query_as(sql).bind(database).fetch_one(observer);
    Ok(counts.await?)
}
