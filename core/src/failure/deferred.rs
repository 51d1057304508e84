use std::time::Duration;

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
}

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
    /// It is given up: the row moves to the dead letters.
    Dead {
        /// Failures so far.
        attempts: u32,
        /// Why.
        reason: String,
    },
}
