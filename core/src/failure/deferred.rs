use std::time::{Duration, SystemTime};

use pillarbox_transport::Message;

use crate::event::Key;

/// Whose exception a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The scope is a destination.
    Relay,
    /// The scope is a group.
    Consumer,
}

impl Side {
    /// As it stands in the tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Consumer => "consumer",
        }
    }

    /// From the tables.
    pub(crate) fn read(text: &str) -> Option<Self> {
        [Self::Relay, Self::Consumer]
            .into_iter()
            .find(|side| side.as_str() == text)
    }
}

/// An event that is to wait: a full copy.
#[derive(Debug, Clone)]
pub struct Deferral {
    /// The event.
    pub message: Message,
    /// Its place in the log (relay); 0 at the consumer, whose lines run by arrival.
    pub position: i64,
    /// Failures so far; 0 for one that merely waits behind another of its key.
    pub attempts: u32,
    /// Why it failed; none for one that merely waits.
    pub reason: Option<String>,
    /// Until its next attempt.
    pub delay: Duration,
    /// The broker may have it all the same: the answer to an attempt was lost.
    pub maybe_sent: bool,
    /// What else it waits for.
    pub hold: Hold,
}

/// What a waiting event waits for, beside its delay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Hold {
    /// Nothing.
    #[default]
    None,
    /// An operator: its key stays blocked behind it.
    Parked,
    /// This time, by the database's clock: until then it stands in no line and holds nothing back.
    Scheduled(SystemTime),
}

/// The wait of a parked event, long enough for any operator.
pub(crate) const PARKED: Duration = Duration::from_secs(315_360_000);

/// A line: the deferred events of one key, in order. A keyless event is a line of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The key; none for an event without order.
    pub key: Option<Key>,
    /// Its first event.
    pub head: LineId,
    /// Until its first event is due; zero if it is.
    pub due_in: Duration,
}

/// Which deferred event: unique within (side, scope).
pub type LineId = (String, String);

/// A deferred event as it was read back.
#[derive(Debug, Clone)]
pub struct Deferred {
    /// The event.
    pub message: Message,
    /// Its place in the log (relay).
    pub position: i64,
    /// Failures so far.
    pub attempts: u32,
    /// Until it is due; zero if it is.
    pub due_in: Duration,
    /// The broker may have it all the same: the answer to an attempt was lost.
    pub maybe_sent: bool,
}

impl Deferred {
    /// Its unique name within (side, scope): source and id.
    #[must_use]
    pub fn line_id(&self) -> LineId {
        (self.message.source().to_owned(), self.message.id.clone())
    }
}

/// What became of a line's head, as one fenced transaction.
#[derive(Debug, Clone)]
pub enum Resolution {
    /// It is through: the row goes.
    Done,
    /// It failed again: the row stays first in its line.
    Again {
        /// Failures so far.
        attempts: u32,
        /// Why.
        reason: String,
        /// Until the next attempt.
        delay: Duration,
    },
    /// The answer to an attempt was lost: noted at the row, which stays as it is.
    Unsure,
    /// It is given up, and its key waits for an operator: the row stays first in its line.
    Park {
        /// Failures so far.
        attempts: u32,
        /// Why.
        reason: String,
    },
    /// It is given up: the row moves to the dead letters.
    Dead {
        /// Failures so far.
        attempts: u32,
        /// Why.
        reason: String,
    },
}
