//! The model database as the engine's store.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;

use super::{
    database::{Change, DeadRow, DeferredRow, RowId, millis, partition_of},
    world::{Inner, World},
};
use crate::{
    admin::{DryRun, Filter, Letter, LetterId, Shown},
    connection::Pool,
    cursor::Progress,
    error::{Error, Kind, Result},
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Line, LineId, PARKED, Resolution, Side},
    lease::{Acquired, Lease, LeaseKey, LeaseTerm},
    store::{Due, Gate, Letters, Slice, Store, Unit, Waiting},
};

/// One process's way to the database.
pub(super) struct ModelStore {
    pub(super) world: Arc<World>,
    pub(super) process: usize,
}

/// Which exceptions a lease is responsible for: side, scope, partition.
pub(super) fn scope(key: &LeaseKey) -> (&'static str, String, u16) {
    match key {
        LeaseKey::Relay {
            destination,
            partition,
        } => (Side::Relay.as_str(), destination.clone(), *partition),
        LeaseKey::Source { group, .. } => (Side::Consumer.as_str(), group.clone(), 0),
        LeaseKey::Duty { scope, shard, .. } => (Side::Consumer.as_str(), scope.clone(), *shard),
    }
}

pub(super) fn row_id(key: &LeaseKey, id: &LineId) -> RowId {
    let (side, scope, _) = scope(key);
    (side, scope, id.0.clone(), id.1.clone())
}

pub(super) fn message_id(message: &pillarbox_transport::Message) -> LineId {
    (message.source().to_owned(), message.id.clone())
}

fn until(due_at: i64, now: i64) -> std::time::Duration {
    std::time::Duration::from_millis(u64::try_from(due_at - now).unwrap_or_default())
}

impl Inner {
    /// The change that lets an event wait; none if it waits already.
    pub(super) fn deferral(&self, key: &LeaseKey, event: &Deferral) -> Option<Change> {
        let (_, _, partition) = scope(key);
        let id = row_id(key, &message_id(&event.message));
        if self.database.state.deferred.contains_key(&id) {
            return None;
        }
        let arrivals = self.database.state.deferred.values().map(|r| r.arrival);
        let row = DeferredRow {
            message: event.message.clone(),
            partition,
            position: event.position,
            arrival: arrivals.max().unwrap_or_default() + 1,
            attempts: event.attempts,
            due_at: self.now() + millis(event.delay),
        };
        Some(Change::Deferred(id, Some(row)))
    }

    fn defer(&mut self, lease: &Lease, events: &[Deferral]) -> Result<()> {
        self.database.held(lease)?;
        let changes = events
            .iter()
            .filter_map(|e| self.deferral(&lease.key, e))
            .collect();
        self.database.commit(None, changes, true);
        Ok(())
    }

    fn bury(&mut self, lease: &Lease, events: &[DeadLetter]) -> Result<()> {
        self.database.held(lease)?;
        let mut changes = Vec::new();
        for event in events {
            let id = row_id(&lease.key, &message_id(&event.message));
            changes.push(Change::Deferred(id.clone(), None));
            if !self.database.state.dead.contains_key(&id) {
                let row = DeadRow {
                    message: event.message.clone(),
                    attempts: event.attempts,
                };
                changes.push(Change::Dead(id, row));
            }
        }
        self.database.commit(None, changes, true);
        Ok(())
    }

    /// The rows that a lease is responsible for, in the order of their lines.
    fn waiting(&self, key: &LeaseKey) -> Vec<(&RowId, &DeferredRow)> {
        let (side, scope, partition) = scope(key);
        let rows = self.database.state.deferred.iter();
        let mut rows: Vec<_> = rows
            .filter(|(id, row)| id.0 == side && id.1 == scope && row.partition == partition)
            .collect();
        rows.sort_by_key(|(_, row)| (row.position, row.arrival));
        rows
    }

    fn lines(&self, lease: &Lease, limit: usize) -> Result<Vec<Line>> {
        self.database.held(lease)?;
        let now = self.now();
        let mut heads = BTreeMap::new();
        for (_, row) in self.waiting(&lease.key) {
            let (key, id) = (Key::of(&row.message), message_id(&row.message));
            // A keyless event is a line of its own.
            let name = (key.clone(), key.is_none().then(|| id.clone()));
            heads.entry(name).or_insert(Line {
                key,
                head: id,
                due_in: until(row.due_at, now),
            });
        }
        let mut lines: Vec<Line> = heads.into_values().collect();
        lines.sort_by_key(|l| l.due_in);
        lines.truncate(limit);
        Ok(lines)
    }

    fn line(
        &self,
        lease: &Lease,
        key: Option<&Key>,
        id: &LineId,
        limit: usize,
    ) -> Result<Vec<Deferred>> {
        self.database.held(lease)?;
        let now = self.now();
        let of_line = |row: &DeferredRow| match key {
            Some(key) => Key::of(&row.message).as_ref() == Some(key),
            None => message_id(&row.message) == *id,
        };
        let rows = self.waiting(&lease.key).into_iter().map(|(_, row)| row);
        let line = rows
            .filter(|row| of_line(row))
            .take(limit)
            .map(|row| Deferred {
                message: row.message.clone(),
                position: row.position,
                attempts: row.attempts,
                due_in: until(row.due_at, now),
                maybe_sent: false,
            });
        Ok(line.collect())
    }

