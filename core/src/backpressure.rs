//! How far the relays are behind, and refusing new events while that is too far.
//!
//! The log itself refuses nothing. A refusal is the application's wish, checked before the INSERT against what was last
//! seen: an enqueue stays one statement.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    error::{Error, Kind, Result},
    store::Store,
};

/// How old a look may be before the next enqueue asks for another.
const FRESH: Duration = Duration::from_secs(1);
/// A look that is older than this says nothing: nobody is refused for it.
const STALE: Duration = Duration::from_secs(30);

/// How far the relays are behind, at the destination that is farthest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// The age of the oldest event in the log that a destination is not done with; zero if there is none.
    pub age: Duration,
    /// How many events that may be. An estimate from positions: it also counts those that were rolled back or are done
    /// since.
    pub events: u64,
}

/// The most that an outbox lets the relays fall behind before it refuses events.
#[derive(Debug)]
pub(crate) struct Pressure {
    most: Backlog,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    latest: Option<(Instant, Backlog)>,
    /// When somebody began to look.
    looking: Option<Instant>,
}

impl Pressure {
    pub(crate) fn new(most: Backlog) -> Self {
        Self {
            most,
            seen: Arc::default(),
        }
    }

    /// Refuses by what was last seen, and sees to it that this is not old. Waits for nothing.
    pub(crate) fn check(&self, store: &Arc<dyn Store>) -> Result<()> {
        let now = Instant::now();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let latest = seen.latest;
        let old = latest.is_none_or(|(at, _)| now - at >= FRESH);
        if old && seen.looking.is_none_or(|since| now - since >= STALE) {
            seen.looking = Some(now);
            tokio::spawn(look(store.clone(), Arc::clone(&self.seen)));
        }
        drop(seen);
        let Some((at, backlog)) = latest.filter(|(at, _)| now - *at < STALE) else {
            return Ok(());
        };
        if backlog.age <= self.most.age && backlog.events <= self.most.events {
            return Ok(());
        }
        let text = format!(
            "the relays are behind by {} events, the oldest {:?} old (seen {:?} ago); the outbox takes none beyond {} or {:?}",
            backlog.events,
            backlog.age,
            now - at,
            self.most.events,
            self.most.age
        );
        Err(Error::new(Kind::Backlogged, "enqueue", text))
    }
}

async fn look(store: Arc<dyn Store>, seen: Arc<Mutex<Seen>>) {
    let looked = store.backlog().await;
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    seen.looking = None;
    match looked {
        Ok(backlog) => seen.latest = Some((Instant::now(), backlog)),
        Err(e) => {
            // Whoever may only write is refused nothing.
            tracing::debug!(error = %e, "the backlog is not known");
            seen.looking = Some(Instant::now());
        }
    }
}
