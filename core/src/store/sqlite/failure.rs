//! Deferred events and dead letters.

use std::time::Duration;

use pillarbox_transport::Message;
use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{
    error::Result,
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Hold, Line, LineId, PARKED, Resolution, Side},
    lease::{Lease, LeaseKey},
    store::Waiting,
};

use super::{
    pool::{Engine, Transaction},
    row,
};

/// Whose exceptions: the columns (side, scope, shard).
pub(super) struct Place {
    pub(super) side: Side,
    pub(super) scope: String,
    pub(super) shard: u16,
}

impl Place {
    /// What a lease works on. A group's events are all in shard 0.
    pub(super) fn of(key: &LeaseKey) -> Self {
        match key {
            LeaseKey::Relay {
                destination,
                partition,
            } => Self {
                side: Side::Relay,
                scope: destination.clone(),
                shard: *partition,
            },
            LeaseKey::Source { group, .. } => Self::group(group),
            LeaseKey::Duty { scope, shard, .. } => Self {
                shard: *shard,
                ..Self::group(scope)
            },
        }
    }

    /// An operator's: of no shard.
    pub(super) fn on(side: Side, scope: &str) -> Self {
        Self {
            side,
            scope: scope.to_owned(),
            shard: 0,
        }
    }

    pub(super) fn is_consumer(&self) -> bool {
        self.side == Side::Consumer
    }

    pub(super) fn group(group: &str) -> Self {
        Self {
            side: Side::Consumer,
            scope: group.to_owned(),
            shard: 0,
        }
    }
}

/// Lets an event wait. A repetition changes nothing.
pub(super) async fn defer(tx: &mut Transaction, place: &Place, event: &Deferral) -> Result<()> {
    let sql = tx.names().sql(
        "INSERT INTO {p}deferred (side, scope, shard, source, id, topic, type, key, payload, headers, attributes, time, \
         position, attempts, reason, first_failure, last_failure, due, maybe_sent, parked, scheduled) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, \
         CASE WHEN ?14 > 0 THEN {now} END, CASE WHEN ?14 > 0 THEN {now} END, coalesce(?19, {now} + ?16), ?17, ?18, \
         ?19 IS NOT NULL) \
         ON CONFLICT (side, scope, source, id) DO NOTHING",
    );
    let parked = event.hold == Hold::Parked;
    let delay = if parked { PARKED } else { event.delay };
    let at = match event.hold {
        Hold::Scheduled(at) => Some(row::instant(at)),
        Hold::None | Hold::Parked => None,
    };
    let query = bind(sqlx::query(sql), place, &event.message)
        .bind(event.position)
        .bind(event.attempts)
        .bind(event.reason.as_deref().map(row::reason))
        .bind(row::micros(delay))
        .bind(event.maybe_sent)
        .bind(parked)
        .bind(at);
    tx.run(query).await.map(drop)
}

/// Gives an event up. A repetition changes nothing.
pub(super) async fn bury(tx: &mut Transaction, place: &Place, event: &DeadLetter) -> Result<()> {
    let sql = tx.names().sql(
        "INSERT INTO {p}dead_letter (side, scope, shard, source, id, topic, type, key, payload, headers, attributes, \
         time, position, attempts, reason, first_failure, last_failure, maybe_sent) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, {now}, {now}, ?16) \
         ON CONFLICT (side, scope, source, id) DO NOTHING",
    );
    let query = bind(sqlx::query(sql), place, &event.message)
        .bind(event.position)
        .bind(event.attempts)
        .bind(row::reason(&event.reason))
        .bind(event.maybe_sent);
    tx.run(query).await.map(drop)
}

