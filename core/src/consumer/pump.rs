//! The group's deferred lines: one owner by a lease of its own, so that a line goes on whichever source its key comes
//! from. Also sends the broker its copies of dead letters.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use pillarbox_transport::Publisher;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Core,
    apply::{Applied, Incoming, Owner, Undone, apply},
    session::{apply_alone, overstayed},
    suspect::ENDED,
};
use crate::{
    backoff::Backoff,
    error::{Error, Kind, Result},
    failure::{Line, LineId, OnExhausted, SUSPECT, Side},
    lease::{self, Keeper, Lease, LeaseKey},
    supervise::caught,
};

/// Looks at least this often: another process may have deferred something.
const POLL: Duration = Duration::from_secs(1);
/// Its names in the consumer's health: of its lease's trouble, of the database's, and of the handlers'.
const LEASE: &str = "deferred lines' lease";
const PUMP: &str = "deferred lines";
const EVENTS: &str = "deferred events";
/// Lines looked at, and events of a line applied, at a time.
const BATCH: u32 = 100;

pub(super) async fn run(core: Core, stop: CancellationToken) -> Result<()> {
    let key = LeaseKey::Duty {
        kind: lease::PUMP,
        scope: core.group.to_string(),
        shard: 0,
    };
    let mut backoff = Backoff::connection();
    while !stop.is_cancelled() {
        let sent = Instant::now();
        let wait = match core.store.acquire(&key, core.settings.lease).await {
            Ok(Some(acquired)) => {
                core.clear(LEASE);
                let lease = acquired.lease;
                let accused = Mutex::new(acquired.alone);
                let keeper =
                    Keeper::start(core.store.clone(), lease.clone(), core.settings.lease, sent);
                let ended = tokio::select! {
                    biased;
                    () = keeper.lost().cancelled() => Ok(()),
                    // An effect may take longer than a stop waits.
                    () = overstayed(&stop, core.settings.drain) => Ok(()),
                    ended = caught(PUMP, pump(&core, (&lease, &accused), &keeper, &stop)) => ended,
                };
                drop(keeper);
                let released = core.store.release(&lease).await;
                match ended.and(released) {
                    Ok(()) => {
                        backoff.reset();
                        Duration::ZERO
                    }
                    Err(e) if e.kind() == Kind::LeaseLost => backoff.step(),
                    Err(e) => core.waits(PUMP, e, &mut backoff)?,
                }
            }
            Ok(None) => {
                // Another's now, with its troubles.
                core.clear(LEASE);
                core.clear(PUMP);
                core.clear(EVENTS);
                core.settings.lease.renewal() / 2
            }
            Err(e) => core.waits(LEASE, e, &mut backoff)?,
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
    Ok(())
}

async fn pump(
    core: &Core,
    (lease, accused): (&Lease, &Mutex<Option<LineId>>),
    keeper: &Keeper,
    stop: &CancellationToken,
) -> Result<()> {
    let mut copies = Copies::default();
    let mut look_at = Instant::now();
    let mut pauses = core.pauses.clone();
    loop {
        let mut next = POLL;
        if core.retry.on_exhausted == OnExhausted::Park && look_at <= Instant::now() {
            let waiting = core.store.deferred(Side::Consumer, &core.group).await?;
            core.report.parked(waiting.parked);
            look_at = Instant::now() + POLL;
        }
        let lines = lines(core, lease).await?;
        if lines.is_empty() {
            core.clear(PUMP);
            core.clear(EVENTS);
        }
        let (due, later): (Vec<Line>, Vec<Line>) =
            lines.into_iter().partition(|line| line.due_in.is_zero());
        next = later.iter().map(|line| line.due_in).fold(next, Ord::min);
        let owner = Owner { lease, stop };
        let mut drained = stream::iter(due)
            .map(|line| drain_line(core, (owner, keeper), line, accused))
            .buffer_unordered(core.settings.workers.max(1));
        while let Some(more) = drained.next().await {
            if more? {
                next = Duration::ZERO;
            }
        }
        next = next.min(copies.send(core, lease).await?);
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            () = core.deferred.notified() => {}
            () = pauses.changed() => {}
            () = tokio::time::sleep(next) => {}
        }
    }
}

/// The lines that may go on.
async fn lines(core: &Core, lease: &Lease) -> Result<Vec<Line>> {
    let Some(pauses) = core.pauses.now().filter(|p| !p.whole) else {
        return Ok(Vec::new());
    };
    // Lines that are held back are due first, and must not hide the others.
    let held = u32::try_from(pauses.keys.len()).unwrap_or(u32::MAX);
    let mut lines = core.store.lines(lease, BATCH.saturating_add(held)).await?;
    lines.retain(|line| !pauses.hold_key(line.key.as_ref()));
    Ok(lines)
}

/// Whether an operator holds the line back since it was found.
fn is_paused(core: &Core, line: &Line) -> bool {
    let pauses = core.pauses.now();
    pauses.is_none_or(|p| p.whole || p.hold_key(line.key.as_ref()))
}

/// Applies the due events at the head of a line, in order. True if there may be more at once.
async fn drain_line(
    core: &Core,
    (owner, keeper): (Owner<'_>, &Keeper),
    line: Line,
    accused: &Mutex<Option<LineId>>,
) -> Result<bool> {
    let lease = owner.lease;
    if owner.stop.is_cancelled() {
        return Ok(false);
    }
    let waiting = core
        .store
        .line(lease, line.key.as_ref(), &line.head, BATCH)
        .await?;
    let mut events: Vec<Incoming> = waiting
        .into_iter()
        .take_while(|e| e.due_in.is_zero())
        .map(|e| {
            let line = Some(e.line_id());
            Incoming {
                message: e.message,
                defect: None,
                attempts: e.attempts,
                line,
            }
        })
        .collect();
    // What ended a process once goes alone, and nothing with it.
    let suspects = events.iter().map(is_suspect);
    let alone = suspects.clone().next().unwrap_or(false);
    let before = suspects.skip(1).position(|s| s || alone);
    events.truncate(before.map_or(events.len(), |n| n + 1));
    let mut overdue = events
        .first()
        .filter(|first| alone && died_over(first, accused))
        .map(|_| ENDED.to_owned());
    let (mut left, mut most) = (&events[..], events.len());
    while !left.is_empty() && !is_paused(core, &line) {
        let part = &left[..most.min(left.len())];
        let applied = if alone {
            let applied = apply_alone(core, owner, part, true, overdue.as_deref()).await;
            core.store.alone(lease, None).await?;
            applied
        } else {
            let _among_others = core.quiet.read().await;
            apply(core, owner, part, true, overdue.as_deref()).await
        };
        if let Ok(Some(sent)) = applied.as_ref().map(|a| a.sent) {
            keeper.renewed(sent);
        }
        match applied {
            Ok(applied) if applied.alone => (left, most) = (&left[applied.handled..], 1),
            Ok(applied) => return Ok(goes_on(core, &applied)),
            Err(Undone::Alone(_)) if part.len() > 1 => most = 1,
            // It took too long even alone: that is its attempt.
            Err(Undone::Alone(reason)) if !reason.is_empty() && overdue.is_none() => {
                overdue = Some(reason);
            }
            Err(undone) => return waits(core, lease, undone),
        }
    }
    Ok(false)
}

fn is_suspect(event: &Incoming) -> bool {
    event.message.attribute(SUSPECT).is_some()
}

/// Whether the last owner died when it had begun this event; told once.
fn died_over(event: &Incoming, accused: &Mutex<Option<LineId>>) -> bool {
    let mut accused = accused.lock().unwrap_or_else(PoisonError::into_inner);
    accused
        .take_if(|id| Some(&*id) == event.line.as_ref())
        .is_some()
}

fn goes_on(core: &Core, applied: &Applied) -> bool {
    core.clear(PUMP);
    core.clear(EVENTS);
    !applied.waits
}

fn waits(core: &Core, lease: &Lease, undone: Undone) -> Result<bool> {
    match undone {
        Undone::Away(e) => Err(e),
        Undone::Fenced => Err(Error::new(
            Kind::LeaseLost,
            "pump",
            format!("another owner has {}", lease.key),
        )),
        Undone::Alone(_) => Ok(false),
        Undone::Unavailable(reason) => {
            core.note(EVENTS, &reason);
            Ok(false)
        }
    }
}

/// Sends the broker's copies of dead letters from their rows: at least once, after the fact, never in the way.
#[derive(Default)]
struct Copies {
    publishers: HashMap<String, Box<dyn Publisher>>,
    backoff: Option<Backoff>,
    not_before: Option<Instant>,
}

impl Copies {
    async fn send(&mut self, core: &Core, lease: &Lease) -> Result<Duration> {
        if let Some(wait) = self
            .not_before
            .and_then(|t| t.checked_duration_since(Instant::now()))
        {
            return Ok(wait);
        }
        let mut by_topic = HashMap::<String, Vec<_>>::new();
        for dead in core.store.uncopied(&core.group, BATCH).await? {
            by_topic
                .entry(dead.message.topic.clone())
                .or_default()
                .push(dead);
        }
        for (topic, dead) in by_topic {
            let ids: Vec<LineId> = dead
                .iter()
                .map(|d| (d.message.source().to_owned(), d.message.id.clone()))
                .collect();
            let messages = dead.into_iter().map(|d| {
                // The reason travels with the copy; control characters do not.
                let reason: String = d
                    .reason
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(1_000)
                    .collect();
                Arc::new(d.message.with_attribute("pillarboxreason", reason))
            });
            match self.publish(core, &topic, messages.collect()).await {
                Ok(stored) => {
                    let ids: Vec<LineId> = ids
                        .into_iter()
                        .zip(stored)
                        .filter(|(_, s)| *s)
                        .map(|(id, _)| id)
                        .collect();
                    core.store.copied(lease, &ids).await?;
                    (self.backoff, self.not_before) = (None, None);
                }
                Err(e) => {
                    tracing::debug!(group = %core.group, error = %e, "copies of dead letters wait");
                    self.publishers.remove(&topic);
                    let wait = self.backoff.get_or_insert_with(Backoff::connection).step();
                    self.not_before = Some(Instant::now() + wait);
                    return Ok(wait);
                }
            }
        }
        Ok(POLL)
    }

    /// Which of them the broker has, or will never take.
    async fn publish(
        &mut self,
        core: &Core,
        topic: &str,
        messages: Vec<Arc<pillarbox_transport::Message>>,
    ) -> Result<Vec<bool>, pillarbox_transport::Error> {
        use pillarbox_transport::Outcome;
        if !self.publishers.contains_key(topic) {
            let publisher = core.transport.dead_letters(topic, &core.group).await?;
            self.publishers.insert(topic.to_owned(), publisher);
        }
        let Some(publisher) = self.publishers.get(topic) else {
            return Ok(Vec::new());
        };
        let mut stored = Vec::new();
        for outcome in publisher.publish(messages).await {
            stored.push(match outcome {
                Outcome::Stored => true,
                Outcome::Rejected(e) => {
                    tracing::warn!(group = %core.group, error = %e, "the broker takes no copy of a dead letter; its row has it");
                    true
                }
                Outcome::Unknown(e) | Outcome::Unavailable(e) | Outcome::Retry(e) => return Err(e),
            });
        }
        Ok(stored)
    }
}
