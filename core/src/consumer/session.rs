//! One lease on one source: a loop around the workers' batches under way.
//!
//! A key belongs to one worker, which has one transaction at a time, so that order holds however many workers there are. The
//! [`Window`] knows which events are not confirmed yet, and bounds them; the source's cursor follows its confirmed prefix.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use futures_util::FutureExt;
use pillarbox_transport::{Ack, Delivery, Message, Source, Subscription};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Core,
    apply::{Applied, Incoming, Owner, Undone, apply},
    suspect::{Caution, ENDED},
};
use crate::{
    backoff::Backoff,
    error::{Error, Kind, Result},
    event::Key,
    failure::{LineId, SUSPECT},
    lease::{Acquired, Keeper, Lease},
    running::task,
    window::{Attempt, Limits, Seq, Window},
};

/// A cursor of its own moves at most this often; more would only bloat its row.
const SETTLE: Duration = Duration::from_millis(100);
/// Most events between the confirmed prefix and the newest: what a fault can repeat.
const UNSETTLED: usize = 10_000;
/// Most bytes of the events that are not confirmed.
const BYTES: usize = 64 << 20;

pub(super) struct Session<'a> {
    core: &'a Core,
    source: &'a Source,
    /// Its handlers' name in the consumer's health.
    trouble: &'a str,
    lease: &'a Lease,
    keeper: &'a Keeper,
    stop: &'a CancellationToken,
    window: Window<Held>,
    workers: Vec<Worker>,
    /// Where events lie in the source, by their number in the window.
    places: VecDeque<(Seq, u64)>,
    cursor: Cursor,
    running: JoinSet<Done>,
    caution: Caution,
    /// Why the session ends, once what is under way has ended.
    broken: Option<Error>,
}

/// An event that is not confirmed.
struct Held {
    worker: usize,
    /// Here, unless it is under way.
    waiting: Option<(Incoming, Ack)>,
}

struct Worker {
    busy: bool,
    /// So many of its next events run one by one.
    alone: usize,
    /// Why its next event has failed already.
    overdue: Option<String>,
    /// Until when it waits.
    not_before: Option<Instant>,
    backoff: Backoff,
    troubled: bool,
}

/// The cursor of a source that can be read again: behind the effects' commits, never before.
struct Cursor {
    position: Option<u64>,
    written: Option<u64>,
    at: Instant,
    /// It is being written.
    busy: bool,
}

/// What has ended.
enum Done {
    Batch {
        worker: usize,
        taken: Vec<Attempt>,
        /// The events that are not stored now, from the end.
        left: Vec<(Incoming, Ack)>,
        outcome: Result<Applied, Undone>,
        acknowledged: Result<()>,
    },
    Cursor(u64, Result<()>),
    /// The deaths of earlier owners are forgotten.
    Noted(Result<()>),
}

impl<'a> Session<'a> {
    pub(super) fn new(
        core: &'a Core,
        (source, trouble): (&'a Source, &'a str),
        (acquired, keeper): (&'a Acquired, &'a Keeper),
        stop: &'a CancellationToken,
    ) -> Self {
        let (workers, batch) = (core.settings.workers.max(1), core.settings.batch);
        let limits = Limits {
            unsettled: UNSETTLED,
            // A batch under way for each, and one to be dealt out.
            held: batch.saturating_mul(workers + 1),
            bytes: BYTES,
            in_flight: usize::MAX,
            // Of one key all are in one transaction, in order.
            per_key: usize::MAX,
        };
        Self {
            core,
            source,
            trouble,
            lease: &acquired.lease,
            keeper,
            stop,
            window: Window::new(limits),
            workers: (0..workers).map(|_| Worker::new()).collect(),
            places: VecDeque::new(),
            cursor: Cursor {
                position: None,
                written: None,
                at: Instant::now(),
                busy: false,
            },
            running: JoinSet::new(),
            caution: Caution::new(acquired, batch.saturating_mul(workers)),
            broken: None,
        }
    }