/// Ends one attempt of a deferred event. A row that is gone was resolved before.
pub(super) async fn resolve(
    tx: &mut Transaction,
    place: &Place,
    id: &LineId,
    resolution: &Resolution,
) -> Result<()> {
    match resolution {
        Resolution::Done => remove(tx, place, id).await,
        Resolution::Again {
            attempts,
            reason,
            delay,
        } => {
            let sql = tx.names().sql(
                "UPDATE {p}deferred SET attempts = ?5, reason = ?6, due = {now} + ?7, \
                 first_failure = coalesce(first_failure, {now}), last_failure = {now} \
                 WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
            );
            let query = name(sqlx::query(sql), place, id)
                .bind(*attempts)
                .bind(row::reason(reason))
                .bind(row::micros(*delay));
            tx.run(query).await.map(drop)
        }
        Resolution::Unsure => {
            let sql = tx.names().sql(
                "UPDATE {p}deferred SET maybe_sent = 1 WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
            );
            tx.run(name(sqlx::query(sql), place, id)).await.map(drop)
        }
        Resolution::Park { attempts, reason } => {
            let sql = tx.names().sql(
                "UPDATE {p}deferred SET parked = 1, attempts = ?5, reason = ?6, due = {now} + ?7, \
                 first_failure = coalesce(first_failure, {now}), last_failure = {now} \
                 WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
            );
            let query = name(sqlx::query(sql), place, id)
                .bind(*attempts)
                .bind(row::reason(reason))
                .bind(row::micros(PARKED));
            tx.run(query).await.map(drop)
        }
        Resolution::Dead { attempts, reason } => {
            let sql = tx.names().sql(
                "INSERT INTO {p}dead_letter (side, scope, shard, source, id, topic, type, key, payload, headers, \
                 attributes, time, position, attempts, reason, first_failure, last_failure, maybe_sent) \
                 SELECT side, scope, shard, source, id, topic, type, key, payload, headers, attributes, time, position, \
                 ?5, ?6, coalesce(first_failure, {now}), {now}, maybe_sent FROM {p}deferred \
                 WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4 \
                 ON CONFLICT (side, scope, source, id) DO NOTHING",
            );
            let query = name(sqlx::query(sql), place, id)
                .bind(*attempts)
                .bind(row::reason(reason));
            tx.run(query).await?;
            remove(tx, place, id).await
        }
    }
}

/// Takes an event out of its line.
pub(super) async fn remove(tx: &mut Transaction, place: &Place, id: &LineId) -> Result<()> {
    let sql = tx
        .names()
        .sql("DELETE FROM {p}deferred WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4");
    tx.run(name(sqlx::query(sql), place, id)).await.map(drop)
}

/// The lines, soonest due first.
pub(super) async fn lines(engine: &Engine, lease: &Lease, limit: u32) -> Result<Vec<Line>> {
    const OPERATION: &str = "read lines";
    let (names, place) = (engine.names(), Place::of(&lease.key));
    let mut reader = engine.reader(OPERATION).await?;
    // Walks by due time; each row is asked whether somebody stands before it.
    let sql = names.sql(
        "SELECT topic, key, source, id, due - {now} FROM {p}deferred d \
         WHERE side = ?1 AND scope = ?2 AND shard = ?3 AND NOT scheduled AND (key IS NULL OR NOT EXISTS ( \
           SELECT 1 FROM {p}deferred b WHERE b.side = ?1 AND b.scope = ?2 AND b.topic = d.topic AND b.key = d.key \
           AND NOT b.scheduled AND (b.position, b.seq) < (d.position, d.seq))) \
         ORDER BY due, seq LIMIT ?4",
    );
    let rows = sqlx::query(sql)
        .bind(place.side.as_str())
        .bind(place.scope)
        .bind(place.shard)
        .bind(limit)
        .fetch_all(&mut *reader)
        .await;
    let line = |row: &SqliteRow| -> sqlx::Result<Line> {
        let topic: String = row.try_get(0)?;
        let key: Option<String> = row.try_get(1)?;
        Ok(Line {
            key: key.map(|key| Key {
                topic: topic.into(),
                key: key.into(),
            }),
            head: (row.try_get(2)?, row.try_get(3)?),
            due_in: until(row.try_get(4)?),
        })
    };
    rows.and_then(|rows| rows.iter().map(line).collect())
        .map_err(|e| names.failed(OPERATION, e))
}

/// The first events of one line.
pub(super) async fn line(
    engine: &Engine,
    lease: &Lease,
    key: Option<&Key>,
    id: &LineId,
    limit: u32,
) -> Result<Vec<Deferred>> {
    const OPERATION: &str = "read line";
    let (names, place) = (engine.names(), Place::of(&lease.key));
    let mut reader = engine.reader(OPERATION).await?;
    let statement = format!(
        "SELECT {}, position, attempts, maybe_sent, due - {{now}} AS due_in FROM {{p}}deferred \
         WHERE side = ?1 AND scope = ?2 AND NOT scheduled AND {} \
         ORDER BY position, seq LIMIT ?5",
        row::MESSAGE,
        match key {
            Some(_) => "topic = ?3 AND key = ?4",
            None => "source = ?3 AND id = ?4",
        }
    );
    let (a, b) = match key {
        Some(key) => (&*key.topic, &*key.key),
        None => (id.0.as_str(), id.1.as_str()),
    };
    let rows = sqlx::query(names.sql(&statement))
        .bind(place.side.as_str())
        .bind(place.scope)
        .bind(a.to_owned())
        .bind(b.to_owned())
        .bind(limit)
        .fetch_all(&mut *reader)
        .await;
    let deferred = |row: &SqliteRow| -> sqlx::Result<Deferred> {
        Ok(Deferred {
            message: row::message(row)?,
            position: row.try_get("position")?,
            attempts: row.try_get("attempts")?,
            due_in: until(row.try_get("due_in")?),
            maybe_sent: row.try_get("maybe_sent")?,
        })
    };
    rows.and_then(|rows| rows.iter().map(deferred).collect())
        .map_err(|e| names.failed(OPERATION, e))
}

