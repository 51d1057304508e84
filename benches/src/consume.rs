use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use pillarbox::{
    Connection, Consumer, ConsumerSettings, Context, Delivery, Event, Failure, Handler, Outbox,
    transport::Transport,
};
use pillarbox_amqp::QueueType;

use crate::{
    Measured,
    stage::{Counting, KIND, Stage, TOPIC, amqp, relay},
};

#[derive(Args)]
pub(crate) struct Consume {
    /// Events in each run.
    #[arg(long, default_value_t = 10_000)]
    events: u32,
    /// Keys.
    #[arg(long, default_value_t = 1_000)]
    keys: u32,
    /// Events in a batch.
    #[arg(long, default_value_t = 100)]
    batch: usize,
    /// Workers, where there are several.
    #[arg(long, default_value_t = 4)]
    workers: usize,
    /// What each handler waits for something else, in microseconds.
    #[arg(long, default_value_t = 0)]
    waits: u64,
    /// Runs of each, in turn.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
}

#[derive(serde::Deserialize)]
pub(crate) struct Tick(i64);

impl Event for Tick {
    const TYPE: &'static str = KIND;
    const TOPIC: &'static str = TOPIC;
    fn key(&self) -> Option<Cow<'_, str>> {
        None
    }
}

/// One row for each event.
pub(crate) struct Insert(Duration);

impl Insert {
    pub(crate) fn at_once() -> Self {
        Self(Duration::ZERO)
    }
}

impl Handler<Tick> for Insert {
    async fn handle(&self, d: Delivery<Tick>, cx: &mut Context<'_>) -> Result<(), Failure> {
        if !self.0.is_zero() {
            tokio::time::sleep(self.0).await;
        }
        // Refutable where another package of the build brings SQLite in.
        #[allow(irrefutable_let_patterns)]
        let Connection::Postgres(tx) = cx.tx() else {
            return Err(Failure::reject("not on PostgreSQL"));
        };
        let insert = sqlx::query("INSERT INTO effect (n) VALUES ($1)").bind(d.event.0);
        insert.execute(tx).await?;
        Ok(())
    }
}

impl Consume {
    pub(crate) async fn run(&self) -> Measured<()> {
        println!(
            "{} events, {} keys, one INSERT each, handlers wait {} µs; effects a second",
            self.events, self.keys, self.waits
        );
        let (many, workers) = (self.batch, self.workers);
        let batches = format!("batches of {many}");
        let side = format!("{workers} workers");
        println!(
            "{:>12} {batches:>16} {:>7} {side:>16} {:>7}",
            "one by one", "ratio", "ratio"
        );
        let mut ratios = Vec::new();
        for _ in 0..self.rounds {
            let single = self.rate(1, 1).await?;
            let batched = self.rate(many, 1).await?;
            let beside = self.rate(many, workers).await?;
            let (more, most) = (batched / single, beside / single);
            println!("{single:>12.0} {batched:>16.0} {more:>7.2} {beside:>16.0} {most:>7.2}");
            ratios.push((more, most));
        }
        let median = |of: fn(&(f64, f64)) -> f64| {
            let mut all: Vec<f64> = ratios.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        println!(
            "median ratios {:.2} and {:.2}",
            median(|r| r.0),
            median(|r| r.1)
        );
        Ok(())
    }

    /// A queue that is full already, and a consumer that starts.
    async fn rate(&self, batch: usize, workers: usize) -> Measured<f64> {
        let stage = Stage::new().await?;
        sqlx::raw_sql("CREATE TABLE effect (n bigint)")
            .execute(&stage.pool)
            .await?;
        let transport = self.fill(&stage).await?;
        let settings = ConsumerSettings {
            batch,
            workers,
            ..ConsumerSettings::default()
        };
        let consumer = Consumer::new(&stage.pool, transport, "bench")
            .settings(settings)
            .on::<Tick>(Insert(Duration::from_micros(self.waits)));
        let started = Instant::now();
        let running = consumer.spawn();
        let mut looks = tokio::time::interval(Duration::from_millis(20));
        let count = "SELECT count(*) FROM effect";
        while sqlx::query_scalar::<_, i64>(count)
            .fetch_one(&stage.pool)
            .await?
            < i64::from(self.events)
        {
            looks.tick().await;
        }
        let took = started.elapsed();
        running.shutdown().await?;
        Ok(f64::from(self.events) / took.as_secs_f64())
    }

    async fn fill(&self, stage: &Stage) -> Measured<Arc<dyn Transport>> {
        let sql = "INSERT INTO pillarbox.outbox (topic, type, key, payload, content_type)
                   SELECT $1, $2, 'key-' || (n % $3), convert_to(n::text, 'UTF8'), 'application/json'
                   FROM generate_series(1, $4) n ORDER BY n";
        sqlx::query(sql)
            .bind(TOPIC)
            .bind(KIND)
            .bind(self.keys.cast_signed())
            .bind(self.events.cast_signed())
            .execute(&stage.pool)
            .await?;
        let amqp = amqp(&stage.amqp_url, QueueType::Quorum, 1)?;
        drop(amqp.publisher().await?);
        let (transport, count) = Counting::new(amqp, u64::from(self.events));
        let outbox = Outbox::new(&stage.pool);
        let running = relay(&outbox, transport.clone(), 1_024).spawn();
        count.reached().await;
        running.shutdown().await?;
        Ok(transport)
    }
}
