//! Destinations: looked at, added, removed.

use std::time::{Duration, SystemTime};

use super::{Admin, Filter};
use crate::{
    destination::{MAIN, Start, as_replay, check_name},
    error::{Error, Kind, Result},
    failure::Side,
    store::{Added, NewDestination},
};

/// A destination as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// Its name; `replay:NAME` for a replay.
    pub name: String,
    /// Where it began.
    pub start: Start,
    /// When it was added, or first seen by a version that keeps this.
    pub added: SystemTime,
    /// Where it stands in each partition of the log.
    pub cursors: Vec<DestinationCursor>,
    /// The age of the oldest event that it has not published; zero if there is none. Events beside the log, in its lines, are
    /// not among them.
    pub lag: Duration,
    /// How many events it lies behind, by positions: an estimate, across all its partitions.
    pub behind: u64,
    /// Events that wait in its lines for another attempt, or behind one that does.
    pub deferred: u64,
    /// Of these, the first of their keys that wait for an operator.
    pub parked: u64,
    /// Events that wait for their `deliver_at`.
    pub scheduled: u64,
    /// Events that it gave up; counted up to 100,000.
    pub dead_letters: u64,
    /// How long no relay has served it, counted while any relay of the database ran: at
    /// [`RetentionSettings::abandon_after`](crate::RetentionSettings) it is removed, unless it is `main`.
    pub unserved: Duration,
}

impl Destination {
    pub(crate) fn new(name: String, start: Start, added: SystemTime, unserved: Duration) -> Self {
        Self {
            name,
            start,
            added,
            cursors: Vec::new(),
            lag: Duration::ZERO,
            behind: 0,
            deferred: 0,
            parked: 0,
            scheduled: 0,
            dead_letters: 0,
            unserved,
        }
    }

    /// Whether a relay holds one of its partitions now.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.cursors.iter().any(|c| c.held)
    }
}

/// Where a destination stands in one partition of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestinationCursor {
    /// Which partition.
    pub partition: u16,
    /// The highest position that is settled. Positions below it that committed late may not be.
    pub position: i64,
    /// How often its lease was taken.
    pub epoch: i64,
    /// Whether a relay holds it now.
    pub held: bool,
    /// In a slice that is not read to its end. A replay whose partitions are all past theirs is through.
    pub(crate) open: bool,
}

/// A destination that was removed, and what was lost by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Its name.
    pub name: String,
    /// When.
    pub at: SystemTime,
    /// By whom, and why.
    pub why: String,
    /// Events of the log that it had not published; counted up to 100,000.
    pub unpublished: u64,
    /// Events that waited in its lines or for their time.
    pub deferred: u64,
    /// Dead letters that went with it.
    pub dead_letters: u64,
}

impl Removed {
    /// Whether nothing was lost.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.unpublished == 0 && self.deferred == 0 && self.dead_letters == 0
    }
}

impl Admin {
    /// Lists the destinations, by name; replays that are not through among them.
    ///
    /// # Errors
    /// The database's.
    pub async fn destinations(&self) -> Result<Vec<Destination>> {
        let mut all = Vec::new();
        for known in self.store.destinations().await? {
            let mut destination = known.destination;
            let name = destination.name.clone();
            let waiting = self.store.deferred(Side::Relay, &name).await?;
            let letters = Filter::of_destination(name);
            destination.dead_letters = self.store.count_letters(&letters).await?.letters;
            (destination.deferred, destination.parked) = (waiting.total, waiting.parked);
            destination.scheduled = waiting.scheduled;
            all.push(destination);
        }
        Ok(all)
    }

    /// Adds a destination. True if it is new; false if it is there already, with this start. From now on the log keeps for it
    /// what it has not published: give it a relay ([`Relay::destination`](crate::Relay::destination)).
    ///
    /// One that was removed may be added again, and begins anew.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a name of other than 1 to 64 letters, digits, `_`, `-`, `.`; [`Kind::Exists`] if it is there with
    /// another start; the database's.
    pub async fn add_destination(&self, name: &str, start: Start) -> Result<bool> {
        const OPERATION: &str = "add a destination";
        check_name(OPERATION, name)?;
        let new = NewDestination {
            name: name.to_owned(),
            start,
            replay: None,
            again: true,
        };
        match self.store.add_destination(&new).await? {
            Added::There(there) if !there.is_same(start) => {
                let text = format!(
                    "the destination {name:?} is there already and began at {there}, not at {start}; remove it first, \
                     or choose another name"
                );
                Err(Error::new(Kind::Exists, OPERATION, text))
            }
            Added::There(_) => Ok(false),
            Added::New | Added::Removed(_) => {
                let operator = &*self.operator;
                tracing::info!(operator, destination = name, %start, "a destination was added");
                Ok(true)
            }
        }
    }

    /// Removes a destination with its cursors, lines and dead letters, and answers what is lost by it; the log keeps nothing
    /// for it any more. Stop its relay first: one that goes on ends with [`Kind::NotFound`], and what it has in flight may
    /// still arrive. The record of it stays ([`Admin::removed_destinations`]).
    ///
    /// `main` may be removed once another destination has taken its place.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Invalid`] for the last destination, without which the log would keep nothing for anybody, and
    /// for a replay ([`Admin::cancel_replay`]); the database's.
    pub async fn remove_destination(&self, name: &str, why: &str) -> Result<Removed> {
        const OPERATION: &str = "remove a destination";
        check_name(OPERATION, name)?;
        let why = format!("{}: {why}", self.operator);
        let removed = self.store.remove_destination(name, &why, None).await?;
        let Some(removed) = removed else {
            return Err(self.unknown(OPERATION, name).await);
        };
        tell(&removed);
        Ok(removed)
    }

    /// The destinations that were removed, by operators or because they were abandoned, the last one first.
    ///
    /// # Errors
    /// The database's.
    pub async fn removed_destinations(&self) -> Result<Vec<Removed>> {
        let mut all = self.store.removed_destinations().await?;
        // A replay that is through was not lost.
        all.retain(|r| as_replay(&r.name).is_none() || !r.is_clean());
        Ok(all)
    }

    /// The error for a destination that is not there, with those that are.
    pub(crate) async fn unknown(&self, operation: &'static str, name: &str) -> Error {
        let known = self.store.destinations().await.unwrap_or_default();
        let known: Vec<_> = known.into_iter().map(|k| k.destination.name).collect();
        let text = format!(
            "there is no destination {name:?}; there are: {}",
            known.join(", ")
        );
        Error::new(Kind::NotFound, operation, text)
    }
}

/// Loud where something was lost.
pub(crate) fn tell(removed: &Removed) {
    let Removed {
        name,
        why,
        unpublished,
        deferred,
        dead_letters,
        ..
    } = removed;
    metrics::counter!("pillarbox_destinations_removed_total", "destination" => name.clone())
        .increment(1);
    metrics::counter!("pillarbox_destination_lost_events_total", "destination" => name.clone())
        .increment(unpublished + deferred);
    if removed.is_clean() {
        tracing::info!(destination = %name, why, "a destination was removed; nothing was lost by it");
        return;
    }
    tracing::warn!(destination = %name, why, unpublished, deferred, dead_letters, "a destination was removed, and these events are not sent there");
}

/// Whether it may be removed because nobody serves it: never the one that every database has.
pub(crate) fn may_be_abandoned(name: &str) -> bool {
    name != MAIN
}
