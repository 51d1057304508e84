//! The heads of lines, each its key's one unconfirmed event.

use std::time::Duration;

use futures_util::FutureExt;
use pillarbox_transport::Outcome;
use tokio::time::Instant;

use super::{super::lines::LineName, Done, LINE, Session};
use crate::{
    error::Result,
    failure::{Deferred, Resolution},
};

impl Session<'_> {
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
        let paused = self
            .paused
            .get(&event.message.topic)
            .map(|p| p.until)
            .filter(|until| *until > now);
        let wait = match (event.due_in, paused, &self.publisher) {
            (due_in, _, _) if !due_in.is_zero() => Some(now + due_in),
            (_, Some(until), _) => Some(until),
            _ if self.draining => Some(now),
            (_, None, None) => Some(now + Duration::from_millis(100)),
            _ if !self.window.take_line(name.key()) => Some(now + Duration::from_millis(5)),
            _ => None,
        };
        if let Some(until) = wait {
            self.lines.wait(&name, until);
            return Ok(());
        }
        let Some(publisher) = &self.publisher else {
            return Ok(());
        };
        let answer = publisher.publish(vec![event.message.clone()]);
        let publish = async move {
            let outcome = answer.await.pop().unwrap_or_else(|| {
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
        self.count(&outcome);
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
                None => Resolution::Dead {
                    attempts,
                    reason: e.to_string(),
                },
            },
            Outcome::Rejected(e) => Resolution::Dead {
                attempts,
                reason: e.to_string(),
            },
            Outcome::Unknown(e) => {
                self.lose_publisher(&e);
                return self.line_waits(&name, Duration::from_millis(100));
            }
            Outcome::Unavailable(e) => {
                self.pause(event.message.topic.clone(), &e);
                return self.line_waits(&name, Duration::from_millis(100));
            }
        };
        self.answers(&event.message.topic);
        if let Resolution::Dead { reason, .. } = &resolution {
            self.log_dead(&event.message, reason);
        }
        let again = if let Resolution::Again { delay, .. } = &resolution {
            Some(*delay)
        } else {
            None
        };
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let resolve = async move {
            let result = store.resolve(&lease, &event.line_id(), &resolution).await;
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