    /// What ends one attempt of a line's head; nothing if another way ended it.
    pub(super) fn resolution(
        &self,
        key: &LeaseKey,
        id: &LineId,
        resolution: &Resolution,
    ) -> Vec<Change> {
        let id = row_id(key, id);
        let Some(row) = self.database.state.deferred.get(&id) else {
            return Vec::new();
        };
        match resolution {
            Resolution::Done => vec![Change::Deferred(id, None)],
            Resolution::Again {
                attempts, delay, ..
            } => {
                let row = DeferredRow {
                    attempts: *attempts,
                    due_at: self.now() + millis(*delay),
                    ..row.clone()
                };
                vec![Change::Deferred(id, Some(row))]
            }
            // Nothing that a schedule looks at.
            Resolution::Unsure => Vec::new(),
            Resolution::Park { attempts, .. } => {
                let row = DeferredRow {
                    attempts: *attempts,
                    due_at: self.now() + millis(PARKED),
                    ..row.clone()
                };
                vec![Change::Deferred(id, Some(row))]
            }
            Resolution::Dead { attempts, .. } => {
                let dead = DeadRow {
                    message: row.message.clone(),
                    attempts: *attempts,
                };
                vec![Change::Deferred(id.clone(), None), Change::Dead(id, dead)]
            }
        }
    }

    fn settle(
        &mut self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<()> {
        let mut row = self.database.held(lease)?;
        self.check_settle(lease, progress);
        row.progress = progress.clone();
        row.expires_at = self.now() + millis(term.term());
        let change = Change::Lease(lease.key.to_string(), row);
        self.database.commit(None, vec![change], durable);
        Ok(())
    }

    fn flush(&mut self, lease: &Lease, gate: &Gate) -> Result<()> {
        self.database.held(lease)?;
        if !self.database.is_flushed(gate) {
            self.database.flush_all();
        }
        Ok(())
    }

    fn renew(&mut self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        let mut row = self.database.held(lease)?;
        row.expires_at = self.now() + millis(term.term());
        let change = Change::Lease(lease.key.to_string(), row);
        self.database.commit(None, vec![change], true);
        Ok(())
    }

    fn waiting_room(&self, side: Side, scope: &str) -> Waiting {
        let mut longest = BTreeMap::<Option<Key>, u64>::new();
        let rows = self.database.state.deferred.iter();
        let mut total = 0;
        for (_, row) in rows.filter(|(id, _)| id.0 == side.as_str() && id.1 == scope) {
            total += 1;
            *longest.entry(Key::of(&row.message)).or_default() += 1;
        }
        let longest = longest
            .into_iter()
            .filter(|(key, _)| key.is_some())
            .map(|(_, n)| n)
            .max();
        Waiting {
            total,
            longest: longest.unwrap_or_default(),
            ..Waiting::default()
        }
    }
}

#[async_trait]
impl Store for ModelStore {
    fn pool(&self) -> Option<Pool> {
        None
    }

    fn schema(&self) -> &str {
        "simulation"
    }

    async fn migrate(&self, _partitions: u16) -> Result<()> {
        Ok(())
    }

    async fn partitions(&self) -> Result<u16> {
        self.call("partitions", |w| Ok(w.plan.partitions)).await
    }

    async fn acquire(&self, key: &LeaseKey, term: LeaseTerm) -> Result<Option<Acquired>> {
        let key = key.clone();
        let process = self.process;
        self.call("acquire", move |w| {
            let (owner, now) = (w.chance.uuid(), w.now());
            let acquired = w.database.acquire(&key, term, now, owner);
            if let Some(acquired) = &acquired {
                w.check_acquire(process, &acquired.lease);
                let epoch = acquired.lease.epoch;
                w.tell(|| {
                    format!(
                        "relay {process} has {key} in epoch {epoch}, {:?}",
                        acquired.progress
                    )
                });
            }
            Ok(acquired)
        })
        .await
    }

    async fn renew(&self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        let lease = lease.clone();
        self.call("renew", move |w| w.renew(&lease, term)).await
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let lease = lease.clone();
        self.call("release", move |w| {
            w.database.release(&lease);
            Ok(())
        })
        .await
    }

    async fn read(&self, partition: u16, from: &Progress, limit: u32) -> Result<Slice> {
        let from = from.clone();
        self.call("read", move |w| {
            let limit = usize::try_from(limit).unwrap_or(usize::MAX).max(1);
            w.check_read(limit);
            let slice = w.database.read(partition, &from, limit);
            w.tell(|| {
                format!(
                    "read {partition}: {:?}",
                    slice.events.iter().map(|e| e.position).collect::<Vec<_>>()
                )
            });
            Ok(slice)
        })
        .await
    }