/// How many wait.
pub(super) async fn waiting(engine: &Engine, side: Side, scope: &str) -> Result<Waiting> {
    const OPERATION: &str = "count deferred";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let sql = names.sql(
        "SELECT coalesce(sum(n), 0), coalesce(max(CASE WHEN key IS NULL THEN min(n, 1) ELSE n END), 0), \
         coalesce(sum(p), 0), coalesce(sum(s), 0) FROM ( \
         SELECT key, sum(NOT scheduled) AS n, sum(parked) AS p, sum(scheduled) AS s FROM {p}deferred \
         WHERE side = ? AND scope = ? GROUP BY topic, key)",
    );
    let (total, longest, parked, scheduled): (i64, i64, i64, i64) = sqlx::query_as(sql)
        .bind(side.as_str())
        .bind(scope.to_owned())
        .fetch_one(&mut *reader)
        .await
        .map_err(|e| names.failed(OPERATION, e))?;
    Ok(Waiting {
        total: total.unsigned_abs(),
        longest: longest.unsigned_abs(),
        parked: parked.unsigned_abs(),
        scheduled: scheduled.unsigned_abs(),
    })
}

/// Dead letters without a copy at the broker, oldest first.
pub(super) async fn uncopied(engine: &Engine, group: &str, limit: u32) -> Result<Vec<DeadLetter>> {
    const OPERATION: &str = "read dead letters";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let statement = format!(
        "SELECT {}, position, attempts, reason, maybe_sent FROM {{p}}dead_letter \
         WHERE side = 'consumer' AND scope = ? AND copied_at IS NULL ORDER BY seq LIMIT ?",
        row::MESSAGE
    );
    let rows = sqlx::query(names.sql(&statement))
        .bind(group.to_owned())
        .bind(limit)
        .fetch_all(&mut *reader)
        .await;
    let letter = |row: &SqliteRow| -> sqlx::Result<DeadLetter> {
        Ok(DeadLetter {
            message: row::message(row)?,
            position: row.try_get("position")?,
            attempts: row.try_get("attempts")?,
            reason: row.try_get("reason")?,
            maybe_sent: row.try_get("maybe_sent")?,
        })
    };
    rows.and_then(|rows| rows.iter().map(letter).collect())
        .map_err(|e| names.failed(OPERATION, e))
}

/// Notes copies.
pub(super) async fn copied(tx: &mut Transaction, place: &Place, ids: &[LineId]) -> Result<()> {
    for id in ids {
        let sql = tx.names().sql(
            "UPDATE {p}dead_letter SET copied_at = coalesce(copied_at, {now}) \
             WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
        );
        tx.run(name(sqlx::query(sql), place, id)).await?;
    }
    Ok(())
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>;

/// `?1` to `?4`: which exception.
pub(super) fn name<'q>(query: Query<'q>, place: &'q Place, id: &'q LineId) -> Query<'q> {
    query
        .bind(place.side.as_str())
        .bind(place.scope.as_str())
        .bind(id.0.as_str())
        .bind(id.1.as_str())
}

/// `?1` to `?12`: place and message.
fn bind<'q>(query: Query<'q>, place: &'q Place, message: &'q Message) -> Query<'q> {
    query
        .bind(place.side.as_str())
        .bind(place.scope.as_str())
        .bind(place.shard)
        .bind(message.source())
        .bind(message.id.as_str())
        .bind(message.topic.as_str())
        .bind(message.kind.as_str())
        .bind(message.key.as_deref())
        .bind(message.payload.as_deref())
        .bind(row::json(&message.headers))
        .bind(row::json(&message.attributes))
        .bind(row::instant(message.time))
}

pub(super) fn until(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}
