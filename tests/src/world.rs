use std::{sync::Arc, time::Duration};

use pillarbox_amqp::{Amqp, Config, Queue};
use pillarbox_core::{
    Connection, Consumer, ConsumerSettings, Database, Event as _, Outbox, Pool, Relay,
    RelaySettings, Running, lease::LeaseTerm, migrate,
};
use pillarbox_testkit::servers::{self, RabbitMq};
use pillarbox_transport::{Message, Transport, memory::Memory};
use sqlx::{PgPool, SqlitePool, postgres::PgPoolOptions, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::{
    effect::{Tick, TickHandler, Ticked, effects},
    tables, wire,
};

/// The tests' topic.
pub const TOPIC: &str = "test.events";

/// Which world a body runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// SQLite and the in-process transport.
    Embedded,
    /// PostgreSQL and RabbitMQ.
    Servers,
    /// PostgreSQL and NATS.
    Nats,
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
    /// The in-process transport, where it is that.
    pub memory: Option<Memory>,
    /// The broker's address, where there is one.
    pub amqp_url: Option<String>,
    /// The same for NATS.
    pub nats_url: Option<String>,
    /// The databases' addresses: producer, consumer.
    pub urls: (String, String),
    /// The consumer group, another for each world: metrics tell tests apart by it.
    pub group: String,
    _folder: Option<TempDir>,
}

