//! Deleting from the log, the inbox and the dead letters, a few rows at a time: nobody waits for the writer's place longer than
//! one small transaction takes, and the pages that are freed are used again.
//!
//! Positions go on growing (AUTOINCREMENT), also when the log is empty.

use std::time::Duration;

use crate::{
    backpressure::Backlog,
    error::Result,
    failure::Side,
    lease::Lease,
    store::{Cleaned, Trimmed},
};

use super::{
    lease,
    pool::{Engine, Transaction},
    row::micros,
};

/// Rows deleted in one transaction.
const ROWS: i64 = 500;
/// Payload bytes deleted in one transaction, beside which one more payload may go.
const BYTES: i64 = 4 << 20;
/// The longest gap between arrivals that counts as running time.
const GAP: i64 = 60_000_000;
/// Parts of the time to remember that its clock keeps points for.
const POINTS: i64 = 16;

const INBOX: &str = "clean the inbox";
const DEAD: &str = "trim dead letters";

/// Deletes what every destination is done with and what is old enough, from the start of the log on. A destination without a
/// row is not done with anything: a new one would find nothing.
pub(super) async fn clean_log(engine: &Engine, held: &Lease, keep: Duration) -> Result<Cleaned> {
    let held = held.clone();
    let removed = engine
        .write("clean the log", move |tx| {
            Box::pin(async move {
                lease::fence(tx, &held).await?;
                let sql = tx.names().sql(
                    "DELETE FROM {p}outbox WHERE position IN (SELECT position FROM ( \
                       SELECT position, CAST(created_at AS INTEGER) AS created, coalesce(length(payload), 0) AS size, \
                              sum(coalesce(length(payload), 0)) OVER (ORDER BY position) AS bytes \
                       FROM (SELECT position, created_at, payload FROM {p}outbox WHERE position <= ( \
                         SELECT CASE WHEN EXISTS (SELECT 1 FROM {p}cursor GROUP BY destination HAVING max(partition = 0) = 0) \
                           THEN 0 ELSE coalesce(min(last), 0) END FROM {p}cursor WHERE partition = 0) \
                         ORDER BY position LIMIT ?2)) \
                     WHERE created <= {now} - ?1 AND bytes - size < ?3) \
                     RETURNING position, CAST(created_at AS INTEGER)",
                );
                let gone: Vec<(i64, i64)> = sqlx::query_as(sql)
                    .bind(micros(keep))
                    .bind(ROWS)
                    .bind(BYTES)
                    .fetch_all(tx.connection())
                    .await
                    .map_err(|e| tx.failed(e))?;
                note_gone(tx, &gone).await?;
                Ok(count(gone.iter()))
            })
        })
        .await?;
    Ok(Cleaned {
        removed,
        more: removed > 0,
        held: Vec::new(),
    })
}

/// For replays, which must know what they cannot send.
async fn note_gone(tx: &mut Transaction, gone: &[(i64, i64)]) -> Result<()> {
    let position = gone.iter().map(|(position, _)| *position).max();
    let Some((position, time)) = position.zip(gone.iter().map(|(_, time)| *time).max()) else {
        return Ok(());
    };
    let sql = tx.names().sql(
        "UPDATE {p}installation SET gone_position = max(gone_position, ?1), gone_time = max(coalesce(gone_time, ?2), ?2)",
    );
    tx.run(sqlx::query(sql).bind(position).bind(time))
        .await
        .map(drop)
}

/// How far the destination is behind that is farthest.
pub(super) async fn backlog(engine: &Engine) -> Result<Backlog> {
    const OPERATION: &str = "look at the backlog";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let sql = names.sql(
        "SELECT coalesce((SELECT {now} - CAST(o.created_at AS INTEGER) FROM {p}outbox o WHERE o.position > c.last \
           ORDER BY o.position LIMIT 1), 0), coalesce((SELECT max(position) FROM {p}outbox) - c.last, 0) \
         FROM (SELECT coalesce(min(last), 0) AS last FROM {p}cursor WHERE destination NOT LIKE 'replay:%') c",
    );
    let (age, events): (i64, i64) = sqlx::query_as(sql)
        .fetch_one(&mut *reader)
        .await
        .map_err(|e| names.failed(OPERATION, e))?;
    Ok(Backlog {
        age: Duration::from_micros(u64::try_from(age).unwrap_or_default()),
        events: u64::try_from(events).unwrap_or_default(),
    })
}

/// A source of a group, and when its last event arrived.
struct Source {
    group: String,
    source: String,
    newest: i64,
}

