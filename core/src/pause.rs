//! What operators hold back for a while: stored in the database, with an end, a reason and a name.
//!
//! A relay or consumer looks at the pauses of its own once a second, by one read of a small table. Until the first look has
//! succeeded it holds everything back: one that starts during a pause must not send first and look then.

use std::{
    collections::HashSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    error::Result, event::Key, failure::Side, running::Report, signal::Signal, store::Store,
};

/// How often they are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// The name of the look's own trouble, and of a pause of the whole, in the health.
const LOOKING: &str = "looking for pauses";
const WHOLE: &str = "pause";

/// What is paused: a destination, one topic or one key of it, a consumer group, or one key of it.
///
/// ```
/// use pillarbox_core::admin::Target;
/// let all = Target::destination("main");
/// let one_customer = Target::destination("main").key("orders.events", "customer-7");
/// let a_group = Target::group("billing");
/// # assert_eq!(one_customer.to_string(), r#"destination "main", topic "orders.events", key "customer-7""#);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Whose: a relay's or a consumer's.
    pub side: Side,
    /// The destination (relay) or the group (consumer).
    pub scope: String,
    /// This topic alone.
    pub topic: Option<String>,
    /// This key of the topic alone.
    pub key: Option<String>,
}

impl Target {
    /// A destination: nothing of it is sent.
    #[must_use]
    pub fn destination(name: impl Into<String>) -> Self {
        Self::whole(Side::Relay, name.into())
    }

    /// A consumer group: none of its sources is read, none of its handlers runs.
    #[must_use]
    pub fn group(name: impl Into<String>) -> Self {
        Self::whole(Side::Consumer, name.into())
    }

    fn whole(side: Side, scope: String) -> Self {
        Self {
            side,
            scope,
            topic: None,
            key: None,
        }
    }

    /// One topic of the destination. A group is paused as a whole, or one key of it.
    #[must_use]
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        (self.topic, self.key) = (Some(topic.into()), None);
        self
    }

    /// One key of the destination or group.
    #[must_use]
    pub fn key(mut self, topic: impl Into<String>, key: impl Into<String>) -> Self {
        (self.topic, self.key) = (Some(topic.into()), Some(key.into()));
        self
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.side {
            Side::Relay => "destination",
            Side::Consumer => "group",
        };
        write!(f, "{what} {:?}", self.scope)?;
        if let Some(topic) = &self.topic {
            write!(f, ", topic {topic:?}")?;
        }
        if let Some(key) = &self.key {
            write!(f, ", key {key:?}")?;
        }
        Ok(())
    }
}

/// A pause that is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// What is paused.
    pub target: Target,
    /// When it ends by itself, by the database's clock.
    pub until: SystemTime,
    /// Why.
    pub reason: String,
    /// Who paused it.
    pub operator: String,
    /// Since when.
    pub since: SystemTime,
}

impl Pause {
    /// The longest pause: 7 days. A destination that is paused keeps the log from being emptied.
    pub const LONGEST: Duration = Duration::from_secs(7 * 86_400);
    /// Most pauses in a database.
    pub const MOST: usize = 1_000;
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let until = Utc(self.until);
        let Self {
            target,
            operator,
            reason,
            ..
        } = self;
        write!(
            f,
            "{target} is paused until {until} by {operator:?} because {reason:?}"
        )
    }
}

/// When a pause ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// So long from now. Defaults to 1 h.
    In(Duration),
    /// At this time, by the database's clock.
    At(SystemTime),
}

impl Default for Expiry {
    fn default() -> Self {
        Self::In(Duration::from_secs(3_600))
    }
}

impl From<Duration> for Expiry {
    fn from(d: Duration) -> Self {
        Self::In(d)
    }
}

impl From<SystemTime> for Expiry {
    fn from(t: SystemTime) -> Self {
        Self::At(t)
    }
}

/// To the second, as people read it.
struct Utc(SystemTime);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = i64::try_from(seconds.as_secs()).unwrap_or(i64::MAX / 2);
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        // Days since March 1 of year 0, in eras of 400 years, so that a leap day is a year's last.
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year + i64::from(month <= 2);
        let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
        )
    }
}

/// The pauses of one destination or group.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pauses {
    pub(crate) all: Vec<Pause>,
    pub(crate) whole: bool,
    pub(crate) topics: HashSet<String>,
    pub(crate) keys: HashSet<Key>,
}

impl Pauses {
    fn of(all: Vec<Pause>) -> Self {
        let mut pauses = Self::default();
        for Target { topic, key, .. } in all.iter().map(|p| &p.target) {
            match (topic, key) {
                (Some(topic), Some(key)) => drop(pauses.keys.insert(Key {
                    topic: topic.as_str().into(),
                    key: key.as_str().into(),
                })),
                (Some(topic), None) => drop(pauses.topics.insert(topic.clone())),
                (None, _) => pauses.whole = true,
            }
        }
        pauses.all = all;
        pauses
    }

