//! A row with owner, epoch and expiry, on the database's clock. It alone assigns work; whoever moves a cursor or commits
//! an effect proves it in the same transaction.

use std::{fmt, time::Duration};

use pillarbox_transport::Source;
use uuid::Uuid;

use crate::cursor::Progress;

/// What a lease is for. A lease on something with a cursor lives in the cursor's row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LeaseKey {
    /// A relay's partition of a destination.
    Relay {
        /// The destination's name.
        destination: String,
        /// 0 to partitions - 1.
        partition: u16,
    },
    /// A group's source.
    Source {
        /// The consumer group.
        group: String,
        /// The queue or partition.
        source: Source,
    },
    /// Work without a cursor: `pump` (a group's deferred lines), `memory` (the one process on the memory transport).
    Duty {
        /// What work.
        kind: &'static str,
        /// For whom: a group, or `""`.
        scope: String,
        /// Which part of it.
        shard: u16,
    },
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relay {
                destination,
                partition,
            } => write!(f, "relay {destination}/{partition}"),
            Self::Source { group, source } => {
                write!(f, "group {group} on {}/{}", source.name, source.partition)
            }
            Self::Duty { kind, scope, shard } => write!(f, "{kind} {scope}/{shard}"),
        }
    }
}

/// A lease that was acquired. Every fenced statement compares both `owner` and `epoch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// What it is for.
    pub key: LeaseKey,
    /// Fresh for each acquisition: after a lossy failover the same epoch can be handed out twice.
    pub owner: Uuid,
    /// Grows with each acquisition.
    pub epoch: i64,
}

/// A lease with what its cursor's row says.
#[derive(Debug, Clone)]
pub struct Acquired {
    /// The lease.
    pub lease: Lease,
    /// For [`LeaseKey::Relay`]: where the partition stands.
    pub progress: Progress,
    /// For [`LeaseKey::Source`]: the last settled position, none at the first start and after a reset.
    pub position: Option<u64>,
    /// For [`LeaseKey::Source`]: the source was deleted and made anew since, so it is read from its oldest event.
    pub reset: bool,
}

/// How long leases last. Defaults to 10 s, renewed at a third of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseTerm(Duration);

impl LeaseTerm {
    /// The shortest term.
    pub const SHORTEST: Duration = Duration::from_secs(1);
    /// The longest term: a lease that expires later than this from now comes from a clock that was set back, and counts as free.
    pub const LONGEST: Duration = Duration::from_secs(300);

    /// A term, held between 1 s and 5 min.
    #[must_use]
    pub fn new(term: Duration) -> Self {
        Self(term.clamp(Self::SHORTEST, Self::LONGEST))
    }

    /// The whole term, counted by the database from the renewal.
    #[must_use]
    pub fn term(self) -> Duration {
        self.0
    }

    /// How long after *sending* a renewal its owner still acts, by its own monotonic clock: well before the expiry, so
    /// that it has stopped when the next owner starts.
    #[must_use]
    pub fn trusted(self) -> Duration {
        self.0 * 4 / 5
    }

    /// How often it is renewed.
    #[must_use]
    pub fn renewal(self) -> Duration {
        self.0 / 3
    }

    /// What a statement or an idle transaction of the engine may last: shorter than the lease, so that a frozen owner
    /// holds no lock for longer.
    #[must_use]
    pub fn statement(self) -> Duration {
        self.0 * 3 / 5
    }
}

impl Default for LeaseTerm {
    fn default() -> Self {
        Self(Duration::from_secs(10))
    }
}