    /// Consumes until the lease is lost, the subscription ends or a stop. Dropped, it undoes what is under way.
    pub(super) async fn run(mut self, subscription: &mut dyn Subscription) -> Result<()> {
        let overstayed = overstayed(self.stop, self.core.settings.drain);
        tokio::pin!(overstayed);
        let mut pauses = self.core.pauses.clone();
        loop {
            // Paused, it ends as it does at a stop, and the broker takes back in order what was not begun.
            let goes_on = self.broken.is_none() && !self.stop.is_cancelled() && !pauses.is_whole();
            if goes_on {
                self.start();
            } else if self.running.is_empty() {
                break;
            }
            self.settle();
            let (due, takes) = (self.due(), goes_on && self.window.room() > 0);
            tokio::select! {
                biased;
                // Whatever is under way is undone; its fence would refuse it anyhow.
                () = self.keeper.lost().cancelled() => return Ok(()),
                () = &mut overstayed => return Ok(()),
                Some(done) = self.running.join_next() => match done {
                    Ok(done) => self.ended(done)?,
                    Err(e) => return Err(Error::new(Kind::Panicked, "consume", "a worker panicked").caused_by(e)),
                },
                delivery = subscription.next(), if takes => {
                    self.receive(delivery, subscription);
                }
                () = self.stop.cancelled(), if goes_on => {}
                () = pauses.changed(), if goes_on => {}
                () = tokio::time::sleep_until(due), if goes_on => {}
            }
        }
        match self.broken.take() {
            Some(e) => Err(e),
            None => self.settle_last().await,
        }
    }

    /// Takes a delivery, and along with it what is there already.
    fn receive(
        &mut self,
        first: pillarbox_transport::Result<Delivery>,
        subscription: &mut dyn Subscription,
    ) {
        let mut next = Some(first);
        while let Some(delivery) = next {
            match delivery {
                Ok(delivery) => self.push(delivery),
                Err(e) => return self.breaks(e.into()),
            }
            next = (self.window.room() > 0)
                .then(|| subscription.next().now_or_never())
                .flatten();
        }
    }

    fn push(&mut self, delivery: Delivery) {
        let Delivery {
            message,
            position,
            defect,
            ack,
        } = delivery;
        let key = Key::of(&message);
        let worker = worker_of(key.as_ref(), &message, self.workers.len());
        let size = message.payload.as_ref().map_or(0, |p| p.len());
        let event = Incoming {
            message,
            defect,
            attempts: 0,
            line: None,
        };
        let held = Held {
            worker,
            waiting: Some((event, ack)),
        };
        let seq = self.window.push(held, key, size);
        self.places.extend(position.map(|p| (seq, p)));
    }

    /// Gives each worker that is free its next events.
    fn start(&mut self) {
        let now = Instant::now();
        for worker in &mut self.workers {
            worker.not_before = worker.not_before.filter(|t| *t > now);
        }
        if self.caution.is_active() {
            return self.start_alone();
        }
        for i in 0..self.workers.len() {
            let worker = &mut self.workers[i];
            if worker.busy || worker.not_before.is_some() {
                continue;
            }
            let most = if worker.alone == 0 {
                self.core.settings.batch
            } else {
                1
            };
            let taken = self.window.take(most, |held| held.worker == i);
            if taken.is_empty() {
                continue;
            }
            self.start_batch(i, taken, false);
        }
    }

    /// One event, if nothing is under way.
    fn start_alone(&mut self) {
        if !self.running.is_empty() {
            return;
        }
        let (caution, workers) = (&self.caution, &self.workers);
        let rests = |held: &Held| workers[held.worker].not_before.is_some();
        let mut taken = self
            .window
            .take(1, |held| !rests(held) && !held.is_accused(caution));
        let judges = taken.is_empty() && caution.may_judge();
        if judges {
            taken = self.window.take(1, |held| held.is_accused(caution));
        }
        let held = taken.first().and_then(|a| self.window.get_mut(a.seq));
        let Some(held) = held else { return };
        let i = held.worker;
        if judges {
            if let Some((event, _)) = &mut held.waiting {
                let attributes = &mut event.message.attributes;
                attributes.insert(SUSPECT.to_owned(), "true".to_owned());
            }
            self.workers[i].overdue = Some(ENDED.to_owned());
            self.caution.judged();
        }
        self.start_batch(i, taken, true);
    }

    fn start_batch(&mut self, i: usize, taken: Vec<Attempt>, alone: bool) {
        // Where the acknowledgement destroys the message, the commit must be on disk before it. And an effect cannot be
        // undone: neither may be what it comes after.
        let durable = !self.source.replayable || self.core.has_effects();
        let worker = &mut self.workers[i];
        worker.busy = true;
        let overdue = worker.overdue.take();
        let mut events = Vec::with_capacity(taken.len());
        let mut acks = Vec::with_capacity(taken.len());
        for attempt in &taken {
            let held = self.window.get_mut(attempt.seq);
            if let Some((event, ack)) = held.and_then(|h| h.waiting.take()) {
                events.push(event);
                acks.push(ack);
            }
        }
        self.running.spawn(task(batch(
            self.core.clone(),
            (self.lease.clone(), self.stop.clone()),
            (durable, alone),
            (i, taken),
            (events, acks),
            overdue,
        )));
    }