/// Moves the clocks of the sources and deletes what each has outrun.
pub(super) async fn clean_inbox(
    engine: &Engine,
    held: &Lease,
    remember: Duration,
) -> Result<Cleaned> {
    let (held, remember) = (held.clone(), micros(remember));
    let sources = sources(engine).await?;
    engine
        .write(INBOX, move |tx| {
            Box::pin(async move {
                lease::fence(tx, &held).await?;
                let mut cleaned = Cleaned::default();
                for source in &sources {
                    tick(tx, source, remember).await?;
                }
                drop_clocks(tx).await?;
                for source in &sources {
                    let room = ROWS.saturating_sub_unsigned(cleaned.removed);
                    cleaned.removed += forget(tx, source, remember, room).await?;
                    cleaned.more = cleaned.removed >= ROWS.unsigned_abs();
                    if cleaned.more {
                        break;
                    }
                }
                Ok(cleaned)
            })
        })
        .await
}

/// From one source to the next by the index, whatever they hold.
async fn sources(engine: &Engine) -> Result<Vec<Source>> {
    let names = engine.names();
    let mut reader = engine.reader(INBOX).await?;
    let mut all: Vec<Source> = Vec::new();
    loop {
        let after = all.last().map(|s| (s.group.clone(), s.source.clone()));
        let condition = match after {
            Some(_) => "WHERE (grp, source) > (?1, ?2)",
            None => "",
        };
        let sql = names.sql(&format!(
            "SELECT s.grp, s.source, (SELECT max(arrived) FROM {{p}}inbox i WHERE i.grp = s.grp AND i.source = s.source) \
             FROM (SELECT grp, source FROM {{p}}inbox INDEXED BY {{p}}inbox_source {condition} \
                   ORDER BY grp, source LIMIT 1) s"
        ));
        let mut query = sqlx::query_as(sql);
        if let Some((group, source)) = after {
            query = query.bind(group).bind(source);
        }
        let row: Option<(String, String, i64)> = query
            .fetch_optional(&mut *reader)
            .await
            .map_err(|e| names.failed(INBOX, e))?;
        let Some((group, source, newest)) = row else {
            return Ok(all);
        };
        all.push(Source {
            group,
            source,
            newest,
        });
    }
}

/// The newest point of a clock moves along; one in so many of the time to remember stays, as something to look back to.
async fn tick(tx: &mut Transaction, source: &Source, remember: i64) -> Result<()> {
    let sql = tx.names().sql(
        "SELECT at, running, {now} FROM {p}inbox_clock WHERE grp = ?1 AND source = ?2 ORDER BY at DESC LIMIT 2",
    );
    let points: Vec<(i64, i64, i64)> = sqlx::query_as(sql)
        .bind(source.group.as_str())
        .bind(source.source.as_str())
        .fetch_all(tx.connection())
        .await
        .map_err(|e| tx.failed(e))?;
    let before = points.get(1).map(|p| p.1);
    match points.first() {
        Some((at, _, now)) if *at > now + GAP => {
            // The clock was set back, and what it said before would forget what arrives now.
            remove_points(tx, source, i64::MAX).await?;
            point(tx, source, source.newest.min(*now), 0).await
        }
        Some((at, running, _)) if source.newest > *at => {
            let running = running + (source.newest - at).min(GAP);
            if before.is_some_and(|before| running - before < remember / POINTS) {
                remove_point(tx, source, *at).await?;
            }
            point(tx, source, source.newest, running).await?;
            match forgettable(tx, source, remember).await? {
                Some(at) => remove_points(tx, source, at).await,
                None => Ok(()),
            }
        }
        Some(_) => Ok(()),
        None => point(tx, source, source.newest, 0).await,
    }
}

async fn point(tx: &mut Transaction, source: &Source, at: i64, running: i64) -> Result<()> {
    let sql = "INSERT INTO {p}inbox_clock (grp, source, at, running) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";
    of(tx, sql, source, [at, running]).await.map(drop)
}

async fn remove_point(tx: &mut Transaction, source: &Source, at: i64) -> Result<()> {
    let sql = "DELETE FROM {p}inbox_clock WHERE grp = ?1 AND source = ?2 AND at = ?3 AND ?4 = 0";
    of(tx, sql, source, [at, 0]).await.map(drop)
}

/// The points before this one.
async fn remove_points(tx: &mut Transaction, source: &Source, before: i64) -> Result<()> {
    let sql = "DELETE FROM {p}inbox_clock WHERE grp = ?1 AND source = ?2 AND at < ?3 AND ?4 = 0";
    of(tx, sql, source, [before, 0]).await.map(drop)
}

/// Of sources of which nothing is left.
async fn drop_clocks(tx: &mut Transaction) -> Result<()> {
    let sql = tx.names().sql(
        "DELETE FROM {p}inbox_clock WHERE NOT EXISTS (SELECT 1 FROM {p}inbox i \
         WHERE i.grp = {p}inbox_clock.grp AND i.source = {p}inbox_clock.source)",
    );
    tx.run(sqlx::query(sql)).await.map(drop)
}

