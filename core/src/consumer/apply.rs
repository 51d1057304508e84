//! One batch, one transaction: probe, inbox, handler, fence, COMMIT.

use std::{collections::HashSet, panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt;
use pillarbox_transport::Message;
use tokio::time::Instant;

use super::{Context, Core, Failure, Next, handler::AnyHandler};
use crate::{
    error::{Error, Kind},
    event::Key,
    failure::{
        DeadLetter, Deferral, Hold, LineId, OnExhausted, PARKED, Resolution, Retry, UNREADABLE,
    },
    lease::{Keeper, Lease},
    store::Unit,
};

/// An event on its way to its handler.
pub(super) struct Incoming {
    pub(super) message: Message,
    /// Why it cannot be understood.
    pub(super) defect: Option<String>,
    /// Failed attempts before this one.
    pub(super) attempts: u32,
    /// Its row, if it waits in a line.
    pub(super) line: Option<LineId>,
}

/// Why nothing of a batch was committed.
#[derive(Debug)]
pub(super) enum Undone {
    /// The database is away.
    Away(Error),
    /// Somebody else holds the lease.
    Fenced,
    /// The transaction lost to another, or an event took too long: run its events again, one by one.
    Alone(String),
    /// A handler's dependency is away, or the waiting room is full.
    Unavailable(String),
}

/// What was committed.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// How many of the events, from the first on; less than all when they take their time.
    pub(super) handled: usize,
    pub(super) applied: u64,
    pub(super) duplicates: u64,
    pub(super) skipped: u64,
    pub(super) deferred: u64,
    pub(super) dead: u64,
    /// For the pump: the line's head failed and waits again.
    pub(super) waits: bool,
}

/// What to do with one event, decided before or by its handler.
enum Verdict {
    Applied,
    Duplicate,
    Failed { next: Next, reason: String },
}

/// Applies events in order in one transaction that proves the lease at its end, and renews it. `overdue`: the reason why
/// the one event failed already (it took too long, alone), so that its attempt is counted without running it again.
pub(super) async fn apply(
    core: &Core,
    (lease, keeper): (&Lease, &Keeper),
    events: &[Incoming],
    durable: bool,
    overdue: Option<&str>,
) -> Result<Applied, Undone> {
    let term = core.settings.lease;
    let mut unit = core
        .store
        .begin(&core.group, term, durable)
        .await
        .map_err(Undone::of)?;
    let done = run(core, &mut *unit, events, overdue).await;
    match done {
        Ok(applied) => {
            let sent = Instant::now();
            unit.commit(lease, term).await.map_err(Undone::of)?;
            keeper.renewed(sent);
            applied.count(&core.group);
            Ok(applied)
        }
        Err(undone) => {
            // The transaction may be gone already; what matters is that it does not commit.
            let _ = unit.rollback().await;
            Err(undone)
        }
    }
}

async fn run(
    core: &Core,
    unit: &mut dyn Unit,
    events: &[Incoming],
    overdue: Option<&str>,
) -> Result<Applied, Undone> {
    let mut done = Applied::default();
    // A key's line is looked up in the transaction of the effect: other workers' memory is no proof.
    let messages: Vec<&Message> = events.iter().map(|e| &e.message).collect();
    let pumped = events.iter().all(|e| e.line.is_some());
    let blocked = if pumped {
        vec![false; events.len()]
    } else {
        unit.blocked(&messages).await.map_err(Undone::of)?
    };
    let mut lines = HashSet::<Key>::new();
    let (begun, most) = (Instant::now(), batch_time(core.settings.lease.term()));
    for (event, blocked) in events.iter().zip(blocked) {
        if done.handled > 0 && begun.elapsed() >= most {
            break;
        }
        done.handled += 1;
        let key = Key::of(&event.message);
        let Some(handler) = core.handler(event, &mut done) else {
            if pumped {
                // Another program of the group deferred it, and has a handler: here its line waits.
                done.waits = true;
                break;
            }
            continue;
        };
        let behind = blocked || key.as_ref().is_some_and(|k| lines.contains(k));
        if behind && handler.is_ok() {
            if pumped {
                break;
            }
            let wait = Deferral::behind(&event.message);
            core.make_room(&mut done).await?;
            unit.defer(&wait).await.map_err(Undone::of)?;
            done.deferred += 1;
            lines.extend(key);
            continue;
        }
        let verdict = match handler {
            Ok(handler) => attempt(core, unit, event, &*handler, overdue).await?,
            Err(reason) => Verdict::Failed {
                next: Next::Reject,
                reason,
            },
        };
        if conclude(core, unit, event, verdict, &mut done).await? {
            lines.extend(key);
            if pumped {
                done.waits = true;
                break;
            }
        }
    }
    Ok(done)
}

