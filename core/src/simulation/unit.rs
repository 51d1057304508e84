//! A consumer's transaction, as the engine holds it: each statement is a call to the model database.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pillarbox_transport::Message;
use tokio::time::Instant;

use super::{
    application::number_of,
    database::{Change, DeadRow, DeferredRow, RowId, millis},
    exceptions::message_id,
    transaction::{self, InboxKey, Open, Row},
    world::{Inner, World},
};
use crate::{
    connection::Connection,
    error::Result,
    event::Key,
    failure::{DeadLetter, Deferral, LineId, PARKED, Resolution, Side},
    lease::{Lease, LeaseTerm},
    store::Unit,
};

pub(super) struct ModelUnit {
    world: Arc<World>,
    process: usize,
    id: u64,
    group: String,
    bound: Duration,
    durable: bool,
    /// The server ends it, whatever becomes of its owner.
    ended: bool,
}

/// Begins a transaction for a process.
pub(super) async fn begin(
    world: &Arc<World>,
    process: usize,
    group: &str,
    term: LeaseTerm,
    durable: bool,
) -> Result<Box<dyn Unit>> {
    let begin = move |w: &mut Inner| Ok(w.begin_unit(process));
    let id = world.call(process, "begin", begin).await?;
    let bound = term.statement();
    tokio::spawn(transaction::guard(world.clone(), id, bound));
    Ok(Box::new(ModelUnit {
        world: world.clone(),
        process,
        id,
        group: group.to_owned(),
        bound,
        durable,
        ended: false,
    }))
}

impl ModelUnit {
    fn row_id(&self, id: &LineId) -> RowId {
        (
            Side::Consumer.as_str(),
            self.group.clone(),
            id.0.clone(),
            id.1.clone(),
        )
    }

    fn inbox_key(&self, message: &Message) -> InboxKey {
        let (source, id) = message_id(message);
        (self.group.clone(), source, id)
    }

    /// One statement. After an error the transaction is gone.
    async fn statement<T: Send + 'static>(
        &mut self,
        what: &'static str,
        run: impl FnOnce(&mut Inner, &mut Open) -> T + Send + 'static,
    ) -> Result<T> {
        let id = self.id;
        let statement = move |w: &mut Inner| w.in_unit(id, what, run);
        let result = self.world.call(self.process, what, statement).await;
        if result.is_err() {
            self.world.with(|w| w.units.undo(id));
        }
        result
    }
}

#[async_trait]
impl Unit for ModelUnit {
    fn connection(&mut self) -> Option<Connection<'_>> {
        None
    }

    async fn blocked(&mut self, messages: &[&Message]) -> Result<Vec<bool>> {
        let asked: Vec<(Option<Key>, RowId)> = messages
            .iter()
            .map(|m| (Key::of(m), self.row_id(&message_id(m))))
            .collect();
        self.statement("blocked", move |w, open| {
            let rows = w.seen_by(open);
            let lines: Vec<(&RowId, Option<Key>)> = rows
                .iter()
                .map(|(id, r)| (id, Key::of(&r.message)))
                .collect();
            let waits = |(key, id): &(Option<Key>, RowId)| {
                let of_group = lines
                    .iter()
                    .filter(|(other, _)| (other.0, &other.1) == (id.0, &id.1));
                of_group
                    .into_iter()
                    .any(|(other, line)| *other == id || (key.is_some() && line == key))
            };
            asked.iter().map(waits).collect()
        })
        .await
    }

    async fn savepoint(&mut self) -> Result<()> {
        self.statement("savepoint", |_, open| open.savepoint())
            .await
    }

    async fn undo(&mut self) -> Result<()> {
        self.statement("undo", |_, open| open.undo()).await
    }

    async fn keep(&mut self) -> Result<()> {
        self.statement("keep", |_, open| open.keep()).await
    }

    async fn remember(&mut self, message: &Message) -> Result<bool> {
        let begun = Instant::now();
        loop {
            let key = self.inbox_key(message);
            let row = self.statement("remember", move |w, open| w.remember(open, key));
            match row.await? {
                Row::New => return Ok(true),
                Row::Known => return Ok(false),
                Row::Awaited if begun.elapsed() < self.bound => self.world.pause(1..=10).await,
                Row::Awaited => {
                    self.world.with(|w| w.units.undo(self.id));
                    return Err(transaction::conflict("remember"));
                }
            }
        }
    }

    async fn defer(&mut self, event: &Deferral) -> Result<()> {
        let (id, event) = (self.row_id(&message_id(&event.message)), event.clone());
        self.statement("defer", move |w, open| {
            if w.seen_by(open).contains_key(&id) {
                return;
            }
            let row = DeferredRow {
                message: event.message,
                partition: 0,
                position: 0,
                arrival: w.units.arrival(),
                attempts: event.attempts,
                due_at: w.now() + millis(event.delay),
            };
            let number = number_of(&row.message);
            w.tell(|| format!("defer {number} after {} attempts", row.attempts));
            w.check_waits(number);
            open.changes.push(Change::Deferred(id, Some(row)));
        })
        .await
    }

    async fn bury(&mut self, event: &DeadLetter) -> Result<()> {
        let (id, event) = (self.row_id(&message_id(&event.message)), event.clone());
        self.statement("bury", move |_, open| {
            let row = DeadRow {
                message: event.message,
                attempts: event.attempts,
                copied: false,
            };
            open.give_up(id, row);
        })
        .await
    }

    async fn resolve(&mut self, id: &LineId, resolution: &Resolution) -> Result<()> {
        let (id, resolution) = (self.row_id(id), resolution.clone());
        self.statement("resolve", move |w, open| {
            w.tell(|| format!("resolve {} {resolution:?}", id.3));
            let Some(row) = w.seen_by(open).remove(&id) else {
                return;
            };
            match resolution {
                Resolution::Done => open.changes.push(Change::Deferred(id, None)),
                Resolution::Again {
                    attempts, delay, ..
                } => {
                    let row = DeferredRow {
                        attempts,
                        due_at: w.now() + millis(delay),
                        ..row
                    };
                    open.changes.push(Change::Deferred(id, Some(row)));
                }
                // Nothing that a schedule looks at.
                Resolution::Unsure => {}
                Resolution::Park { attempts, .. } => {
                    let row = DeferredRow {
                        attempts,
                        due_at: w.now() + millis(PARKED),
                        ..row
                    };
                    open.changes.push(Change::Deferred(id, Some(row)));
                }
                Resolution::Dead { attempts, .. } => {
                    let row = DeadRow {
                        message: row.message,
                        attempts,
                        copied: false,
                    };
                    open.give_up(id, row);
                }
            }
        })
        .await
    }

    async fn commit(mut self: Box<Self>, lease: &Lease, term: LeaseTerm) -> Result<()> {
        self.ended = true;
        let (id, durable, lease) = (self.id, self.durable, lease.clone());
        let commit = move |w: &mut Inner| w.commit_unit(id, &lease, term, durable);
        let result = self.world.call(self.process, "commit", commit).await;
        if result.is_err() {
            self.world.with(|w| w.units.undo(id));
        }
        result
    }

    async fn rollback(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

impl Drop for ModelUnit {
    fn drop(&mut self) {
        // The connection is closed, and the server undoes what was open. A COMMIT that was sent runs to its end.
        if !self.ended {
            self.world.with(|w| w.units.undo(self.id));
        }
    }
}
