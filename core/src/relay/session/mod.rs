//! One lease of one partition: everything in memory begins and ends with it.
//!
//! A loop around one set of work under way. Each round starts whatever can start (read, publish, defer, settle, lines)
//! and then waits for a piece of work, a wake-up or a time.

mod broker;
mod failed;
mod line;
mod log;
mod pauses;
mod suspect;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use pillarbox_transport::{Outcome, Publisher};
use tokio::{
    sync::{OwnedRwLockWriteGuard, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use suspect::Suspects;

use super::{Core, circuit::Probe, lines::LineName, lines::Lines, trail::Trail};
use crate::{
    backoff::Backoff,
    cursor::Progress,
    error::{Error, Kind, Result},
    failure::{Deferred, Line},
    lease::{Acquired, Keeper, Lease},
    pause::Pauses,
    store::{Due, Logged, Slice, Store, Waiting},
    window::{Attempt, Seq, Window},
};

/// Deferred rows written at a time.
const DEFERRALS: usize = 500;
/// Most lines looked at when a partition is taken over; the maximum of deferred events bounds them.
const LINES: u32 = 1_000_000;
/// How often an owner looks for lines that an operator made, where that is cheap.
const LOOK: Duration = Duration::from_secs(1);

/// What may meet trouble: each has a name of its own in the relay's health, or one that works would end another's trouble.
pub(super) const READING: &str = "reading";
const SETTLING: &str = "settling";
const DEFERRING: &str = "deferring";
const BURYING: &str = "dead letters";
const LINE: &str = "deferred events";
const LOOKING: &str = "operators' commands";
const SCHEDULE: &str = "scheduled events";
const BROKER: &str = "broker";

/// What was under way and is done.
enum Done {
    Opened(Result<Box<dyn Publisher>, pillarbox_transport::Error>),
    Read(Result<Slice>),
    Published(Vec<Attempt>, Vec<Outcome>),
    /// Written, left for later because their room is full, and whether it came to the insert.
    Deferred(Vec<Seq>, Vec<Seq>, bool, Result<()>),
    Buried(Attempt, String, Result<()>),
    Settled(Progress, Instant, Result<()>),
    Line(LineName, Result<Option<Deferred>>),
    LinePublished(LineName, Box<Deferred>, Outcome),
    LineResolved(LineName, Option<Duration>, Result<()>),
    /// Nothing is in flight in the whole relay.
    Quiet(OwnedRwLockWriteGuard<()>),
    Looked(Instant, Result<(Waiting, Vec<Line>)>),
    FellDue(Result<Due>),
    Noted(LineName, Result<()>),
}

/// What became of an event that goes into its line.
struct Failed {
    attempts: u32,
    reason: String,
    delay: Duration,
    parked: bool,
}

/// A topic that the broker cannot take now.
struct Pause {
    until: Instant,
    backoff: Backoff,
}

struct Session<'a> {
    core: &'a Core,
    store: Arc<dyn Store>,
    partition: u16,
    lease: Lease,
    keeper: &'a Keeper,
    work: FuturesUnordered<BoxFuture<'static, Done>>,

    publisher: Option<Box<dyn Publisher>>,
    opening: bool,
    open_at: Instant,
    open_backoff: Backoff,
    /// It finds out for all partitions whether the broker is back.
    probe: Option<Probe>,

    window: Window<Logged>,
    trail: Trail,
    lines: Lines,
    /// Failed attempts of events that are on their way into a line.
    failed: HashMap<Seq, Failed>,
    /// Events that may have been sent: an answer was lost.
    unsure: HashSet<Seq>,
    paused: HashMap<String, Pause>,
    /// What operators hold back; none before it is known.
    pauses: Option<Arc<Pauses>>,
    /// Lines that wait for the end of a pause.
    put_off: HashSet<LineName>,
    told_full: bool,
    suspects: Suspects,

    reading: bool,
    from: Progress,
    /// What was enqueued before is passed over.
    since: Option<SystemTime>,
    poll_at: Instant,
    poll: Duration,
    read_backoff: Backoff,

    deferring: bool,
    defer_at: Instant,

    looking: bool,
    look_at: Instant,

    /// When it may publish again, after another partition needed quiet.
    loud_at: Instant,

    /// When a scheduled event's time comes next; none while none is scheduled, or while they are looked at.
    due_at: Option<Instant>,
    /// The highest position read: what falls due now comes behind it.
    newest: i64,

    settling: bool,
    settle_at: Instant,
    unsettled: Option<Progress>,

    draining: bool,
}

/// Runs until the lease ends or `stop` has drained. Without error when the lease was lost or handed back.
pub(super) async fn run(
    core: &Core,
    partition: u16,
    acquired: Acquired,
    keeper: &Keeper,
    stop: &CancellationToken,
) -> Result<()> {
    let mut session = Session::new(core, partition, acquired, keeper);
    // After the acquisition is committed: rows that the last owner wrote before are all there, later ones are fenced.
    let lines = tokio::select! {
        biased;
        () = keeper.lost().cancelled() => return Ok(()),
        lines = session.store.lines(&session.lease, LINES) => lines?,
    };
    for key in lines.iter().filter_map(|l| l.key.clone()) {
        session.window.block(key);
    }
    session.lines.load(lines, Instant::now());
    let drained = tokio::select! {
        biased;
        () = keeper.lost().cancelled() => false,
        result = session.work(stop) => result?,
    };
    if drained && let Some(progress) = session.unsettled.take() {
        let term = core.settings.lease;
        session
            .store
            .settle(&session.lease, &progress, term, true)
            .await?;
    }
    Ok(())
}

impl<'a> Session<'a> {
    fn new(core: &'a Core, partition: u16, acquired: Acquired, keeper: &'a Keeper) -> Self {
        let now = Instant::now();
        Self {
            core,
            store: core.store.clone(),
            partition,
            lease: acquired.lease,
            keeper,
            work: FuturesUnordered::new(),
            publisher: None,
            opening: false,
            open_at: now,
            open_backoff: Backoff::connection(),
            probe: None,
            window: Window::new(core.settings.window).per_topic(core.per_key.clone()),
            trail: Trail::default(),
            lines: Lines::default(),
            failed: HashMap::new(),
            unsure: HashSet::new(),
            paused: HashMap::new(),
            pauses: None,
            put_off: HashSet::new(),
            told_full: false,
            suspects: Suspects::default(),
            reading: false,
            from: acquired.progress,
            since: acquired.since,
            poll_at: now,
            poll: core.settings.busy_poll,
            read_backoff: Backoff::connection(),
            deferring: false,
            defer_at: now,
            looking: false,
            look_at: now + LOOK,
            loud_at: now,
            due_at: Some(now),
            newest: 0,
            settling: false,
            settle_at: now,
            unsettled: None,
            draining: false,
        }
    }

    /// True once a stop has drained.
    async fn work(&mut self, stop: &CancellationToken) -> Result<bool> {
        let mut wake = self.core.wake.listen();
        let (mut circuit, mut pauses) = (self.core.circuit.watch(), self.core.pauses.clone());
        self.heed(pauses.now());
        let mut give_up = None;
        loop {
            // Before anything else is sent.
            if pauses.take_change() {
                self.heed(pauses.now());
            }
            self.advance();
            if self.draining && self.is_quiet() {
                return Ok(true);
            }
            let now = Instant::now();
            if give_up.is_some_and(|at| at <= now) {
                tracing::warn!(destination = %self.core.destination, partition = self.partition, in_flight = self.window.in_flight(), "the drain time is over; what is unconfirmed comes again");
                return Ok(true);
            }
            let next = [self.start(now), give_up].into_iter().flatten().min();
            tokio::select! {
                biased;
                () = stop.cancelled(), if !self.draining => {
                    self.draining = true;
                    give_up = Some(now + self.core.settings.drain);
                }
                Some(done) = self.work.next(), if !self.work.is_empty() => {
                    self.done(done)?;
                    while let Some(Some(done)) = self.work.next().now_or_never() {
                        self.done(done)?;
                    }
                }
                () = woken(&mut wake), if !self.draining => {
                    (self.poll_at, self.poll) = (now, self.core.settings.busy_poll);
                }
                // Another partition has found out about the broker.
                Ok(()) = circuit.changed(), if self.publisher.is_none() && !self.draining => {}
                () = pauses.changed(), if !self.draining => self.heed(pauses.now()),
                () = sleep_until(next) => {}
            }
        }
    }

    /// A trouble is noted; what ends the session is an error.
    fn trouble(&self, what: &str, e: Error) -> Result<()> {
        if e.kind() == Kind::LeaseLost || !(e.is_temporary() || e.kind() == Kind::Database) {
            return Err(e);
        }
        self.waits(what, &e.to_string());
        Ok(())
    }

    fn waits(&self, what: &str, trouble: &str) {
        self.core
            .waits(&trouble_with(self.partition, what), trouble);
    }

    fn goes_on(&self, what: &str) {
        if self.core.report.is_troubled() {
            self.core.goes_on(&trouble_with(self.partition, what));
        }
    }

    fn is_quiet(&self) -> bool {
        self.window.in_flight() == 0
            && !self.deferring
            && !self.settling
            && self.lines.under_way() == 0
    }

    /// Starts what can start now, and answers when something else could.
    fn start(&mut self, now: Instant) -> Option<Instant> {
        let mut next = None::<Instant>;
        let mut at = |t: Instant| next = Some(next.map_or(t, |n| n.min(t)));
        if !self.settling && self.unsettled.is_some() {
            if self.settle_at <= now {
                self.settle(now)
            } else {
                at(self.settle_at)
            }
        }
        if !self.deferring {
            if self.defer_at <= now {
                self.defer()
            } else {
                at(self.defer_at)
            }
        }
        if self.draining {
            self.acquit();
            return next;
        }
        if !self.looking {
            if self.look_at <= now {
                self.look(now)
            } else {
                at(self.look_at)
            }
        }
        match self.due_at {
            Some(due) if due <= now => self.fall_due(),
            Some(due) => at(due),
            None => {}
        }
        if !self.reading && self.wants_more() {
            if self.poll_at <= now {
                self.read()
            } else {
                at(self.poll_at)
            }
        }
        self.tell_full();
        if self.is_paused() {
            self.rest();
            return next;
        }
        if self.publisher.is_none() {
            if !self.opening
                && let Some(open_at) = self.open(now)
            {
                at(open_at);
            }
            return next;
        }
        if let Some(resume) = self
            .paused
            .values()
            .map(|p| p.until)
            .filter(|t| *t > now)
            .min()
        {
            at(resume);
        }
        self.publish(now);
        if let Some(turn) = self.core.next_turn(now) {
            at(turn);
        }
        [self.suspects.due(), Some(self.loud_at)]
            .into_iter()
            .flatten()
            .filter(|t| *t > now)
            .for_each(&mut at);
        if self.probe.is_none() {
            self.start_lines(now).into_iter().for_each(at);
        }
        next
    }

    fn done(&mut self, done: Done) -> Result<()> {
        match done {
            Done::Opened(opened) => self.opened(opened),
            Done::Read(read) => return self.read_done(read),
            Done::Published(attempts, outcomes) => self.published(&attempts, outcomes),
            Done::Deferred(seqs, left, tried, result) => {
                self.window.not_deferred(&left);
                return self.deferred(&seqs, tried, result);
            }
            Done::Buried(attempt, reason, result) => return self.buried(attempt, &reason, result),
            Done::Settled(progress, sent, result) => return self.settled(progress, sent, result),
            Done::Line(name, head) => return self.line_loaded(name, head),
            Done::LinePublished(name, event, outcome) => self.line_published(name, *event, outcome),
            Done::LineResolved(name, again, result) => {
                return self.line_resolved(&name, again, result);
            }
            Done::Looked(begun, lines) => return self.looked(begun, lines),
            Done::Quiet(quiet) => self.hushed(quiet),
            Done::FellDue(due) => return self.fell_due(due),
            Done::Noted(name, result) => return self.line_noted(&name, result),
        }
        Ok(())
    }
}

/// The name of a partition's trouble: one line in the log when it begins, one when it ends.
pub(super) fn trouble_with(partition: u16, what: &str) -> String {
    format!("partition {partition} {what}")
}

async fn woken(wake: &mut watch::Receiver<u64>) {
    if wake.changed().await.is_err() {
        // The outbox is gone; polling is enough.
        std::future::pending::<()>().await;
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
