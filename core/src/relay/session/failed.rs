//! What failed: into its line, or given up.

use std::time::Duration;

use futures_util::FutureExt;
use pillarbox_transport::Message;
use tokio::time::Instant;

use super::{super::lines::LineName, BURYING, DEFERRALS, DEFERRING, Done, Session};
use crate::{
    error::{Error, Kind, Result},
    event::Key,
    failure::{DeadLetter, Deferral, Hold, Side},
    relay::RelaySettings,
    store::Waiting,
    window::{Attempt, Seq},
};

impl Session<'_> {
    pub(super) fn defer(&mut self) {
        let seqs = self.window.take_deferrals(DEFERRALS);
        if seqs.is_empty() {
            return;
        }
        self.deferring = true;
        let events: Vec<Deferral> = seqs
            .iter()
            .filter_map(|seq| {
                let event = self.window.get(*seq)?;
                let failed = self.failed.get(seq);
                let hold = match (failed, event.deliver_at) {
                    (Some(failed), _) if failed.parked => Hold::Parked,
                    (_, Some(at)) => Hold::Scheduled(at),
                    _ => Hold::None,
                };
                Some(Deferral {
                    message: Message::clone(&event.message),
                    position: event.position,
                    attempts: failed.map_or(0, |f| f.attempts),
                    reason: failed.map(|f| f.reason.clone()),
                    delay: failed.map_or(Duration::ZERO, |f| f.delay),
                    maybe_sent: self.unsure.contains(seq),
                    hold,
                })
            })
            .collect();
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let settings = self.core.settings.clone();
        let scope = self.core.destination.to_string();
        let write = async move {
            let waiting = match store.deferred(Side::Relay, &scope).await {
                Ok(waiting) => waiting,
                Err(e) => return Done::Deferred(seqs, Vec::new(), false, Err(e)),
            };
            let all = seqs.into_iter().zip(events);
            let (fit, left): (Vec<_>, Vec<_>) =
                all.partition(|(_, e)| fits(&settings, &waiting, e));
            let (seqs, events): (Vec<_>, Vec<_>) = fit.into_iter().unzip();
            let left: Vec<Seq> = left.into_iter().map(|(seq, _)| seq).collect();
            if events.is_empty() {
                let full = Error::new(Kind::Unavailable, "defer", full(&settings, &waiting));
                return Done::Deferred(seqs, left, false, Err(full));
            }
            let result = store.defer(&lease, &events).await;
            Done::Deferred(seqs, left, true, result)
        };
        self.work.push(write.boxed());
    }

    /// `tried`: it came to the insert.
    pub(super) fn deferred(&mut self, seqs: &[Seq], tried: bool, result: Result<()>) -> Result<()> {
        self.deferring = false;
        let now = Instant::now();
        if let Err(e) = result {
            if tried {
                // The rows may be there all the same, and fill the waiting room: their lines must go on.
                self.lines_grew(seqs, now);
            }
            self.window.not_deferred(seqs);
            self.defer_at = now + Duration::from_secs(1);
            return self.trouble(DEFERRING, e);
        }
        self.goes_on(DEFERRING);
        self.lines_grew(seqs, now);
        for seq in seqs {
            self.failed.remove(seq);
        }
        let scheduled = |seq: &Seq| {
            self.window
                .get(*seq)
                .is_some_and(|e| e.deliver_at.is_some())
        };
        if seqs.iter().any(scheduled) {
            self.due_at = Some(now);
        }
        self.window.deferred(seqs);
        Ok(())
    }

    fn lines_grew(&mut self, seqs: &[Seq], now: Instant) {
        for seq in seqs {
            let Some(event) = self.window.get(*seq).filter(|e| e.deliver_at.is_none()) else {
                continue;
            };
            let id = (event.message.source().to_owned(), event.message.id.clone());
            let name = LineName::new(Key::of(&event.message), id);
            let delay = self.failed.get(seq).map_or(Duration::ZERO, |f| f.delay);
            self.lines.grew(name, now + delay);
        }
    }

    pub(super) fn bury(&mut self, attempt: Attempt, reason: String) {
        let Some(event) = self.window.get(attempt.seq) else {
            return;
        };
        let dead = DeadLetter {
            message: Message::clone(&event.message),
            position: event.position,
            attempts: 1,
            reason,
            maybe_sent: self.unsure.contains(&attempt.seq),
        };
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let write = async move {
            let result = store.bury(&lease, std::slice::from_ref(&dead)).await;
            if result.is_err() {
                // It is tried again at once, and the broker asked anew: not in a rush.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Done::Buried(attempt, dead.reason, result)
        };
        self.work.push(write.boxed());
    }

    pub(super) fn log_parked(&self, message: &pillarbox_transport::Message, reason: &str) {
        tracing::warn!(destination = %self.core.destination, id = %message.id, kind = %message.kind, key = message.key, reason, "a key is parked");
    }

    pub(super) fn log_dead(&self, message: &pillarbox_transport::Message, reason: &str) {
        tracing::warn!(destination = %self.core.destination, id = %message.id, kind = %message.kind, reason, "dead letter");
    }

    /// Until its row is known to be committed it is its key's unconfirmed event.
    pub(super) fn buried(
        &mut self,
        attempt: Attempt,
        reason: &str,
        result: Result<()>,
    ) -> Result<()> {
        match result {
            Ok(()) => {
                if let Some(event) = self.window.get(attempt.seq) {
                    self.log_dead(&event.message, reason);
                }
                self.goes_on(BURYING);
                self.window.settle(attempt);
                Ok(())
            }
            Err(e) => {
                self.window.again(attempt);
                self.trouble(BURYING, e)
            }
        }
    }
}

/// Scheduled events have a room of their own: neither fills the other's.
fn fits(settings: &RelaySettings, waiting: &Waiting, event: &Deferral) -> bool {
    if let Hold::Scheduled(_) = event.hold {
        return waiting.scheduled < settings.scheduled;
    }
    waiting.total < settings.deferred && waiting.longest < settings.deferred_per_key
}

fn full(settings: &RelaySettings, waiting: &Waiting) -> String {
    format!(
        "{} events wait, {} of one key, and {} for their time; the maxima are {}, {} and {}",
        waiting.total,
        waiting.longest,
        waiting.scheduled,
        settings.deferred,
        settings.deferred_per_key,
        settings.scheduled
    )
}
