//! Which destination a relay serves: made where it is missing, anchored where the database has moved; and what of the log goes
//! there.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use pillarbox_transport::Message;
use tokio::time::Instant;

use super::{Core, Relay};
use crate::{
    admin::Selection,
    cursor::Progress,
    destination::{MAIN, REPLAYED, Start, gone, of_replay},
    error::{Error, Kind, Result},
    failure::{OnExhausted, Retry},
    lease::{Acquired, LeaseKey},
    store::{Added, Logged, NewDestination, Slice, Store},
};

impl Relay {
    /// Serves this destination instead of `main`: a set of cursors of its own over the same log, with this relay's transport and
    /// [topics](Relay::topics). It must be there ([`Admin::add_destination`](crate::Admin::add_destination)), or
    /// [`Relay::start`] say where it begins; else the relay ends with [`Kind::NotFound`], and so it does
    /// when the destination is removed.
    ///
    /// The log keeps what any destination has not published: one that nobody serves any more must be removed.
    pub fn destination(mut self, name: impl AsRef<str>) -> Self {
        self.core.destination = name.as_ref().into();
        self
    }

    /// Makes the destination where it is missing, beginning there. Means nothing once it is there.
    pub fn start(mut self, start: Start) -> Self {
        self.core.start = Some(start);
        self
    }

    pub(crate) fn serves(&self, destination: &str) -> bool {
        &*self.core.destination == destination
    }

    /// A relay that sends what a replay has not sent, and says how much.
    pub(crate) fn replaying(
        mut self,
        store: &Arc<dyn Store>,
        name: &str,
        selection: &Selection,
        per_second: f64,
    ) -> (Self, Arc<Replaying>) {
        let replaying = Arc::new(Replaying {
            name: name.to_owned(),
            selection: selection.clone(),
            pace: Mutex::new(Pace::new(per_second, Instant::now())),
            sent: AtomicU64::new(0),
        });
        self.core.store = store.clone();
        self.core.destination = of_replay(name).into();
        self.core.start = None;
        self.core.replay = Some(replaying.clone());
        // A key that waited for an operator would keep the replay from ending.
        self.core.retry = Arc::new(Retry {
            on_exhausted: OnExhausted::Continue,
            ..(*self.core.retry).clone()
        });
        (self, replaying)
    }
}

/// What the tasks of a relay share while it replays.
#[derive(Debug)]
pub(crate) struct Replaying {
    name: String,
    selection: Selection,
    pace: Mutex<Pace>,
    sent: AtomicU64,
}

