//! What the engine asks of a database. Two stores are built in; applications never call this.
//!
//! Every method that names a [`Lease`] proves it with a locking statement as the last one before COMMIT, and answers
//! [`Kind::LeaseLost`](crate::error::Kind::LeaseLost) when owner or epoch differ: nothing of it is then written.
//! No method is harmed by dropping its future: each runs to its end.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use pillarbox_transport::Message;

use crate::{
    admin::{
        Destination, DryRun, Filter, Gone, Installation, Letter, LetterId, Removed, Selection,
        Shown,
    },
    backpressure::Backlog,
    connection::{Connection, Pool},
    cursor::Progress,
    destination::{Reanchored, Start},
    error::{Error, Kind, Result},
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Line, LineId, Resolution, Side},
    lease::{Acquired, Lease, LeaseKey, LeaseTerm},
    pause::{NewPause, Pause, Target},
};

#[cfg(feature = "postgres")]
pub(crate) mod postgres;
#[cfg(feature = "sqlite")]
pub(crate) mod sqlite;
mod standings;

pub use standings::Standings;

/// The program's number for the schema's "oldest program that may use it".
pub const PROGRAM: i32 = 1;
/// The schema version that this program makes.
pub const SCHEMA_VERSION: i32 = 5;

/// A database of outbox, cursors, leases, exceptions and inbox.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The host's pool, none for the simulation's store.
    fn pool(&self) -> Option<Pool>;

    /// Closes the host's pool and the engine's own, once their connections are given back.
    async fn close(&self);

    /// Schema name (PostgreSQL) or table prefix (SQLite), checked and ready to stand in a statement.
    fn schema(&self) -> &str;

    /// Makes or completes the schema; any number of programs may do so at once. `partitions` (a power of two, 1 to 64)
    /// counts only when the log is made; SQLite has one.
    async fn migrate(&self, partitions: u16) -> Result<()>;

    /// Looks whether this program may use the schema, and answers the number of log partitions.
    async fn partitions(&self) -> Result<u16>;

    /// What the schema says of itself, whatever its version.
    async fn installation(&self) -> Result<Installation>;

    /// Takes the lease if it is free (expired, or expiring later than any lease can: a clock was set back). Commits
    /// synchronously: an epoch is never handed out twice by one timeline. Makes the cursor's row where there is none.
    async fn acquire(&self, key: &LeaseKey, term: LeaseTerm) -> Result<Option<Acquired>>;

    /// Prolongs a lease.
    async fn renew(&self, lease: &Lease, term: LeaseTerm) -> Result<()>;

    /// Gives a lease back, so that the next owner need not wait. Does nothing if it is lost.
    async fn release(&self, lease: &Lease) -> Result<()>;

    /// The next events of a relay partition after `from`, in order: at most `limit`, and fewer where they are large (a
    /// few tens of MiB), so that no backlog of large payloads fills the memory.
    async fn read(&self, partition: u16, from: &Progress, limit: u32) -> Result<Slice>;

    /// Waits until everything that a slice showed is on disk, and proves that the database has not crashed since the
    /// lease was acquired. [`LeaseLost`](crate::error::Kind::LeaseLost) if it has: what was read may never have been.
    async fn flush(&self, lease: &Lease, gate: &Gate) -> Result<()>;

    /// Moves a relay's cursor and renews its lease in one statement. `durable` waits for the disk (drain).
    async fn settle(
        &self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<()>;

    /// Moves a source's cursor and renews its lease.
    async fn settle_source(&self, lease: &Lease, position: u64, term: LeaseTerm) -> Result<()>;

    /// Lets events wait: idempotent by (side, scope, source, id), in one fenced, durable transaction.
    async fn defer(&self, lease: &Lease, events: &[Deferral]) -> Result<()>;

    /// Gives events up that never waited: idempotent, in one fenced, durable transaction.
    async fn bury(&self, lease: &Lease, events: &[DeadLetter]) -> Result<()>;

    /// The lines of the lease's side, scope and shard, each with its head, soonest due first, at most `limit`.
    /// The lease is a relay partition's, or the duty `pump` of a group (shard 0 holds all its lines for now).
    async fn lines(&self, lease: &Lease, limit: u32) -> Result<Vec<Line>>;

    /// The first events of a line in order, at most `limit`; with no key, the one event `id`. Empty when the line is.
    async fn line(
        &self,
        lease: &Lease,
        key: Option<&Key>,
        id: &LineId,
        limit: u32,
    ) -> Result<Vec<Deferred>>;

    /// Ends one attempt of a relay's line head.
    async fn resolve(&self, lease: &Lease, id: &LineId, resolution: &Resolution) -> Result<()>;

    /// Lets the scheduled events of a relay partition whose time has come enter their lines, soonest first, at most
    /// `limit`, in one fenced, durable transaction: behind `position` and behind what stands in the line. Those that were
    /// cancelled are deleted instead; those of which somebody is just deciding that stay.
    async fn fall_due(&self, lease: &Lease, position: i64, limit: u32) -> Result<Due>;

    /// How many events wait, for the maximum: of the scope, and of the key that has most.
    async fn deferred(&self, side: Side, scope: &str) -> Result<Waiting>;

    /// How each of these events stands with a group now, as committed: asked before an effect runs outside of a
    /// transaction, and so a hint alone.
    async fn standing(&self, group: &str, messages: &[&Message]) -> Result<Vec<Standing>>;

    /// How far the destinations are behind: the one that is farthest.
    async fn backlog(&self) -> Result<Backlog>;

    /// A consumer's transaction: READ COMMITTED, bounded below the lease, durable at COMMIT where `durable`.
    async fn begin(&self, group: &str, term: LeaseTerm, durable: bool) -> Result<Box<dyn Unit>>;

    /// Room for so many more of [`Store::begin`]'s transactions at once, until [`Store::narrow`].
    fn widen(&self, _more: usize) {}

    /// They are not needed any more.
    fn narrow(&self, _less: usize) {}

    /// How many transactions that write can be open at once.
    fn writers(&self) -> usize {
        tokio::sync::Semaphore::MAX_PERMITS
    }

    /// The oldest dead letters of a group that have no copy at the broker yet.
    async fn uncopied(&self, group: &str, limit: u32) -> Result<Vec<DeadLetter>>;

    /// Notes that the broker has these copies.
    async fn copied(&self, lease: &Lease, ids: &[LineId]) -> Result<()>;

    /// One bounded step of emptying the log of what every destination is done with and what is older than `keep`. Never
    /// what is not settled, and nothing while a destination lacks a cursor. No writer waits for it longer than 50 ms.
    async fn clean_log(&self, lease: &Lease, keep: Duration) -> Result<Cleaned>;

    /// One bounded step of forgetting in the inbox: moves the clocks of the sources by what has arrived, and forgets the
    /// events of each source behind which it has been running for `remember`.
    async fn clean_inbox(&self, lease: &Lease, remember: Duration) -> Result<Cleaned>;

    /// One bounded step of removing dead letters of a side: those older than `keep`, and in each scope the oldest beyond
    /// `most`. Empty when there is nothing more to remove.
    async fn trim_dead_letters(
        &self,
        lease: &Lease,
        side: Side,
        keep: Duration,
        most: u64,
    ) -> Result<Vec<Trimmed>>;

    /// Who holds which lease, and how far the cursors are. Exceptions stay zero.
    async fn standings(&self) -> Result<Standings>;

    /// Dead letters or parked events, without payloads.
    async fn letters(&self, letters: &Letters) -> Result<Vec<Letter>>;

    /// One dead letter or parked event, whole.
    async fn letter(&self, id: &LetterId) -> Result<Option<Shown>>;

    /// How many dead letters a filter names, up to 100,000. `newer` stays none.
    async fn count_letters(&self, filter: &Filter) -> Result<DryRun>;

    /// How many newer events of a relay's dead letter's key are settled and neither wait nor were given up, of the 10,000
    /// that come after it in its partition of the log.
    async fn newer(&self, id: &LetterId) -> Result<u64>;

    /// Whether an event waits in a line.
    async fn waits(&self, id: &LetterId) -> Result<bool>;

    /// Lets parked events go on where they are, due at once, and moves dead letters into their lines, in the order given, in one durable transaction, with a new round of attempts,
    /// [`RETRIED`](crate::failure::RETRIED), and due at once. Answers how many; what is no readable dead letter is left alone.
    ///
    /// At the consumer no transaction of the group's is open at that moment: one that has probed its keys already could
    /// apply a newer event of the key beside the line's head.
    async fn retry_letters(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64>;

    /// Deletes dead letters and parked events in one durable transaction, and answers how many. A consumer's inbox remembers them.
    async fn discard_letters(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64>;

    /// The pauses in force: of a destination or group, or all there are. The simulation's operators pause nothing.
    async fn pauses(&self, _of: Option<(Side, &str)>) -> Result<Vec<Paused>> {
        Ok(Vec::new())
    }

    /// Makes a pause, or replaces the one of the same target, in one durable transaction. None if its expiry is over by the
    /// database's clock, or lies further ahead than [`Pause::LONGEST`].
    async fn pause(&self, _pause: &NewPause) -> Result<Option<Paused>> {
        Ok(None)
    }

    /// Ends a pause, and answers it if it was in force.
    async fn resume(&self, _target: &Target) -> Result<Option<Paused>> {
        Ok(None)
    }

    /// The destinations or groups that have run on this database, the first 100 by name.
    async fn scopes(&self, _side: Side) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Removes the pauses of a side that are over, and answers how many.
    async fn forget_pauses(&self, _lease: &Lease, _side: Side) -> Result<u64> {
        Ok(0)
    }

    /// Looks whether the database is where its cursors were written. If not, fits log and cursors to the place where it is,
    /// once, whoever calls: nothing is lost, and each destination keeps what it has settled. None if all is as it was.
    async fn anchor(&self) -> Result<Option<Reanchored>> {
        Ok(None)
    }

    /// Makes a destination's cursors, unless it has some, in one durable transaction. A replay ends with what is visible now.
    async fn add_destination(&self, new: &NewDestination) -> Result<Added> {
        Err(of_one(&new.name))
    }

    /// The destinations that have cursors, by name; without what waits beside the log.
    async fn destinations(&self) -> Result<Vec<Registered>> {
        Ok(Vec::new())
    }

    /// Deletes a destination's cursors, lines, and dead letters, where no `heir` takes these, in one durable transaction that
    /// records what was lost. None if there is none of this name; [`Kind::Invalid`] for the last one.
    async fn remove_destination(
        &self,
        name: &str,
        _why: &str,
        _heir: Option<&str>,
    ) -> Result<Option<Removed>> {
        Err(of_one(name))
    }

    /// The record of those that were removed, the last one first.
    async fn removed_destinations(&self) -> Result<Vec<Removed>> {
        Ok(Vec::new())
    }

    /// For the cleaner of the log: counts for how long each destination has been without a relay.
    async fn watch_destinations(&self, _lease: &Lease) -> Result<Vec<Unserved>> {
        Ok(Vec::new())
    }

    /// What the log holds.
    async fn log_extent(&self) -> Result<Extent> {
        Ok(Extent::default())
    }

    /// Counts the events of the log that a selection names, up to 100,000, and those that are older than `remember`.
    async fn count_events(&self, _selection: &Selection, _remember: Duration) -> Result<Counted> {
        Ok(Counted::default())
    }
}

/// The simulation's store has the one destination that its relays serve.
fn of_one(name: &str) -> Error {
    let text = format!("this store knows no other destinations than its own: {name:?}");
    Error::new(Kind::Invalid, "change destinations", text)
}

/// A destination to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDestination {
    /// Its name, checked.
    pub name: String,
    /// Where it begins.
    pub start: Start,
    /// What is sent again, as JSON, if it is a replay.
    pub replay: Option<String>,
    /// Also if one of this name was removed.
    pub again: bool,
}

/// What [`Store::add_destination`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Added {
    /// None of this name; it is made.
    New,
    /// It has cursors, and began there; nothing is changed.
    There(Start),
    /// It was removed; it is made where that was asked for.
    Removed(Removed),
}

