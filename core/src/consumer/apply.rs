//! One batch, one transaction: probe, inbox, handlers or the outcomes of effects, fence, COMMIT.

use std::{collections::HashSet, time::Duration};

use pillarbox_transport::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Core, Next, Way,
    attempt::{Again, Verdict, attempt, conclude, known},
    effect,
};
use crate::{
    backoff::Backoff,
    error::{Error, Kind},
    event::Key,
    failure::{LineId, OnExhausted, Side},
    lease::Lease,
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

/// In whose right events are applied.
#[derive(Clone, Copy)]
pub(super) struct Owner<'a> {
    pub(super) lease: &'a Lease,
    pub(super) stop: &'a CancellationToken,
}

/// An event in its batch.
pub(super) struct Item<'a> {
    pub(super) event: &'a Incoming,
    pub(super) key: Option<Key>,
    /// What is to run for it, or why nothing can; none for a type that this group does not handle.
    pub(super) way: Option<Result<Way, String>>,
    /// How its effect ended, if it has run.
    pub(super) ran: Option<Verdict>,
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
    /// What a handler needs is away, or the waiting room is full: later, and nothing is counted.
    Unavailable(String),
}

/// What was committed.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// How many of the events, from the first on; less than all when they take their time, or when one of them must run
    /// again.
    pub(super) handled: usize,
    /// The first of the rest runs again by itself.
    pub(super) alone: bool,
    /// When the COMMIT was sent, which renewed the lease.
    pub(super) sent: Option<Instant>,
    pub(super) applied: u64,
    pub(super) duplicates: u64,
    pub(super) skipped: u64,
    pub(super) deferred: u64,
    pub(super) dead: u64,
    /// For the pump: the line's head failed and waits again.
    pub(super) waits: bool,
}

/// Applies events in order in one transaction that proves the lease at its end, and renews it. `overdue`: the reason why
/// the one event failed already (it took too long, alone), so that its attempt is counted without running it again.
///
/// A batch has either handlers or effects. A mail must not go out twice because the handler of a neighbour lost to another
/// transaction, nor before what came earlier for its key is committed.
pub(super) async fn apply(
    core: &Core,
    owner: Owner<'_>,
    events: &[Incoming],
    durable: bool,
    overdue: Option<&str>,
) -> Result<Applied, Undone> {
    let mut items: Vec<Item<'_>> = events.iter().map(|e| core.item(e)).collect();
    let kind = items.iter().find_map(Item::is_effect).unwrap_or(false);
    let other = |item: &Item<'_>| item.is_effect().is_some_and(|effect| effect != kind);
    let alike = items.iter().position(other).unwrap_or(items.len());
    items.truncate(alike);
    if !kind {
        return commit(core, owner, &items, durable, overdue).await;
    }
    match (overdue, items.first_mut()) {
        (Some(reason), Some(first)) => {
            // It may have happened, and be noted, before its owner died.
            let asked = [&first.event.message];
            let standing = core.store.standing(&core.group, &asked).await;
            let standing = standing.map_err(Undone::of)?;
            let is_known = standing.first().is_some_and(|s| s.known);
            first.ran = Some(if is_known {
                Verdict::Duplicate
            } else {
                Verdict::overdue(reason)
            });
            items.truncate(1);
        }
        _ => effect::run(core, owner, &mut items).await?,
    }
    let mut backoff = Backoff::connection();
    loop {
        // What has happened must not happen again for want of a row: its owner tries for as long as it has the lease.
        match commit(core, owner, &items, durable, None).await {
            Err(Undone::Away(e)) if e.is_temporary() => {
                tracing::debug!(group = %core.group, error = %e, "the outcomes of effects wait");
            }
            Err(Undone::Alone(reason)) if reason.is_empty() => {}
            ended => return ended,
        }
        tokio::time::sleep(backoff.step()).await;
    }
}

impl Item<'_> {
    /// Whether it is the same event, brought again.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let (one, two) = (&self.event.message, &other.event.message);
        one.id == two.id && one.source() == two.source()
    }

    /// Whether an effect is to run; none where nothing is.
    fn is_effect(&self) -> Option<bool> {
        match &self.way {
            Some(Ok(way)) => Some(matches!(way, Way::Effect(_))),
            _ => None,
        }
    }
}