    async fn flush(&self, lease: &Lease, gate: &Gate) -> Result<()> {
        let (lease, gate) = (lease.clone(), gate.clone());
        self.call("flush", move |w| w.flush(&lease, &gate)).await
    }

    async fn settle(
        &self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<()> {
        let (lease, progress) = (lease.clone(), progress.clone());
        self.call("settle", move |w| {
            w.tell(|| format!("settle {} at {progress:?}", lease.key));
            w.settle(&lease, &progress, term, durable)
        })
        .await
    }

    async fn settle_source(&self, lease: &Lease, position: u64, term: LeaseTerm) -> Result<()> {
        let lease = lease.clone();
        self.call("settle the source", move |w| {
            let mut row = w.database.held(&lease)?;
            row.position = Some(position);
            row.expires_at = w.now() + millis(term.term());
            let change = Change::Lease(lease.key.to_string(), row);
            w.database.commit(None, vec![change], false);
            Ok(())
        })
        .await
    }

    async fn defer(&self, lease: &Lease, events: &[Deferral]) -> Result<()> {
        let (lease, events) = (lease.clone(), events.to_vec());
        self.call("defer", move |w| {
            w.tell(|| {
                format!(
                    "defer {:?}",
                    events
                        .iter()
                        .map(|e| (e.position, e.attempts))
                        .collect::<Vec<_>>()
                )
            });
            w.defer(&lease, &events)
        })
        .await
    }

    async fn bury(&self, lease: &Lease, events: &[DeadLetter]) -> Result<()> {
        let (lease, events) = (lease.clone(), events.to_vec());
        self.call("bury", move |w| {
            w.tell(|| {
                format!(
                    "bury {:?}",
                    events.iter().map(|e| e.position).collect::<Vec<_>>()
                )
            });
            w.bury(&lease, &events)
        })
        .await
    }

    async fn lines(&self, lease: &Lease, limit: u32) -> Result<Vec<Line>> {
        let lease = lease.clone();
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        self.call("lines", move |w| w.lines(&lease, limit)).await
    }

    async fn line(
        &self,
        lease: &Lease,
        key: Option<&Key>,
        id: &LineId,
        limit: u32,
    ) -> Result<Vec<Deferred>> {
        let (lease, key, id) = (lease.clone(), key.cloned(), id.clone());
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        self.call("line", move |w| w.line(&lease, key.as_ref(), &id, limit))
            .await
    }

    async fn resolve(&self, lease: &Lease, id: &LineId, resolution: &Resolution) -> Result<()> {
        let (lease, id, resolution) = (lease.clone(), id.clone(), resolution.clone());
        self.call("resolve", move |w| {
            w.tell(|| format!("resolve {} {resolution:?}", id.1));
            w.database.held(&lease)?;
            let changes = w.resolution(&lease.key, &id, &resolution);
            w.database.commit(None, changes, true);
            Ok(())
        })
        .await
    }

    async fn fall_due(&self, _lease: &Lease, _position: i64, _limit: u32) -> Result<Due> {
        // Its writers schedule nothing.
        Ok(Due::default())
    }

    async fn deferred(&self, side: Side, scope: &str) -> Result<Waiting> {
        let scope = scope.to_owned();
        self.call("deferred", move |w| Ok(w.waiting_room(side, &scope)))
            .await
    }

    async fn begin(&self, _group: &str, _term: LeaseTerm, _durable: bool) -> Result<Box<dyn Unit>> {
        Err(not_simulated("begin"))
    }

    async fn uncopied(&self, _group: &str, _limit: u32) -> Result<Vec<DeadLetter>> {
        Ok(Vec::new())
    }

    async fn copied(&self, _lease: &Lease, _ids: &[LineId]) -> Result<()> {
        Ok(())
    }

    async fn letters(&self, _letters: &Letters) -> Result<Vec<Letter>> {
        Err(not_simulated("letters"))
    }

    async fn letter(&self, _id: &LetterId) -> Result<Option<Shown>> {
        Err(not_simulated("letter"))
    }

    async fn count_letters(&self, _filter: &Filter) -> Result<DryRun> {
        Err(not_simulated("count letters"))
    }

    async fn newer(&self, _id: &LetterId) -> Result<u64> {
        Err(not_simulated("newer"))
    }

    async fn waits(&self, _id: &LetterId) -> Result<bool> {
        Err(not_simulated("waits"))
    }

    async fn retry_letters(&self, _side: Side, _scope: &str, _ids: &[LineId]) -> Result<u64> {
        Err(not_simulated("retry letters"))
    }

    async fn discard_letters(&self, _side: Side, _scope: &str, _ids: &[LineId]) -> Result<u64> {
        Err(not_simulated("discard letters"))
    }
}

fn not_simulated(operation: &'static str) -> Error {
    Error::new(Kind::Unavailable, operation, "not simulated")
}

impl ModelStore {
    async fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        effect: impl FnOnce(&mut Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.world.call(self.process, what, effect).await
    }
}

/// Where the database would put an event.
pub(super) fn place(w: &Inner, message: &pillarbox_transport::Message, number: usize) -> u16 {
    partition_of(Key::of(message).as_ref(), number, w.plan.partitions)
}