    fn ended(&mut self, done: Done) -> Result<()> {
        match done {
            Done::Batch {
                worker,
                taken,
                left,
                outcome,
                acknowledged,
            } => {
                let stored = taken.len() - left.len();
                self.caution.got_through(stored);
                for attempt in &taken[..stored] {
                    self.window.settle(*attempt);
                }
                let size = left.len();
                for (attempt, event) in taken[stored..].iter().zip(left) {
                    if let Some(held) = self.window.get_mut(attempt.seq) {
                        held.waiting = Some(event);
                    }
                    self.window.again(*attempt);
                }
                self.advance();
                self.workers[worker].busy = false;
                if let Err(e) = acknowledged {
                    self.breaks(e);
                }
                self.judge(worker, outcome, size)
            }
            Done::Cursor(position, written) => {
                self.cursor.busy = false;
                self.cursor.at = Instant::now();
                match written {
                    Ok(()) => self.cursor.written = Some(position),
                    Err(e) => self.breaks(e),
                }
                Ok(())
            }
            Done::Noted(noted) => {
                if let Err(e) = noted {
                    self.breaks(e);
                }
                Ok(())
            }
        }
    }

    /// What a worker does next. `left`: how many events of the batch came back.
    fn judge(&mut self, i: usize, outcome: Result<Applied, Undone>, left: usize) -> Result<()> {
        let worker = &mut self.workers[i];
        match outcome {
            Ok(applied) => {
                let rest = worker.alone.saturating_sub(applied.handled);
                worker.alone = rest.max(usize::from(applied.alone));
                if applied.handled == 0 {
                    return Ok(());
                }
                worker.backoff.reset();
                worker.troubled = false;
                if let Some(sent) = applied.sent {
                    self.keeper.renewed(sent);
                }
                if applied.deferred > 0 || applied.dead > 0 {
                    self.core.deferred.notify_one();
                }
                if !self.workers.iter().any(|w| w.troubled) {
                    self.core.clear(self.trouble);
                }
            }
            Err(Undone::Away(e)) => self.breaks(e),
            Err(Undone::Fenced) => {
                let text = format!("another owner has {}", self.lease.key);
                return Err(Error::new(Kind::LeaseLost, "consume", text));
            }
            Err(Undone::Alone(_)) if left > 1 => worker.alone = left,
            // It named itself by ending alone: an attempt.
            Err(Undone::Alone(reason)) if !reason.is_empty() => {
                (worker.alone, worker.overdue) = (worker.alone.max(1), Some(reason));
            }
            Err(Undone::Alone(_)) => worker.wait(),
            Err(Undone::Unavailable(reason)) => {
                worker.wait();
                worker.troubled = true;
                // One that has run by itself does so again.
                worker.alone = worker.alone.max(usize::from(left == 1));
                self.core.note(self.trouble, &reason);
            }
        }
        Ok(())
    }

    /// The first reason counts; the others follow from it.
    fn breaks(&mut self, e: Error) {
        self.broken.get_or_insert(e);
    }

    /// The confirmed prefix, and no event behind one that is not, is where the source is read from next.
    fn advance(&mut self) {
        let Some(last) = self.window.advance() else {
            return;
        };
        while let Some((_, position)) = self.places.pop_front_if(|(seq, _)| *seq <= last) {
            self.cursor.position = Some(position);
        }
        if self.caution.is_over() {
            let (core, lease) = (self.core.clone(), self.lease.clone());
            self.running.spawn(task(async move {
                Done::Noted(core.store.alone(&lease, None).await)
            }));
        }
    }

    fn settle(&mut self) {
        let Some(position) = self.cursor.unwritten() else {
            return;
        };
        if self.cursor.at.elapsed() < SETTLE {
            return;
        }
        self.cursor.busy = true;
        let (core, lease) = (self.core.clone(), self.lease.clone());
        self.running.spawn(task(async move {
            let term = core.settings.lease;
            let written = core.store.settle_source(&lease, position, term).await;
            Done::Cursor(position, written)
        }));
    }

    async fn settle_last(&mut self) -> Result<()> {
        let Some(position) = self.cursor.unwritten() else {
            return Ok(());
        };
        let term = self.core.settings.lease;
        let settled = self.core.store.settle_source(self.lease, position, term);
        settled.await
    }