async fn commit(
    core: &Core,
    owner: Owner<'_>,
    items: &[Item<'_>],
    durable: bool,
    overdue: Option<&str>,
) -> Result<Applied, Undone> {
    let term = core.settings.lease;
    let turn = core.turns.acquire().await;
    let closed = |_| Error::new(Kind::Unavailable, "begin", "the consumer ends");
    let _turn = turn.map_err(|e| Undone::of(closed(e)))?;
    let begun = core.store.begin(&core.group, term, durable).await;
    let mut unit = begun.map_err(Undone::of)?;
    match run(core, &mut *unit, items, overdue).await {
        // Nothing to commit: the first event must run again.
        Ok(applied) if applied.handled == 0 => {
            let _ = unit.rollback().await;
            Ok(applied)
        }
        Ok(mut applied) => {
            applied.sent = Some(Instant::now());
            let done = unit.commit(owner.lease, term).await;
            done.map_err(Undone::at_commit)?;
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
    items: &[Item<'_>],
    overdue: Option<&str>,
) -> Result<Applied, Undone> {
    let mut done = Applied::default();
    // A key's line is looked up in the transaction of the effect: other workers' memory is no proof.
    let messages: Vec<&Message> = items.iter().map(|i| &i.event.message).collect();
    let pumped = items.iter().all(|i| i.event.line.is_some());
    let blocked = if pumped {
        vec![false; items.len()]
    } else {
        unit.blocked(&messages).await.map_err(Undone::of)?
    };
    let mut lines = HashSet::<&Key>::new();
    let pauses = core.pauses.now();
    let (begun, most) = (Instant::now(), batch_time(core.settings.lease.term()));
    // What has run is noted, however long that takes.
    let ran = items.iter().any(|i| i.ran.is_some());
    for (item, blocked) in items.iter().zip(blocked) {
        if done.handled > 0 && !ran && begun.elapsed() >= most {
            break;
        }
        done.handled += 1;
        let (event, key) = (item.event, item.key.as_ref());
        let held = event.line.is_none() && pauses.as_ref().is_some_and(|p| p.hold_key(key));
        let behind = blocked || held || key.is_some_and(|k| lines.contains(k));
        let tried = match (&item.way, &item.ran) {
            // Another program of the group deferred it, and has a handler: here its line waits.
            (None, _) if pumped => {
                done.waits = true;
                break;
            }
            (None, _) => {
                done.skipped += 1;
                continue;
            }
            (Some(Err(reason)), _) => Ok(Verdict::Failed {
                next: Next::Reject,
                reason: reason.clone(),
            }),
            (Some(Ok(_)), Some(verdict)) => Ok(known(unit, event, verdict).await?),
            (Some(Ok(Way::Handler(handler))), None) if !behind => {
                attempt(core, unit, (event, items.len()), &**handler, overdue).await?
            }
            (Some(Ok(_)), None) if pumped => {
                done.handled -= 1;
                break;
            }
            // Also an effect that did not run for a line that has gone meanwhile: what ran behind it is to be noted.
            (Some(Ok(_)), None) => Ok(Verdict::Behind),
        };
        let waits = match tried {
            Ok(verdict) => conclude(core, unit, event, verdict, &mut done).await?,
            Err(again) => Err(again),
        };
        match waits {
            // What came before it in the batch is kept.
            Err(again) => return done.stop(again, items.len()),
            Ok(true) if pumped => {
                done.waits = true;
                break;
            }
            Ok(true) => lines.extend(key),
            Ok(false) => {}
        }
    }
    Ok(done)
}

impl Core {
    fn item<'a>(&self, event: &'a Incoming) -> Item<'a> {
        Item {
            event,
            key: Key::of(&event.message),
            way: self.way(event),
            ran: None,
        }
    }

    /// The event's handler or effect, or the exact reason why it can have none; nothing for a type that this group does
    /// not handle.
    fn way(&self, event: &Incoming) -> Option<Result<Way, String>> {
        if let Some(defect) = &event.defect {
            return Some(Err(defect.clone()));
        }
        let message = &event.message;
        let registered = self.types.get(message.kind.as_str())?;
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
            Some(way) => match self.check.as_ref().map(|check| check(message)) {
                Some(Err(reason)) => Err(format!("{}: {reason}", message.kind)),
                _ => Ok(way.clone()),
            },
        })
    }

    /// Whether an event that is given up stays first in its line instead.
    pub(super) fn parks(&self, event: &Incoming) -> bool {
        self.retry.on_exhausted == OnExhausted::Park
            && event.message.key.is_some()
            && event.defect.is_none()
    }

    /// The waiting room has a maximum: at it the source waits, rather than the database filling up.
    pub(super) async fn full(&self) -> Result<Option<String>, Undone> {
        let waiting = self.store.deferred(Side::Consumer, &self.group).await;
        let waiting = waiting.map_err(Undone::of)?;
        let (most, per_key) = (self.settings.deferred, self.settings.deferred_per_key);
        if waiting.total < most && waiting.longest < per_key {
            return Ok(None);
        }
        Ok(Some(format!(
            "{} events wait, {} of one key; the maxima are {most} and {per_key}",
            waiting.total, waiting.longest
        )))
    }
}

/// When a batch begins no further event. On a database with one writer the lease cannot be renewed before the COMMIT, so
/// this and the longest handler together stay below the time for which it is trusted.
pub(super) fn batch_time(term: Duration) -> Duration {
    term / 5
}

impl Undone {
    pub(super) fn of(e: Error) -> Self {
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

impl Undone {
    /// At COMMIT the database refuses what it checks last, such as a deferred constraint, and nobody says which event it
    /// was: they run again one by one, and one that is refused alone has named itself.
    fn at_commit(e: Error) -> Self {
        use std::error::Error as _;
        let sql = e.source().and_then(|s| s.downcast_ref::<sqlx::Error>());
        let refused = sql.is_some_and(|sql| sql.as_database_error().is_some());
        match Self::of(e) {
            Self::Away(e) if refused && e.kind() == Kind::Database => Self::Alone(e.to_string()),
            undone => undone,
        }
    }
}

impl Applied {
    /// Ends a batch of so many events before the one that it has come to.
    fn stop(mut self, again: Again, events: usize) -> Result<Self, Undone> {
        let alone = !matches!(again, Again::Unavailable(_));
        if self.handled == 1 && !(alone && events > 1) {
            return Err(again.undone(events));
        }
        (self.handled, self.alone) = (self.handled - 1, alone);
        Ok(self)
    }

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
