//! The session's broker: publishing, and what each answer means.

use std::{collections::HashMap, time::Duration};

use futures_util::FutureExt;
use pillarbox_transport::{Outcome, Publisher};
use tokio::time::Instant;

use super::{super::circuit::Open, BROKER, Done, Failed, Pause, Session, trouble_with};
use crate::{backoff::Backoff, error::Result, failure::PARKED, store::Logged, window::Attempt};

/// How long a publish waits for quiet elsewhere to end.
const QUIET: Duration = Duration::from_millis(5);

impl Session<'_> {
    /// Opens a publisher, if it is time to; else answers when that may be, unless it is for the breaker to tell.
    pub(super) fn open(&mut self, now: Instant) -> Option<Instant> {
        if self.open_at > now {
            return Some(self.open_at);
        }
        self.probe = match self.core.circuit.ask(now) {
            Open::Now(probe) => probe,
            Open::At(at) => return Some(at),
            Open::Later => return None,
        };
        self.opening = true;
        let transport = self.core.transport.clone();
        self.work
            .push(async move { Done::Opened(transport.publisher().await) }.boxed());
        None
    }

    /// A paused destination needs no publisher, once what was sent is answered.
    pub(super) fn rest(&mut self) {
        if self.window.in_flight() == 0 {
            (self.publisher, self.probe) = (None, None);
        }
    }

    pub(super) fn opened(
        &mut self,
        opened: Result<Box<dyn Publisher>, pillarbox_transport::Error>,
    ) {
        self.opening = false;
        match opened {
            Ok(publisher) => {
                self.publisher = Some(publisher);
                self.publisher_opened();
                // Nothing is there whose confirm would show it.
                if self.window.is_empty() {
                    self.is_back();
                }
            }
            Err(e) => {
                self.is_away(&e);
                let probe = self.probe.take();
                self.core.circuit.failed(&e, probe.as_ref());
            }
        }
    }

    pub(super) fn publish(&mut self, now: Instant) {
        if self.suspects.is_active(now) {
            return self.publish_alone(now);
        }
        self.suspects.rest();
        let settings = self.core.settings.clone();
        // One that filled the window would leave nothing to send while its confirms are awaited.
        let most = settings.publish.min(settings.window.in_flight / 4).max(1);
        let held = self.pauses.clone().unwrap_or_default();
        loop {
            let probes = self.probe.is_some();
            if probes && self.window.in_flight() > 0 {
                return;
            }
            // Not while an event of another partition goes alone.
            let Ok(among_others) = self.core.quiet.clone().try_read_owned() else {
                // Whoever goes alone may wait for the breaker, and proves as well whether the broker is back.
                if probes {
                    self.is_back();
                }
                self.loud_at = now + QUIET;
                return;
            };
            let paused = &self.paused;
            let allowed = |e: &Logged| {
                let topic = &e.message.topic;
                paused.get(topic).is_none_or(|p| p.until <= now) && !held.hold_topic(topic)
            };
            let most = self.core.paced(if probes { 1 } else { most }, now);
            let attempts = self.window.take(most, allowed);
            if attempts.is_empty() {
                // Nothing is there to prove it with: that it could be opened must do.
                if probes && most > 0 {
                    self.is_back();
                }
                return;
            }
            self.core.spend(attempts.len());
            let (attempts, refused) = self.without_defects(attempts);
            for (attempt, reason) in refused {
                self.bury(attempt, reason);
            }
            if attempts.is_empty() {
                continue;
            }
            let Some(publisher) = &self.publisher else {
                return;
            };
            let events = attempts.iter().filter_map(|a| self.window.get(a.seq));
            // Its final size at once: growing by halves costs as much as the copies.
            let mut messages = Vec::with_capacity(attempts.len());
            messages.extend(events.map(|e| e.message.clone()));
            let answers = publisher.publish(messages);
            self.work.push(
                async move {
                    let outcomes = answers.await;
                    drop(among_others);
                    Done::Published(attempts, outcomes)
                }
                .boxed(),
            );
        }
    }

    /// Events that no broker may see are given up unsent.
    pub(super) fn without_defects(
        &self,
        attempts: Vec<Attempt>,
    ) -> (Vec<Attempt>, Vec<(Attempt, String)>) {
        let mut refused = Vec::new();
        let good = attempts.into_iter().filter(|a| {
            let defect = self.window.get(a.seq).and_then(|e| e.defect.clone());
            let is_good = defect.is_none();
            refused.extend(defect.map(|reason| (*a, reason)));
            is_good
        });
        (good.collect(), refused)
    }

    pub(super) fn published(&mut self, attempts: &[Attempt], mut outcomes: Vec<Outcome>) {
        // A transport that answers too little has not answered: nothing is assumed.
        outcomes.resize_with(attempts.len(), || {
            Outcome::Unknown(pillarbox_transport::Error::new(
                pillarbox_transport::Kind::Closed,
                "publish",
                "the transport gave no outcome",
            ))
        });
        // Summed up for each batch: a counter for each event costs more than the rest of its bookkeeping.
        let mut counts = HashMap::new();
        for (attempt, outcome) in attempts.iter().zip(outcomes) {
            if let Some(name) = self.answered(*attempt, outcome) {
                *counts.entry(name).or_default() += 1;
            }
        }
        for (name, count) in counts {
            self.count(name, count);
        }
    }

    /// Answers the outcome's name, if it is one of the event's current attempt.
    fn answered(&mut self, attempt: Attempt, outcome: Outcome) -> Option<&'static str> {
        // An answer to an earlier attempt says nothing about the current one.
        if !self.window.is_current(attempt) {
            return None;
        }
        let event = self.window.get(attempt.seq)?;
        let (message, position) = (event.message.clone(), event.position);
        let (topic, kind) = (&message.topic, &message.kind);
        let name = self.name(kind, &outcome);
        match outcome {
            Outcome::Unknown(e) => {
                self.unsure.insert(attempt.seq);
                self.lose_publisher(&e);
                self.window.again(attempt);
                return Some(name);
            }
            Outcome::Unavailable(e) if !self.is_accepted(kind, &e) => {
                self.window.again(attempt);
                self.suspects.unanswered();
                self.pause(topic.clone(), &e);
                return Some(name);
            }
            Outcome::Stored | Outcome::Unavailable(_) => {
                self.window.settle(attempt);
            }
            Outcome::Retry(e) if self.is_accepted(kind, &e) => {
                self.window.settle(attempt);
            }
            Outcome::Retry(e) => match self.core.retry.after(1) {
                Some(delay) => self.fail(attempt, e.to_string(), delay, false),
                None => self.give_up(attempt, e.to_string()),
            },
            Outcome::Rejected(e) => self.give_up(attempt, e.to_string()),
        }
        self.answers(topic);
        self.got_through(position);
        Some(name)
    }

    pub(super) fn fail(&mut self, attempt: Attempt, reason: String, delay: Duration, parked: bool) {
        let failed = Failed {
            attempts: 1,
            reason,
            delay,
            parked,
        };
        self.failed.insert(attempt.seq, failed);
        self.window.defer(attempt);
    }

    /// A dead letter, or the head of a line that waits for an operator.
    pub(super) fn give_up(&mut self, attempt: Attempt, reason: String) {
        let message = self.window.get(attempt.seq).map(|e| &e.message);
        if let Some(message) = message.filter(|m| self.core.parks(m)) {
            self.log_parked(message, &reason);
            self.fail(attempt, reason, PARKED, true);
        } else {
            self.bury(attempt, reason);
        }
    }

    /// The broker has answered, whatever it said.
    pub(super) fn is_back(&mut self) {
        self.core.circuit.answered();
        self.probe = None;
        // Quietly, as below: the breaker has told it.
        if self.core.report.is_troubled() {
            self.core
                .report
                .clear(&trouble_with(self.partition, BROKER));
        }
    }

    /// In the health alone: an outage is one line in the log, the breaker's, and not one for each partition and try.
    fn is_away(&self, e: &pillarbox_transport::Error) {
        let what = trouble_with(self.partition, BROKER);
        self.core.report.trouble(&what, &e.to_string());
    }

    /// The broker takes events of this topic, or says what is wrong with one: it is not away.
    pub(super) fn answers(&mut self, topic: &str) {
        self.open_backoff.reset();
        self.paused.remove(topic);
        self.is_back();
        self.goes_on(topic);
    }

    pub(super) fn is_accepted(&self, kind: &str, e: &pillarbox_transport::Error) -> bool {
        e.kind() == pillarbox_transport::Kind::Unrouted && self.core.accept_unrouted.contains(kind)
    }

    /// The session is dead: what is still open on it resolves by itself, and nothing more is given to it.
    pub(super) fn lose_publisher(&mut self, e: &pillarbox_transport::Error) {
        if self.publisher.take().is_some() {
            self.is_away(e);
            let probe = self.probe.take();
            self.core.circuit.lost(e, probe.as_ref());
            self.open_at = Instant::now() + self.open_backoff.step();
            self.publisher_died(e);
        }
    }

    /// The broker's trouble, not the event's: the topic waits, nothing is counted.
    pub(super) fn pause(&mut self, topic: String, e: &pillarbox_transport::Error) {
        self.is_back();
        self.waits(&topic, &e.to_string());
        let now = Instant::now();
        let fresh = || Pause {
            until: now,
            backoff: Backoff::new(Duration::from_millis(20), Duration::from_secs(2)),
        };
        let pause = self.paused.entry(topic).or_insert_with(fresh);
        if pause.until <= now {
            pause.until = now + pause.backoff.step();
        }
    }

    pub(super) fn name(&self, kind: &str, outcome: &Outcome) -> &'static str {
        match outcome {
            Outcome::Stored => "stored",
            Outcome::Retry(e) | Outcome::Unavailable(e) if self.is_accepted(kind, e) => "accepted",
            Outcome::Unknown(_) => "unknown",
            Outcome::Unavailable(_) => "unavailable",
            Outcome::Retry(_) => "retry",
            Outcome::Rejected(_) => "rejected",
        }
    }

    pub(super) fn count(&self, name: &'static str, events: u64) {
        if matches!(name, "stored" | "accepted") {
            self.core.taken(events);
        }
        let destination = self.core.destination.clone();
        metrics::counter!("pillarbox_relay_events_total", "destination" => destination, "outcome" => name).increment(events);
    }
}
