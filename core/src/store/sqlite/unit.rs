//! A consumer's transaction, in which handlers write. It is the only writer while it lives, so nobody can take the
//! lease from it; what it commits is on the disk.

use async_trait::async_trait;
use pillarbox_transport::Message;

use crate::{
    connection::Connection,
    error::{Error, Kind, Result},
    failure::{DeadLetter, Deferral, LineId, Resolution},
    lease::{Lease, LeaseTerm},
    store::{Standing, Unit},
};

use super::{
    failure::{self, Place},
    lease,
    pool::{Engine, Transaction, uncancelled},
    row,
};

/// The length of an inbox slot: six hours of event time, in microseconds.
pub(super) const SLOT: i64 = 6 * 3600 * 1_000_000;

pub(super) struct SqliteUnit {
    tx: Transaction,
    group: Place,
    name: String,
}

impl SqliteUnit {
    pub(super) fn new(tx: Transaction, group: &str) -> Self {
        Self {
            tx,
            group: Place::group(group),
            name: group.to_owned(),
        }
    }

    /// A statement about the event's savepoint, which only a handler's own COMMIT or ROLLBACK can have removed.
    async fn savepoint_statement(
        &mut self,
        operation: &'static str,
        sql: &'static str,
    ) -> Result<()> {
        self.tx.doing(operation);
        match sqlx::raw_sql(sql).execute(self.tx.connection()).await {
            Ok(_) => Ok(()),
            Err(e) if gone(&e) => {
                let text = "the handler ended the engine's transaction; it must not run COMMIT or ROLLBACK";
                Err(Error::new(Kind::Invalid, operation, text).caused_by(e))
            }
            Err(e) => Err(self.tx.failed(e)),
        }
    }

    /// Writes an inbox row. True if the event is to be applied: it is new, or a dead letter that was put back into its line.
    async fn inbox(&mut self, message: &Message, dead: bool) -> Result<bool> {
        let sql = self.tx.names().sql(
            "INSERT INTO {p}inbox (grp, source, id, slot, dead) VALUES (?1, ?2, ?3, ?4 / ?5, ?6) \
             ON CONFLICT (grp, source, id) DO UPDATE SET dead = 0 WHERE dead AND NOT ?6 AND EXISTS ( \
               SELECT 1 FROM {p}deferred WHERE side = 'consumer' AND scope = ?1 AND source = ?2 AND id = ?3)",
        );
        let query = sqlx::query(sql)
            .bind(self.name.as_str())
            .bind(message.source())
            .bind(message.id.as_str())
            .bind(row::instant(message.time))
            .bind(SLOT)
            .bind(dead);
        Ok(self.tx.run(query).await? > 0)
    }

    /// The inbox row of a deferred event that is given up.
    async fn inbox_of_deferred(&mut self, (source, id): &LineId) -> Result<()> {
        // WHERE also keeps the parser from taking ON for a join.
        let sql = self.tx.names().sql(
            "INSERT INTO {p}inbox (grp, source, id, slot, dead) SELECT scope, source, id, time / ?4, 1 \
             FROM {p}deferred WHERE side = 'consumer' AND scope = ?1 AND source = ?2 AND id = ?3 ON CONFLICT DO NOTHING",
        );
        let query = sqlx::query(sql)
            .bind(self.name.as_str())
            .bind(source.as_str())
            .bind(id.as_str())
            .bind(SLOT);
        self.tx.run(query).await.map(drop)
    }
}

/// Whether an event of [`names`] waits: itself, or behind its key's line.
const WAITS: &str = "EXISTS (SELECT 1 FROM {p}deferred d WHERE d.side = 'consumer' AND d.scope = ?1 \
       AND d.source = json_extract(m.value, '$[0]') AND d.id = json_extract(m.value, '$[1]')) \
     OR EXISTS (SELECT 1 FROM {p}deferred d WHERE d.side = 'consumer' AND d.scope = ?1 \
       AND d.topic = json_extract(m.value, '$[2]') AND d.key = json_extract(m.value, '$[3]'))";

/// Events as one parameter: source, id, topic and key of each.
fn names(operation: &'static str, messages: &[&Message]) -> Result<String> {
    let names: Vec<_> = messages
        .iter()
        .map(|m| (m.source(), &m.id, &m.topic, &m.key))
        .collect();
    serde_json::to_string(&names).map_err(|e| {
        let text = "the events' names cannot be written as JSON";
        Error::new(Kind::Invalid, operation, text).caused_by(e)
    })
}

