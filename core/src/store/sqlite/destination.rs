//! Destinations: what is said about them, made and removed with their cursors. Writers are serial here, so that the highest
//! position is a place that nothing commits behind.

use std::time::{Duration, UNIX_EPOCH};

use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{
    admin::{Destination, DestinationCursor, Gone, Removed, Selection, replay::COUNTED},
    destination::{Start, as_replay, gone, last_one},
    error::Result,
    lease::Lease,
    store::{Added, Counted, Extent, NewDestination, Registered, Unserved},
};

use super::{
    lease,
    pool::{Engine, Transaction},
    row,
};

const LIST: &str = "list destinations";
const COUNT: &str = "count events of the log";
/// The highest position that was ever drawn.
const HIGHEST: &str = "coalesce((SELECT seq FROM sqlite_sequence WHERE name = '{p}outbox'), 0)";
/// The longest gap between two looks of the cleaner that counts: while no relay ran, nobody could have been served.
const GAP: i64 = 90_000_000;

pub(super) async fn list(engine: &Engine) -> Result<Vec<Registered>> {
    let names = engine.names();
    let mut reader = engine.reader(LIST).await?;
    let sql = names.sql(
        "SELECT c.destination, coalesce(d.start, 'earliest') AS start, d.since, d.replay, \
           coalesce(d.created_at, {now}) AS created_at, coalesce(d.unserved, 0) AS unserved, \
           c.partition, c.last, c.epoch, c.upto IS NOT NULL AS open, c.expires_at > {now} AS held, \
           coalesce((SELECT {now} - CAST(o.created_at AS INTEGER) FROM {p}outbox o WHERE o.position > c.last \
             ORDER BY o.position LIMIT 1), 0) AS age, \
           max(coalesce((SELECT max(o.position) FROM {p}outbox o), 0) - c.last, 0) AS behind \
         FROM {p}cursor c LEFT JOIN {p}destination d ON d.name = c.destination WHERE c.partition = 0 \
         ORDER BY c.destination",
    );
    let rows = sqlx::query(sql)
        .fetch_all(&mut *reader)
        .await
        .map_err(|e| names.failed(LIST, e))?;
    let all: sqlx::Result<Vec<_>> = rows.iter().map(registered).collect();
    all.map_err(|e| names.failed(LIST, e))
}

fn registered(row: &SqliteRow) -> sqlx::Result<Registered> {
    let start: String = row.try_get("start")?;
    let since: Option<i64> = row.try_get("since")?;
    let mut destination = Destination::new(
        row.try_get("destination")?,
        Start::read(&start, since.map(row::time)),
        row::time(row.try_get("created_at")?),
        duration(row.try_get("unserved")?),
    );
    let (age, behind): (i64, i64) = (row.try_get("age")?, row.try_get("behind")?);
    destination.lag = duration(age);
    destination.behind = u64::try_from(behind).unwrap_or_default();
    destination.cursors.push(DestinationCursor {
        partition: row.try_get("partition")?,
        position: row.try_get("last")?,
        epoch: row.try_get("epoch")?,
        held: row.try_get("held")?,
        open: row.try_get("open")?,
    });
    Ok(Registered {
        destination,
        replay: row.try_get("replay")?,
    })
}

