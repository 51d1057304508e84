use std::fmt;

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use crate::{Message, Result};

/// A reading session on one source.
///
/// # Behavior
/// - Deliveries come in the source's order.
/// - What was delivered and not acknowledged comes again, in order, to the next session.
#[async_trait]
pub trait Subscription: Send {
    /// Waits for the next delivery. Cancel-safe: dropping the future loses nothing.
    ///
    /// # Errors
    /// Any error ends the session: close it, give the lease back, subscribe anew.
    async fn next(&mut self) -> Result<Delivery>;

    /// Ends the session and returns what is unacknowledged to the broker, in order. When this resolves, the broker
    /// gives nothing more to this session, so that the lease can be handed on.
    async fn close(self: Box<Self>);
}

/// One message as it arrived.
#[derive(Debug)]
pub struct Delivery {
    /// The message; as much of it as could be read when there is a [`Delivery::defect`].
    pub message: Message,
    /// Its place in the source, where the broker has one.
    pub position: Option<u64>,
    /// Why it cannot be understood (no id, malformed attributes): to be dead-lettered with this reason.
    pub defect: Option<String>,
    /// Tells the broker that it is stored or applied.
    pub ack: Ack,
}

/// The acknowledgement of one delivery. Dropping it acknowledges nothing.
pub struct Ack(Option<Box<dyn FnOnce() -> BoxFuture<'static, Result<()>> + Send>>);

impl Ack {
    /// An acknowledgement that runs `f`.
    #[must_use]
    pub fn new(f: impl FnOnce() -> BoxFuture<'static, Result<()>> + Send + 'static) -> Self {
        Self(Some(Box::new(f)))
    }

    /// For sources that keep no acknowledgements: progress is the consumer's own cursor.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// Acknowledges. Success means that the broker was told, not that it heard: a repeat stays possible.
    ///
    /// # Errors
    /// The session is gone; the message will be delivered again.
    pub async fn ack(self) -> Result<()> {
        match self.0 {
            Some(f) => f().await,
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Ack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ack")
    }
}
