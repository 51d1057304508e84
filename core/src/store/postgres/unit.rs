//! A consumer's transaction: probe, inbox, the handlers' writes, and the fence at its end.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pillarbox_transport::Message;
use sqlx::{PgConnection, Row, postgres::PgRow};
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use super::{
    Inner,
    engine::{Commit, Query, Session, Text, query, to_its_end},
    failure::Place,
    lease::lost,
    row,
};
use crate::{
    connection::Connection,
    error::{Error, Kind, Result, sqlstate},
    failure::{DeadLetter, Deferral, LineId, Resolution},
    lease::{Lease, LeaseTerm},
    store::{Standing, Unit},
};

/// Microseconds of one inbox slot, and slots of the ring.
const SLOT: i64 = 6 * 3_600 * 1_000_000;
const RING: i64 = 8;

/// Keeps what was done and begins anew.
const NEXT: &str = "RELEASE SAVEPOINT pillarbox_event; SAVEPOINT pillarbox_event";

pub(super) struct Statements {
    waiting: Text,
    remember: Text,
    standing: Text,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        Self {
            waiting: format!("SELECT w FROM \"{schema}\".waiting($1, $2, $3, $4, $5) w").into(),
            remember: format!("SELECT \"{schema}\".remember($1, $2, $3, $4, $5, $6) AS new").into(),
            standing: STANDING
                .replace("@schema@", &format!("\"{schema}\""))
                .into(),
        }
    }
}

/// As `waiting` and `remember` see it, and without writing.
const STANDING: &str = "\
    SELECT w.waits, CASE WHEN m.ring IS NULL \
        THEN EXISTS (SELECT FROM @schema@.inbox_timeless i \
                     WHERE i.grp = $1 AND i.source = m.source AND i.id = m.id AND NOT (i.dead AND r.retried)) \
        ELSE EXISTS (SELECT FROM @schema@.inbox i WHERE i.ring = m.ring AND i.slot = m.slot \
                     AND i.grp = $1 AND i.source = m.source AND i.id = m.id AND NOT (i.dead AND r.retried)) \
        END AS known \
    FROM unnest($4::text[], $5::text[], $6::smallint[], $7::bigint[]) WITH ORDINALITY AS m (source, id, ring, slot, n) \
    JOIN @schema@.waiting($1, $2, $3, $4, $5) WITH ORDINALITY AS w (waits, n) USING (n) \
    CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM @schema@.deferred d WHERE d.side = 'consumer' AND d.scope = $1 \
                        AND d.source = m.source AND d.id = m.id) AS retried) r \
    ORDER BY m.n";

/// Events as the statements name them, one array for each column.
pub(super) struct Asked {
    group: String,
    topics: Vec<String>,
    keys: Vec<Option<String>>,
    sources: Vec<String>,
    ids: Vec<String>,
    slots: Vec<Option<i64>>,
}

impl Asked {
    pub(super) fn new(group: &str, messages: &[&Message]) -> Self {
        let texts =
            |part: fn(&Message) -> String| messages.iter().map(|m| part(m)).collect::<Vec<_>>();
        Self {
            group: group.to_owned(),
            topics: texts(|m| row::storable(&m.topic).into_owned()),
            keys: messages
                .iter()
                .map(|m| m.key.as_deref().map(|k| row::storable(k).into_owned()))
                .collect(),
            sources: texts(|m| row::named(m.source())),
            ids: texts(|m| row::named(&m.id)),
            slots: messages.iter().map(|m| slot(row::micros(m.time))).collect(),
        }
    }

    /// Bound as `waiting` takes it.
    fn bind<'q>(self, text: &Text) -> Query<'q> {
        query(text)
            .bind(self.group)
            .bind(self.topics)
            .bind(self.keys)
            .bind(self.sources)
            .bind(self.ids)
    }
}

impl Inner {
    /// How events stand with a group.
    pub(super) async fn standing(&self, mut asked: Asked) -> Result<Vec<Standing>> {
        const OPERATION: &str = "look at events";
        let slots = std::mem::take(&mut asked.slots);
        let rings: Vec<Option<i16>> = slots.iter().map(|s| s.and_then(ring)).collect();
        let q = asked.bind(&self.unit.standing).bind(rings).bind(slots);
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(OPERATION, bound, Commit::Soon).await?;
        let rows = tx.fetch(q).await;
        let rows = tx.end(rows).await?;
        let read = |row: &PgRow| {
            Ok(Standing {
                waits: row.try_get("waits")?,
                known: row.try_get("known")?,
            })
        };
        let standings: sqlx::Result<Vec<_>> = rows.iter().map(read).collect();
        standings.map_err(|e| self.engine.failed(OPERATION, e))
    }
}