pub(super) async fn add(tx: &mut Transaction, new: &NewDestination) -> Result<Added> {
    let sql = tx.names().sql(
        "SELECT d.start, d.since, d.removed_at, d.removed_why, coalesce(d.unpublished, 0) AS unpublished, \
           coalesce(d.deferred, 0) AS deferred, coalesce(d.dead_letters, 0) AS dead_letters, \
           EXISTS (SELECT 1 FROM {p}cursor c WHERE c.destination = ?1) AS there \
         FROM (SELECT ?1 AS name) n LEFT JOIN {p}destination d ON d.name = n.name",
    );
    let row = sqlx::query(sql)
        .bind(new.name.as_str())
        .fetch_one(tx.connection())
        .await
        .map_err(|e| tx.failed(e))?;
    let found = found(&row, new).map_err(|e| tx.failed(e))?;
    match &found {
        Added::There(_) => return Ok(found),
        Added::Removed(_) if !new.again => return Ok(found),
        Added::New | Added::Removed(_) => {}
    }
    let (last, upto) = match (new.start, &new.replay) {
        (_, Some(_)) => ("0", HIGHEST),
        (Start::Now, None) => (HIGHEST, "NULL"),
        (Start::Earliest | Start::At(_), None) => ("0", "NULL"),
    };
    let statement = format!(
        "INSERT INTO {{p}}cursor (destination, partition, last, upto) VALUES (?1, 0, {last}, {upto})"
    );
    let cursor = tx.names().sql(&statement);
    tx.run(sqlx::query(cursor).bind(new.name.as_str())).await?;
    let note = tx.names().sql(
        "INSERT INTO {p}destination (name, start, since, replay) VALUES (?1, ?2, ?3, ?4) \
         ON CONFLICT (name) DO UPDATE SET start = excluded.start, since = excluded.since, replay = excluded.replay, \
           created_at = {now}, looked_at = NULL, unserved = 0, removed_at = NULL, removed_why = NULL, unpublished = 0, \
           deferred = 0, dead_letters = 0",
    );
    let note = sqlx::query(note)
        .bind(new.name.as_str())
        .bind(new.start.word())
        .bind(new.start.time().map(row::instant))
        .bind(new.replay.as_deref());
    tx.run(note).await?;
    // Names of replays come new each time.
    let forget = tx.names().sql(
        "DELETE FROM {p}destination WHERE name LIKE 'replay:%' AND removed_at < {now} - 2592000000000",
    );
    tx.run(sqlx::query(forget)).await?;
    Ok(found)
}

fn found(row: &SqliteRow, new: &NewDestination) -> sqlx::Result<Added> {
    let start: Option<String> = row.try_get("start")?;
    let since: Option<i64> = row.try_get("since")?;
    if row.try_get("there")? {
        let start = Start::read(&start.unwrap_or_default(), since.map(row::time));
        return Ok(Added::There(start));
    }
    match row.try_get::<Option<i64>, _>("removed_at")? {
        Some(_) => removed(row, new.name.clone()).map(Added::Removed),
        None => Ok(Added::New),
    }
}

