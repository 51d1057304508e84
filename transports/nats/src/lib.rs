//! NATS JetStream for Pillarbox.
//!
//! | here | there |
//! |---|---|
//! | topic | stream of that name with `_` for `.` |
//! | event type | subject |
//! | group | nothing: it reads from the position in its own database |
//! | dead letters of a group | subject `{stream}_dlq.{group}` in the stream `{stream}_dlq` |
//! | envelope | headers `ce-*` and `Content-Type`; `Nats-Msg-Id` is `{id}@{source}` |
//!
//! [`Outcome::Stored`](pillarbox_transport::Outcome::Stored) means that the server has answered with the message's place in
//! the expected stream. **It has then been written on a majority of the stream's replicas, not flushed**: a server flushes
//! every two minutes, unless its `jetstream { sync_interval: always }` says otherwise. Nobody can see that setting over this
//! connection, so with one replica set it, or lose what a power cut takes.
//!
//! A type that no subject of a configured stream takes is [`Rejected`](pillarbox_transport::Outcome::Rejected) with
//! [`Kind::Unrouted`]. A stream that is full, gone or without a leader makes its topic unavailable.
//!
//! Needs a server of version 2.10 or later.

#![warn(missing_docs)]

mod address;
mod config;
mod connection;
mod outcome;
mod publisher;
mod subscription;
mod tls;
mod topology;
mod wire;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use pillarbox_transport::{
    Binding, Error, Kind, Publisher, Result, Source, Subscription, Transport,
};

pub use config::{Config, Stream, Tls};

use connection::{Connections, Live};
use publisher::{Plan, Session, Target};
use subscription::{Reader, Wanted, identity};
use topology::Topology;

/// The word that selects this transport.
const KIND: &str = "nats";

/// NATS JetStream as a [`Transport`]. Clones share one connection that reads and declares, made when the first session
/// needs it, and made anew by the next session after it was lost. Each publishing session has a connection of its own.
///
/// ```
/// use pillarbox_nats::{Config, Nats};
/// use pillarbox_transport::Transport;
/// let nats = Nats::new(Config::new("nats://localhost:4222"))?;
/// assert_eq!(nats.kind(), "nats");
/// # Ok::<(), pillarbox_transport::Error>(())
/// ```
#[derive(Clone)]
pub struct Nats(Arc<Inner>);

struct Inner {
    config: Arc<Config>,
    connections: Connections,
    topology: Arc<Topology>,
}

impl Nats {
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
            config,
        })))
    }

    /// Closes the connection that reads, within [`Config::connect_timeout`]. Open reading sessions find it lost; a later
    /// session connects anew. Publishing sessions go on.
    pub async fn close(&self) {
        self.0.connections.close().await;
    }

    async fn session(&self, target: Target) -> Result<Box<dyn Publisher>> {
        let Inner {
            config,
            topology,
            connections,
        } = &*self.0;
        let session = Session::open(Plan {
            live: connections.publishing().await?,
            topology: Arc::clone(topology),
            target,
            confirm_timeout: config.confirm_timeout,
            max_payload: config.max_payload,
        });
        Ok(Box::new(session.await?))
    }

    /// Does `work` on the shared connection, and again on another one when the first turns out to be lost: one that stands
    /// idle shows that only when it is used.
    async fn reading<T, F>(&self, work: impl Fn(Arc<Live>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let live = self.0.connections.reading().await?;
        match work(Arc::clone(&live)).await {
            Err(e) if e.kind() == Kind::Unreachable && !live.is_up() => {
                work(self.0.connections.reading().await?).await
            }
            done => done,
        }
    }
}

impl fmt::Debug for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Nats").field(&self.0.config).finish()
    }
}

#[async_trait]
impl Transport for Nats {
    fn kind(&self) -> &'static str {
        KIND
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        self.session(Target::Topics).await
    }

    /// The source's name is the stream, its identity the time when that was created, its cluster
    /// [`Config::cluster`].
    async fn bind(&self, binding: &Binding) -> Result<Vec<Source>> {
        let topology = &self.0.topology;
        let spec = topology.bind(binding)?;
        if spec.subjects.is_empty() {
            let text = format!(
                "group {:?} has no handler for topic {:?}, and no stream is configured for it; expected one of both",
                binding.group, binding.topic
            );
            return Err(Error::new(Kind::Configuration, "bind", text));
        }
        let spec = &spec;
        let declare = async |live: Arc<Live>| {
            topology.declare(&live).await?;
            let info = topology.declare_stream(&live, spec).await?;
            Ok((live.cluster().to_owned(), identity(&info)))
        };
        let (cluster, identity) = self.reading(declare).await?;
        Ok(vec![Source {
            transport: KIND,
            cluster,
            topic: binding.topic.clone(),
            name: spec.name.clone(),
            partition: 0,
            identity,
            replayable: true,
        }])
    }

    async fn subscribe(
        &self,
        source: &Source,
        group: &str,
        from: Option<u64>,
    ) -> Result<Box<dyn Subscription>> {
        let Inner {
            config, topology, ..
        } = &*self.0;
        let spec = topology.of_topic(&source.topic)?;
        if spec.name != source.name {
            let text = format!(
                "group {group:?} reads topic {:?} from {:?}, not from {:?}",
                source.topic, spec.name, source.name
            );
            return Err(Error::new(Kind::Configuration, "subscribe", text));
        }
        let types = topology.types_of(&source.topic, group);
        let wanted = Wanted {
            source,
            types: types.into_iter().collect(),
            from,
            prefetch: config.prefetch,
            ping_interval: config.ping_interval,
        };
        let wanted = &wanted;
        let open = async |live: Arc<Live>| Reader::open(live, wanted).await;
        Ok(Box::new(self.reading(open).await?))
    }

    async fn dead_letters(&self, topic: &str, group: &str) -> Result<Box<dyn Publisher>> {
        let spec = self.0.topology.of_topic(topic)?;
        let subject = spec.dead_letter_subject(group)?;
        self.session(Target::DeadLetters(Box::new(spec), subject))
            .await
    }
}
