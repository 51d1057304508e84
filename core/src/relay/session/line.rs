//! The heads of lines, each its key's one unconfirmed event.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use pillarbox_transport::{Message, Outcome};
use tokio::time::Instant;

use super::{super::lines::LineName, Done, LINE, LINES, LOOK, LOOKING, SCHEDULE, Session};
use crate::{
    error::Result,
    failure::{Deferred, Line, PARKED, RETRIED, Resolution, SUSPECT, Side},
    store::{Due, Waiting},
};

/// Scheduled events that enter their lines at a time.
const AT_ONCE: u32 = 100;
/// A look takes at most this share of the time.
const SHARE: u32 = 50;

impl Session<'_> {
    /// Looks for lines that this owner does not know: an operator puts dead letters back behind its back.
    pub(super) fn look(&mut self, now: Instant) {
        self.looking = true;
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let scope = self.core.destination.to_string();
        let look = async move {
            // Nearly always, nothing waits at all.
            let waiting = store.deferred(Side::Relay, &scope).await;
            let looked = match waiting {
                Ok(waiting) if waiting.total == 0 => Ok((waiting, Vec::new())),
                Ok(waiting) => store.lines(&lease, LINES).await.map(|l| (waiting, l)),
                Err(e) => Err(e),
            };
            Done::Looked(now, looked)
        };
        self.work.push(look.boxed());
    }

    pub(super) fn looked(
        &mut self,
        begun: Instant,
        looked: Result<(Waiting, Vec<Line>)>,
    ) -> Result<()> {
        self.looking = false;
        let now = Instant::now();
        self.look_at = now + LOOK.max(now.saturating_duration_since(begun) * SHARE);
        let (waiting, lines) = match looked {
            Ok(looked) => looked,
            Err(e) => return self.trouble(LOOKING, e),
        };
        self.goes_on(LOOKING);
        self.core.report.parked(waiting.parked);
        self.found(lines, now);
        Ok(())
    }

    /// A line that is empty by now does no harm: the read of its head unblocks the key.
    fn found(&mut self, lines: Vec<Line>, now: Instant) {
        for line in lines {
            if let Some(key) = &line.key {
                self.window.block(key.clone());
            }
            let due = now + line.due_in;
            let name = LineName::new(line.key, line.head);
            // One that waits for the end of a pause is due all the same.
            if !self.put_off.contains(&name) {
                self.lines.found(name, due);
            }
        }
    }

    /// Lets scheduled events enter their lines when their time comes.
    pub(super) fn fall_due(&mut self) {
        self.due_at = None;
        let (store, lease, newest) = (self.store.clone(), self.lease.clone(), self.newest);
        let fall = async move { store.fall_due(&lease, newest, AT_ONCE).await };
        self.work.push(fall.map(Done::FellDue).boxed());
    }

    pub(super) fn fell_due(&mut self, due: Result<Due>) -> Result<()> {
        let now = Instant::now();
        match due {
            Ok(due) => {
                self.goes_on(SCHEDULE);
                // One may have been scheduled meanwhile.
                let next = due.next.map(|next| now + next);
                self.due_at = [self.due_at, next].into_iter().flatten().min();
                self.found(due.lines, now);
                Ok(())
            }
            // Those that entered all the same are found as any other line.
            Err(e) => {
                self.due_at = Some(now + LOOK);
                self.trouble(SCHEDULE, e)
            }
        }
    }

    pub(super) fn load_line(&mut self, name: LineName) {
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let load = async move {
            let head = store
                .line(&lease, name.key(), &name.id(), 1)
                .await
                .map(|events| events.into_iter().next());
            Done::Line(name, head)
        };
        self.work.push(load.boxed());
    }

    pub(super) fn line_loaded(
        &mut self,
        name: LineName,
        head: Result<Option<Deferred>>,
    ) -> Result<()> {
        let now = Instant::now();
        if head.is_ok() {
            self.goes_on(LINE);
        }
        let event = match head {
            Ok(Some(event)) => event,
            Ok(None) => {
                if self.lines.empty(&name, now)
                    && let Some(key) = name.key()
                {
                    self.window.unblock(key);
                }
                return Ok(());
            }
            Err(e) => {
                self.lines.wait(&name, now + Duration::from_secs(1));
                return self.trouble(LINE, e);
            }
        };
        if self.holds(&event.message) {
            self.put_off(name);
            return Ok(());
        }
        let paused = self
            .paused
            .get(&event.message.topic)
            .map(|p| p.until)
            .filter(|until| *until > now);
        let wait = match (event.due_in, paused, self.publisher.is_some()) {
            (due_in, _, _) if !due_in.is_zero() => Some(now + due_in),
            (_, Some(until), _) => Some(until),
            _ if self.draining => Some(now),
            (_, None, false) => Some(now + Duration::from_millis(100)),
            _ if !self.may_send_head(&event) => Some(now + Duration::from_millis(20)),
            _ if !self.window.take_line(name.key()) => {
                self.suspects.unanswered();
                Some(now + Duration::from_millis(20))
            }
            _ => None,
        };
        if let Some(until) = wait {
            self.lines.wait(&name, until);
            return Ok(());
        }
        if let Some(reason) = self.refusal(&event.message) {
            self.suspects.unanswered();
            let attempts = event.attempts.saturating_add(1);
            self.resolve(name, &event, Resolution::Dead { attempts, reason });
            return Ok(());
        }
        let Some(publisher) = &self.publisher else {
            return Ok(());
        };
        // None for one that goes alone.
        let among_others = self.core.quiet.clone().try_read_owned().ok();
        if among_others.is_none() && !self.head_is_alone() {
            self.line_waits(&name, Duration::from_millis(20));
            return Ok(());
        }
        let mut message = event.message.clone();
        message.attributes.remove(SUSPECT);
        let answer = publisher.publish(vec![Arc::new(message)]);
        let publish = async move {
            let mut outcomes = answer.await;
            drop(among_others);
            let outcome = outcomes.pop().unwrap_or_else(|| {
                let text = "the transport gave no outcome";
                Outcome::Unknown(pillarbox_transport::Error::new(
                    pillarbox_transport::Kind::Closed,
                    "publish",
                    text,
                ))
            });
            Done::LinePublished(name, Box::new(event), outcome)
        };
        self.work.push(publish.boxed());
        Ok(())
    }

    pub(super) fn line_published(&mut self, name: LineName, event: Deferred, outcome: Outcome) {
        self.count(self.name(&event.message.kind, &outcome), 1);
        let attempts = event.attempts.saturating_add(1);
        let resolution = match outcome {
            Outcome::Stored => Resolution::Done,
            Outcome::Retry(e) | Outcome::Unavailable(e)
                if self.is_accepted(&event.message.kind, &e) =>
            {
                Resolution::Done
            }
            Outcome::Retry(e) => match self.core.retry.after(attempts) {
                Some(delay) => Resolution::Again {
                    attempts,
                    reason: e.to_string(),
                    delay,
                },
                None => self.end_of(&event.message, attempts, e.to_string()),
            },
            Outcome::Rejected(e) => self.end_of(&event.message, attempts, e.to_string()),
            Outcome::Unknown(e) => {
                let alone = self.head_is_alone();
                self.lose_publisher(&e);
                if self.accuse_head(alone, (&name, &event), &e) {
                    return;
                }
                if event.maybe_sent {
                    return self.line_waits(&name, Duration::from_millis(100));
                }
                return self.note(name, &event);
            }
            Outcome::Unavailable(e) => {
                self.suspects.unanswered();
                self.pause(event.message.topic.clone(), &e);
                return self.line_waits(&name, Duration::from_millis(100));
            }
        };
        self.answers(&event.message.topic);
        self.head_got_through(&event);
        self.resolve(name, &event, resolution);
    }

    pub(super) fn end_of(&self, message: &Message, attempts: u32, reason: String) -> Resolution {
        if self.core.parks(message) {
            return Resolution::Park { attempts, reason };
        }
        Resolution::Dead { attempts, reason }
    }

    /// Notes at the row that its answer was lost: a dead letter tells, whoever gives it up later.
    fn note(&mut self, name: LineName, event: &Deferred) {
        let (store, lease, id) = (self.store.clone(), self.lease.clone(), event.line_id());
        let note = async move {
            let result = store.resolve(&lease, &id, &Resolution::Unsure).await;
            Done::Noted(name, result)
        };
        self.work.push(note.boxed());
    }

    pub(super) fn line_noted(&mut self, name: &LineName, result: Result<()>) -> Result<()> {
        self.line_waits(name, Duration::from_millis(100));
        result.or_else(|e| self.trouble(LINE, e))
    }

    /// What was given up unsent for breaking a limit may break it still when an operator puts it back.
    fn refusal(&self, message: &Message) -> Option<String> {
        message.attribute(RETRIED)?;
        let mut own = message.clone();
        // Our own attributes are not held against it.
        own.attributes
            .retain(|name, _| !name.starts_with("pillarbox"));
        self.core.limits.check(&own).err().map(|e| e.to_string())
    }

    pub(super) fn resolve(&mut self, name: LineName, event: &Deferred, resolution: Resolution) {
        let again = match &resolution {
            Resolution::Again { delay, .. } => Some(*delay),
            Resolution::Park { reason, .. } => {
                self.log_parked(&event.message, reason);
                Some(PARKED)
            }
            Resolution::Dead { reason, .. } => {
                self.log_dead(&event.message, reason);
                None
            }
            Resolution::Done | Resolution::Unsure => None,
        };
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let id = event.line_id();
        let resolve = async move {
            let result = store.resolve(&lease, &id, &resolution).await;
            Done::LineResolved(name, again, result)
        };
        self.work.push(resolve.boxed());
    }

    pub(super) fn line_waits(&mut self, name: &LineName, wait: Duration) {
        self.window.end_line(name.key());
        self.lines.wait(name, Instant::now() + wait);
    }

    pub(super) fn line_resolved(
        &mut self,
        name: &LineName,
        again: Option<Duration>,
        result: Result<()>,
    ) -> Result<()> {
        match result {
            Ok(()) => {
                self.line_waits(name, again.unwrap_or_default());
                Ok(())
            }
            // Unknown: the row tells, when it is read again.
            Err(e) => {
                self.line_waits(name, Duration::from_millis(100));
                self.trouble(LINE, e)
            }
        }
    }
}
