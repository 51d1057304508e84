//! Suspect mode: an event that ends the publisher's session, and that nobody names.
//!
//! A broker that closes the channel over one event leaves all that is in flight without an answer. Sent again together, they
//! would meet the same end, for ever. So after a second death without progress of the prefix, what was in flight goes one by
//! one. A session that dies with one event in flight, and works for another one after that, has named it: this is the event's
//! attempt, and retry schedule and dead letter follow as for any refusal. From then on it is never sent beside another one.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{sync::OwnedRwLockWriteGuard, time::Instant};

use super::{super::lines::LineName, Done, Session};
use crate::{
    failure::{Deferred, LineId, Resolution, SUSPECT},
    store::Logged,
    window::Seq,
};

/// So many deaths of the publisher without progress are no accident.
const DEATHS: u32 = 2;
/// Where there is nothing to try instead of a suspect, a new session that has lasted so long speaks against it.
const ALIVE: Duration = Duration::from_secs(1);
/// How long a line's head may hold the others back that is to be sent alone.
const TURN: Duration = Duration::from_millis(200);
/// Its name in the relay's health.
const SUSPECTS: &str = "suspects";

#[derive(Debug, Default)]
pub(super) struct Suspects {
    /// Deaths since the prefix has moved, and where it stood.
    deaths: u32,
    prefix: Seq,
    /// Positions of what was in flight when the publisher died.
    under: BTreeSet<i64>,
    /// Positions of those that died alone since something got through.
    died: BTreeSet<i64>,
    alone: Option<Alone>,
    accused: Option<Accused>,
    /// How often a line's head died, and others beside it.
    heads: HashMap<LineId, u32>,
    /// Until when a suspect that is a line's head waits for its turn.
    head_until: Option<Instant>,
    /// Nothing is in flight in any partition of the relay.
    quiet: Option<OwnedRwLockWriteGuard<()>>,
    /// That is being waited for.
    hushing: bool,
    /// The session was opened since: whatever dies on it was not killed by another one.
    fresh: bool,
    /// Died alone on an older session: goes again on a fresh one.
    again: Option<i64>,
}

/// In flight, and nothing else is.
#[derive(Debug)]
enum Alone {
    Event(i64),
    Head,
}

/// Died alone; guilty once another one gets through.
#[derive(Debug)]
struct Accused {
    who: Who,
    reason: String,
    /// The broker was silent, which says nothing against the event where nothing else was tried.
    silent: bool,
    /// When there was a session again.
    opened: Option<Instant>,
}

#[derive(Debug)]
enum Who {
    Event(i64),
    /// It stays its key's one unconfirmed event, in flight as far as the window knows.
    Head(LineName, Box<Deferred>),
}

impl Suspects {
    /// Whether events go one by one.
    pub(super) fn is_active(&self, now: Instant) -> bool {
        !self.is_quiet() || self.head_until.is_some_and(|until| now < until)
    }

    fn is_quiet(&self) -> bool {
        self.under.is_empty()
            && self.alone.is_none()
            && self.accused.is_none()
            && self.again.is_none()
    }

    /// How many of those in flight are not on their way.
    fn kept(&self) -> usize {
        let head = self
            .accused
            .as_ref()
            .is_some_and(|a| matches!(a.who, Who::Head(..)));
        usize::from(head)
    }

    /// When there may be something to do though nothing ends.
    pub(super) fn due(&self) -> Option<Instant> {
        let opened = self.accused.as_ref().and_then(|a| a.opened);
        let judged = opened.map(|at| at + ALIVE);
        [judged, self.head_until].into_iter().flatten().min()
    }

    /// An answer that says nothing: neither died it nor got it through.
    pub(super) fn unanswered(&mut self) {
        if self.alone.take().is_some() {
            self.loud();
        }
    }

    /// Nobody came for whom there is quiet.
    pub(super) fn rest(&mut self) {
        if self.quiet.is_some() {
            self.loud();
        }
    }

    /// The others go on.
    fn loud(&mut self) {
        (self.quiet, self.fresh, self.again) = (None, false, None);
    }

    fn died_alone(&mut self, who: Who, e: &pillarbox_transport::Error) {
        if let Who::Event(position) = who {
            self.died.insert(position);
        }
        self.loud();
        self.accused = Some(Accused {
            who,
            reason: format!("the broker's session ends when it is sent, even alone: {e}"),
            silent: e.kind() == pillarbox_transport::Kind::Timeout,
            opened: None,
        });
    }
}

