use std::time::{Duration, SystemTime};

/// What a schema says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// Schema (PostgreSQL) or table prefix (SQLite).
    pub schema: String,
    /// Its version.
    pub version: u32,
    /// The version that this program makes and needs.
    pub needed: u32,
    /// Partitions of the log: as many relays can work at once.
    pub partitions: u16,
}

impl Installation {
    /// Whether [`migrate`](crate::migrate) has nothing to do.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.version >= self.needed
    }
}

/// How everything stands in one database, as any program can see it that may read the engine's tables.
///
/// Cheap whatever the log holds: by indexes and by arithmetic on positions, nothing is counted in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The schema.
    pub installation: Installation,
    /// When this was seen, by the database's clock.
    pub seen: SystemTime,
    /// The relays' side, by name.
    pub destinations: Vec<DestinationStatus>,
    /// The consumers' side, by name.
    pub groups: Vec<GroupStatus>,
    /// Who does what has no cursor: `pump` of a group, `cleaner`, `memory`.
    pub duties: Vec<DutyStatus>,
}

/// A destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestinationStatus {
    /// Its name.
    pub name: String,
    /// The log's partitions, in order.
    pub partitions: Vec<PartitionStatus>,
    /// What its relays did not get through.
    pub exceptions: Exceptions,
}

impl DestinationStatus {
    /// The age of the oldest event that is not published; zero if there is none.
    #[must_use]
    pub fn lag(&self) -> Duration {
        let lags = self.partitions.iter().map(|p| p.lag);
        lags.max().unwrap_or_default()
    }
}

/// A destination's way through one partition of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionStatus {
    /// Which one.
    pub partition: u16,
    /// Who relays it.
    pub owner: Option<Owner>,
    /// Grows with each owner.
    pub epoch: i64,
    /// Up to this position it is settled, but for transactions that were open then.
    pub settled: i64,
    /// The age of the oldest event above; zero if there is none.
    pub lag: Duration,
    /// Positions from that event to the partition's newest: no fewer than the events that wait. An estimate, because the
    /// partitions share one count, and what was rolled back has a position too.
    pub behind: u64,
}

/// A consumer group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// What it reads from.
    pub sources: Vec<SourceStatus>,
    /// What its handlers did not get through.
    pub exceptions: Exceptions,
}

/// A queue, or a partition of a topic or stream, that a group reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceStatus {
    /// `amqp`, `memory`, …
    pub transport: String,
    /// The broker's cluster, as far as it names itself.
    pub cluster: String,
    /// The queue's, topic's or stream's name.
    pub name: String,
    /// Its partition; 0 where there are none.
    pub partition: u32,
    /// Who reads it.
    pub owner: Option<Owner>,
    /// Grows with each owner.
    pub epoch: i64,
    /// The last settled offset or sequence; none where the broker keeps it.
    pub position: Option<u64>,
}

/// A lease without a cursor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DutyStatus {
    /// What work.
    pub kind: String,
    /// For whom: a group, a part of the engine, or empty.
    pub scope: String,
    /// Which part of it.
    pub shard: u16,
    /// Who does it.
    pub owner: Option<Owner>,
}

/// Whoever holds a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Fresh for each acquisition.
    pub id: String,
    /// Until the lease is free unless it is renewed.
    pub expires_in: Duration,
}

/// Events that left the straight way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exceptions {
    /// They wait in their keys' lines.
    pub deferred: u64,
    /// Of these, those that wait for an operator, each with its key behind it.
    pub parked: u64,
    /// The longest line of a key.
    pub longest_line: u64,
    /// Their time has not come.
    pub scheduled: u64,
    /// Given up; counted up to 100,000.
    pub dead_letters: u64,
}
