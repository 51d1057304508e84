//! One attempt on one event, and what follows from it.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt;
use pillarbox_transport::Message;

use super::{
    Context, Core, Failure, Next,
    apply::{Applied, Incoming, Undone},
    handler::AnyHandler,
};
use crate::{
    error::{Error, Kind},
    failure::{DeadLetter, Deferral, Hold, PARKED, Resolution, Retry, UNREADABLE},
    store::Unit,
};

/// What to do with one event, decided before or by its handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Applied,
    Duplicate,
    /// Its key has a line.
    Behind,
    Failed {
        next: Next,
        reason: String,
    },
}

impl Verdict {
    /// It has failed already, and nobody was there to say so.
    pub(super) fn overdue(reason: &str) -> Self {
        Self::Failed {
            next: Next::Retry,
            reason: reason.to_owned(),
        }
    }
}

/// Why an event must run again, with nothing counted: its own writes are undone.
pub(super) enum Again {
    /// It lost to another transaction.
    Conflict,
    /// Its database is away, or full.
    Away(String),
    /// What it depends on is away, or the waiting room is full.
    Unavailable(String),
}

/// Runs an event's handler inside its savepoint. `of` is the size of its batch.
pub(super) async fn attempt(
    core: &Core,
    unit: &mut dyn Unit,
    (event, of): (&Incoming, usize),
    handler: &dyn AnyHandler,
    overdue: Option<&str>,
) -> Result<Result<Verdict, Again>, Undone> {
    unit.savepoint().await.map_err(Undone::of)?;
    if !unit.remember(&event.message).await.map_err(Undone::of)? {
        unit.keep().await.map_err(Undone::of)?;
        return Ok(Ok(Verdict::Duplicate));
    }
    // Only now: it may have been committed before its owner died.
    if let Some(reason) = overdue {
        unit.undo().await.map_err(Undone::of)?;
        return Ok(Ok(Verdict::overdue(reason)));
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
                Ok(()) => Ok(Ok(Verdict::Applied)),
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
    let again = failure.again();
    match (unit.undo().await, again) {
        (Ok(()), Some(again)) => Ok(Err(again)),
        (Ok(()), None) => Ok(Ok(Verdict::Failed {
            next: failure.next,
            reason: failure.reason(),
        })),
        // The transaction went with what the handler met: nothing of the batch is left.
        (Err(_), Some(again)) => Err(again.undone(of)),
        (Err(e), None) => Err(Undone::of(e)),
    }
}

/// The outcome of an effect that has run, unless the inbox has the event by now.
pub(super) async fn known(
    unit: &mut dyn Unit,
    event: &Incoming,
    verdict: &Verdict,
) -> Result<Verdict, Undone> {
    let new =
        *verdict != Verdict::Applied || unit.remember(&event.message).await.map_err(Undone::of)?;
    Ok(if new {
        verdict.clone()
    } else {
        Verdict::Duplicate
    })
}

impl Again {
    /// When nothing of a batch of so many events is kept.
    pub(super) fn undone(self, events: usize) -> Undone {
        match self {
            Self::Away(reason) if events == 1 => Undone::Unavailable(reason),
            Self::Conflict | Self::Away(_) => Undone::Alone(String::new()),
            Self::Unavailable(reason) => Undone::Unavailable(reason),
        }
    }
}

impl Failure {
    /// Whether it is nobody's fault. SQLSTATE 40xxx, 55P03, 57014, 53xxx, 57Pxx, 08xxx and lost connections never count.
    pub(super) fn again(&self) -> Option<Again> {
        if self.is_away() {
            Some(Again::Away(self.reason()))
        } else if self.is_conflict() {
            Some(Again::Conflict)
        } else if self.next == Next::Unavailable {
            Some(Again::Unavailable(self.reason()))
        } else {
            None
        }
    }
}

/// A handler ends before the database would end its idle transaction, so that the reason is known.
pub(super) fn handler_time(statement: Duration) -> Duration {
    statement * 9 / 10
}

/// Writes what follows from a verdict. True if the event waits now; or it must run again, where it can wait nowhere.
pub(super) async fn conclude(
    core: &Core,
    unit: &mut dyn Unit,
    event: &Incoming,
    verdict: Verdict,
    done: &mut Applied,
) -> Result<Result<bool, Again>, Undone> {
    let (next, reason) = match verdict {
        Verdict::Applied => {
            done.applied += 1;
            return passed(unit, event).await;
        }
        Verdict::Duplicate => {
            done.duplicates += 1;
            return passed(unit, event).await;
        }
        Verdict::Behind => return wait(core, unit, Deferral::behind(&event.message), done).await,
        Verdict::Failed { next, reason } => (next, reason),
    };
    if next == Next::Skip {
        unit.remember(&event.message).await.map_err(Undone::of)?;
        done.applied += 1;
        return passed(unit, event).await;
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
            let deferral = Deferral {
                message: event.message.clone(),
                position: 0,
                attempts,
                reason: Some(reason),
                delay,
                maybe_sent: false,
                hold: if parks { Hold::Parked } else { Hold::None },
            };
            return wait(core, unit, deferral, done).await;
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
    Ok(Ok(delay.is_some() || parks))
}

/// The event is through, and with it its place in a line.
async fn passed(unit: &mut dyn Unit, event: &Incoming) -> Result<Result<bool, Again>, Undone> {
    if let Some(id) = &event.line {
        let done = unit.resolve(id, &Resolution::Done).await;
        done.map_err(Undone::of)?;
    }
    Ok(Ok(false))
}

async fn wait(
    core: &Core,
    unit: &mut dyn Unit,
    event: Deferral,
    done: &mut Applied,
) -> Result<Result<bool, Again>, Undone> {
    // Asked once for each batch: the maximum is passed by less than one.
    if done.deferred == 0
        && let Some(full) = core.full().await?
    {
        return Ok(Err(Again::Unavailable(full)));
    }
    unit.defer(&event).await.map_err(Undone::of)?;
    done.deferred += 1;
    Ok(Ok(true))
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
