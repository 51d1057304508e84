//! What operators hold back for a while.

use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{
    error::Result,
    failure::Side,
    lease::Lease,
    pause::{Expiry, NewPause, Pause, Target},
    store::Paused,
};

use super::{
    failure::until,
    lease,
    pool::{Engine, Transaction},
    row::{instant, micros, reason, time},
};

const LOOK: &str = "look for pauses";
/// Names of destinations or groups told at most.
const NAMES: u32 = 100;

/// In the order of [`paused`].
const COLUMNS: &str = "side, scope, topic, keyed, key, begun_at, ends_at, reason, operator, ends_at - {now} AS left_us";
/// `?1` to `?5`.
const NAMED: &str = "side = ?1 AND scope = ?2 AND topic = ?3 AND keyed = ?4 AND key = ?5";

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>;

pub(super) async fn list(engine: &Engine, of: Option<(Side, &str)>) -> Result<Vec<Paused>> {
    let names = engine.names();
    let mut reader = engine.reader(LOOK).await?;
    let statement = format!(
        "SELECT {COLUMNS} FROM {{p}}pause WHERE ends_at > {{now}} AND (?1 IS NULL OR side = ?1 AND scope = ?2) \
         ORDER BY side, scope, topic, keyed, key"
    );
    let rows = sqlx::query(names.sql(&statement))
        .bind(of.map(|(side, _)| side.as_str()))
        .bind(of.map(|(_, scope)| scope.to_owned()))
        .fetch_all(&mut *reader)
        .await;
    rows.and_then(|rows| rows.iter().map(paused).collect())
        .map_err(|e| names.failed(LOOK, e))
}

/// None if the expiry is out of bounds.
pub(super) async fn pause(tx: &mut Transaction, pause: &NewPause) -> Result<Option<Paused>> {
    let statement = format!(
        "INSERT INTO {{p}}pause (side, scope, topic, keyed, key, ends_at, reason, operator) \
         SELECT ?1, ?2, ?3, ?4, ?5, t.ends_at, ?6, ?7 FROM (SELECT coalesce(?8, {{now}} + ?9) AS ends_at) t \
         WHERE t.ends_at > {{now}} AND t.ends_at <= {{now}} + ?10 \
         ON CONFLICT (side, scope, topic, keyed, key) DO UPDATE SET begun_at = {{now}}, \
           ends_at = excluded.ends_at, reason = excluded.reason, operator = excluded.operator \
         RETURNING {COLUMNS}"
    );
    let (at, wait) = match pause.expiry {
        Expiry::At(at) => (Some(instant(at)), 0),
        Expiry::In(d) => (None, micros(d)),
    };
    let query = name(sqlx::query(tx.names().sql(&statement)), &pause.target)
        .bind(reason(&pause.reason).to_owned())
        .bind(reason(&pause.operator).to_owned())
        .bind(at)
        .bind(wait)
        .bind(micros(Pause::LONGEST));
    one(tx, query).await
}

/// One that is over has ended by itself, and is removed all the same.
pub(super) async fn resume(tx: &mut Transaction, target: &Target) -> Result<Option<Paused>> {
    let found = format!("SELECT {COLUMNS} FROM {{p}}pause WHERE {NAMED} AND ends_at > {{now}}");
    let query = name(sqlx::query(tx.names().sql(&found)), target);
    let found = one(tx, query).await?;
    let gone = format!("DELETE FROM {{p}}pause WHERE {NAMED}");
    let query = name(sqlx::query(tx.names().sql(&gone)), target);
    tx.run(query).await?;
    Ok(found)
}

/// The destinations or groups that have run here.
pub(super) async fn scopes(engine: &Engine, side: Side) -> Result<Vec<String>> {
    let names = engine.names();
    let mut reader = engine.reader(LOOK).await?;
    let sql = names.sql(match side {
        Side::Relay => "SELECT DISTINCT destination FROM {p}cursor ORDER BY 1 LIMIT ?1",
        Side::Consumer => {
            "SELECT grp FROM {p}source_cursor UNION SELECT scope FROM {p}lease WHERE kind = 'pump' \
             ORDER BY 1 LIMIT ?1"
        }
    });
    sqlx::query_scalar(sql)
        .bind(NAMES)
        .fetch_all(&mut *reader)
        .await
        .map_err(|e| names.failed(LOOK, e))
}

pub(super) async fn forget(tx: &mut Transaction, held: &Lease, side: Side) -> Result<u64> {
    lease::fence(tx, held).await?;
    let sql = tx
        .names()
        .sql("DELETE FROM {p}pause WHERE side = ?1 AND ends_at < {now}");
    tx.run(sqlx::query(sql).bind(side.as_str())).await
}

async fn one(tx: &mut Transaction, query: Query<'_>) -> Result<Option<Paused>> {
    let row = query.fetch_optional(tx.connection()).await;
    row.and_then(|row| row.as_ref().map(paused).transpose())
        .map_err(|e| tx.failed(e))
}

fn name<'q>(query: Query<'q>, target: &Target) -> Query<'q> {
    query
        .bind(target.side.as_str())
        .bind(target.scope.clone())
        .bind(target.topic.clone().unwrap_or_default())
        .bind(target.key.is_some())
        .bind(target.key.clone().unwrap_or_default())
}

fn paused(row: &SqliteRow) -> sqlx::Result<Paused> {
    let (side, topic): (String, String) = (row.try_get("side")?, row.try_get("topic")?);
    let (keyed, key): (bool, String) = (row.try_get("keyed")?, row.try_get("key")?);
    Ok(Paused {
        pause: Pause {
            target: Target {
                side: Side::read(&side).unwrap_or(Side::Relay),
                scope: row.try_get("scope")?,
                topic: (!topic.is_empty()).then_some(topic),
                key: keyed.then_some(key),
            },
            until: time(row.try_get("ends_at")?),
            reason: row.try_get("reason")?,
            operator: row.try_get("operator")?,
            since: time(row.try_get("begun_at")?),
        },
        left: until(row.try_get("left_us")?),
    })
}
