//! What an event does outside of the database: no transaction is open while it runs, and its outcome is written down
//! afterwards.

use std::{collections::HashSet, future::Future, panic::AssertUnwindSafe};

use futures_util::{FutureExt, future::BoxFuture};
use pillarbox_transport::Message;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{
    Core, Failure, Next, Way,
    apply::{Incoming, Item, Owner, Undone, batch_time},
    attempt::Verdict,
    handler::{Delivery, Typed, read},
};
use crate::{
    event::{Event, Key},
    store::Standing,
};

/// Does something outside of the database for each event of one type: a mail, an HTTP call. State is `self`.
///
/// No transaction is open while it runs. Its outcome is written down afterwards, so an effect that a crash, a lost lease or
/// a lost database comes after happens **again**: at least once, where a [`Handler`](crate::Handler) has its effect once.
/// Give the other system `delivery.message.id` as an idempotency key, and it is once there too.
///
/// Order for each key, retries, dead letters and waiting are a handler's. It ends within
/// [`ConsumerSettings::effect_timeout`](crate::ConsumerSettings::effect_timeout): a longer run is dropped at an await and
/// counts as an attempt.
///
/// ```
/// use pillarbox_core::{Delivery, Effect, Event, Failure};
/// # #[derive(serde::Deserialize)] struct OrderPlaced { mail: String }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "a"; const TOPIC: &'static str = "b"; }
/// # struct Mailer;
/// # impl Mailer { async fn send(&self, _key: &str, _to: &str) -> std::io::Result<()> { Ok(()) } }
/// impl Effect<OrderPlaced> for Mailer {
///     async fn run(&self, d: &Delivery<OrderPlaced>) -> Result<(), Failure> {
///         // The provider drops a second mail with the same key.
///         self.send(&d.message.id, &d.event.mail).await?;
///         Ok(())
///     }
/// }
/// ```
pub trait Effect<E>: Send + Sync + 'static {
    /// Does it for one event.
    ///
    /// # Errors
    /// As [`Handler::handle`](crate::Handler::handle): any error is tried again after the retry schedule; [`Failure`] says
    /// otherwise.
    fn run(&self, delivery: &Delivery<E>) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// An effect without its type.
pub(super) trait AnyEffect: Send + Sync {
    fn run<'a>(&'a self, message: &'a Message, attempts: u32)
    -> BoxFuture<'a, Result<(), Failure>>;
}

impl<E, F> AnyEffect for Typed<E, F>
where
    E: Event + DeserializeOwned + Send + Sync + 'static,
    F: Effect<E>,
{
    fn run<'a>(
        &'a self,
        message: &'a Message,
        attempts: u32,
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let delivery = Delivery {
                event: read::<E>(message).map_err(Failure::reject)?,
                message: message.clone(),
                attempts,
            };
            self.handler.run(&delivery).await
        })
    }
}

/// Runs the effects of a batch in its order and notes how each ended. Cuts the batch where it cannot go on.
pub(super) async fn run(
    core: &Core,
    owner: Owner<'_>,
    items: &mut Vec<Item<'_>>,
) -> Result<(), Undone> {
    let messages: Vec<&Message> = items.iter().map(|i| &i.event.message).collect();
    // Looked up before each run: what the inbox has must not happen again, and what waits must not overtake its line.
    let standings = core.store.standing(&core.group, &messages).await;
    let standings = standings.map_err(Undone::of)?;
    let mut course = Course {
        core,
        lines: HashSet::new(),
        full: None,
    };
    let (begun, longest) = (Instant::now(), batch_time(core.settings.lease.term()));
    for (i, standing) in standings.into_iter().enumerate() {
        // What has run is written down soon, and a stop waits for one run alone.
        let twice = items.get(i).is_some_and(|item| {
            let before = &items[..i];
            before.iter().any(|other| other.is_same(item))
        });
        // And what comes twice waits until it is known what became of the first.
        if twice || i > 0 && (begun.elapsed() >= longest || owner.stop.is_cancelled()) {
            items.truncate(i);
        }
        let Some(item) = items.get_mut(i) else { break };
        match course.step(item, standing).await? {
            Step::On => {}
            Step::Before(reason) if i == 0 => return Err(Undone::Unavailable(reason)),
            // What came before it is written down first.
            Step::Before(_) => items.truncate(i),
            Step::After => items.truncate(i + 1),
        }
    }
    Ok(())
}

/// Where a batch ends, if it does.
enum Step {
    On,
    /// Before this event, which runs later; with the reason.
    Before(String),
    After,
}

struct Course<'a> {
    core: &'a Core,
    /// Keys whose next events wait.
    lines: HashSet<Key>,
    /// Whether the waiting room is full, once it was asked.
    full: Option<Option<String>>,
}

impl Course<'_> {
    async fn step(&mut self, item: &mut Item<'_>, standing: Standing) -> Result<Step, Undone> {
        let Some(Ok(Way::Effect(effect))) = &item.way else {
            return Ok(Step::On);
        };
        if standing.known {
            item.ran = Some(Verdict::Duplicate);
            return Ok(Step::On);
        }
        let new = item.event.line.is_none();
        let behind = item.key.as_ref().is_some_and(|k| self.lines.contains(k));
        let pauses = self.core.pauses.now();
        let held = pauses.is_some_and(|p| p.hold_key(item.key.as_ref()));
        if behind || new && (standing.waits || held) {
            return Ok(match self.full().await? {
                Some(full) if new => Step::Before(full),
                _ => Step::On,
            });
        }
        match once(self.core, &**effect, item.event).await {
            Ok(verdict) => item.ran = Some(verdict),
            Err(reason) => return Ok(Step::Before(reason)),
        }
        if !matches!(item.ran, Some(Verdict::Failed { .. })) {
            return Ok(Step::On);
        }
        self.lines.extend(item.key.clone());
        // What runs behind an event that finds no place to wait could not be written down.
        Ok(match self.full().await? {
            Some(_) if new => Step::After,
            _ => Step::On,
        })
    }

    async fn full(&mut self) -> Result<Option<String>, Undone> {
        if self.full.is_none() {
            self.full = Some(self.core.full().await?);
        }
        Ok(self.full.clone().flatten())
    }
}

/// One run; the reason if what it needs is away.
async fn once(core: &Core, effect: &dyn AnyEffect, event: &Incoming) -> Result<Verdict, String> {
    let limit = core.settings.effect_timeout;
    let run = AssertUnwindSafe(effect.run(&event.message, event.attempts)).catch_unwind();
    let failed = |reason: String| Verdict::Failed {
        next: Next::Retry,
        reason,
    };
    match tokio::time::timeout(limit, run).await {
        Ok(Ok(Ok(()))) => Ok(Verdict::Applied),
        Ok(Ok(Err(failure))) if failure.again().is_some() => Err(failure.reason()),
        Ok(Ok(Err(failure))) => Ok(Verdict::Failed {
            next: failure.next,
            reason: failure.reason(),
        }),
        Ok(Err(_)) => Ok(failed("the effect panicked".to_owned())),
        Err(_) => Ok(failed(format!("the effect took longer than {limit:?}"))),
    }
}
