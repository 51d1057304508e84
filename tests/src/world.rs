use std::{future::Future, sync::Arc, time::Duration};

use pillarbox_amqp::{Amqp, Config};
use pillarbox_core::{
    Connection, Consumer, ConsumerSettings, Database, Outbox, Pool, Relay, RelaySettings,
    lease::LeaseTerm, migrate,
};
use pillarbox_testkit::servers;
use pillarbox_transport::{Transport, memory::Memory};
use sqlx::{postgres::PgPoolOptions, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

use crate::effect::{Tick, TickHandler};

/// Which world a body runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// SQLite and the in-process transport.
    Embedded,
    /// PostgreSQL and RabbitMQ.
    Servers,
}

/// A producer's and a consumer's database, fresh and migrated, and a transport between them.
pub struct World {
    /// Which one.
    pub kind: Kind,
    /// The database with the outbox.
    pub producer: Database,
    /// The database with the inbox and the effects.
    pub consumer: Database,
    /// Between them.
    pub transport: Arc<dyn Transport>,
    /// The broker's address, where there is one.
    pub amqp_url: Option<String>,
    /// The databases' addresses: producer, consumer.
    pub urls: (String, String),
    _folder: Option<TempDir>,
}

impl World {
    /// SQLite files in a temporary folder, and `memory`.
    pub async fn embedded() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let url = |name: &str| format!("sqlite://{}", folder.path().join(name).display());
        let urls = (url("producer.sqlite"), url("consumer.sqlite"));
        Self {
            kind: Kind::Embedded,
            producer: open(&urls.0).await,
            consumer: open(&urls.1).await,
            transport: Arc::new(Memory::new()),
            amqp_url: None,
            urls,
            _folder: Some(folder),
        }
    }

    /// Two databases and a vhost of their own on the shared servers; none where these may be missing and are.
    pub async fn servers() -> Option<Self> {
        let postgres = servers::required(servers::postgres().await)?;
        let rabbitmq = servers::required(servers::rabbitmq().await)?;
        let amqp_url = rabbitmq.create_vhost().await.expect("a vhost");
        let urls = (
            postgres.create_database().await.expect("a database"),
            postgres.create_database().await.expect("a database"),
        );
        Some(Self::at(urls, &amqp_url).await)
    }

    /// At these addresses, which may lead through a proxy.
    pub async fn at(urls: (String, String), amqp_url: &str) -> Self {
        Self {
            kind: Kind::Servers,
            producer: open(&urls.0).await,
            consumer: open(&urls.1).await,
            transport: Arc::new(Amqp::new(Config::new(amqp_url)).expect("a valid config")),
            amqp_url: Some(amqp_url.to_owned()),
            urls,
            _folder: None,
        }
    }

    /// An outbox of the producer.
    pub fn outbox(&self) -> Outbox {
        Outbox::new(&self.producer)
    }

    /// A relay with short leases.
    pub fn relay(&self, outbox: &Outbox) -> Relay {
        let settings = RelaySettings {
            lease: term(),
            ..RelaySettings::default()
        };
        Relay::new(outbox, self.transport.clone())
            .source("producer")
            .settings(settings)
    }

    /// A consumer of group `ticks` with short leases and this handler for [`Tick`].
    pub fn ticks(&self, handler: TickHandler) -> Consumer {
        let settings = ConsumerSettings {
            lease: term(),
            ..ConsumerSettings::default()
        };
        Consumer::new(&self.consumer, self.transport.clone(), "ticks")
            .settings(settings)
            .on::<Tick>(handler)
    }

    /// Enqueues in a transaction of its own.
    pub async fn commit(&self, outbox: &Outbox, ticks: &[Tick]) {
        write(&self.producer, outbox, ticks, true).await;
    }

    /// Enqueues and rolls back.
    pub async fn roll_back(&self, outbox: &Outbox, ticks: &[Tick]) {
        write(&self.producer, outbox, ticks, false).await;
    }
}

fn term() -> LeaseTerm {
    LeaseTerm::new(Duration::from_secs(3))
}

async fn write(database: &Database, outbox: &Outbox, ticks: &[Tick], commit: bool) {
    match database.pool().expect("a pool") {
        Pool::Postgres(pool) => {
            let mut tx = pool.begin().await.expect("begin");
            outbox.enqueue_all(&mut tx, ticks).await.expect("enqueue");
            if commit {
                tx.commit().await.expect("commit")
            } else {
                tx.rollback().await.expect("rollback")
            }
        }
        Pool::Sqlite(pool) => {
            let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.expect("begin");
            outbox
                .enqueue_all(Connection::Sqlite(&mut tx), ticks)
                .await
                .expect("enqueue");
            if commit {
                tx.commit().await.expect("commit")
            } else {
                tx.rollback().await.expect("rollback")
            }
        }
    }
    outbox.wake();
}

async fn open(url: &str) -> Database {
    let database = if url.starts_with("sqlite:") {
        let options: SqliteConnectOptions = url.parse().expect("a SQLite address");
        let options = options
            .create_if_missing(true)
            .busy_timeout(Duration::from_secs(20));
        Database::from(
            &sqlx::SqlitePool::connect_with(options)
                .await
                .expect("a SQLite database"),
        )
    } else {
        let pool = PgPoolOptions::new().max_connections(4).connect(url).await;
        Database::from(&pool.expect("a PostgreSQL database"))
    };
    migrate(&database).await.expect("migrate");
    crate::effect::create_table(&database).await;
    database
}

/// Looks every 20 ms until `done` says so.
///
/// # Panics
/// After two minutes, with `what` was awaited.
pub async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    let wait = async {
        loop {
            looks.tick().await;
            if done().await {
                break;
            }
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(120), wait)
            .await
            .is_ok(),
        "waited in vain until {what}"
    );
}