/// A destination and what is kept of it besides.
#[derive(Debug, Clone)]
pub struct Registered {
    /// The destination.
    pub destination: Destination,
    /// What is sent again, as JSON, if it is a replay.
    pub replay: Option<String>,
}

/// For how long nobody has served a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unserved {
    /// Its name.
    pub name: String,
    /// Zero while a relay holds one of its partitions.
    pub unserved: Duration,
}

/// What the log holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    /// Position and time of its first event.
    pub oldest: Option<(i64, SystemTime)>,
    /// The highest position that was seen in it; 0 before the first.
    pub newest: i64,
    /// What retention has removed.
    pub gone: Option<Gone>,
}

/// What [`Store::count_events`] counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// Events.
    pub events: u64,
    /// When the first and the last of them were enqueued.
    pub between: Option<(SystemTime, SystemTime)>,
    /// Of these, how many are older than what was asked.
    pub older: u64,
}

/// What a step of cleaning did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Rows that were deleted, or slots that were emptied.
    pub removed: u64,
    /// Another step would go on.
    pub more: bool,
    /// What could not be cleaned because of something that passes, or that a person must mend: of what, and why.
    pub held: Vec<(String, &'static str)>,
}

/// A pause in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paused {
    /// The pause.
    pub pause: Pause,
    /// Until it ends by itself, by the database's clock.
    pub left: Duration,
}