/// How events stand with a group. Reads beside the writer.
pub(super) async fn standing(
    engine: &Engine,
    group: &str,
    messages: &[&Message],
) -> Result<Vec<Standing>> {
    const OPERATION: &str = "look at events";
    let text = format!(
        "SELECT {WAITS}, EXISTS (SELECT 1 FROM {{p}}inbox i WHERE i.grp = ?1 \
           AND i.source = json_extract(m.value, '$[0]') AND i.id = json_extract(m.value, '$[1]') \
           AND NOT (i.dead AND EXISTS (SELECT 1 FROM {{p}}deferred d WHERE d.side = 'consumer' AND d.scope = ?1 \
             AND d.source = i.source AND d.id = i.id))) \
         FROM json_each(?2) m ORDER BY m.key"
    );
    let mut connection = engine.reader(OPERATION).await?;
    let rows = sqlx::query_as(engine.names().sql(&text))
        .bind(group)
        .bind(names(OPERATION, messages)?)
        .fetch_all(&mut *connection)
        .await;
    let rows: Vec<(bool, bool)> = rows.map_err(|e| engine.names().failed(OPERATION, e))?;
    Ok(rows
        .into_iter()
        .map(|(waits, known)| Standing { waits, known })
        .collect())
}

#[async_trait]
impl Unit for SqliteUnit {
    fn connection(&mut self) -> Option<Connection<'_>> {
        Some(Connection::Sqlite(self.tx.connection()))
    }

    async fn blocked(&mut self, messages: &[&Message]) -> Result<Vec<bool>> {
        self.tx.doing("probe lines");
        let probe = names(self.tx.operation(), messages)?;
        let text = format!("SELECT {WAITS} FROM json_each(?2) m ORDER BY m.key");
        let sql = self.tx.names().sql(&text);
        let blocked = sqlx::query_scalar(sql)
            .bind(self.name.as_str())
            .bind(probe)
            .fetch_all(self.tx.connection())
            .await;
        blocked.map_err(|e| self.tx.failed(e))
    }

    async fn savepoint(&mut self) -> Result<()> {
        self.savepoint_statement("begin event", "SAVEPOINT pillarbox_event")
            .await
    }

    async fn undo(&mut self) -> Result<()> {
        let sql = "ROLLBACK TO pillarbox_event; RELEASE pillarbox_event";
        self.savepoint_statement("undo event", sql).await
    }

    async fn keep(&mut self) -> Result<()> {
        self.savepoint_statement("keep event", "RELEASE pillarbox_event")
            .await
    }

    async fn remember(&mut self, message: &Message) -> Result<bool> {
        self.tx.doing("remember event");
        self.inbox(message, false).await
    }

    async fn defer(&mut self, event: &Deferral) -> Result<()> {
        self.tx.doing("defer event");
        failure::defer(&mut self.tx, &self.group, event).await
    }

    async fn bury(&mut self, event: &DeadLetter) -> Result<()> {
        self.tx.doing("bury event");
        let id = (event.message.source().to_owned(), event.message.id.clone());
        failure::bury(&mut self.tx, &self.group, event).await?;
        failure::remove(&mut self.tx, &self.group, &id).await?;
        self.inbox(&event.message, true).await.map(drop)
    }

    async fn resolve(&mut self, id: &LineId, resolution: &Resolution) -> Result<()> {
        self.tx.doing("resolve event");
        if matches!(resolution, Resolution::Dead { .. }) {
            self.inbox_of_deferred(id).await?;
        }
        failure::resolve(&mut self.tx, &self.group, id, resolution).await
    }

    async fn commit(mut self: Box<Self>, lease: &Lease, term: LeaseTerm) -> Result<()> {
        const OPERATION: &str = "commit";
        let lease = lease.clone();
        uncancelled(OPERATION, async move {
            self.tx.doing(OPERATION);
            // Renewed here, because nobody else could while this transaction held the writer's place.
            match lease::renew(&mut self.tx, &lease, term).await {
                Ok(()) => self.tx.commit().await,
                Err(e) => {
                    let _ = self.tx.rollback().await;
                    Err(e)
                }
            }
        })
        .await
    }

    async fn rollback(self: Box<Self>) -> Result<()> {
        uncancelled("roll back", self.tx.rollback()).await
    }
}

fn gone(e: &sqlx::Error) -> bool {
    e.as_database_error()
        .is_some_and(|d| d.message().starts_with("no such savepoint"))
}
