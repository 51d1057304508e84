//! A model of the database: commits in a write-ahead log, of which a crash leaves what was flushed; transactions that
//! become visible in another order than that of their positions; snapshots; rows that hold leases.
//!
//! A log that is replayed is all its memory, so that what a crash or a failover leaves is consistent by construction.

use std::collections::{BTreeMap, BTreeSet};

use pillarbox_transport::Message;
use uuid::Uuid;

use super::application::number_of;
use crate::{
    cursor::Progress,
    error::{Error, Kind, Result},
    event::Key,
    failure::LineId,
    lease::{Acquired, Lease, LeaseKey, LeaseTerm},
};

/// An event's number: its place among all that the schedule's application wrote.
pub(super) type Number = usize;
/// Side, scope, source, id.
pub(super) type RowId = (&'static str, String, String, String);

/// A row of the log.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) number: Number,
    pub(super) position: i64,
    pub(super) xid: u64,
    pub(super) partition: u16,
    pub(super) message: Message,
    pub(super) defect: Option<String>,
}

/// A row that holds a lease, and a cursor if it has one.
#[derive(Debug, Clone, Default)]
pub(super) struct LeaseRow {
    pub(super) owner: Option<Uuid>,
    pub(super) epoch: i64,
    pub(super) expires_at: i64,
    pub(super) progress: Progress,
    pub(super) position: Option<u64>,
    pub(super) identity: String,
    pub(super) deaths: u32,
    pub(super) alone: Option<LineId>,
}

impl LeaseRow {
    pub(super) fn is_free(&self, now: i64) -> bool {
        self.expires_at <= now || self.expires_at > now + millis(LeaseTerm::LONGEST)
    }
}

#[derive(Debug, Clone)]
pub(super) struct DeferredRow {
    pub(super) message: Message,
    pub(super) partition: u16,
    pub(super) position: i64,
    pub(super) arrival: u64,
    pub(super) attempts: u32,
    pub(super) due_at: i64,
}

#[derive(Debug, Clone)]
pub(super) struct DeadRow {
    pub(super) message: Message,
    pub(super) attempts: u32,
    pub(super) copied: bool,
}

/// What a commit changed.
#[derive(Debug, Clone)]
pub(super) enum Change {
    Log(Row),
    Lease(String, LeaseRow),
    Deferred(RowId, Option<DeferredRow>),
    Dead(RowId, DeadRow),
    /// Group, source, id; whether the event is dead there.
    Inbox((String, String, String), bool),
    /// A handler's own write.
    Effect(Number),
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) log: BTreeMap<i64, Row>,
    pub(super) leases: BTreeMap<String, LeaseRow>,
    pub(super) deferred: BTreeMap<RowId, DeferredRow>,
    pub(super) dead: BTreeMap<RowId, DeadRow>,
    pub(super) inbox: BTreeMap<(String, String, String), bool>,
    pub(super) effects: Vec<Number>,
}

impl State {
    fn apply(&mut self, change: &Change) {
        match change.clone() {
            Change::Log(row) => drop(self.log.insert(row.position, row)),
            Change::Lease(key, row) => drop(self.leases.insert(key, row)),
            Change::Deferred(id, Some(row)) => drop(self.deferred.insert(id, row)),
            Change::Deferred(id, None) => drop(self.deferred.remove(&id)),
            Change::Dead(id, row) => drop(self.dead.insert(id, row)),
            Change::Inbox(id, dead) => drop(self.inbox.insert(id, dead)),
            Change::Effect(number) => self.effects.push(number),
        }
    }
}

#[derive(Debug)]
struct Record {
    xid: u64,
    changes: Vec<Change>,
}

#[derive(Debug, Default)]
pub(super) struct Database {
    records: Vec<Record>,
    /// So many of them are on disk.
    pub(super) flushed: usize,
    pub(super) state: State,
    pub(super) running: BTreeSet<u64>,
    pub(super) next_xid: u64,
    next_position: i64,
    /// The owners that this incarnation of the database remembers; a crash forgets all.
    tokens: BTreeSet<Uuid>,
    /// Grows with each crash: what was under way then is no more.
    pub(super) incarnation: u32,
    /// Where in the log each event was committed.
    logged: BTreeMap<Number, usize>,
    /// Events that a failover lost after they were flushed.
    pub(super) lost: BTreeSet<Number>,
    /// Events that were given up, even if a failover has undone it.
    pub(super) given_up: BTreeSet<Number>,
}

impl Database {
    /// Begins a writer's transaction.
    pub(super) fn begin(&mut self) -> u64 {
        self.next_xid += 1;
        self.running.insert(self.next_xid);
        self.next_xid
    }

    /// Draws a position, as an INSERT does.
    pub(super) fn draw(&mut self) -> i64 {
        self.next_position += 1;
        self.next_position
    }

    pub(super) fn rollback(&mut self, xid: u64) {
        self.running.remove(&xid);
    }

    /// Commits. The caller has checked what must be true.
    pub(super) fn commit(&mut self, xid: Option<u64>, changes: Vec<Change>, durable: bool) {
        let xid = xid.unwrap_or_else(|| self.begin());
        self.running.remove(&xid);
        for change in &changes {
            self.state.apply(change);
            match change {
                Change::Log(row) => drop(self.logged.insert(row.number, self.records.len())),
                Change::Dead(_, row) => drop(self.given_up.insert(number_of(&row.message))),
                _ => {}
            }
        }
        self.records.push(Record { xid, changes });
        if durable {
            self.flush_all();
        }
    }

