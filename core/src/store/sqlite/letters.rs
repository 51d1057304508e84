//! The operators' side: dead letters listed, put back into their lines, discarded.

use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{
    admin::{DryRun, Filter, Letter, LetterId, Shown},
    error::Result,
    failure::{LineId, RETRIED, Side, UNREADABLE},
    store::Letters,
};

use super::{
    failure::{Place, name},
    pool::{Engine, Transaction},
    row,
    unit::SLOT,
};

/// Letters counted at most, and events of the log looked at behind one.
const COUNTED: u32 = 100_000;
const BEHIND: u32 = 10_000;

/// `?1` to `?9`: what a filter names.
const NAMED: &str = "(?1 IS NULL OR side = ?1) AND (?2 IS NULL OR scope = ?2) AND (?3 IS NULL OR topic = ?3) \
     AND (?4 IS NULL OR key = ?4) AND (?5 IS NULL OR type = ?5) AND (?6 IS NULL OR instr(reason, ?6) > 0) \
     AND (?7 IS NULL OR last_failure >= ?7) AND (?8 IS NULL OR last_failure < ?8) \
     AND (?9 IS NULL OR id = ?9)";

fn columns() -> String {
    format!(
        "side, scope, source, id, seq, topic, type, key, time, position, attempts, reason, first_failure, last_failure, \
         maybe_sent, coalesce(CAST(json_extract(attributes, '$.{RETRIED}') AS INTEGER), 0) AS retried, \
         json_extract(attributes, '$.{UNREADABLE}') IS NOT NULL AS unreadable"
    )
}

/// Events that were given up: they are in `dead_letter`, or still first in their lines.
const DEAD: &str = "dead_letter WHERE true";
const PARKED: &str = "deferred WHERE parked";

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>;

fn bind<'q>(query: Query<'q>, filter: &Filter) -> Query<'q> {
    query
        .bind(filter.side.map(Side::as_str))
        .bind(filter.scope.clone())
        .bind(filter.topic.clone())
        .bind(filter.key.clone())
        .bind(filter.kind.clone())
        .bind(filter.reason.clone())
        .bind(filter.since.map(row::instant))
        .bind(filter.before.map(row::instant))
        .bind(filter.id.clone())
}

pub(super) async fn list(engine: &Engine, letters: &Letters) -> Result<Vec<Letter>> {
    const OPERATION: &str = "list dead letters";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let statement = format!(
        "SELECT {} FROM {{p}}{} AND {NAMED} AND seq > ?10 AND seq < ?11 AND (position, seq) > (?12, ?13) \
         ORDER BY {} LIMIT ?14",
        columns(),
        if letters.parked { PARKED } else { DEAD },
        letters.order.by()
    );
    let (above, below, (position, number)) = letters.order.bounds();
    let rows = bind(sqlx::query(names.sql(&statement)), &letters.filter)
        .bind(above)
        .bind(below)
        .bind(position)
        .bind(number)
        .bind(letters.limit)
        .fetch_all(&mut *reader)
        .await;
    rows.and_then(|rows| rows.iter().map(letter).collect())
        .map_err(|e| names.failed(OPERATION, e))
}

pub(super) async fn show(engine: &Engine, id: &LetterId) -> Result<Option<Shown>> {
    const OPERATION: &str = "show a dead letter";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let one = |from: &str| {
        format!(
            "SELECT {}, payload, headers, attributes FROM {{p}}{from} AND side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
            columns()
        )
    };
    let statement = format!("{} UNION ALL {}", one(DEAD), one(PARKED));
    let (place, id) = (Place::on(id.side, &id.scope), id.line_id());
    let row = name(sqlx::query(names.sql(&statement)), &place, &id)
        .fetch_optional(&mut *reader)
        .await;
    let shown = |row: SqliteRow| -> sqlx::Result<Shown> {
        Ok(Shown {
            letter: letter(&row)?,
            message: row::message(&row)?,
        })
    };
    row.and_then(|row| row.map(shown).transpose())
        .map_err(|e| names.failed(OPERATION, e))
}

pub(super) async fn count(engine: &Engine, filter: &Filter) -> Result<DryRun> {
    const OPERATION: &str = "count dead letters";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let statement = format!(
        "SELECT count(*), count(DISTINCT topic || char(31) || key), count(*) - count(key), \
           coalesce(sum(maybe_sent), 0) \
         FROM (SELECT topic, key, maybe_sent FROM {{p}}dead_letter WHERE {NAMED} LIMIT {COUNTED})"
    );
    let row = bind(sqlx::query(names.sql(&statement)), filter)
        .fetch_one(&mut *reader)
        .await;
    let counted = |row: &SqliteRow| -> sqlx::Result<DryRun> {
        let number = |i: usize| row.try_get::<i64, _>(i).map(i64::unsigned_abs);
        Ok(DryRun {
            letters: number(0)?,
            keys: number(1)?,
            keyless: number(2)?,
            maybe_sent: number(3)?,
            newer: None,
        })
    };
    row.and_then(|row| counted(&row))
        .map_err(|e| names.failed(OPERATION, e))
}

