//! The contract between the Pillarbox engine and a message broker.
//!
//! This crate is what an adapter depends on, and all that it depends on: no database, no engine, no broker client.
//! It holds the one [`Message`] type, the traits [`Transport`], [`Publisher`] and [`Subscription`], the per-message
//! [`Outcome`], the CloudEvents mapping that every adapter shares, the limits that every message is held to, and
//! [`memory`], the transport for one process.
//!
//! A new transport implements three traits:
//!
//! | trait | is | lives as long as |
//! |---|---|---|
//! | [`Transport`] | the configured broker | the process |
//! | [`Publisher`] | one publishing session | one lease of one relay partition |
//! | [`Subscription`] | one reading session | one lease of one consumer source |

#![warn(missing_docs)]

pub mod cloudevents;
mod error;
pub mod limits;
pub mod memory;
mod message;
mod outcome;
mod subscription;

use std::sync::Arc;

use async_trait::async_trait;
pub use bytes::Bytes;
use futures_util::future::BoxFuture;

pub use error::{Error, Kind, Result};
pub use limits::Limits;
pub use message::Message;
pub use outcome::Outcome;
pub use subscription::{Ack, Delivery, Subscription};

/// A configured broker: opens publishing and reading sessions. Shared as `Arc<dyn Transport>`.
///
/// # Behavior
/// - Every await has a deadline of the adapter's own; nothing waits for ever except [`Subscription::next`] and a
///   publish that the broker itself holds back (flow control, alarms).
/// - Sessions declare the configured topology before their first use, so that no event meets a missing queue.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// The word that selects this transport in a config file: `"memory"`, `"amqp"`, …
    fn kind(&self) -> &'static str;

    /// Opens a publishing session.
    ///
    /// # Errors
    /// [`Kind::Unreachable`] and [`Kind::Timeout`] when the broker is away, [`Kind::Refused`] for credentials and
    /// permissions, [`Kind::Configuration`] when the declared topology contradicts what the broker has.
    async fn publisher(&self) -> Result<Box<dyn Publisher>>;

    /// Declares that a group reads these types of a topic, and answers where it reads them: one [`Source`] for each
    /// queue or partition. A relay may start once every group of its process is bound.
    ///
    /// # Errors
    /// As [`Transport::publisher`]; [`Kind::Configuration`] names a type that the group's queue does not receive.
    async fn bind(&self, binding: &Binding) -> Result<Vec<Source>>;

    /// Opens a reading session on one source. `from` is the first position wanted, for brokers whose log can be read
    /// again; brokers that remember what was acknowledged ignore it.
    ///
    /// The caller holds the group's lease for this source: the transport need not keep others out.
    ///
    /// # Errors
    /// As [`Transport::publisher`].
    async fn subscribe(
        &self,
        source: &Source,
        group: &str,
        from: Option<u64>,
    ) -> Result<Box<dyn Subscription>>;

    /// Opens a publishing session to the dead-letter address of a group.
    ///
    /// # Errors
    /// As [`Transport::publisher`].
    async fn dead_letters(&self, topic: &str, group: &str) -> Result<Box<dyn Publisher>>;
}

/// A publishing session. Thrown away after the first [`Outcome::Unknown`], and with the lease that it served.
pub trait Publisher: Send + Sync {
    /// Hands messages to the broker in call order; the future answers one [`Outcome`] for each, in the same order.
    ///
    /// # Behavior
    /// - The messages are queued for the broker when this returns, before the future is first polled. Several calls
    ///   may be open at once; their messages reach the broker in call order.
    /// - [`Outcome::Stored`] only when the broker has durably taken that very message.
    /// - Every message gets an outcome in bounded time, unless the broker holds the connection back.
    /// - Dropping the future does not recall the messages.
    /// - The messages are shared: the engine keeps each until its outcome is known, without a copy.
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>>;
}

/// What a group reads: the types of one topic that have a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The topic.
    pub topic: String,
    /// The consumer group; one effect for each event and group.
    pub group: String,
    /// Event types with a handler.
    pub kinds: Vec<String>,
}

/// One queue or partition that a group reads: what a consumer's lease and cursor belong to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// [`Transport::kind`].
    pub transport: &'static str,
    /// Which broker cluster; two clusters have two cursors.
    pub cluster: String,
    /// The topic whose events arrive here.
    pub topic: String,
    /// The broker's name for it: queue, topic or stream.
    pub name: String,
    /// Partition number, 0 where the broker has none.
    pub partition: u32,
    /// Changes when the queue, topic or stream is deleted and made anew.
    pub identity: String,
    /// Whether it can be read again from a position. Where not, an acknowledgement destroys the message, and the
    /// consumer commits durably before it acknowledges.
    pub replayable: bool,
}