    pub(crate) fn hold_topic(&self, topic: &str) -> bool {
        !self.topics.is_empty() && self.topics.contains(topic)
    }

    pub(crate) fn hold_key(&self, key: Option<&Key>) -> bool {
        !self.keys.is_empty() && key.is_some_and(|key| self.keys.contains(key))
    }
}

/// The pauses as they were last seen; none before the first look.
#[derive(Debug)]
pub(crate) struct Watched {
    all: Arc<Signal<Option<Arc<Pauses>>>>,
    own: watch::Receiver<Option<Arc<Pauses>>>,
}

/// Each has a channel of its own.
impl Clone for Watched {
    fn clone(&self) -> Self {
        Self::of(self.all.clone())
    }
}

impl Watched {
    /// Nothing is known, and never will be: for whoever does not run yet.
    pub(crate) fn unknown() -> Self {
        Self::of(Arc::new(Signal::new(None)))
    }

    fn of(all: Arc<Signal<Option<Arc<Pauses>>>>) -> Self {
        let own = all.watch();
        Self { all, own }
    }

    pub(crate) fn now(&self) -> Option<Arc<Pauses>> {
        self.all.get()
    }

    /// Everything is held back.
    pub(crate) fn is_whole(&self) -> bool {
        self.all.get().is_none_or(|p| p.whole)
    }

    /// Whether they have changed since this was asked, or [`Watched::changed`] resolved.
    pub(crate) fn take_change(&mut self) -> bool {
        let has_changed = self.own.has_changed().unwrap_or(false);
        self.own.mark_unchanged();
        has_changed
    }

    /// Resolves at the next change.
    pub(crate) async fn changed(&mut self) {
        if self.own.changed().await.is_err() {
            // Nobody looks any more: whoever asks is about to end.
            std::future::pending::<()>().await;
        }
    }

    /// Resolves once not everything is held back.
    pub(crate) async fn goes_on(&self) {
        let mut own = self.clone();
        while own.is_whole() {
            own.changed().await;
        }
    }
}

/// Looks at the pauses of one destination or group, for all the tasks of a relay or consumer.
pub(crate) struct Watcher {
    store: Arc<dyn Store>,
    side: Side,
    scope: Arc<str>,
    report: Report,
    seen: Arc<Signal<Option<Arc<Pauses>>>>,
}

impl Watcher {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        side: Side,
        scope: Arc<str>,
        report: Report,
    ) -> (Self, Watched) {
        let seen = Arc::new(Signal::new(None));
        let watched = Watched::of(seen.clone());
        let watcher = Self {
            store,
            side,
            scope,
            report,
            seen,
        };
        (watcher, watched)
    }

    /// Looks until `stop`. What it cannot see stops nobody: the last look holds.
    pub(crate) async fn run(self, stop: CancellationToken) -> Result<()> {
        loop {
            let wait = self.look().await;
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Answers how long to wait.
    async fn look(&self) -> Duration {
        match self.store.pauses(Some((self.side, &self.scope))).await {
            Ok(paused) => {
                if self.report.clear(LOOKING) {
                    tracing::info!(scope = %self.scope, "the pauses are seen again");
                }
                let next = paused.iter().map(|p| p.left).fold(LOOK, Ord::min);
                self.note(paused.into_iter().map(|p| p.pause).collect());
                // One that has just ended is gone at the next look.
                next.max(LOOK / 50)
            }
            Err(e) => {
                let trouble = e.to_string();
                if self.report.trouble(LOOKING, &trouble) {
                    tracing::warn!(scope = %self.scope, trouble, "the pauses cannot be seen; the last look holds");
                }
                LOOK
            }
        }
    }

    fn note(&self, all: Vec<Pause>) {
        let before = self.seen.get();
        if before.as_ref().is_some_and(|b| b.all == all) {
            return;
        }
        let before = before.map(|b| b.all.clone()).unwrap_or_default();
        for pause in all.iter().filter(|p| !before.contains(p)) {
            tracing::info!("{pause}");
        }
        let is_over = |p: &&Pause| !all.iter().any(|now| now.target == p.target);
        for pause in before.iter().filter(is_over) {
            tracing::info!(target_of = %pause.target, "a pause is over");
        }
        match all.iter().find(|p| p.target.topic.is_none()) {
            Some(whole) => drop(self.report.trouble(WHOLE, &whole.to_string())),
            None => drop(self.report.clear(WHOLE)),
        }
        // Who reads it in the health can count on it.
        self.seen.set(Some(Arc::new(Pauses::of(all.clone()))));
        self.report.pauses(all);
    }
}

/// A pause that an operator asks for.
#[derive(Debug, Clone)]
pub struct NewPause {
    /// Of what.
    pub target: Target,
    /// Until when.
    pub expiry: Expiry,
    /// Why.
    pub reason: String,
    /// Who.
    pub operator: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_people_read_them() {
        let at = |seconds| Utc(UNIX_EPOCH + Duration::from_secs(seconds)).to_string();
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_795_530_645), "2026-11-24T14:30:45Z");
        assert_eq!(at(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