pub(super) async fn remove(
    tx: &mut Transaction,
    name: &str,
    why: &str,
    heir: Option<&str>,
) -> Result<Option<Removed>> {
    let is_replay = as_replay(name).is_some();
    // A replay has not lost what lies behind its end.
    let sql = tx.names().sql(&format!(
        "SELECT (SELECT count(DISTINCT destination) FROM {{p}}cursor \
                 WHERE destination <> ?1 AND destination NOT LIKE 'replay:%'), \
           (SELECT count(*) FROM (SELECT 1 FROM {{p}}outbox o WHERE o.position > c.last \
              AND (NOT ?2 OR o.position <= coalesce(c.upto, 0)) LIMIT {COUNTED})) \
         FROM {{p}}cursor c WHERE c.destination = ?1 AND c.partition = 0"
    ));
    let counted: Option<(i64, i64)> = sqlx::query_as(sql)
        .bind(name)
        .bind(is_replay)
        .fetch_optional(tx.connection())
        .await
        .map_err(|e| tx.failed(e))?;
    let Some((others, unpublished)) = counted else {
        return Ok(None);
    };
    if others == 0 && !is_replay {
        return Err(last_one(tx.operation(), name));
    }
    let cursors = tx
        .names()
        .sql("DELETE FROM {p}cursor WHERE destination = ?1");
    tx.run(sqlx::query(cursors).bind(name)).await?;
    let lines = tx
        .names()
        .sql("DELETE FROM {p}deferred WHERE side = 'relay' AND scope = ?1");
    let deferred = tx.run(sqlx::query(lines).bind(name)).await?;
    if let Some(heir) = heir {
        let inherit = tx.names().sql(
            "UPDATE OR IGNORE {p}dead_letter SET scope = ?2 WHERE side = 'relay' AND scope = ?1",
        );
        tx.run(sqlx::query(inherit).bind(name).bind(heir)).await?;
    }
    let letters = tx
        .names()
        .sql("DELETE FROM {p}dead_letter WHERE side = 'relay' AND scope = ?1");
    let dead_letters = tx.run(sqlx::query(letters).bind(name)).await?;
    let record = tx.names().sql(
        "INSERT INTO {p}destination (name, removed_at, removed_why, unpublished, deferred, dead_letters) \
         VALUES (?1, {now}, ?2, ?3, ?4, ?5) ON CONFLICT (name) DO UPDATE SET removed_at = excluded.removed_at, \
           removed_why = excluded.removed_why, unpublished = excluded.unpublished, deferred = excluded.deferred, \
           dead_letters = excluded.dead_letters RETURNING removed_at",
    );
    let at: i64 = sqlx::query_scalar(record)
        .bind(name)
        .bind(why)
        .bind(unpublished)
        .bind(i64::try_from(deferred).unwrap_or(i64::MAX))
        .bind(i64::try_from(dead_letters).unwrap_or(i64::MAX))
        .fetch_one(tx.connection())
        .await
        .map_err(|e| tx.failed(e))?;
    Ok(Some(Removed {
        name: name.to_owned(),
        at: row::time(at),
        why: why.to_owned(),
        unpublished: unpublished.unsigned_abs(),
        deferred,
        dead_letters,
    }))
}

/// Refuses a destination that was removed, whose relay goes on.
pub(super) async fn check_removed(tx: &mut Transaction, name: &str) -> Result<()> {
    let sql = tx.names().sql(
        "SELECT removed_at, removed_why, unpublished, deferred, dead_letters FROM {p}destination \
         WHERE name = ?1 AND removed_at IS NOT NULL",
    );
    let row = sqlx::query(sql)
        .bind(name)
        .fetch_optional(tx.connection())
        .await
        .map_err(|e| tx.failed(e))?;
    match row {
        Some(row) => {
            let removed = removed(&row, name.to_owned()).map_err(|e| tx.failed(e))?;
            Err(gone(tx.operation(), &removed))
        }
        None => Ok(()),
    }
}

pub(super) async fn list_removed(engine: &Engine) -> Result<Vec<Removed>> {
    let names = engine.names();
    let mut reader = engine.reader(LIST).await?;
    let sql = names.sql(
        "SELECT name, removed_at, removed_why, unpublished, deferred, dead_letters FROM {p}destination \
         WHERE removed_at IS NOT NULL ORDER BY removed_at DESC",
    );
    let rows = sqlx::query(sql)
        .fetch_all(&mut *reader)
        .await
        .map_err(|e| names.failed(LIST, e))?;
    let read = |row: &SqliteRow| removed(row, row.try_get("name")?);
    let all: sqlx::Result<Vec<_>> = rows.iter().map(read).collect();
    all.map_err(|e| names.failed(LIST, e))
}

fn removed(row: &SqliteRow, name: String) -> sqlx::Result<Removed> {
    let count = |column: &str| row.try_get::<i64, _>(column).map(i64::unsigned_abs);
    let at: Option<i64> = row.try_get("removed_at")?;
    let why: Option<String> = row.try_get("removed_why")?;
    Ok(Removed {
        name,
        at: at.map_or(UNIX_EPOCH, row::time),
        why: why.unwrap_or_default(),
        unpublished: count("unpublished")?,
        deferred: count("deferred")?,
        dead_letters: count("dead_letters")?,
    })
}

