//! Consumers' transactions on the model database's side: what is open, rows of the inbox that others wait for, an end by
//! the server when nothing happens for too long.

use std::{borrow::Cow, collections::BTreeMap, fmt, sync::Arc, time::Duration};

use pillarbox_transport::Message;
use tokio::time::Instant;

use super::{
    application::number_of,
    database::{Change, DeadRow, DeferredRow, Number, RowId, millis},
    exceptions::message_id,
    world::{Inner, World},
};
use crate::{
    error::{Error, Kind, Result},
    event::Key,
    failure::{LineId, Side},
    lease::{Lease, LeaseTerm},
    store::Standing,
};

/// Group, source, id.
pub(super) type InboxKey = (String, String, String);

/// Transactions that are open.
#[derive(Debug, Default)]
pub(super) struct Units {
    open: BTreeMap<u64, Open>,
    next: u64,
    /// Deferred rows are numbered as they are written.
    arrivals: u64,
}

#[derive(Debug)]
pub(super) struct Open {
    process: usize,
    incarnation: u32,
    pub(super) changes: Vec<Change>,
    /// Inbox rows that it wrote: another transaction that writes one of them waits.
    rows: Vec<InboxKey>,
    /// The event whose inbox row was asked for last: the one that is handled.
    handled: Option<InboxKey>,
    /// Where its savepoint stands, in changes and rows.
    savepoint: Option<(usize, usize)>,
    touched: Instant,
}

impl Units {
    pub(super) fn undo(&mut self, id: u64) {
        self.open.remove(&id);
    }

    /// The number of the next deferred row.
    pub(super) fn arrival(&mut self) -> u64 {
        self.arrivals += 1;
        self.arrivals
    }
}

/// The server ends a transaction in which nothing happens.
pub(super) async fn guard(world: Arc<World>, id: u64, bound: Duration) {
    while let Some(touched) = world.with(|w| w.units.open.get(&id).map(|o| o.touched)) {
        if touched.elapsed() >= bound {
            return world.with(|w| {
                w.tell(|| format!("transaction {id} was idle for too long"));
                w.units.undo(id);
            });
        }
        tokio::time::sleep_until(touched + bound).await;
    }
}

/// Whether an inbox row could be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Row {
    New,
    Known,
    /// Another transaction has written it, and has not ended.
    Awaited,
}

impl Inner {
    /// Begins a transaction, and answers its number.
    pub(super) fn begin_unit(&mut self, process: usize) -> u64 {
        self.units.next += 1;
        let open = Open {
            process,
            incarnation: self.database.incarnation,
            changes: Vec::new(),
            rows: Vec::new(),
            handled: None,
            savepoint: None,
            touched: Instant::now(),
        };
        self.units.open.insert(self.units.next, open);
        self.units.next
    }

    fn take_unit(&mut self, id: u64, what: &'static str) -> Result<Open> {
        let open = self.units.open.remove(&id);
        open.filter(|o| o.incarnation == self.database.incarnation)
            .ok_or_else(|| Error::new(Kind::Unavailable, what, "the transaction is gone"))
    }

    /// Runs one statement of a transaction; one that fails ends it.
    pub(super) fn in_unit<T>(
        &mut self,
        id: u64,
        what: &'static str,
        run: impl FnOnce(&mut Self, &mut Open) -> T,
    ) -> Result<T> {
        let mut open = self.take_unit(id, what)?;
        if !self.healed && self.chance.hit(self.plan.consumer.conflict) {
            return Err(conflict(what));
        }
        let result = run(self, &mut open);
        open.touched = Instant::now();
        self.units.open.insert(id, open);
        Ok(result)
    }

    /// How an event stands with a group, as committed.
    pub(super) fn standing(&self, group: &str, key: Option<&Key>, id: &LineId) -> Standing {
        let rows = self.database.state.deferred.iter();
        let mut rows = rows.filter(|(of, _)| of.0 == Side::Consumer.as_str() && of.1 == group);
        let inbox = (group.to_owned(), id.0.clone(), id.1.clone());
        Standing {
            waits: rows.any(|(of, row)| {
                let itself = (&of.2, &of.3) == (&id.0, &id.1);
                itself || (key.is_some() && Key::of(&row.message).as_ref() == key)
            }),
            known: self.database.state.inbox.contains_key(&inbox),
        }
    }