impl Session<'_> {
    /// The publisher is dead. Asked before its events are taken back: what is in flight is suspect.
    pub(super) fn publisher_died(&mut self, e: &pillarbox_transport::Error) {
        match self.suspects.alone.take() {
            Some(Alone::Event(position)) if self.suspects.fresh => {
                self.acquit();
                return self.suspects.died_alone(Who::Event(position), e);
            }
            // The session may have been dead before: over another one, when this one was idle.
            Some(Alone::Event(position)) => {
                self.suspects.again = Some(position);
                return;
            }
            // Whoever hears its answer goes on.
            Some(Alone::Head) => return,
            None => {}
        }
        let prefix = self.window.prefix();
        let same = prefix == self.suspects.prefix;
        self.suspects.deaths = if same { self.suspects.deaths + 1 } else { 1 };
        self.suspects.prefix = prefix;
        if self.suspects.deaths >= DEATHS {
            let sent = self.window.sent().map(|e| e.position);
            self.suspects.under.extend(sent);
            let trouble = format!(
                "the broker's session has ended {} times without progress: {} events go one by one; the last time: {e}",
                self.suspects.deaths,
                self.suspects.under.len()
            );
            self.waits(SUSPECTS, &trouble);
        }
    }

    pub(super) fn publisher_opened(&mut self) {
        self.suspects.fresh = self.suspects.quiet.is_some();
        if let Some(accused) = &mut self.suspects.accused {
            accused.opened = Some(Instant::now());
        }
    }

    /// An event was answered: whatever died before it is guilty.
    pub(super) fn got_through(&mut self, position: i64) {
        if self.suspects.is_quiet() {
            return;
        }
        if self.suspects.alone.take().is_some() {
            self.suspects.loud();
        }
        self.suspects.died.clear();
        self.suspects.under.remove(&position);
        self.convict();
        self.suspects_over();
    }

    fn suspects_over(&mut self) {
        if self.suspects.alone.is_none() && self.suspects.again.is_none() {
            self.suspects.loud();
        }
        if self.suspects.is_quiet() {
            self.suspects.deaths = 0;
            self.suspects.died.clear();
            self.goes_on(SUSPECTS);
        }
    }

    /// Sends one event, if nothing is in flight.
    pub(super) fn publish_alone(&mut self, now: Instant) {
        let suspects = &self.suspects;
        let waits = suspects.head_until.is_some_and(|until| now < until);
        if waits && self.window.in_flight() == 0 {
            self.opened_must_do();
        }
        let suspects = &self.suspects;
        if waits || suspects.alone.is_some() || self.window.in_flight() > suspects.kept() {
            return;
        }
        self.suspects.head_until = None;
        let next = self.suspects.again.or_else(|| self.next_alone(now));
        let Some(position) = next else {
            return self.nothing_alone(now);
        };
        if !self.hush() {
            return;
        }
        let taken = self.window.take(1, |e| e.position == position);
        if taken.is_empty() {
            // It has gone into its line; or an accused head has the only place in flight.
            self.suspects.loud();
            return self.nothing_alone(now);
        }
        let (attempts, refused) = self.without_defects(taken);
        for (attempt, reason) in refused {
            self.suspects.under.remove(&position);
            self.bury(attempt, reason);
        }
        let (Some(attempt), Some(publisher)) = (attempts.first(), &self.publisher) else {
            return self.suspects.loud();
        };
        let Some(event) = self.window.get(attempt.seq) else {
            return;
        };
        (self.suspects.alone, self.suspects.again) = (Some(Alone::Event(position)), None);
        let answer = publisher.publish(vec![event.message.clone()]);
        self.work
            .push(async move { Done::Published(attempts, answer.await) }.boxed());
    }

    /// Whether nothing is in flight in the whole relay; else that is waited for.
    fn hush(&mut self) -> bool {
        let suspects = &mut self.suspects;
        if suspects.quiet.is_none() && !suspects.hushing {
            suspects.hushing = true;
            let quiet = self.core.quiet.clone().write_owned();
            self.work.push(quiet.map(Done::Quiet).boxed());
        }
        suspects.quiet.is_some()
    }

    pub(super) fn hushed(&mut self, quiet: OwnedRwLockWriteGuard<()>) {
        let suspects = &mut self.suspects;
        suspects.hushing = false;
        // Not for one that does not come.
        if !self.draining && suspects.is_active(Instant::now()) {
            suspects.quiet = Some(quiet);
        }
    }

    /// The oldest suspect. Instead of one that has just died: the newest event that has not, for poison lies close together.
    fn next_alone(&self, now: Instant) -> Option<i64> {
        let suspects = &self.suspects;
        let held = self.pauses.clone().unwrap_or_default();
        let may = |e: &&Logged| {
            let paused = self.paused.get(&e.message.topic);
            paused.is_none_or(|p| p.until <= now) && !held.hold_topic(&e.message.topic)
        };
        let mut ready = self.window.ready().filter(may).map(|e| e.position);
        if suspects.accused.is_some() {
            return ready.rfind(|position| !suspects.died.contains(position));
        }
        let next = ready
            .clone()
            .find(|position| suspects.under.contains(position));
        // While a suspect's topic is paused, the others need not wait for it.
        next.or_else(|| ready.next())
    }

    /// No event goes to prove that the broker is back, and a line's head waits for that.
    fn opened_must_do(&mut self) {
        if self.probe.is_some() {
            self.is_back();
        }
    }

    /// No event can be sent now, though there may be suspects.
    fn nothing_alone(&mut self, now: Instant) {
        self.opened_must_do();
        let left: BTreeSet<i64> = self.window.ready().map(|e| e.position).collect();
        self.suspects.under.retain(|p| left.contains(p));
        let accused = self.suspects.accused.as_ref();
        let silent = accused.is_some_and(|a| a.silent);
        let opened = accused.and_then(|a| a.opened);
        if opened.is_some_and(|at| at + ALIVE <= now) {
            if silent {
                self.acquit();
            } else {
                self.convict();
            }
        }
        self.suspects_over();
    }

    /// Counts the attempt of the one that died alone.
    fn convict(&mut self) {
        let Some(Accused { who, reason, .. }) = self.suspects.accused.take() else {
            return;
        };
        let destination = self.core.destination.clone();
        metrics::counter!("pillarbox_relay_suspects_total", "destination" => destination)
            .increment(1);
        match who {
            Who::Event(position) => {
                self.suspects.under.remove(&position);
                self.suspects.died.remove(&position);
                // None, if it has gone into its line meanwhile.
                for attempt in self.window.take(1, |e| e.position == position) {
                    if let Some(event) = self.window.get_mut(attempt.seq) {
                        let name = SUSPECT.to_owned();
                        Arc::make_mut(&mut event.message)
                            .attributes
                            .insert(name, "true".to_owned());
                    }
                    match self.core.retry.after(1) {
                        Some(delay) => self.fail(attempt, reason.clone(), delay, false),
                        None => self.give_up(attempt, reason.clone()),
                    }
                }
            }
            Who::Head(name, event) => {
                let attempts = event.attempts.saturating_add(1);
                let resolution = match self.core.retry.after(attempts) {
                    Some(delay) => Resolution::Again {
                        attempts,
                        reason,
                        delay,
                    },
                    None => self.end_of(&event.message, attempts, reason),
                };
                self.resolve(name, &event, resolution);
            }
        }
    }

    /// What died alone before it is not guilty of that: nothing else got through either.
    pub(super) fn acquit(&mut self) {
        if self.draining && self.suspects.alone.is_none() {
            self.suspects.loud();
        }
        if let Some(Accused {
            who: Who::Head(name, _),
            ..
        }) = self.suspects.accused.take()
        {
            self.line_waits(&name, ALIVE);
        }
    }

    /// Whether the head of a line may be sent now. One that is suspect goes alone, and the others wait for its turn.
    pub(super) fn may_send_head(&mut self, event: &Deferred) -> bool {
        let suspects = &mut self.suspects;
        let deaths = suspects.heads.get(&event.line_id());
        let suspect = event.message.attribute(SUSPECT).is_some()
            || deaths.is_some_and(|deaths| *deaths >= DEATHS);
        if !suspect && suspects.is_quiet() {
            return true;
        }
        if suspects.alone.is_some() || (suspect && !suspects.is_quiet()) {
            return false;
        }
        if suspect {
            suspects.head_until = Some(Instant::now() + TURN);
        }
        if self.window.in_flight() > suspects.kept() || !self.hush() {
            return false;
        }
        self.suspects.head_until = None;
        self.suspects.alone = Some(Alone::Head);
        true
    }

    /// The publisher died over a line's head. False if it was not alone.
    pub(super) fn accuse_head(
        &mut self,
        was_alone: bool,
        (name, event): (&LineName, &Deferred),
        e: &pillarbox_transport::Error,
    ) -> bool {
        if was_alone && !self.suspects.fresh {
            // As for an event; it is soon read again.
            self.suspects.head_until = Some(Instant::now() + 10 * ALIVE);
            self.line_waits(name, Duration::from_millis(20));
        } else if was_alone {
            self.acquit();
            let who = Who::Head(name.clone(), Box::new(event.clone()));
            self.suspects.died_alone(who, e);
        } else {
            *self.suspects.heads.entry(event.line_id()).or_default() += 1;
        }
        was_alone
    }

    /// It was answered.
    pub(super) fn head_got_through(&mut self, event: &Deferred) {
        if !self.suspects.heads.is_empty() {
            self.suspects.heads.remove(&event.line_id());
        }
        self.got_through(event.position);
    }

    pub(super) fn head_is_alone(&self) -> bool {
        matches!(self.suspects.alone, Some(Alone::Head))
    }
}
