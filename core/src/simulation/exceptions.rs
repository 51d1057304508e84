//! What waits in the model database, and what was given up.

use std::collections::BTreeMap;

use pillarbox_transport::Message;

use super::{
    application::number_of,
    database::{Change, DeadRow, DeferredRow, RowId, millis},
    world::Inner,
};
use crate::{
    error::Result,
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Line, LineId, PARKED, Resolution, Side},
    lease::{Lease, LeaseKey},
    store::Waiting,
};

/// Which exceptions a lease is responsible for: side, scope, partition.
fn scope(key: &LeaseKey) -> (&'static str, String, u16) {
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

pub(super) fn message_id(message: &Message) -> LineId {
    (message.source().to_owned(), message.id.clone())
}

fn until(due_at: i64, now: i64) -> std::time::Duration {
    std::time::Duration::from_millis(u64::try_from(due_at - now).unwrap_or_default())
}

impl Inner {
    /// The change that lets an event wait; none if it waits already.
    fn deferral(&self, key: &LeaseKey, event: &Deferral) -> Option<Change> {
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

    pub(super) fn defer(&mut self, lease: &Lease, events: &[Deferral]) -> Result<()> {
        self.database.held(lease)?;
        if self.straight {
            let numbers: Vec<_> = events.iter().map(|e| number_of(&e.message)).collect();
            self.wrong(format!("{numbers:?} wait, and nothing of their keys does"));
        }
        let changes = events
            .iter()
            .filter_map(|e| self.deferral(&lease.key, e))
            .collect();
        self.database.commit(None, changes, true);
        self.check_relays_room();
        Ok(())
    }

    pub(super) fn bury(&mut self, lease: &Lease, events: &[DeadLetter]) -> Result<()> {
        self.database.held(lease)?;
        let mut changes = Vec::new();
        for event in events {
            let id = row_id(&lease.key, &message_id(&event.message));
            changes.push(Change::Deferred(id.clone(), None));
            if !self.database.state.dead.contains_key(&id) {
                let row = DeadRow {
                    message: event.message.clone(),
                    attempts: event.attempts,
                    copied: false,
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

    pub(super) fn lines(&self, lease: &Lease, limit: usize) -> Result<Vec<Line>> {
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

    pub(super) fn line(
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
                    copied: false,
                };
                vec![Change::Deferred(id.clone(), None), Change::Dead(id, dead)]
            }
        }
    }

    pub(super) fn waiting_room(&self, side: Side, scope: &str) -> Waiting {
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