impl World {
    /// SQLite files in a temporary folder, and `memory`.
    pub async fn embedded() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let url = |name: &str| format!("sqlite://{}", folder.path().join(name).display());
        let urls = (url("producer.sqlite"), url("consumer.sqlite"));
        let memory = Memory::new();
        Self {
            kind: Kind::Embedded,
            producer: open(&urls.0).await,
            consumer: open(&urls.1).await,
            transport: Arc::new(memory.clone()),
            memory: Some(memory),
            amqp_url: None,
            nats_url: None,
            urls,
            group: group(),
            _folder: Some(folder),
        }
    }

    /// Two databases and a vhost of their own on the shared servers; none where these may be missing and are.
    pub async fn servers() -> Option<Self> {
        let (urls, amqp_url) = addresses().await?;
        Some(Self::at(urls, &amqp_url).await)
    }

    /// At these addresses, which may lead through a proxy.
    pub async fn at(urls: (String, String), amqp_url: &str) -> Self {
        let group = group();
        let config = amqp_config(amqp_url, &group);
        Self::over(urls, config, amqp_url, group).await
    }

    /// With this configuration of the transport.
    pub async fn over(
        urls: (String, String),
        config: Config,
        amqp_url: &str,
        group: String,
    ) -> Self {
        let (producer, consumer) = tokio::join!(open(&urls.0), open(&urls.1));
        Self {
            kind: Kind::Servers,
            producer,
            consumer,
            transport: Arc::new(Amqp::new(config).expect("a valid config")),
            memory: None,
            amqp_url: Some(amqp_url.to_owned()),
            nats_url: None,
            urls,
            group,
            _folder: None,
        }
    }

    /// Two databases and an account of their own on the shared servers; none where these may be missing and are.
    pub async fn nats() -> Option<Self> {
        let server = servers::required(servers::nats().await)?;
        let url = server.create_account().expect("an account");
        Self::on_nats(&url).await
    }

    /// Two databases on the shared server, and the NATS account at this address.
    pub async fn on_nats(url: &str) -> Option<Self> {
        let postgres = servers::required(servers::postgres().await)?;
        let (producer, consumer) =
            tokio::join!(postgres.create_database(), postgres.create_database());
        let urls = (producer.expect("a database"), consumer.expect("a database"));
        let (producer, consumer) = tokio::join!(open(&urls.0), open(&urls.1));
        Some(Self {
            kind: Kind::Nats,
            producer,
            consumer,
            transport: Arc::new(crate::nats::transport(url)),
            memory: None,
            amqp_url: None,
            nats_url: Some(url.to_owned()),
            urls,
            group: group(),
            _folder: None,
        })
    }

    /// The group's queue.
    #[must_use]
    pub fn queue(&self) -> String {
        format!("{TOPIC}.{}", self.group)
    }

    /// An outbox of the producer.
    pub fn outbox(&self) -> Outbox {
        Outbox::new(&self.producer)
    }

    /// A relay with short leases.
    pub fn relay(&self, outbox: &Outbox) -> Relay {
        Relay::new(outbox, self.transport.clone())
            .source("producer")
            .settings(Self::relay_settings())
    }

    /// The settings of [`World::relay`].
    #[must_use]
    pub fn relay_settings() -> RelaySettings {
        RelaySettings {
            lease: term(),
            ..RelaySettings::default()
        }
    }

    /// A consumer of the group with short leases and this handler for [`Tick`].
    pub fn ticks(&self, handler: TickHandler) -> Consumer {
        self.group_of(&self.group).on::<Tick>(handler)
    }

    /// A consumer of a group, without handlers yet.
    pub fn group_of(&self, group: &str) -> Consumer {
        Consumer::new(&self.consumer, self.transport.clone(), group)
            .settings(Self::consumer_settings())
    }

    /// The settings of [`World::ticks`].
    #[must_use]
    pub fn consumer_settings() -> ConsumerSettings {
        ConsumerSettings {
            lease: term(),
            ..ConsumerSettings::default()
        }
    }

    /// Enqueues in a transaction of its own.
    pub async fn commit(&self, outbox: &Outbox, ticks: &[Tick]) {
        self.transact(outbox, true, async |c| {
            outbox.enqueue_all(c, ticks).await.expect("enqueue");
        })
        .await;
    }

    /// Enqueues and rolls back.
    pub async fn roll_back(&self, outbox: &Outbox, ticks: &[Tick]) {
        self.transact(outbox, false, async |c| {
            outbox.enqueue_all(c, ticks).await.expect("enqueue");
        })
        .await;
    }

    /// Enqueues messages of any content in one transaction.
    pub async fn commit_messages(&self, outbox: &Outbox, messages: Vec<Message>) {
        self.transact(outbox, true, async |mut c| {
            for message in messages {
                outbox
                    .enqueue_message(c.reborrow(), message)
                    .await
                    .expect("enqueue");
            }
        })
        .await;
    }

    /// Runs `work` in a transaction of the producer's.
    pub async fn transact(
        &self,
        outbox: &Outbox,
        commit: bool,
        work: impl AsyncFnOnce(Connection<'_>),
    ) {
        macro_rules! run {
            ($tx:expr, $variant:ident) => {{
                let mut tx = $tx.await.expect("begin");
                work(Connection::$variant(&mut tx)).await;
                if commit {
                    tx.commit().await.expect("commit")
                } else {
                    tx.rollback().await.expect("rollback")
                }
            }};
        }
        match self.producer.pool().expect("a pool") {
            Pool::Postgres(pool) => run!(pool.begin(), Postgres),
            Pool::Sqlite(pool) => run!(pool.begin_with("BEGIN IMMEDIATE"), Sqlite),
        }
        outbox.wake();
    }

    /// Puts messages into the broker past every outbox: by a raw client, or by the transport where there is no wire.
    pub async fn inject(&self, messages: Vec<Message>) {
        if let Some(url) = &self.amqp_url {
            let client = wire::Client::connect(url).await;
            for message in &messages {
                client.publish(message).await;
            }
            return;
        }
        if let Some(url) = &self.nats_url {
            return crate::nats::publish(url, &messages).await;
        }
        let publisher = self.transport.publisher().await.expect("a publisher");
        let outcomes = publisher
            .publish(messages.into_iter().map(Arc::new).collect())
            .await;
        let stored = outcomes.iter().all(|o| o.is_stored());
        assert!(stored, "{outcomes:?}");
    }

    /// Starts a relay of this outbox and a consumer, which is bound before.
    pub async fn start(&self, outbox: &Outbox, consumer: Consumer) -> Way {
        self.start_with(self.relay(outbox), consumer).await
    }

    /// Starts this relay and a consumer, which is bound before.
    pub async fn start_with(&self, relay: Relay, mut consumer: Consumer) -> Way {
        consumer.bind().await.expect("bind");
        let consumer = consumer.spawn();
        let relay = relay.spawn();
        until("the consumer reads", async || consumer.health().held > 0).await;
        Way { relay, consumer }
    }

    /// The committed effects, in the order in which they happened.
    pub async fn effects(&self) -> Vec<Ticked> {
        effects(&self.consumer).await
    }

    /// Waits until there are so many effects at least.
    pub async fn until_effects(&self, count: usize) {
        until(&format!("{count} effects"), async || {
            self.count_effects().await >= count
        })
        .await;
    }

    /// How many effects there are.
    pub async fn count_effects(&self) -> usize {
        tables::count(&self.consumer, "effect").await
    }
}

