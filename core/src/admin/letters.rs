use std::{
    fmt,
    time::{Duration, SystemTime},
};

use pillarbox_transport::Message;

use crate::{
    error::{Error, Kind, Result},
    event::Key,
    failure::{LineId, Side},
};

/// Which dead letter: unique in its database.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LetterId {
    /// Who gave it up.
    pub side: Side,
    /// The destination (relay) or the group (consumer).
    pub scope: String,
    /// The event's CloudEvents source.
    pub source: String,
    /// The event's id.
    pub id: String,
}

impl LetterId {
    pub(crate) fn line_id(&self) -> LineId {
        (self.source.clone(), self.id.clone())
    }
}

impl fmt::Display for LetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            side,
            scope,
            source,
            id,
        } = self;
        write!(f, "{} {scope}: {id} of source {source:?}", side.as_str())
    }
}

/// A dead letter without its payload, headers and attributes, which may hold what not every operator should see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    /// Which one.
    pub id: LetterId,
    /// Grows with each event that is given up; [`Page::after`] takes it.
    pub number: i64,
    /// The event's topic.
    pub topic: String,
    /// Its type.
    pub kind: String,
    /// Its key; none for an event without order.
    pub key: Option<String>,
    /// When it was enqueued.
    pub time: SystemTime,
    /// Its place in the log (relay).
    pub position: i64,
    /// Failed attempts.
    pub attempts: u32,
    /// Why it was given up.
    pub reason: String,
    /// Its first failure.
    pub first_failure: SystemTime,
    /// When it was given up.
    pub last_failure: SystemTime,
    /// The broker may have it all the same: the answer to an attempt was lost.
    pub maybe_sent: bool,
    /// How often operators have put it back before.
    pub retried: u32,
    /// It could not be read as it was written. It can be discarded, but not put back.
    pub unreadable: bool,
}

impl Letter {
    /// What it has its order by.
    #[must_use]
    pub fn order(&self) -> Option<Key> {
        let key = self.key.as_deref()?;
        Some(Key {
            topic: self.topic.as_str().into(),
            key: key.into(),
        })
    }
}

/// A dead letter with everything that is kept of it.
#[derive(Debug, Clone)]
pub struct Shown {
    /// What a list shows.
    pub letter: Letter,
    /// The event, whole.
    pub message: Message,
}

/// Which dead letters: those that satisfy all that is given. The default is all there are.
///
/// ```
/// use pillarbox_core::admin::Filter;
/// let rejected = Filter {
///     reason: Some("payload is not as expected".into()),
///     ..Filter::of_group("billing")
/// };
/// # assert!(rejected.topic.is_none());
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Who gave it up.
    pub side: Option<Side>,
    /// The destination (relay) or the group (consumer).
    pub scope: Option<String>,
    /// The topic.
    pub topic: Option<String>,
    /// The key. With a topic, these are the letters of one key.
    pub key: Option<String>,
    /// The type.
    pub kind: Option<String>,
    /// The event's id. The same id may have been given up in several places.
    pub id: Option<String>,
    /// A part of the reason, as it is written there.
    pub reason: Option<String>,
    /// Given up at this time or later.
    pub since: Option<SystemTime>,
    /// Given up before this time.
    pub before: Option<SystemTime>,
}

impl Filter {
    /// All that the relays of a destination gave up.
    #[must_use]
    pub fn of_destination(destination: impl Into<String>) -> Self {
        Self {
            side: Some(Side::Relay),
            scope: Some(destination.into()),
            ..Self::default()
        }
    }

    /// All that a consumer group gave up.
    #[must_use]
    pub fn of_group(group: impl Into<String>) -> Self {
        Self {
            side: Some(Side::Consumer),
            scope: Some(group.into()),
            ..Self::default()
        }
    }

    /// Those of one key.
    #[must_use]
    pub fn key(mut self, topic: impl Into<String>, key: impl Into<String>) -> Self {
        (self.topic, self.key) = (Some(topic.into()), Some(key.into()));
        self
    }

    /// Side and scope, which a command for many letters must name.
    pub(crate) fn place(&self, operation: &'static str) -> Result<(Side, &str)> {
        match (self.side, &self.scope) {
            (Some(side), Some(scope)) => Ok((side, scope)),
            _ => {
                let text = "a filter of a command names side and scope: Filter::of_destination or Filter::of_group";
                Err(Error::new(Kind::Invalid, operation, text))
            }
        }
    }
}

/// A part of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// The newest first, or the oldest.
    pub newest_first: bool,
    /// Goes on behind the letter of this [`Letter::number`].
    pub after: Option<i64>,
    /// Most letters, 1 to 1,000.
    pub limit: u32,
}

impl Default for Page {
    fn default() -> Self {
        Self {
            newest_first: true,
            after: None,
            limit: 100,
        }
    }
}

/// How a command for many letters runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Pace {
    /// Most letters a second, 0.01 to 10,000. Defaults to 50: a broker or a handler that has just come back is not flooded.
    pub per_second: f64,
    /// Most letters in all. Defaults to 10,000.
    pub most: u64,
    /// A retry stops while this many events wait in the destination's or group's lines, which have a maximum that new
    /// failures need too. Defaults to 1,000.
    pub waiting: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            per_second: 50.0,
            most: 10_000,
            waiting: 1_000,
        }
    }
}

impl Pace {
    pub(crate) fn check(&self, operation: &'static str) -> Result<()> {
        if (0.01..=10_000.0).contains(&self.per_second) {
            return Ok(());
        }
        let text = format!(
            "{} letters a second; 0.01 to 10,000 are expected",
            self.per_second
        );
        Err(Error::new(Kind::Invalid, operation, text))
    }

    /// Letters of one transaction: a fifth of a second's, so that the rate is even, and 100 at most.
    pub(crate) fn at_once(&self) -> usize {
        let many = (self.per_second / 5.0).clamp(1.0, 100.0);
        // Within the bounds just set.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        {
            many as usize
        }
    }

    pub(crate) fn wait(&self, letters: usize) -> Duration {
        let letters = u32::try_from(letters).unwrap_or(u32::MAX);
        Duration::from_secs_f64(f64::from(letters) / self.per_second)
    }
}

/// What a command for many letters did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Letters put back or discarded.
    pub done: u64,
    /// Letters left alone because they cannot be put back: see [`Letter::unreadable`].
    pub unreadable: u64,
    /// Why it ended.
    pub ended: Ended,
}

/// Why a command for many letters ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ended {
    /// Nothing is left of what the filter named when it began.
    #[default]
    Complete,
    /// [`Pace::most`] letters are done.
    Most,
    /// [`Pace::waiting`] events wait: go on when they are fewer.
    Waiting,
}

/// What a command would touch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DryRun {
    /// Letters that the filter names; counted up to 100,000.
    pub letters: u64,
    /// Their keys.
    pub keys: u64,
    /// Letters without order.
    pub keyless: u64,
    /// Of these letters, those that the broker may have already.
    pub maybe_sent: u64,
    /// Newer events of their keys that went past them: a retry comes after these. Known for the relay, as far as the log
    /// goes back, for up to 100 keys and 10,000 events of the log behind each; none where it is not known: a consumer's
    /// inbox holds no keys.
    pub newer: Option<u64>,
}