/// Settled and through: at or below the cursor, neither waiting nor given up.
pub(super) async fn newer(engine: &Engine, id: &LetterId) -> Result<u64> {
    const OPERATION: &str = "count newer events";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let elsewhere = |table: &str| {
        format!(
            "NOT EXISTS (SELECT 1 FROM {{p}}{table} x WHERE x.side = ?1 AND x.scope = ?2 AND x.topic = o.topic \
             AND x.key = o.key AND x.id = o.id)"
        )
    };
    let statement = format!(
        "SELECT count(*) FROM {{p}}dead_letter d JOIN (SELECT position, topic, key, id FROM {{p}}outbox \
           WHERE position > (SELECT position FROM {{p}}dead_letter WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4) \
           ORDER BY position LIMIT {BEHIND}) o ON o.topic = d.topic AND o.key = d.key \
         WHERE d.side = ?1 AND d.scope = ?2 AND d.source = ?3 AND d.id = ?4 \
           AND o.position <= (SELECT last FROM {{p}}cursor WHERE destination = ?2 AND partition = 0) AND {} AND {}",
        elsewhere("deferred"),
        elsewhere("dead_letter")
    );
    let (place, id) = (Place::on(id.side, &id.scope), id.line_id());
    let row = name(sqlx::query(names.sql(&statement)), &place, &id)
        .fetch_one(&mut *reader)
        .await;
    row.and_then(|row| row.try_get::<i64, _>(0))
        .map(i64::unsigned_abs)
        .map_err(|e| names.failed(OPERATION, e))
}

pub(super) async fn waits(engine: &Engine, id: &LetterId) -> Result<bool> {
    const OPERATION: &str = "look for a waiting event";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let sql = names.sql(
        "SELECT 1 FROM {p}deferred WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
    );
    let (place, id) = (Place::on(id.side, &id.scope), id.line_id());
    let row = name(sqlx::query(sql), &place, &id)
        .fetch_optional(&mut *reader)
        .await;
    row.map(|row| row.is_some())
        .map_err(|e| names.failed(OPERATION, e))
}

/// This transaction is the database's only writer: no transaction of a consumer's is open beside it.
pub(super) async fn retry(tx: &mut Transaction, place: &Place, ids: &[LineId]) -> Result<u64> {
    let insert = format!(
        "INSERT INTO {{p}}deferred (side, scope, shard, source, id, topic, type, key, payload, headers, attributes, time, \
           position, attempts, reason, first_failure, last_failure, maybe_sent, due) \
         SELECT side, scope, shard, source, id, topic, type, key, payload, headers, json_set(attributes, '$.{RETRIED}', \
           CAST(coalesce(CAST(json_extract(attributes, '$.{RETRIED}') AS INTEGER), 0) + 1 AS TEXT)), time, \
           CASE side WHEN 'consumer' THEN -1 ELSE position END, 0, reason, first_failure, last_failure, maybe_sent, {{now}} \
         FROM {{p}}dead_letter WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4 \
           AND json_extract(attributes, '$.{UNREADABLE}') IS NULL \
         ON CONFLICT (side, scope, source, id) DO NOTHING"
    );
    let delete = format!(
        "DELETE FROM {{p}}dead_letter WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4 \
         AND json_extract(attributes, '$.{UNREADABLE}') IS NULL"
    );
    let mut moved = 0;
    for id in ids {
        let sql = tx.names().sql(&insert);
        tx.run(name(sqlx::query(sql), place, id)).await?;
        let sql = tx.names().sql(&delete);
        moved += tx.run(name(sqlx::query(sql), place, id)).await?;
        // The same as if its row were moved, because nobody works on a parked one.
        let sql = tx.names().sql(
            "UPDATE {p}deferred SET parked = 0, attempts = 0, due = {now} \
             WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4 AND parked",
        );
        moved += tx.run(name(sqlx::query(sql), place, id)).await?;
    }
    Ok(moved)
}

pub(super) async fn discard(tx: &mut Transaction, place: &Place, ids: &[LineId]) -> Result<u64> {
    let mut gone = 0;
    for id in ids {
        if place.is_consumer() {
            // Normally there since it was given up; what has been forgotten since could come again and be applied.
            let sql = tx.names().sql(
                "INSERT INTO {p}inbox (grp, source, id, slot, dead) SELECT scope, source, id, time / ?5, 1 FROM ( \
                   SELECT side, scope, source, id, time FROM {p}dead_letter \
                   UNION ALL SELECT side, scope, source, id, time FROM {p}deferred WHERE parked) \
                 WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4 ON CONFLICT DO NOTHING",
            );
            tx.run(name(sqlx::query(sql), place, id).bind(SLOT)).await?;
        }
        let sql = tx.names().sql(
            "DELETE FROM {p}dead_letter WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
        );
        gone += tx.run(name(sqlx::query(sql), place, id)).await?;
        let sql = tx.names().sql(
            "DELETE FROM {p}deferred WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4 AND parked",
        );
        gone += tx.run(name(sqlx::query(sql), place, id)).await?;
    }
    Ok(gone)
}

fn letter(row: &SqliteRow) -> sqlx::Result<Letter> {
    let side: String = row.try_get("side")?;
    Ok(Letter {
        id: LetterId {
            side: Side::read(&side)
                .ok_or_else(|| sqlx::Error::Decode(format!("side {side:?}").into()))?,
            scope: row.try_get("scope")?,
            source: row.try_get("source")?,
            id: row.try_get("id")?,
        },
        number: row.try_get("seq")?,
        topic: row.try_get("topic")?,
        kind: row.try_get("type")?,
        key: row.try_get("key")?,
        time: row::time(row.try_get("time")?),
        position: row.try_get("position")?,
        attempts: row.try_get("attempts")?,
        reason: row.try_get("reason")?,
        first_failure: row::time(row.try_get("first_failure")?),
        last_failure: row::time(row.try_get("last_failure")?),
        maybe_sent: row.try_get("maybe_sent")?,
        retried: u32::try_from(row.try_get::<i64, _>("retried")?).unwrap_or_default(),
        unreadable: row.try_get("unreadable")?,
    })
}
