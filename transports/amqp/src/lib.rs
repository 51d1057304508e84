//! RabbitMQ for Pillarbox, over AMQP 0-9-1.
//!
//! | here | there |
//! |---|---|
//! | topic | durable topic exchange of that name |
//! | event type | routing key |
//! | group | durable queue with a single active consumer, bound to the types of its handlers |
//! | dead letters of a group | durable queue, published to by its name |
//! | envelope | headers `cloudEvents_*`, and `message_id`, `type`, `content_type`, `timestamp`, `app_id`, `correlation_id` |
//!
//! [`Outcome::Stored`](pillarbox_transport::Outcome::Stored) means that the broker has confirmed the message and has not
//! returned it: it lies in at least one queue. On quorum queues a majority has flushed it to disk.
//!
//! A message that no queue wants is [`Retry`](pillarbox_transport::Outcome::Retry) with
//! [`Kind::Unrouted`]. While the broker blocks the connection (memory or disk alarm), publishes wait without a deadline
//! and are not repeated.
//!
//! # Logs
//!
//! The client library underneath writes the bodies of returned messages to its log, and whole frames at level TRACE.
//! This crate keeps that quiet on the thread where nearly all of it happens, if a `tracing` subscriber is installed
//! before the first connection. Programs that install one later, forward `tracing` to `log`, or log at TRACE silence
//! [`QUIET_TARGETS`].

#![warn(missing_docs)]

mod config;
mod connection;
mod outcome;
mod publisher;
mod subscription;
mod tls;
mod topology;
mod wire;

use std::{
    fmt,
    sync::{Arc, atomic::AtomicUsize},
};

use async_trait::async_trait;
use pillarbox_transport::{
    Binding, Error, Kind, Publisher, Result, Source, Subscription, Transport,
};

pub use config::{Config, Queue, QueueType, Tls};

use connection::{Connections, Live, Role};
use publisher::{Plan, Session, Target};
use subscription::Reader;
use topology::Topology;

/// The word that selects this transport.
const KIND: &str = "amqp";

/// Log targets of the client library that may show payloads or credentials, the first already at level WARN.
///
/// ```
/// // For tracing_subscriber's EnvFilter and env_logger alike:
/// let off: Vec<String> = pillarbox_amqp::QUIET_TARGETS.iter().map(|t| format!("{t}=off")).collect();
/// assert_eq!(off[0], "lapin::returned_messages=off");
/// ```
pub const QUIET_TARGETS: &[&str] = &[
    "lapin::returned_messages",
    "lapin::channels",
    "lapin::frames",
    "lapin::io_loop",
    "lapin::channel",
];

/// RabbitMQ as a [`Transport`]. Clones share two connections, one that publishes and one that consumes; both are made
/// when the first session needs them, and made anew by the next session after they were lost.
///
/// ```
/// use pillarbox_amqp::{Amqp, Config};
/// use pillarbox_transport::Transport;
/// let amqp = Amqp::new(Config::new("amqp://guest:guest@localhost:5672"))?;
/// assert_eq!(amqp.kind(), "amqp");
/// # Ok::<(), pillarbox_transport::Error>(())
/// ```
#[derive(Clone)]
pub struct Amqp(Arc<Inner>);

struct Inner {
    config: Arc<Config>,
    connections: Connections,
    topology: Arc<Topology>,
    max_payload: Arc<AtomicUsize>,
}

impl Amqp {
    /// Checks the configuration. Connects to nothing.
    ///
    /// # Errors
    /// As [`Config::validate`].
    pub fn new(config: Config) -> Result<Self> {
        config.validate()?;
        let config = Arc::new(config);
        Ok(Self(Arc::new(Inner {
            connections: Connections::new(Arc::clone(&config)),
            topology: Arc::new(Topology::new(Arc::clone(&config))),
            max_payload: Arc::new(AtomicUsize::new(config.max_payload)),
            config,
        })))
    }

    /// Closes both connections, within [`Config::connect_timeout`] each. Open sessions find them lost; a later session
    /// connects anew. Dropping the last clone does the same in the background.
    pub async fn close(&self) {
        self.0.connections.close().await;
    }

    async fn session(&self, target: Target) -> Result<Box<dyn Publisher>> {
        let Inner {
            config,
            topology,
            max_payload,
            ..
        } = &*self.0;
        let open = |live| {
            Session::open(Plan {
                live,
                topology: Arc::clone(topology),
                target: target.clone(),
                channels: config.channels,
                confirm_timeout: config.confirm_timeout,
                max_payload: Arc::clone(max_payload),
            })
        };
        Ok(Box::new(self.with(Role::Publishing, open).await?))
    }

    /// Does `work` on a connection, and again on another one when the first turns out to be lost: one that stands idle
    /// shows that only when it is used.
    async fn with<T, F>(&self, role: Role, work: impl Fn(Arc<Live>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let live = self.0.connections.live(role).await?;
        match work(Arc::clone(&live)).await {
            Err(e) if e.kind() == Kind::Unreachable && !live.is_up() => {
                work(self.0.connections.live(role).await?).await
            }
            done => done,
        }
    }
}

impl fmt::Debug for Amqp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Amqp").field(&self.0.config).finish()
    }
}

#[async_trait]
impl Transport for Amqp {
    fn kind(&self) -> &'static str {
        KIND
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        self.session(Target::Topics).await
    }

    /// The source's cluster is `host:port/vhost`, its name the queue. Its identity is the queue's name too: AMQP does not
    /// tell a queue from one that was made anew under the same name.
    async fn bind(&self, binding: &Binding) -> Result<Vec<Source>> {
        let spec = self.0.topology.bind(binding)?;
        let declare = async |live: Arc<Live>| {
            self.0.topology.declare(&live).await?;
            Ok(live.cluster().to_owned())
        };
        let cluster = self.with(Role::Consuming, declare).await?;
        Ok(vec![Source {
            transport: KIND,
            cluster,
            topic: binding.topic.clone(),
            identity: spec.name.clone(),
            name: spec.name,
            partition: 0,
            replayable: false,
        }])
    }

    async fn subscribe(
        &self,
        source: &Source,
        group: &str,
        _from: Option<u64>,
    ) -> Result<Box<dyn Subscription>> {
        let spec = self.0.topology.of_group(&source.topic, group)?;
        if spec.name != source.name {
            let text = format!(
                "group {group:?} reads topic {:?} from {:?}, not from {:?}",
                source.topic, spec.name, source.name
            );
            return Err(Error::new(Kind::Configuration, "subscribe", text));
        }
        let limit = self.0.config.connect_timeout;
        let open = async |live: Arc<Live>| {
            self.0.topology.declare(&live).await?;
            Reader::open(live, &source.topic, &spec.name, spec.prefetch, limit).await
        };
        Ok(Box::new(self.with(Role::Consuming, open).await?))
    }

    async fn dead_letters(&self, topic: &str, group: &str) -> Result<Box<dyn Publisher>> {
        let spec = self.0.topology.of_group(topic, group)?;
        self.session(Target::DeadLetters(spec)).await
    }
}