/// Where the event's savepoint stands. The end of one event sets the next one's in the same trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Savepoint {
    /// There is none.
    None,
    /// Set, and nothing was written since.
    Ready,
    /// Set before something that was written.
    Behind,
}

/// An open transaction of a group.
pub(super) struct Work {
    inner: Arc<Inner>,
    session: Session,
    place: Place,
    group: String,
    /// Set inside the transaction alone: gone with it when a handler ends it.
    mark: String,
    savepoint: Savepoint,
    _permit: OwnedSemaphorePermit,
}

impl Work {
    pub(super) async fn begin(
        inner: Arc<Inner>,
        group: &str,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<Self> {
        inner.engine.heed(term);
        let mark = Uuid::new_v4().to_string();
        let begun = inner.engine.begin_unit(
            "begin",
            term.statement(),
            durable,
            &mark,
            barrier(&inner.name, group),
        );
        let (session, permit) = begun.await?;
        Ok(Self {
            inner,
            session,
            place: Place::group(group),
            group: group.to_owned(),
            mark,
            savepoint: Savepoint::None,
            _permit: permit,
        })
    }

    fn failed(&self, operation: &'static str, e: sqlx::Error) -> Error {
        self.inner.engine.failed(operation, e)
    }

    /// The connection for something that may write.
    fn writing(&mut self) -> &mut PgConnection {
        if self.savepoint == Savepoint::Ready {
            self.savepoint = Savepoint::Behind;
        }
        self.session.connection()
    }

    async fn fetch(&mut self, operation: &'static str, q: Query<'_>) -> Result<Vec<PgRow>> {
        let rows = q.fetch_all(self.writing()).await;
        rows.map_err(|e| self.failed(operation, e))
    }

    async fn run(&mut self, operation: &'static str, q: Query<'_>) -> Result<()> {
        let done = q.execute(self.writing()).await;
        done.map(drop).map_err(|e| self.failed(operation, e))
    }

    /// A statement about the event's savepoint, which says whether the transaction is still there.
    async fn mark(&mut self, operation: &'static str, text: &'static str) -> Result<()> {
        let done = self.session.script(text).await;
        done.map_err(|e| match sqlstate(&e).as_deref() {
            Some("3B001" | "25P01") => ended(operation).caused_by(e),
            Some("25P02") => {
                let text = "a statement of the handler failed and the handler went on, so that nothing of it can be kept";
                Error::new(Kind::Invalid, operation, text).caused_by(e)
            }
            _ => self.failed(operation, e),
        })
    }

    /// Writes the inbox row; false if the inbox has one.
    async fn inbox(&mut self, name: &LineId, slot: Option<i64>, dead: bool) -> Result<bool> {
        const OPERATION: &str = "remember an event";
        let ring = slot.and_then(ring);
        let q = query(&self.inner.unit.remember)
            .bind(self.group.clone())
            .bind(ring)
            .bind(slot)
            .bind(row::named(&name.0))
            .bind(row::named(&name.1))
            .bind(dead);
        let rows = self.fetch(OPERATION, q).await?;
        let new = rows.first().ok_or(sqlx::Error::RowNotFound);
        new.and_then(|row| row.try_get("new"))
            .map_err(|e| self.failed(OPERATION, e))
    }

    async fn prove_and_commit(mut self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        const OPERATION: &str = "commit";
        let q = self.inner.prove(lease, term, &self.mark);
        let rows = self.fetch(OPERATION, q).await;
        let own = rows.and_then(|rows| {
            let Some(row) = rows.first() else {
                return Err(lost(OPERATION, lease));
            };
            row.try_get::<bool, _>("own")
                .map_err(|e| self.failed(OPERATION, e))
        });
        match own {
            Ok(true) => {
                let inner = Arc::clone(&self.inner);
                let done = self.session.commit().await;
                done.map_err(|e| inner.engine.failed(OPERATION, e))
            }
            // Whatever the handler began in its place goes with the connection.
            Ok(false) => Err(ended(OPERATION)),
            Err(e) => {
                if e.kind() == Kind::LeaseLost {
                    self.session.rollback().await;
                }
                Err(e)
            }
        }
    }
}

#[async_trait]
impl Unit for Work {
    fn connection(&mut self) -> Option<Connection<'_>> {
        Some(Connection::Postgres(self.writing()))
    }

