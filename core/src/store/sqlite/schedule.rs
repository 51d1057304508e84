//! Events whose time comes, and those that were cancelled before.

use std::time::Duration;

use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{
    error::Result,
    event::Key,
    failure::{Line, LineId},
    store::Due,
};

use super::{
    failure::{Place, name, remove, until},
    pool::Transaction,
};

/// This transaction is the database's only writer: nobody is just deciding to cancel.
pub(super) async fn fall_due(
    tx: &mut Transaction,
    place: &Place,
    position: i64,
    limit: u32,
) -> Result<Due> {
    let mut due = Due::default();
    for (id, cancelled) in fallen(tx, place, limit).await? {
        if cancelled {
            remove(tx, place, &id).await?;
        } else {
            due.lines.push(enter(tx, place, &id, position).await?);
        }
    }
    let forget = tx.names().sql(
        "DELETE FROM {p}cancelled WHERE id IN (SELECT id FROM {p}cancelled WHERE deliver_at < {now} - 2592000000000 \
         ORDER BY deliver_at LIMIT 100)",
    );
    tx.run(sqlx::query(forget)).await?;
    let sql = tx.names().sql(
        "SELECT min(due) - {now} FROM {p}deferred WHERE side = ?1 AND scope = ?2 AND shard = ?3 AND scheduled",
    );
    let next = sqlx::query_scalar::<_, Option<i64>>(sql)
        .bind(place.side.as_str())
        .bind(place.scope.as_str())
        .bind(place.shard)
        .fetch_one(tx.connection())
        .await;
    let next = next.map_err(|e| tx.failed(e))?;
    due.next = next.map(|wait| until(wait).min(Duration::from_secs(86_400)));
    Ok(due)
}

/// Those whose time has come, soonest first, and whether each was cancelled.
async fn fallen(tx: &mut Transaction, place: &Place, limit: u32) -> Result<Vec<(LineId, bool)>> {
    let sql = tx.names().sql(
        "SELECT source, id, EXISTS (SELECT 1 FROM {p}cancelled c WHERE c.id = d.id) FROM {p}deferred d \
         WHERE side = ?1 AND scope = ?2 AND shard = ?3 AND scheduled AND due <= {now} ORDER BY due, seq LIMIT ?4",
    );
    let rows = sqlx::query(sql)
        .bind(place.side.as_str())
        .bind(place.scope.as_str())
        .bind(place.shard)
        .bind(limit)
        .fetch_all(tx.connection())
        .await;
    let fallen = |row: &SqliteRow| Ok(((row.try_get(0)?, row.try_get(1)?), row.try_get(2)?));
    rows.and_then(|rows| rows.iter().map(fallen).collect())
        .map_err(|e| tx.failed(e))
}

/// With a new number, so that those that fall due together stand in that order.
async fn enter(tx: &mut Transaction, place: &Place, id: &LineId, position: i64) -> Result<Line> {
    let sql = tx.names().sql(
        "UPDATE {p}deferred AS d SET scheduled = 0, seq = (SELECT max(seq) + 1 FROM {p}deferred), \
           position = max(position, ?5, coalesce((SELECT max(x.position) FROM {p}deferred x WHERE x.side = ?1 \
             AND x.scope = ?2 AND x.topic = d.topic AND x.key = d.key AND NOT x.scheduled), ?5)) \
         WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
    );
    tx.run(name(sqlx::query(sql), place, id).bind(position))
        .await?;
    let sql = tx.names().sql(
        "SELECT topic, key, due - {now} FROM {p}deferred WHERE side = ?1 AND scope = ?2 AND source = ?3 AND id = ?4",
    );
    let row = name(sqlx::query(sql), place, id)
        .fetch_one(tx.connection())
        .await;
    let line = |row: SqliteRow| -> sqlx::Result<Line> {
        let topic: String = row.try_get(0)?;
        let key: Option<String> = row.try_get(1)?;
        Ok(Line {
            key: key.map(|key| Key {
                topic: topic.into(),
                key: key.into(),
            }),
            head: id.clone(),
            due_in: until(row.try_get(2)?),
        })
    };
    row.and_then(line).map_err(|e| tx.failed(e))
}
