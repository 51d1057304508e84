//! Destinations: named sets of cursors over one log, each with its own transport.
//!
//! What is said about one in the database, and what of the log it wants. Never who relays to it: that is the leases'.

use std::{fmt, str::FromStr, time::SystemTime};

use pillarbox_transport::cloudevents;

use crate::{
    admin::Removed,
    error::{Error, Kind, Result},
};

/// The default destination, which `migrate` makes at the start of the log.
pub const MAIN: &str = "main";

/// The attribute of an event that a replay sent again: the replay's name.
pub const REPLAYED: &str = "pillarboxreplayed";

/// What the scope of a replay begins with; no other destination's name holds a ':'.
const REPLAY: &str = "replay:";

/// The longest name, in bytes.
const NAME: usize = 64;

/// Where in the log a destination begins. Counts when the destination is added, and never again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Start {
    /// With the oldest event that the log still has.
    #[default]
    Earliest,
    /// With what commits from now on: also what was enqueued before and commits later. Never right for a move from one
    /// broker to another, whose new destination must begin before the old consumers' position.
    Now,
    /// With what was enqueued at this time or later, by the database's clock. The log is read from its start, and older
    /// events are passed over.
    At(SystemTime),
}

impl Start {
    /// Whether both mean the same, in the database's microseconds.
    pub(crate) fn is_same(self, other: Self) -> bool {
        match (self, other) {
            (Self::At(a), Self::At(b)) => micros(a) == micros(b),
            (a, b) => a == b,
        }
    }

    /// The word in the table.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Earliest => "earliest",
            Self::Now => "now",
            Self::At(_) => "at",
        }
    }

    /// The time that it names.
    pub(crate) fn time(self) -> Option<SystemTime> {
        match self {
            Self::At(time) => Some(time),
            Self::Earliest | Self::Now => None,
        }
    }

    /// From the table.
    pub(crate) fn read(word: &str, time: Option<SystemTime>) -> Self {
        match (word, time) {
            (_, Some(time)) => Self::At(time),
            ("now", None) => Self::Now,
            _ => Self::Earliest,
        }
    }
}

impl FromStr for Start {
    type Err = Error;

    /// From `earliest`, `now` or a time as RFC 3339 writes it.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "earliest" => Ok(Self::Earliest),
            "now" => Ok(Self::Now),
            time => cloudevents::time(time).map(Self::At).ok_or_else(|| {
                let text =
                    "expected \"earliest\", \"now\" or a time such as \"2026-11-24T15:00:00Z\"";
                Error::new(Kind::Invalid, "read a start", text)
            }),
        }
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Earliest | Self::Now => f.write_str(self.word()),
            Self::At(time) => f.write_str(&cloudevents::rfc3339(*time)),
        }
    }
}

fn micros(time: SystemTime) -> i128 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i128::try_from(after.as_micros()).unwrap_or(i128::MAX),
        Err(before) => -i128::try_from(before.duration().as_micros()).unwrap_or(i128::MAX),
    }
}

/// The rule for names, of destinations and of replays.
pub(crate) const NAMES: &str = "1 to 64 letters, digits, '_', '-', '.'";

/// Whether a destination, or a replay, may be called this.
#[must_use]
pub(crate) fn is_name(name: &str) -> bool {
    (1..=NAME).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
}

pub(crate) fn check_name(operation: &'static str, name: &str) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME).collect();
    let text = format!("the name {shown:?}; {NAMES} are expected");
    Err(Error::new(Kind::Invalid, operation, text))
}

/// The error for removing the only one: without any, the log would keep nothing for anybody.
pub(crate) fn last_one(operation: &'static str, name: &str) -> Error {
    let text = format!(
        "{name:?} is the last destination, and without one the log keeps nothing: add its successor first"
    );
    Error::new(Kind::Invalid, operation, text)
}

/// The error for a relay whose destination was removed.
pub(crate) fn gone(operation: &'static str, removed: &Removed) -> Error {
    let Removed {
        name,
        at,
        why,
        unpublished,
        deferred,
        ..
    } = removed;
    let at = cloudevents::rfc3339(*at);
    let text = format!(
        "the destination {name:?} was removed at {at} ({why}), and {unpublished} events of the log and {deferred} deferred \
         ones with it; an operator may add it anew"
    );
    Error::new(Kind::NotFound, operation, text)
}

/// The destination that a replay is while it lasts.
pub(crate) fn of_replay(name: &str) -> String {
    format!("{REPLAY}{name}")
}

/// The replay that a destination is.
pub(crate) fn as_replay(destination: &str) -> Option<&str> {
    destination.strip_prefix(REPLAY)
}

/// The database was found in another place than its cursors were written in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reanchored {
    /// What had happened.
    pub cause: Cause,
    /// When it was noticed.
    pub at: SystemTime,
    /// For each destination, how many events of the log it had not settled: these are sent, and those among them that were
    /// sent already after the dump was made are sent again. Empty after a failover.
    pub unsettled: Vec<(String, u64)>,
}

/// Why a database is not where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It was restored into another cluster, or upgraded: transaction ids and cursors were anchored anew.
    Cluster,
    /// Another server took over (its timeline differs). Cursors and log went together and stay as they are; what was settled
    /// shortly before comes again, and what the new server had not received is gone.
    Failover,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "cluster",
            Self::Failover => "failover",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_reads_as_it_is_written() {
        for text in ["earliest", "now", "2026-11-24T15:00:00Z"] {
            assert_eq!(text.parse::<Start>().unwrap().to_string(), text);
        }
        for text in ["", "later", "2026-11-24", "-1"] {
            let refused = text.parse::<Start>().unwrap_err();
            assert!(refused.to_string().contains("earliest"), "{refused}");
        }
    }

    #[test]
    fn names_are_bounded() {
        for good in ["main", "audit-2", "eu.kafka", &"x".repeat(NAME)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "a b", "replay:x", "ä", "a\0", &"x".repeat(NAME + 1)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
