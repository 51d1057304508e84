//! A row with owner, epoch and expiry, on the database's clock. It alone assigns work; whoever moves a cursor or commits
//! an effect proves it in the same transaction.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use pillarbox_transport::Source;
use tokio::{sync::watch, task::AbortHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{cursor::Progress, error::Kind, failure::LineId, running::task, store::Store};

/// The kind of the seats of a destination's relays.
pub(crate) const RELAYS: &str = "relays";

/// The kind of the lease on a group's deferred lines.
pub(crate) const PUMP: &str = "pump";

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
    /// Work without a cursor: `pump` (a group's deferred lines), `cleaner` (of the log, of the inbox), `memory` (the one
    /// process on the memory transport). Or a place among many: `relays` (those of a destination that live).
    Duty {
        /// What work.
        kind: &'static str,
        /// For whom: a group, or `""`.
        scope: String,
        /// Which part of it.
        shard: u16,
    },
}

impl LeaseKey {
    /// Whether its owners run handlers, over which a process can die.
    pub(crate) fn runs_handlers(&self) -> bool {
        match self {
            Self::Source { .. } => true,
            Self::Duty { kind, .. } => *kind == PUMP,
            Self::Relay { .. } => false,
        }
    }
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
    /// For [`LeaseKey::Relay`]: the destination began at this time, and passes over what was enqueued before.
    pub since: Option<SystemTime>,
    /// For [`LeaseKey::Source`]: the last settled position, none at the first start and after a reset.
    pub position: Option<u64>,
    /// For a consumer's leases: how many owners in a row died without giving it back.
    pub deaths: u32,
    /// What the last of them had begun, when it had nothing else under way.
    pub alone: Option<LineId>,
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

/// Renews a lease from a task of its own, and says when it must no longer be trusted.
#[derive(Debug)]
pub(crate) struct Keeper {
    lost: CancellationToken,
    renewed: watch::Sender<Instant>,
    task: AbortHandle,
}

impl Keeper {
    /// `acquired` is the moment before the acquisition was sent: the database's clock started no earlier.
    pub(crate) fn start(
        store: Arc<dyn Store>,
        lease: Lease,
        term: LeaseTerm,
        acquired: Instant,
    ) -> Self {
        let lost = CancellationToken::new();
        let renewed = watch::Sender::new(acquired);
        let keep = keep(store, lease, term, renewed.clone(), lost.clone());
        Self {
            lost,
            renewed,
            task: tokio::spawn(task(keep)).abort_handle(),
        }
    }

    /// Another statement, sent at `sent`, renewed the lease too.
    pub(crate) fn renewed(&self, sent: Instant) {
        self.renewed.send_if_modified(|at| {
            let later = sent > *at;
            *at = (*at).max(sent);
            later
        });
    }

    /// Resolves when the lease is lost, or could be: whoever holds it stops at once.
    pub(crate) fn lost(&self) -> &CancellationToken {
        &self.lost
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(
    store: Arc<dyn Store>,
    lease: Lease,
    term: LeaseTerm,
    renewed: watch::Sender<Instant>,
    lost: CancellationToken,
) {
    let mut seen = renewed.subscribe();
    let mut retry_at = None;
    loop {
        let sent = *seen.borrow_and_update();
        let deadline = sent + term.trusted();
        let due = retry_at.take().unwrap_or(sent + term.renewal());
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(deadline) => break,
            _ = seen.changed() => continue,
            () = tokio::time::sleep_until(due) => {}
        }
        let sent = Instant::now();
        let renewal = tokio::time::timeout_at(deadline, store.renew(&lease, term)).await;
        match renewal {
            Ok(Ok(())) => drop(renewed.send_if_modified(|at| {
                *at = (*at).max(sent);
                true
            })),
            Ok(Err(e)) if e.kind() == Kind::LeaseLost => break,
            // Away or busy: go on trying until it can no longer be trusted.
            Ok(Err(_)) => retry_at = Some(Instant::now() + term.term() / 40),
            Err(_) => break,
        }
    }
    lost.cancel();
}