impl Replaying {
    /// Events that the broker has taken.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn pace(&self) -> std::sync::MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Turns that fill up evenly, a fifth of a second's at most.
#[derive(Debug)]
struct Pace {
    per_second: f64,
    turns: f64,
    at: Instant,
}

impl Pace {
    fn new(per_second: f64, now: Instant) -> Self {
        Self {
            per_second,
            turns: 1.0,
            at: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        let most = (self.per_second / 5.0).max(1.0);
        self.turns = (self.turns + passed * self.per_second).min(most);
        self.at = self.at.max(now);
    }

    /// How many events may go now.
    fn now(&mut self, now: Instant) -> usize {
        self.fill(now);
        // Between 0 and a fifth of the highest rate.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        {
            self.turns as usize
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn spend(&mut self, events: usize) {
        self.turns -= events as f64;
    }

    /// When the next one may, if none may now.
    fn next(&mut self, now: Instant) -> Option<Instant> {
        self.fill(now);
        let missing = 1.0 - self.turns;
        (missing > 0.0).then(|| {
            // A millisecond more, so that the turn is there and not nearly there.
            now + Duration::from_secs_f64(missing / self.per_second) + Duration::from_millis(1)
        })
    }
}

impl Core {
    /// Looks whether the relay can work here, and answers the number of partitions.
    pub(super) async fn enter(&self) -> Result<u16> {
        let partitions = self.store.partitions().await?;
        self.anchor().await?;
        self.make_destination().await?;
        Ok(partitions)
    }

    async fn make_destination(&self) -> Result<()> {
        const OPERATION: &str = "serve a destination";
        let name = &*self.destination;
        if self.replay.is_some() {
            return Ok(());
        }
        crate::destination::check_name(OPERATION, name)?;
        let Some(start) = self.start else {
            return self.must_be_there(OPERATION, name).await;
        };
        let new = NewDestination {
            name: name.to_owned(),
            start,
            replay: None,
            again: false,
        };
        match self.store.add_destination(&new).await? {
            Added::New => tracing::info!(destination = name, %start, "a destination was added"),
            Added::There(_) => {}
            Added::Removed(removed) => return Err(gone(OPERATION, &removed)),
        }
        Ok(())
    }

    async fn must_be_there(&self, operation: &'static str, name: &str) -> Result<()> {
        // Made with the schema; whether it was removed is seen with its lease.
        if name == MAIN {
            return Ok(());
        }
        let all = self.store.destinations().await?;
        if all.iter().any(|k| k.destination.name == name) {
            return Ok(());
        }
        let removed = self.store.removed_destinations().await?;
        if let Some(removed) = removed.iter().find(|r| r.name == name) {
            return Err(gone(operation, removed));
        }
        let known: Vec<_> = all.into_iter().map(|k| k.destination.name).collect();
        let text = format!(
            "there is no destination {name:?}; there are: {}. Add it, or say where it starts",
            known.join(", ")
        );
        Err(Error::new(Kind::NotFound, operation, text))
    }

    /// Takes a lease; where the database has moved, its cursors are anchored first.
    pub(super) async fn acquire(&self, key: &LeaseKey) -> Result<Option<Acquired>> {
        match self.store.acquire(key, self.settings.lease).await {
            Err(e) if e.kind() == Kind::Moved => {
                self.anchor().await?;
                self.store.acquire(key, self.settings.lease).await
            }
            answer => answer,
        }
    }

    /// Loud: events come a second time, and nobody has done anything here that would tell them why.
    async fn anchor(&self) -> Result<()> {
        let Some(anchored) = self.store.anchor().await? else {
            return Ok(());
        };
        let (cause, unsettled) = (anchored.cause.to_string(), &anchored.unsettled);
        metrics::counter!("pillarbox_reanchored_total", "cause" => cause.clone()).increment(1);
        tracing::warn!(
            cause,
            ?unsettled,
            "the database was found in another place; nothing is lost by that, and what was sent after the state that it \
             has now is sent again"
        );
        self.report.reanchored(anchored);
        Ok(())
    }

    /// Whether an event of the log goes to the destination. Asked here and not in SQL: the cursor must move over what nobody
    /// wants.
    pub(super) fn wants(&self, event: &Logged, since: Option<SystemTime>) -> bool {
        let topic = &event.message.topic;
        self.topics.as_ref().is_none_or(|t| t.contains(topic))
            && since.is_none_or(|t| event.message.time >= t)
            && self.replay.as_ref().is_none_or(|r| {
                // What could not be read was given up before.
                event.defect.is_none() && r.selection.names(event, SystemTime::now())
            })
    }

    /// Consumers may want to know.
    pub(super) fn mark(&self, message: &mut Message) {
        if let Some(replay) = &self.replay {
            let name = replay.name.clone();
            message.attributes.insert(REPLAYED.to_owned(), name);
        }
    }

    /// A replay reads the slice that was opened when it was started, and no further.
    pub(super) fn bounded(&self, from: &Progress, slice: Slice) -> Slice {
        if self.replay.is_none() || slice.events.is_empty() || slice.within.upto == from.upto {
            return slice;
        }
        // The next slice: what was asked for ended before it.
        let end = Progress {
            upto: None,
            last: 0,
            ..slice.within
        };
        Slice {
            within: from.clone(),
            end: Some(end),
            ..Slice::default()
        }
    }

    /// Whether there can be more to read behind a progress.
    pub(super) fn reads_on(&self, from: &Progress) -> bool {
        self.replay.is_none() || from.upto.is_some()
    }

    /// How many events may be sent now, of so many.
    pub(super) fn paced(&self, most: usize, now: Instant) -> usize {
        let replay = self.replay.as_ref();
        replay.map_or(most, |r| r.pace().now(now).min(most))
    }

    /// So many are sent.
    pub(super) fn spend(&self, events: usize) {
        if let Some(replay) = &self.replay {
            replay.pace().spend(events);
        }
    }

    /// When the next event may be sent, where that is not now.
    pub(super) fn next_turn(&self, now: Instant) -> Option<Instant> {
        self.replay.as_ref().and_then(|r| r.pace().next(now))
    }

    /// The broker has taken so many.
    pub(super) fn taken(&self, events: u64) {
        if let Some(replay) = &self.replay {
            replay.sent.fetch_add(events, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_evenly_and_do_not_pile_up() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut pace = Pace::new(100.0, begin);
        assert_eq!(pace.now(begin), 1);
        pace.spend(1);
        assert_eq!(pace.now(begin), 0);
        let next = pace.next(begin).unwrap();
        assert!(next > at(10) && next < at(13));
        assert_eq!(pace.now(at(50)), 5);
        assert_eq!(pace.now(at(60_000)), 20, "a fifth of a second's at most");
        assert_eq!(pace.next(at(60_000)), None);
        // One at a time, however slow.
        let mut slow = Pace::new(0.1, begin);
        slow.spend(1);
        assert_eq!(slow.now(at(9_000)), 0);
        assert_eq!(slow.now(at(10_100)), 1);
    }
}
