//! Servers, databases, queues, and a transport that counts confirms.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::{FutureExt, future::BoxFuture};
use lapin::{Connection, ConnectionProperties, options::QueueDeleteOptions};
use pillarbox::{
    Outbox, Relay, RelaySettings,
    transport::{Binding, Message, Outcome, Publisher, Result, Source, Subscription, Transport},
};
use pillarbox_amqp::{Amqp, Config, Queue, QueueType};
use pillarbox_testkit::servers::{self, Postgres};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::sync::Notify;

use crate::Measured;

pub(crate) const TOPIC: &str = "bench.events";
pub(crate) const KIND: &str = "bench.tick";
pub(crate) const QUEUE: &str = "bench.queue";

/// A fresh database and a fresh vhost.
pub(crate) struct Stage {
    pub(crate) database_url: String,
    pub(crate) amqp_url: String,
    pub(crate) pool: PgPool,
}

impl Stage {
    pub(crate) async fn new() -> Measured<Self> {
        let database_url = servers::postgres().await?.create_database().await?;
        let amqp_url = servers::rabbitmq().await?.create_vhost().await?;
        let pool = PgPoolOptions::new()
            .max_connections(8)
            .connect(&database_url)
            .await?;
        pillarbox::migrate(&pool).await?;
        Ok(Self {
            database_url,
            amqp_url,
            pool,
        })
    }

    /// Deletes the queue and lets the broker do what it has put off, which would count for the next run.
    pub(crate) async fn clear(&self) -> Measured<()> {
        let connection =
            Connection::connect(&self.amqp_url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let all = QueueDeleteOptions::default();
        channel.queue_delete(QUEUE.into(), all).await?;
        connection.close(200, "done".into()).await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        Ok(())
    }

    /// Commits a backlog by plain SQL: payloads of `bytes`, `keys` keys in turn.
    pub(crate) async fn fill(&self, events: u32, bytes: u32, keys: u32) -> Measured<()> {
        fill(&self.pool, events, bytes, keys).await?;
        for put_off in ["VACUUM ANALYZE pillarbox.outbox", "CHECKPOINT"] {
            sqlx::query(put_off).execute(&self.pool).await?;
        }
        Ok(())
    }
}

/// A fresh, migrated database on a server of a measurement's own.
pub(crate) async fn database(on: &Postgres) -> Measured<(String, PgPool)> {
    let url = on.create_database().await?;
    let pool = PgPoolOptions::new()
        .max_connections(8)
        .connect(&url)
        .await?;
    pillarbox::migrate(&pool).await?;
    Ok((url, pool))
}

/// Commits so many events in one transaction.
pub(crate) async fn fill(pool: &PgPool, events: u32, bytes: u32, keys: u32) -> Measured<()> {
    let sql = "INSERT INTO pillarbox.outbox (topic, type, key, payload, content_type)
               SELECT $1, $2, 'key-' || (n % $3), convert_to(rpad(n::text, $4, '.'), 'UTF8'), 'text/plain'
               FROM generate_series(1, $5) n ORDER BY n";
    sqlx::query(sql)
        .bind(TOPIC)
        .bind(KIND)
        .bind(keys.cast_signed())
        .bind(bytes.cast_signed())
        .bind(events.cast_signed())
        .execute(pool)
        .await?;
    Ok(())
}

/// The middle one, of an even number the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.as_slice() {
        [] => f64::NAN,
        all if all.len() % 2 == 1 => all[middle],
        all => f64::midpoint(all[middle - 1], all[middle]),
    }
}

/// The least and the most.
pub(crate) fn spread(values: &[f64]) -> (f64, f64) {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (least, most)
}

/// RabbitMQ with one queue, and this many publishing channels in each session.
pub(crate) fn amqp(url: &str, queue_type: QueueType, channels: u16) -> Measured<Amqp> {
    let mut config = Config::new(url);
    config.channels = channels;
    config.queue_type = queue_type;
    config
        .queues
        .insert(QUEUE.to_owned(), Queue::new(TOPIC, "bench", [KIND]));
    Ok(Amqp::new(config)?)
}

/// A relay whose partitions share `in_flight` among them.
pub(crate) fn relay(outbox: &Outbox, transport: Arc<dyn Transport>, in_flight: usize) -> Relay {
    let mut settings = RelaySettings::default();
    settings.window.in_flight = in_flight / 4;
    Relay::new(outbox, transport)
        .source("bench")
        .settings(settings)
}

/// Counts what the broker has confirmed.
pub(crate) struct Counting {
    inner: Arc<dyn Transport>,
    count: Arc<Count>,
}

/// How many, since when, and a signal when there are enough.
pub(crate) struct Count {
    first: OnceLock<Instant>,
    stored: AtomicU64,
    wanted: u64,
    reached: Notify,
}

impl Counting {
    pub(crate) fn new(inner: impl Transport, wanted: u64) -> (Arc<Self>, Arc<Count>) {
        let count = Arc::new(Count {
            first: OnceLock::new(),
            stored: AtomicU64::new(0),
            wanted,
            reached: Notify::new(),
        });
        (
            Arc::new(Self {
                inner: Arc::new(inner),
                count: count.clone(),
            }),
            count,
        )
    }
}

impl Count {
    pub(crate) async fn reached(&self) {
        self.reached.notified().await;
    }

    /// Since the first publish: the clock of the raw client starts with open channels, too.
    pub(crate) fn took(&self) -> Duration {
        self.first.get().map(Instant::elapsed).unwrap_or_default()
    }

    /// How many so far.
    pub(crate) fn stored(&self) -> u64 {
        self.stored.load(Relaxed)
    }

    /// Waits for so many.
    pub(crate) async fn until(&self, stored: u64) {
        let mut looks = tokio::time::interval(Duration::from_millis(2));
        while self.stored() < stored {
            looks.tick().await;
        }
    }
}

#[async_trait]
impl Transport for Counting {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(CountingPublisher {
            inner: self.inner.publisher().await?,
            count: self.count.clone(),
        }))
    }
    async fn bind(&self, binding: &Binding) -> Result<Vec<Source>> {
        self.inner.bind(binding).await
    }
    async fn subscribe(
        &self,
        source: &Source,
        group: &str,
        from: Option<u64>,
    ) -> Result<Box<dyn Subscription>> {
        self.inner.subscribe(source, group, from).await
    }
    async fn dead_letters(&self, topic: &str, group: &str) -> Result<Box<dyn Publisher>> {
        self.inner.dead_letters(topic, group).await
    }
}

struct CountingPublisher {
    inner: Box<dyn Publisher>,
    count: Arc<Count>,
}

impl Publisher for CountingPublisher {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let count = self.count.clone();
        count.first.get_or_init(Instant::now);
        let answers = self.inner.publish(messages);
        let counted = answers.map(move |outcomes| {
            let stored = outcomes.iter().filter(|o| o.is_stored()).count() as u64;
            let before = count.stored.fetch_add(stored, Relaxed);
            if before < count.wanted && before + stored >= count.wanted {
                count.reached.notify_one();
            }
            outcomes
        });
        counted.boxed()
    }
}