/// Dead letters that were removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trimmed {
    /// Of which destination or group.
    pub scope: String,
    /// For their number; else for their age.
    pub too_many: bool,
    /// How many.
    pub removed: u64,
    /// Of these, how many the broker has no copy of, where it was to get one.
    pub uncopied: u64,
}

/// Dead letters as they are asked for.
#[derive(Debug, Clone)]
pub struct Letters {
    /// Which.
    pub filter: Filter,
    /// Those that are parked, instead of those that were taken out of their lines.
    pub parked: bool,
    /// In which order.
    pub order: Order,
    /// How many at most.
    pub limit: u32,
}

/// The order of dead letters.
#[derive(Debug, Clone, Copy)]
pub enum Order {
    /// The last given up first, from below this number on.
    Newest(Option<i64>),
    /// The first given up first, from above this number on.
    Oldest(Option<i64>),
    /// As they stand in their lines: by position and number, from above these on, without numbers above `through`.
    Lines {
        /// Position and number.
        after: Option<(i64, i64)>,
        /// The highest number.
        through: i64,
    },
}

impl Order {
    /// The lowest and the highest number, exclusive, and the place to go on behind.
    pub(crate) fn bounds(self) -> (i64, i64, (i64, i64)) {
        const START: (i64, i64) = (i64::MIN, i64::MIN);
        match self {
            Self::Newest(after) => (i64::MIN, after.unwrap_or(i64::MAX), START),
            Self::Oldest(after) => (after.unwrap_or(i64::MIN), i64::MAX, START),
            Self::Lines { after, through } => {
                (i64::MIN, through.saturating_add(1), after.unwrap_or(START))
            }
        }
    }