    async fn blocked(&mut self, messages: &[&Message]) -> Result<Vec<bool>> {
        const OPERATION: &str = "look for waiting keys";
        let q = Asked::new(&self.group, messages).bind(&self.inner.unit.waiting);
        let rows = q.fetch_all(self.session.connection()).await;
        let rows = rows.map_err(|e| self.failed(OPERATION, e))?;
        let blocked: sqlx::Result<Vec<bool>> = rows.iter().map(|row| row.try_get("w")).collect();
        blocked.map_err(|e| self.failed(OPERATION, e))
    }

    async fn savepoint(&mut self) -> Result<()> {
        match self.savepoint {
            Savepoint::None => {
                self.mark("begin an event", "SAVEPOINT pillarbox_event")
                    .await?
            }
            Savepoint::Ready => {}
            // What was written since the last event is not this one's to undo.
            Savepoint::Behind => self.mark("begin an event", NEXT).await?,
        }
        self.savepoint = Savepoint::Behind;
        Ok(())
    }

    async fn undo(&mut self) -> Result<()> {
        self.mark("undo an event", "ROLLBACK TO SAVEPOINT pillarbox_event")
            .await?;
        self.savepoint = Savepoint::Ready;
        Ok(())
    }

    async fn keep(&mut self) -> Result<()> {
        self.mark("end an event", NEXT).await?;
        self.savepoint = Savepoint::Ready;
        Ok(())
    }

    async fn remember(&mut self, message: &Message) -> Result<bool> {
        self.inbox(&name(message), slot(row::micros(message.time)), false)
            .await
    }

    async fn defer(&mut self, event: &Deferral) -> Result<()> {
        let q = self
            .inner
            .failure
            .defer(&self.place, std::slice::from_ref(event));
        self.run("defer an event", q).await
    }

    async fn bury(&mut self, event: &DeadLetter) -> Result<()> {
        let q = self
            .inner
            .failure
            .bury(&self.place, std::slice::from_ref(event));
        self.run("dead-letter an event", q).await?;
        let message = &event.message;
        self.inbox(&name(message), slot(row::micros(message.time)), true)
            .await
            .map(drop)
    }

    async fn resolve(&mut self, id: &LineId, resolution: &Resolution) -> Result<()> {
        const OPERATION: &str = "end an attempt";
        if matches!(resolution, Resolution::Dead { .. }) {
            // The row's time says where its inbox row lies.
            let q = self.inner.failure.alone(&self.place, id);
            let rows = self.fetch(OPERATION, q).await?;
            let Some(waiting) = rows.first() else {
                return Ok(());
            };
            let time = row::time(waiting, "time").map_err(|e| self.failed(OPERATION, e))?;
            self.inbox(id, slot(row::micros(time)), true).await?;
        }
        let q = self.inner.failure.resolve(&self.place, id, resolution);
        self.run(OPERATION, q).await
    }

    async fn commit(self: Box<Self>, lease: &Lease, term: LeaseTerm) -> Result<()> {
        let lease = lease.clone();
        to_its_end("commit", term.term(), async move {
            self.prove_and_commit(&lease, term).await
        })
        .await
    }

    async fn rollback(self: Box<Self>) -> Result<()> {
        let deadline = Duration::from_secs(5);
        to_its_end("roll back", deadline, async move {
            self.session.rollback().await;
            Ok(())
        })
        .await
    }
}

/// The advisory lock that every transaction of a group shares, and that an operator takes alone to put dead letters back: a
/// transaction that has probed its keys before must not apply a newer event of a key beside its line's head.
pub(super) fn barrier(schema: &str, group: &str) -> i64 {
    row::hash(&format!("pillarbox unit {schema} {group}"))
}

fn ended(operation: &'static str) -> Error {
    let text = "the handler ended the transaction itself (COMMIT or ROLLBACK), so that its effect and the inbox are no \
                longer one; a handler must leave that to the consumer";
    Error::new(Kind::Invalid, operation, text)
}

fn name(message: &Message) -> LineId {
    (message.source().to_owned(), message.id.clone())
}

/// A function of the event, never of its arrival; none for an event without time.
fn slot(micros: i64) -> Option<i64> {
    (micros != 0).then(|| micros.div_euclid(SLOT))
}

fn ring(slot: i64) -> Option<i16> {
    i16::try_from(slot.rem_euclid(RING)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_six_hours_of_the_events_time() {
        assert_eq!(slot(0), None);
        assert_eq!(slot(1), Some(0));
        assert_eq!(slot(SLOT - 1), Some(0));
        assert_eq!(slot(SLOT), Some(1));
        assert_eq!(slot(-1), Some(-1));
        assert_eq!((-1i64).rem_euclid(RING), 7);
    }
}