impl Core {
    /// The event's handler, or the exact reason why it can have none; nothing for a type that this group does not handle.
    fn handler(
        &self,
        event: &Incoming,
        done: &mut Applied,
    ) -> Option<Result<std::sync::Arc<dyn AnyHandler>, String>> {
        if let Some(defect) = &event.defect {
            return Some(Err(defect.clone()));
        }
        let message = &event.message;
        let Some(registered) = self.handlers.get(message.kind.as_str()) else {
            done.skipped += 1;
            return None;
        };
        let version = message.version().and_then(|v| registered.versions.get(&v));
        Some(match version {
            None => {
                let known: Vec<String> = registered.versions.keys().map(u32::to_string).collect();
                let found = message.attribute("dataversion").unwrap_or("1");
                let kind = &message.kind;
                Err(format!(
                    "unknown version {found:?} of {kind}; this consumer knows {}",
                    known.join(", ")
                ))
            }
            Some(handler) => match self.check.as_ref().map(|check| check(message)) {
                Some(Err(reason)) => Err(format!("{}: {reason}", message.kind)),
                _ => Ok(handler.clone()),
            },
        })
    }

    /// Whether an event that is given up stays first in its line instead.
    fn parks(&self, event: &Incoming) -> bool {
        self.retry.on_exhausted == OnExhausted::Park
            && event.message.key.is_some()
            && event.defect.is_none()
    }

    /// The waiting room has a maximum: at it the source waits, rather than the database filling up.
    async fn make_room(&self, done: &mut Applied) -> Result<(), Undone> {
        if done.deferred > 0 {
            return Ok(());
        }
        let waiting = self
            .store
            .deferred(crate::failure::Side::Consumer, &self.group)
            .await
            .map_err(Undone::of)?;
        let (most, per_key) = (self.settings.deferred, self.settings.deferred_per_key);
        if waiting.total < most && waiting.longest < per_key {
            return Ok(());
        }
        Err(Undone::Unavailable(format!(
            "{} events wait, {} of one key; the maxima are {most} and {per_key}",
            waiting.total, waiting.longest
        )))
    }
}

async fn attempt(
    core: &Core,
    unit: &mut dyn Unit,
    event: &Incoming,
    handler: &dyn AnyHandler,
    overdue: Option<&str>,
) -> Result<Verdict, Undone> {
    if let Some(reason) = overdue {
        return Ok(Verdict::Failed {
            next: Next::Retry,
            reason: reason.to_owned(),
        });
    }
    unit.savepoint().await.map_err(Undone::of)?;
    if !unit.remember(&event.message).await.map_err(Undone::of)? {
        unit.keep().await.map_err(Undone::of)?;
        return Ok(Verdict::Duplicate);
    }
    let limit = handler_time(core.settings.lease.statement());
    let result = {
        let mut cx = Context::new(unit, &core.outbox, &event.message);
        let call = AssertUnwindSafe(handler.handle(&event.message, event.attempts, &mut cx))
            .catch_unwind();
        tokio::time::timeout(limit, call).await
    };
    let failure = match result {
        Ok(Ok(Ok(()))) => {
            return match unit.keep().await {
                Ok(()) => Ok(Verdict::Applied),
                Err(e) if e.kind() == Kind::Invalid => Err(Undone::Alone(e.to_string())),
                Err(e) => Err(Undone::of(e)),
            };
        }
        Ok(Ok(Err(failure))) => failure,
        Ok(Err(_)) => Failure::from(Error::new(Kind::Panicked, "handle", "the handler panicked")),
        // Its connection may be in the middle of a statement: the transaction is of no use any more.
        Err(_) => {
            return Err(Undone::Alone(format!(
                "the handler took longer than {limit:?}"
            )));
        }
    };
    if failure.is_away() {
        return Err(Undone::Away(Error::new(
            Kind::Unavailable,
            "handle",
            failure.reason(),
        )));
    }
    if failure.is_conflict() {
        return Err(Undone::Alone(String::new()));
    }
    if failure.next == Next::Unavailable {
        return Err(Undone::Unavailable(failure.reason()));
    }
    unit.undo().await.map_err(Undone::of)?;
    Ok(Verdict::Failed {
        next: failure.next,
        reason: failure.reason(),
    })
}

/// A handler ends before the database would end its idle transaction, so that the reason is known.
pub(super) fn handler_time(statement: Duration) -> Duration {
    statement * 9 / 10
}

/// When a batch begins no further event. On a database with one writer the lease cannot be renewed before the COMMIT, so
/// this and the longest handler together stay below the time for which it is trusted.
fn batch_time(term: Duration) -> Duration {
    term / 5
}