    /// Deferred rows as a transaction sees them: what is committed, and its own.
    pub(super) fn seen_by(&self, open: &Open) -> BTreeMap<RowId, DeferredRow> {
        let mut rows = self.database.state.deferred.clone();
        for change in &open.changes {
            match change {
                Change::Deferred(id, Some(row)) => drop(rows.insert(id.clone(), row.clone())),
                Change::Deferred(id, None) => drop(rows.remove(id)),
                _ => {}
            }
        }
        rows
    }

    /// Writes an inbox row, if it can be written.
    pub(super) fn remember(&self, open: &mut Open, key: InboxKey) -> Row {
        let row = self.inbox(open, &key);
        open.handled = Some(key.clone());
        if row == Row::New {
            open.changes.push(Change::Inbox(key.clone(), false));
            open.rows.push(key);
        }
        row
    }

    fn inbox(&self, open: &Open, key: &InboxKey) -> Row {
        let own = |change: &Change| matches!(change, Change::Inbox(k, _) if k == key);
        if self.database.state.inbox.contains_key(key) || open.changes.iter().any(own) {
            Row::Known
        } else if self
            .units
            .open
            .values()
            .any(|other| other.incarnation == self.database.incarnation && other.rows.contains(key))
        {
            Row::Awaited
        } else {
            Row::New
        }
    }

    /// A handler's own write, in the open transaction of its process that handles this message. False if that is gone.
    pub(super) fn effect(&mut self, process: usize, group: &str, message: &Message) -> bool {
        let id = message_id(message);
        let key = (group.to_owned(), id.0, id.1);
        // The newest: an older one may be on its way to its COMMIT.
        let mut open = self.units.open.values_mut().rev();
        let open = open.find(|o| o.process == process && o.handled.as_ref() == Some(&key));
        open.is_some_and(|open| {
            open.touched = Instant::now();
            open.changes.push(Change::Effect(number_of(message)));
            true
        })
    }

    /// Commits a transaction, if the lease is held.
    pub(super) fn commit_unit(
        &mut self,
        id: u64,
        lease: &Lease,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<()> {
        let open = self.take_unit(id, "commit")?;
        let mut row = self.database.held(lease)?;
        row.expires_at = self.now() + millis(term.term());
        let effect = |change: &Change| match change {
            Change::Effect(number) => Some(*number),
            _ => None,
        };
        let mut changes = open.changes;
        let effects: Vec<Number> = changes.iter().filter_map(effect).collect();
        self.tell(|| format!("consumer {}: effects {effects:?}", open.process));
        self.check_effects(&effects);
        changes.push(Change::Lease(lease.key.to_string(), row));
        self.database.commit(None, changes, durable);
        self.check_consumers_room();
        Ok(())
    }
}

impl Open {
    pub(super) fn savepoint(&mut self) {
        self.savepoint = Some((self.changes.len(), self.rows.len()));
    }

    pub(super) fn undo(&mut self) {
        if let Some((changes, rows)) = self.savepoint.take() {
            self.changes.truncate(changes);
            self.rows.truncate(rows);
        }
    }

    pub(super) fn keep(&mut self) {
        self.savepoint = None;
    }

    /// An event is given up: out of its line, into the inbox, among the dead letters.
    pub(super) fn give_up(&mut self, id: RowId, row: DeadRow) {
        let inbox = (id.1.clone(), id.2.clone(), id.3.clone());
        self.changes.push(Change::Deferred(id.clone(), None));
        self.changes.push(Change::Inbox(inbox, true));
        self.changes.push(Change::Dead(id, row));
    }
}

/// What a database answers when a transaction lost to another.
#[derive(Debug)]
struct Conflict;

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("could not serialize access")
    }
}

impl std::error::Error for Conflict {}

impl sqlx::error::DatabaseError for Conflict {
    fn message(&self) -> &str {
        "could not serialize access"
    }

    fn code(&self) -> Option<Cow<'_, str>> {
        Some("40001".into())
    }

    fn as_error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        self
    }

    fn as_error_mut(&mut self) -> &mut (dyn std::error::Error + Send + Sync + 'static) {
        self
    }

    fn into_error(self: Box<Self>) -> Box<dyn std::error::Error + Send + Sync + 'static> {
        self
    }

    fn kind(&self) -> sqlx::error::ErrorKind {
        sqlx::error::ErrorKind::Other
    }
}

/// As a handler's own statement meets it.
pub(super) fn lost_to_another() -> sqlx::Error {
    sqlx::Error::Database(Box::new(Conflict))
}

pub(super) fn conflict(what: &'static str) -> Error {
    Error::new(Kind::Unavailable, what, "it lost to another").caused_by(lost_to_another())
}