    /// As ORDER BY says it.
    pub(crate) fn by(self) -> &'static str {
        match self {
            Self::Newest(_) => "seq DESC",
            Self::Oldest(_) => "seq",
            Self::Lines { .. } => "position, seq",
        }
    }
}

/// What [`Store::read`] found.
#[derive(Debug, Clone, Default)]
pub struct Slice {
    /// In order.
    pub events: Vec<Logged>,
    /// The slice that the events lie in: an event's progress is `within.at(position)`.
    pub within: Progress,
    /// Where the partition stands once all these events are settled, when they were the slice's last. An empty read
    /// moves nothing and has none.
    pub end: Option<Progress>,
    /// What must be on disk before these events may be published; none if it is.
    pub gate: Option<Gate>,
}

/// A point of the database's log that must be on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate(pub String);

/// One event of the log.
#[derive(Debug, Clone)]
pub struct Logged {
    /// Its place.
    pub position: i64,
    /// The event, with `dataversion` and `datacontenttype` among its attributes.
    pub message: Arc<Message>,
    /// Not before this time, by the database's clock.
    pub deliver_at: Option<SystemTime>,
    /// Why it cannot be published, for rows that a plain INSERT made wrong (headers that are no object of texts).
    pub defect: Option<String>,
}

/// What [`Store::fall_due`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Due {
    /// The lines that were entered.
    pub lines: Vec<Line>,
    /// Until it is worth asking again; none while nothing is scheduled.
    pub next: Option<Duration>,
}

/// How full the waiting room is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Events of the scope's lines.
    pub total: u64,
    /// Of these, the first of their lines that wait for an operator.
    pub parked: u64,
    /// Events beside the lines, whose time has not come.
    pub scheduled: u64,
    /// Events of its longest line.
    pub longest: u64,
}

/// How an event stands with a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Its key has a line, or it waits itself.
    pub waits: bool,
    /// The inbox has it, applied or dead; but for a dead letter that was put back into its line.
    pub known: bool,
}

/// One transaction of a consumer, in which handlers write.
#[async_trait]
pub trait Unit: Send {
    /// The handler's connection; none in the simulation.
    fn connection(&mut self) -> Option<Connection<'_>>;

    /// For each message, whether it must wait because its key has a line, or because it waits itself.
    async fn blocked(&mut self, messages: &[&Message]) -> Result<Vec<bool>>;

    /// Begins an event: what follows is undone by [`Unit::undo`].
    async fn savepoint(&mut self) -> Result<()>;

    /// Undoes the event.
    async fn undo(&mut self) -> Result<()>;

    /// Ends the event. An error means that the handler ended the transaction itself.
    async fn keep(&mut self) -> Result<()>;

    /// Writes the inbox row of an event that is being applied; false if the inbox has it (applied or dead).
    async fn remember(&mut self, message: &Message) -> Result<bool>;

    /// Lets an event wait (idempotent).
    async fn defer(&mut self, event: &Deferral) -> Result<()>;

    /// Gives an event up: dead letter and inbox row (`dead`) together, whether it waited or not.
    async fn bury(&mut self, event: &DeadLetter) -> Result<()>;

    /// Ends one attempt of a line's head ([`Resolution::Dead`] also writes the inbox row).
    async fn resolve(&mut self, id: &LineId, resolution: &Resolution) -> Result<()>;

    /// Proves the lease and commits. After an error the outcome is unknown: run again, the inbox knows.
    async fn commit(self: Box<Self>, lease: &Lease, term: LeaseTerm) -> Result<()>;

    /// Undoes everything.
    async fn rollback(self: Box<Self>) -> Result<()>;
}

/// A duration as whole milliseconds for a statement.
pub(crate) fn millis(d: Duration) -> i64 {
    i64::try_from(d.as_millis()).unwrap_or(i64::MAX)
}