pub(super) async fn watch(tx: &mut Transaction, held: &Lease) -> Result<Vec<Unserved>> {
    lease::fence(tx, held).await?;
    let enter = tx.names().sql(
        "INSERT INTO {p}destination (name) SELECT DISTINCT destination FROM {p}cursor WHERE true ON CONFLICT DO NOTHING",
    );
    tx.run(sqlx::query(enter)).await?;
    let sql = tx.names().sql(&format!(
        "UPDATE {{p}}destination SET looked_at = {{now}}, unserved = CASE \
           WHEN EXISTS (SELECT 1 FROM {{p}}cursor c WHERE c.destination = name AND c.expires_at > {{now}}) THEN 0 \
           ELSE unserved + max(0, min({GAP}, coalesce({{now}} - looked_at, 0))) END \
         WHERE removed_at IS NULL AND EXISTS (SELECT 1 FROM {{p}}cursor c WHERE c.destination = name) \
         RETURNING name, unserved"
    ));
    let rows: Vec<(String, i64)> = sqlx::query_as(sql)
        .fetch_all(tx.connection())
        .await
        .map_err(|e| tx.failed(e))?;
    let read = |(name, unserved): (String, i64)| Unserved {
        name,
        unserved: duration(unserved),
    };
    Ok(rows.into_iter().map(read).collect())
}

pub(super) async fn extent(engine: &Engine) -> Result<Extent> {
    let names = engine.names();
    let mut reader = engine.reader(COUNT).await?;
    let sql = names.sql(&format!(
        "SELECT o.position, o.created, i.gone_position, i.gone_time, {HIGHEST} FROM {{p}}installation i \
         LEFT JOIN (SELECT position, CAST(created_at AS INTEGER) AS created FROM {{p}}outbox ORDER BY position LIMIT 1) o"
    ));
    type Found = (Option<i64>, Option<i64>, i64, Option<i64>, i64);
    let row: Option<Found> = sqlx::query_as(sql)
        .fetch_optional(&mut *reader)
        .await
        .map_err(|e| names.failed(COUNT, e))?;
    let Some((position, created, gone, gone_time, newest)) = row else {
        return Ok(Extent::default());
    };
    Ok(Extent {
        oldest: position.zip(created.map(row::time)),
        newest,
        gone: gone_time.map(|time| Gone {
            position: gone,
            time: row::time(time),
        }),
    })
}

pub(super) async fn count(engine: &Engine, s: &Selection, remember: Duration) -> Result<Counted> {
    let names = engine.names();
    let mut reader = engine.reader(COUNT).await?;
    let sql = names.sql(&format!(
        "SELECT count(*), min(created), max(created), coalesce(sum(created < {{now}} - ?8), 0) FROM ( \
           SELECT CAST(created_at AS INTEGER) AS created FROM {{p}}outbox \
           WHERE (?1 IS NULL OR CAST(created_at AS INTEGER) >= ?1) AND (?2 IS NULL OR CAST(created_at AS INTEGER) < ?2) \
             AND (?3 IS NULL OR position >= ?3) AND (?4 IS NULL OR position <= ?4) AND (?5 IS NULL OR topic = ?5) \
             AND (?6 IS NULL OR type = ?6) AND (?7 IS NULL OR key = ?7) \
             AND (deliver_at IS NULL OR deliver_at <= {{now}}) LIMIT {COUNTED})"
    ));
    let (events, first, last, older): (i64, Option<i64>, Option<i64>, i64) = sqlx::query_as(sql)
        .bind(s.since.map(row::instant))
        .bind(s.before.map(row::instant))
        .bind(s.from)
        .bind(s.to)
        .bind(s.topic.as_deref())
        .bind(s.kind.as_deref())
        .bind(s.key.as_deref())
        .bind(row::micros(remember))
        .fetch_one(&mut *reader)
        .await
        .map_err(|e| names.failed(COUNT, e))?;
    Ok(Counted {
        events: events.unsigned_abs(),
        between: first.map(row::time).zip(last.map(row::time)),
        older: older.unsigned_abs(),
    })
}

fn duration(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or_default())
}