/// The arrival behind which the source has been running for as long as the inbox remembers.
async fn forgettable(tx: &mut Transaction, source: &Source, remember: i64) -> Result<Option<i64>> {
    let sql = tx.names().sql(
        "SELECT max(at) FROM {p}inbox_clock WHERE grp = ?1 AND source = ?2 AND running <= ( \
           SELECT max(running) FROM {p}inbox_clock WHERE grp = ?1 AND source = ?2) - ?3",
    );
    sqlx::query_scalar(sql)
        .bind(source.group.as_str())
        .bind(source.source.as_str())
        .bind(remember)
        .fetch_one(tx.connection())
        .await
        .map_err(|e| tx.failed(e))
}

async fn forget(tx: &mut Transaction, source: &Source, remember: i64, room: i64) -> Result<u64> {
    let Some(upto) = forgettable(tx, source, remember).await? else {
        return Ok(0);
    };
    let sql = "DELETE FROM {p}inbox WHERE grp = ?1 AND source = ?2 AND id IN (SELECT id FROM {p}inbox \
               WHERE grp = ?1 AND source = ?2 AND arrived <= ?3 ORDER BY arrived LIMIT ?4)";
    of(tx, sql, source, [upto, room]).await
}

async fn of(tx: &mut Transaction, sql: &str, source: &Source, [a, b]: [i64; 2]) -> Result<u64> {
    let query = sqlx::query(tx.names().sql(sql))
        .bind(source.group.clone())
        .bind(source.source.clone());
    tx.run(query.bind(a).bind(b)).await
}

/// At most so many dead letters of each scope. Those of which the broker is to get a copy stay until it has it, unless they
/// are too many.
pub(super) async fn trim_dead_letters(
    engine: &Engine,
    held: &Lease,
    side: Side,
    keep: Duration,
    most: u64,
) -> Result<Vec<Trimmed>> {
    const AGED: &str = "last_failure < {now} - ?4 AND (side = 'relay' OR copied_at IS NOT NULL)";
    const TOO_MANY: &str = "seq <= (SELECT n.seq FROM {p}dead_letter n WHERE n.side = ?1 AND n.scope = ?2 \
                            ORDER BY n.seq DESC LIMIT 1 OFFSET ?4)";
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let mut all = Vec::new();
    for scope in scopes(engine, side).await? {
        for (too_many, which, bound) in [(false, AGED, micros(keep)), (true, TOO_MANY, most)] {
            let sql = format!(
                "DELETE FROM {{p}}dead_letter WHERE seq IN (SELECT seq FROM ( \
                   SELECT seq, side, last_failure, copied_at FROM {{p}}dead_letter \
                   WHERE side = ?1 AND scope = ?2 ORDER BY seq LIMIT ?3) WHERE {which}) \
                 RETURNING side = 'consumer' AND copied_at IS NULL"
            );
            let (held, of) = (held.clone(), scope.clone());
            let gone: Vec<bool> = engine
                .write(DEAD, move |tx| {
                    Box::pin(async move {
                        lease::fence(tx, &held).await?;
                        let query = sqlx::query_scalar(tx.names().sql(&sql))
                            .bind(side.as_str())
                            .bind(of)
                            .bind(ROWS)
                            .bind(bound);
                        let gone = query.fetch_all(tx.connection()).await;
                        gone.map_err(|e| tx.failed(e))
                    })
                })
                .await?;
            if !gone.is_empty() {
                all.push(Trimmed {
                    scope: scope.clone(),
                    too_many,
                    removed: count(gone.iter()),
                    uncopied: count(gone.iter().filter(|uncopied| **uncopied)),
                });
            }
        }
    }
    Ok(all)
}

async fn scopes(engine: &Engine, side: Side) -> Result<Vec<String>> {
    let names = engine.names();
    let mut reader = engine.reader(DEAD).await?;
    let sql = names.sql(
        "WITH RECURSIVE s(scope) AS (SELECT min(scope) FROM {p}dead_letter WHERE side = ?1 UNION ALL \
         SELECT (SELECT min(d.scope) FROM {p}dead_letter d WHERE d.side = ?1 AND d.scope > s.scope) \
         FROM s WHERE s.scope IS NOT NULL) SELECT scope FROM s WHERE scope IS NOT NULL",
    );
    sqlx::query_scalar(sql)
        .bind(side.as_str())
        .fetch_all(&mut *reader)
        .await
        .map_err(|e| names.failed(DEAD, e))
}

fn count<T>(rows: impl Iterator<Item = T>) -> u64 {
    u64::try_from(rows.count()).unwrap_or(u64::MAX)
}