/// Writes what follows from a verdict. True if the event waits now.
async fn conclude(
    core: &Core,
    unit: &mut dyn Unit,
    event: &Incoming,
    verdict: Verdict,
    done: &mut Applied,
) -> Result<bool, Undone> {
    let (next, reason) = match verdict {
        Verdict::Applied | Verdict::Duplicate => {
            let count = if matches!(verdict, Verdict::Applied) {
                &mut done.applied
            } else {
                &mut done.duplicates
            };
            *count += 1;
            if let Some(id) = &event.line {
                unit.resolve(id, &Resolution::Done)
                    .await
                    .map_err(Undone::of)?;
            }
            return Ok(false);
        }
        Verdict::Failed { next, reason } => (next, reason),
    };
    if next == Next::Skip {
        unit.remember(&event.message).await.map_err(Undone::of)?;
        if let Some(id) = &event.line {
            unit.resolve(id, &Resolution::Done)
                .await
                .map_err(Undone::of)?;
        }
        done.applied += 1;
        return Ok(false);
    }
    let attempts = event.attempts.saturating_add(1);
    let delay = delay(&core.retry, next, attempts);
    tracing::debug!(group = %core.group, id = %event.message.id, kind = %event.message.kind, attempts, %reason, "a handler failed");
    let parks = delay.is_none() && core.parks(event);
    if parks {
        tracing::warn!(group = %core.group, id = %event.message.id, kind = %event.message.kind, key = event.message.key, %reason, "a key is parked");
    }
    match (delay.or(parks.then_some(PARKED)), &event.line) {
        (Some(_), Some(id)) if parks => {
            let park = Resolution::Park { attempts, reason };
            unit.resolve(id, &park).await.map_err(Undone::of)?;
        }
        (Some(delay), Some(id)) => {
            let again = Resolution::Again {
                attempts,
                reason,
                delay,
            };
            unit.resolve(id, &again).await.map_err(Undone::of)?;
        }
        (Some(delay), None) => {
            core.make_room(done).await?;
            let message = event.message.clone();
            let wait = Deferral {
                message,
                position: 0,
                attempts,
                reason: Some(reason),
                delay,
                maybe_sent: false,
                hold: if parks { Hold::Parked } else { Hold::None },
            };
            unit.defer(&wait).await.map_err(Undone::of)?;
            done.deferred += 1;
        }
        (None, Some(id)) => {
            let dead = Resolution::Dead { attempts, reason };
            unit.resolve(id, &dead).await.map_err(Undone::of)?;
            done.dead += 1;
        }
        (None, None) => {
            let mut message = event.message.clone();
            if event.defect.is_some() {
                let name = UNREADABLE.to_owned();
                message.attributes.insert(name, "true".to_owned());
            }
            let dead = DeadLetter {
                message,
                position: 0,
                attempts,
                reason,
                maybe_sent: false,
            };
            unit.bury(&dead).await.map_err(Undone::of)?;
            done.dead += 1;
        }
    }
    Ok(delay.is_some() || parks)
}

fn delay(retry: &Retry, next: Next, attempts: u32) -> Option<Duration> {
    match next {
        Next::Retry => retry.after(attempts),
        Next::RetryIn(delay) => retry.after(attempts).map(|_| delay),
        Next::Reject | Next::Skip | Next::Unavailable => None,
    }
}

impl Deferral {
    /// Nothing is wrong with the event but that another of its key waits.
    fn behind(message: &Message) -> Self {
        Self {
            message: message.clone(),
            position: 0,
            attempts: 0,
            reason: None,
            delay: Duration::ZERO,
            maybe_sent: false,
            hold: Hold::None,
        }
    }
}

impl Undone {
    fn of(e: Error) -> Self {
        use std::error::Error as _;
        let sql = e.source().and_then(|s| s.downcast_ref::<sqlx::Error>());
        match e.kind() {
            Kind::LeaseLost => Self::Fenced,
            Kind::Invalid => Self::Alone(e.to_string()),
            _ if sql.is_some_and(crate::error::is_conflict) => Self::Alone(String::new()),
            _ => Self::Away(e),
        }
    }
}

impl Applied {
    fn count(&self, group: &str) {
        let counts = [
            ("applied", self.applied),
            ("duplicate", self.duplicates),
            ("unhandled", self.skipped),
            ("deferred", self.deferred),
            ("dead_lettered", self.dead),
        ];
        for (outcome, count) in counts.into_iter().filter(|(_, n)| *n > 0) {
            metrics::counter!("pillarbox_consumer_events_total", "group" => group.to_owned(), "outcome" => outcome)
                .increment(count);
        }
    }
}