    /// When something is to be done though nothing ends and nothing comes: a worker has waited, or the last of a burst is to
    /// be settled.
    fn due(&self) -> Instant {
        let waits = self.workers.iter().filter(|w| !w.busy);
        let waits = waits.filter_map(|w| w.not_before).min();
        let settles = self.cursor.unwritten().map(|_| self.cursor.at + SETTLE);
        let idle = Instant::now() + self.core.settings.lease.term();
        let idle = idle.min(self.caution.due().unwrap_or(idle));
        idle.min(waits.unwrap_or(idle)).min(settles.unwrap_or(idle))
    }
}

impl Held {
    fn is_accused(&self, caution: &Caution) -> bool {
        let event = self.waiting.as_ref().map(|(event, _)| &event.message);
        event.is_some_and(|m| caution.is_accused(m.source(), &m.id))
    }
}

impl Worker {
    fn new() -> Self {
        Self {
            busy: false,
            alone: 0,
            overdue: None,
            not_before: None,
            backoff: Backoff::connection(),
            troubled: false,
        }
    }

    fn wait(&mut self) {
        self.not_before = Some(Instant::now() + self.backoff.step());
    }
}

impl Cursor {
    fn unwritten(&self) -> Option<u64> {
        let position = self.position.filter(|p| Some(*p) != self.written);
        position.filter(|_| !self.busy)
    }
}

/// Applies a worker's batch and acknowledges what is stored.
async fn batch(
    core: Core,
    (lease, stop): (Lease, CancellationToken),
    (durable, alone): (bool, bool),
    (worker, taken): (usize, Vec<Attempt>),
    (mut events, mut acks): (Vec<Incoming>, Vec<Ack>),
    overdue: Option<String>,
) -> Done {
    let owner = Owner {
        lease: &lease,
        stop: &stop,
    };
    let overdue = overdue.as_deref();
    let outcome = if alone {
        apply_alone(&core, owner, &events, durable, overdue).await
    } else {
        let _among_others = core.quiet.read().await;
        apply(&core, owner, &events, durable, overdue).await
    };
    let stored = outcome.as_ref().map_or(0, |applied| applied.handled);
    let mut acknowledged = Ok(());
    for ack in acks.drain(..stored) {
        if let Err(e) = ack.ack().await {
            acknowledged = Err(e.into());
            break;
        }
    }
    Done::Batch {
        worker,
        taken,
        left: events.drain(stored..).zip(acks).collect(),
        outcome,
        acknowledged,
    }
}

/// Applies an event beside which nothing else is under way in this consumer, noted in the database before: if the process dies
/// over it, the next owner knows.
pub(super) async fn apply_alone(
    core: &Core,
    owner: Owner<'_>,
    events: &[Incoming],
    durable: bool,
    overdue: Option<&str>,
) -> Result<Applied, Undone> {
    let _alone = core.quiet.write().await;
    let first = events.first().filter(|_| overdue.is_none());
    if let Some(event) = first {
        let name: LineId = (event.message.source().to_owned(), event.message.id.clone());
        let noted = core.store.alone(owner.lease, Some(&name)).await;
        noted.map_err(Undone::of)?;
    }
    apply(core, owner, events, durable, overdue).await
}

/// A key's one worker. What has no key goes by its name: a repeat then meets no transaction of another worker.
fn worker_of(key: Option<&Key>, message: &Message, workers: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    match key {
        Some(key) => key.hash(&mut hasher),
        None => (message.source(), &message.id).hash(&mut hasher),
    }
    usize::try_from(hasher.finish() % workers as u64).unwrap_or_default()
}

/// Resolves when a stop has waited for as long as it may.
pub(super) async fn overstayed(stop: &CancellationToken, drain: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(drain).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: &str, key: Option<&str>) -> Message {
        let mut message = Message::new(id, "topic", "kind", "{}");
        message.key = key.map(Into::into);
        message
    }

    #[test]
    fn a_key_has_one_worker_and_all_have_work() {
        let mut of = vec![0; 4];
        for n in 0..400 {
            let key = format!("key-{n}");
            let first = message("a", Some(&key));
            let worker = worker_of(Key::of(&first).as_ref(), &first, 4);
            let other = message("b", Some(&key));
            assert_eq!(worker_of(Key::of(&other).as_ref(), &other, 4), worker);
            let keyless = message(&key, None);
            of[worker] += 1;
            of[worker_of(None, &keyless, 4)] += 1;
        }
        assert!(of.iter().all(|n| *n > 120), "{of:?}");
    }
}
