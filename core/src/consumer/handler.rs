use std::{error::Error as StdError, fmt, future::Future, marker::PhantomData, time::Duration};

use futures_util::future::BoxFuture;
use pillarbox_transport::Message;
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    connection::Connection,
    error::{Result, is_away, is_conflict},
    event::Event,
    outbox::Outbox,
    store::Unit,
};

/// Applies events of one type. State is `self`.
///
/// What it writes through [`Context::tx`] commits together with the inbox row: one effect, however often the event
/// is delivered. It makes no calls to other systems: they would hold the transaction open and happen again at a retry.
/// That is for an [`Effect`](crate::Effect).
///
/// ```
/// use pillarbox_core::{Context, Delivery, Event, Failure, Handler};
/// # #[derive(serde::Deserialize)] struct OrderPlaced { order: String }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "a"; const TOPIC: &'static str = "b"; }
/// struct Mark;
/// impl Handler<OrderPlaced> for Mark {
///     async fn handle(&self, d: Delivery<OrderPlaced>, cx: &mut Context<'_>) -> Result<(), Failure> {
///         if d.event.order.is_empty() {
///             return Err(Failure::reject("an order without a name"));
///         }
///         // … write through cx.tx() …
///         Ok(())
///     }
/// }
/// ```
pub trait Handler<E>: Send + Sync + 'static {
    /// Applies one event.
    ///
    /// # Errors
    /// Any error is tried again after the retry schedule; [`Failure`] says otherwise.
    fn handle(
        &self,
        delivery: Delivery<E>,
        cx: &mut Context<'_>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// An event as a handler or an effect receives it.
#[derive(Debug, Clone)]
pub struct Delivery<E> {
    /// The payload.
    pub event: E,
    /// The envelope: id, time, topic, key, attributes, headers. Its payload is the raw body.
    pub message: Message,
    /// Failed attempts before this one.
    pub attempts: u32,
}

/// What a handler works with: its transaction.
pub struct Context<'a> {
    unit: &'a mut dyn Unit,
    outbox: &'a Outbox,
    message: &'a Message,
}

impl<'a> Context<'a> {
    pub(crate) fn new(unit: &'a mut dyn Unit, outbox: &'a Outbox, message: &'a Message) -> Self {
        Self {
            unit,
            outbox,
            message,
        }
    }

    /// The transaction's connection. Do not end the transaction on it.
    pub fn tx(&mut self) -> Connection<'_> {
        match self.unit.connection() {
            Some(connection) => connection,
            None => unreachable!("only the simulation's store has no connection"),
        }
    }

    /// Enqueues an event in the same transaction. It carries on the correlation, and names the handled event as its cause.
    ///
    /// # Errors
    /// As [`Outbox::enqueue`].
    pub async fn enqueue<E: Event + Serialize>(&mut self, event: &E) -> Result<Uuid> {
        let outbox = self.outbox.caused_by(self.message);
        outbox.enqueue(self.tx(), event).await
    }
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("message", self.message)
            .finish_non_exhaustive()
    }
}

/// Why a handler did not apply an event, and what to do next. Any error becomes one that is tried again.
pub struct Failure {
    pub(crate) next: Next,
    reason: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What to do with an event that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// After the schedule.
    Retry,
    /// After this long.
    RetryIn(Duration),
    /// Never: a dead letter.
    Reject,
    /// Never: it counts as applied.
    Skip,
    /// When what the handler depends on is back; not an attempt.
    Unavailable,
}

impl Failure {
    /// Never passes: the event becomes a dead letter with this reason.
    pub fn reject(why: impl fmt::Display) -> Self {
        Self::because(Next::Reject, why)
    }

    /// Try again after `delay`; counts as an attempt.
    pub fn retry_in(delay: Duration, why: impl fmt::Display) -> Self {
        Self::because(Next::RetryIn(delay), why)
    }

    /// Nothing to do for this event: what the handler wrote is undone, the event counts as applied.
    #[must_use]
    pub fn skip() -> Self {
        Self::because(Next::Skip, "skipped")
    }

    /// Something that the handler needs is away: the source waits, and no attempt is counted.
    pub fn unavailable(why: impl fmt::Display) -> Self {
        Self::because(Next::Unavailable, why)
    }

    fn because(next: Next, why: impl fmt::Display) -> Self {
        Self {
            next,
            reason: why.to_string(),
            source: None,
        }
    }

    /// The reason and its causes, as one line.
    #[must_use]
    pub fn reason(&self) -> String {
        let mut text = self.reason.clone();
        let mut cause = self.source.as_ref().and_then(|s| s.source());
        while let Some(c) = cause {
            let more = c.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            cause = c.source();
        }
        text
    }

    fn any_sql(&self, test: impl Fn(&sqlx::Error) -> bool) -> bool {
        let mut cause = self
            .source
            .as_ref()
            .map(|s| &**s as &(dyn StdError + 'static));
        while let Some(c) = cause {
            if c.downcast_ref::<sqlx::Error>().is_some_and(&test) {
                return true;
            }
            cause = c.source();
        }
        false
    }

    /// The database is away: nobody's fault.
    pub(crate) fn is_away(&self) -> bool {
        self.any_sql(is_away)
    }

    /// The transaction lost to another: the event runs again, alone.
    pub(crate) fn is_conflict(&self) -> bool {
        self.any_sql(is_conflict)
    }
}

impl<E: StdError + Send + Sync + 'static> From<E> for Failure {
    fn from(e: E) -> Self {
        Self {
            next: Next::Retry,
            reason: e.to_string(),
            source: Some(Box::new(e)),
        }
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failure({:?}: {})", self.next, self.reason())
    }
}

/// A handler without its type.
pub(crate) trait AnyHandler: Send + Sync {
    fn handle<'a>(
        &'a self,
        message: &'a Message,
        attempts: u32,
        cx: &'a mut Context<'_>,
    ) -> BoxFuture<'a, Result<(), Failure>>;
}

pub(crate) struct Typed<E, H> {
    pub(crate) handler: H,
    pub(crate) event: PhantomData<fn() -> E>,
}

impl<E, H> AnyHandler for Typed<E, H>
where
    E: Event + DeserializeOwned + Send + 'static,
    H: Handler<E>,
{
    fn handle<'a>(
        &'a self,
        message: &'a Message,
        attempts: u32,
        cx: &'a mut Context<'_>,
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let event = read::<E>(message).map_err(Failure::reject)?;
            let delivery = Delivery {
                event,
                message: message.clone(),
                attempts,
            };
            self.handler.handle(delivery, cx).await
        })
    }
}

pub(super) fn read<E: Event + DeserializeOwned>(message: &Message) -> Result<E, String> {
    let Some(body) = &message.payload else {
        return Err(format!("{}: the payload is missing", E::TYPE));
    };
    serde_json::from_slice(body)
        .map_err(|e| format!("{}: the payload is not as expected: {e}", E::TYPE))
}