/// A relay and a consumer at work.
#[must_use = "stop it"]
pub struct Way {
    /// The relay.
    pub relay: Running,
    /// The consumer.
    pub consumer: Running,
}

impl Way {
    /// Stops both, which is possible at any time.
    pub async fn stop(self) {
        self.relay.shutdown().await.expect("the relay ends well");
        self.consumer
            .shutdown()
            .await
            .expect("the consumer ends well");
    }
}

/// Databases and a vhost of a test's own on the shared servers.
async fn addresses() -> Option<((String, String), String)> {
    let postgres = servers::required(servers::postgres().await)?;
    let rabbitmq = servers::required(servers::rabbitmq().await)?;
    let (producer, consumer, vhost) = tokio::join!(
        postgres.create_database(),
        postgres.create_database(),
        rabbitmq.create_vhost(),
    );
    let mut amqp_url = vhost.expect("a vhost");
    if amqp_url == rabbitmq.url() {
        // A broker that we may not command gives no vhosts, and the tests share a topic.
        static OWN: OnceCell<RabbitMq> = OnceCell::const_new();
        let own = OWN.get_or_try_init(RabbitMq::start).await;
        let own = servers::required(own)?;
        amqp_url = own.create_vhost().await.expect("a vhost");
    }
    let urls = (producer.expect("a database"), consumer.expect("a database"));
    Some((urls, amqp_url))
}

/// The topology of a group of tests, with deadlines that tests can wait for.
#[must_use]
pub fn amqp_config(url: &str, group: &str) -> Config {
    let mut config = Config::new(url);
    config.heartbeat = Duration::from_secs(2);
    config.connect_timeout = Duration::from_secs(4);
    config.confirm_timeout = Duration::from_secs(4);
    config.queues.insert(
        format!("{TOPIC}.{group}"),
        Queue::new(TOPIC, group, [Tick::TYPE, "test.handled.#"]),
    );
    config
}

fn group() -> String {
    format!("ticks_{}", &Uuid::new_v4().simple().to_string()[..12])
}

fn term() -> LeaseTerm {
    LeaseTerm::new(Duration::from_secs(3))
}

/// A database at this address, migrated.
pub async fn open(url: &str) -> Database {
    let database = connect(url);
    migrate(&database).await.expect("migrate");
    crate::effect::create_table(&database).await;
    database
}

/// A database at this address, as it is. Connects to nothing yet.
#[must_use]
pub fn connect(url: &str) -> Database {
    crate::show_log();
    if !url.starts_with("sqlite:") {
        let pool: PgPool = PgPoolOptions::new()
            .max_connections(10)
            .acquire_timeout(Duration::from_secs(5))
            .connect_lazy(url)
            .expect("a PostgreSQL address");
        return Database::from(&pool);
    }
    let options: SqliteConnectOptions = url.parse().expect("a SQLite address");
    let options = options
        .create_if_missing(true)
        .busy_timeout(Duration::from_secs(20));
    Database::from(&SqlitePool::connect_lazy_with(options))
}

/// Looks every 20 ms until `done` says so.
///
/// # Panics
/// After two minutes, with `what` was awaited.
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
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