    /// The end of the log of commits.
    pub(super) fn end(&self) -> usize {
        self.records.len()
    }

    pub(super) fn flush_all(&mut self) {
        self.flushed = self.records.len();
    }

    /// Some of what was not flushed.
    pub(super) fn flush_some(&mut self, share: f64) {
        let rest = self.records.len() - self.flushed;
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let some = (rest as f64 * share).ceil() as usize;
        self.flushed += some.min(rest);
    }

    /// Whether an event is in the log, and nothing but a failover can undo it.
    pub(super) fn is_durable(&self, number: Number) -> bool {
        self.logged
            .get(&number)
            .is_some_and(|lsn| *lsn < self.flushed)
    }

    /// Whether a crash could still undo what became of an event at a consumer.
    pub(super) fn could_lose(&self, id: &str) -> bool {
        let unflushed = self
            .records
            .iter()
            .skip(self.flushed)
            .flat_map(|r| &r.changes);
        unflushed.into_iter().any(|change| match change {
            Change::Inbox(key, _) => key.2 == id,
            Change::Deferred(key, _) => key.3 == id,
            _ => false,
        })
    }

    /// Ends and starts again: what was not flushed never was. Positions and transaction ids are handed out again.
    pub(super) fn crash(&mut self) {
        self.recover(self.flushed);
    }

    /// A standby takes over that lacks the last `commits` that were flushed.
    pub(super) fn fail_over(&mut self, commits: usize) {
        let kept = self.flushed.saturating_sub(commits);
        let flushed = self.records.iter().take(self.flushed).skip(kept);
        for change in flushed.flat_map(|r| &r.changes) {
            if let Change::Log(row) = change {
                self.lost.insert(row.number);
            }
        }
        self.recover(kept);
    }

    fn recover(&mut self, kept: usize) {
        self.records.truncate(kept);
        self.flushed = kept;
        self.logged.retain(|_, lsn| *lsn < kept);
        self.state = State::default();
        (self.next_xid, self.next_position) = (0, 0);
        for record in &self.records {
            self.next_xid = self.next_xid.max(record.xid);
            for change in &record.changes {
                self.state.apply(change);
                if let Change::Log(row) = change {
                    self.next_position = self.next_position.max(row.position);
                }
            }
        }
        self.running.clear();
        self.tokens.clear();
        self.incarnation += 1;
    }
}

impl Database {
    pub(super) fn acquire(
        &mut self,
        key: &LeaseKey,
        term: LeaseTerm,
        now: i64,
        owner: Uuid,
    ) -> Option<Acquired> {
        let name = key.to_string();
        let mut row = self.state.leases.get(&name).cloned().unwrap_or_default();
        if !row.is_free(now) {
            return None;
        }
        match row.owner.replace(owner) {
            Some(before) => {
                self.tokens.remove(&before);
                row.deaths += 1;
            }
            None => (row.deaths, row.alone) = (0, None),
        }
        row.epoch += 1;
        row.expires_at = now + millis(term.term());
        let mut reset = false;
        if let LeaseKey::Source { source, .. } = key {
            reset = row.position.is_some() && row.identity != source.identity;
            row.position = row.position.filter(|_| !reset);
            row.identity.clone_from(&source.identity);
        }
        let acquired = Acquired {
            lease: Lease {
                key: key.clone(),
                owner,
                epoch: row.epoch,
            },
            progress: row.progress.clone(),
            since: None,
            position: row.position,
            reset,
            deaths: row.deaths,
            alone: row.alone.clone(),
        };
        self.tokens.insert(owner);
        self.commit(None, vec![Change::Lease(name, row)], true);
        Some(acquired)
    }

    /// The lease's row, if it is held: owner, epoch, and the memory of this incarnation.
    pub(super) fn held(&self, lease: &Lease) -> Result<LeaseRow> {
        let row = self.owned(lease);
        row.filter(|_| self.tokens.contains(&lease.owner))
            .ok_or_else(|| {
                let text = format!("the lease {} has another owner", lease.key);
                Error::new(Kind::LeaseLost, "simulate", text)
            })
    }

    fn owned(&self, lease: &Lease) -> Option<LeaseRow> {
        let row = self.state.leases.get(&lease.key.to_string());
        row.filter(|r| r.owner == Some(lease.owner) && r.epoch == lease.epoch)
            .cloned()
    }

    pub(super) fn release(&mut self, lease: &Lease) {
        if let Some(mut row) = self.owned(lease) {
            self.tokens.remove(&lease.owner);
            (row.owner, row.expires_at) = (None, i64::MIN);
            self.commit(None, vec![Change::Lease(lease.key.to_string(), row)], false);
        }
    }
}

pub(super) fn millis(d: std::time::Duration) -> i64 {
    crate::store::millis(d)
}

/// The key's place: a partition, as a hash in the database gives it.
pub(super) fn partition_of(key: Option<&Key>, number: Number, partitions: u16) -> u16 {
    let text = key.map_or_else(
        || number.to_string(),
        |k| format!("{}\u{1f}{}", k.topic, k.key),
    );
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    u16::try_from((hash >> 17) % u64::from(partitions)).unwrap_or_default()
}
