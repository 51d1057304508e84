//! Destinations: what is said about them, made and removed with their cursors.

use std::time::{Duration, SystemTime};

use sqlx::{Row, postgres::PgRow};

use super::{
    Inner,
    engine::{Commit, Query, Text, Tx, query},
    row,
};
use crate::{
    admin::{Destination, DestinationCursor, Gone, Removed, Selection, replay::COUNTED},
    destination::{Start, as_replay, gone, last_one},
    error::Result,
    lease::Lease,
    store::{Added, Counted, Extent, NewDestination, Registered, Unserved},
};

/// The longest that a step takes.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

const LIST: &str = "list destinations";
const ADD: &str = "add a destination";
const REMOVE: &str = "remove a destination";
const WATCH: &str = "watch destinations";
const COUNT: &str = "count events of the log";

pub(super) struct Statements {
    lock: Text,
    known: Text,
    list: Text,
    cursors: Text,
    start: Text,
    start_now: Text,
    start_replay: Text,
    note: Text,
    others: Text,
    remove: Text,
    lines: Text,
    inherit: Text,
    letters: Text,
    record: Text,
    removed: Text,
    forget: Text,
    enter: Text,
    watch: Text,
    extent: Text,
    count: Text,
}

/// Of a partition of the log, for its cursor: where events lie that a destination has not settled.
const AHEAD: &str = "o.partition = c.partition AND o.position > greatest(c.base, c.last)";

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let text = |template: &str| -> Text {
            template
                .replace("{schema}", &format!("\"{schema}\""))
                .into()
        };
        let partitions = "{schema}.installation i, generate_series(0, i.partitions - 1) p ON CONFLICT DO NOTHING";
        // A cut, and beside it the highest position that is visible in it: in one statement, the transaction's first. What
        // is running now and commits later is listed in it, whatever its positions.
        let cut = |cursor: &str, values: &str| {
            text(&format!(
                "WITH cut AS MATERIALIZED (SELECT {{schema}}.restate(s.now, pg_current_xact_id()) AS at \
                   FROM (SELECT pg_current_snapshot() AS now OFFSET 0) s) \
                 INSERT INTO {{schema}}.cursor (destination, partition, {cursor}) \
                 SELECT $1, p, {values} FROM cut, {partitions}"
            ))
        };
        let highest = "coalesce((SELECT o.position FROM {schema}.outbox o WHERE o.partition = p \
                       ORDER BY o.position DESC LIMIT 1), 0)";
        Self {
            lock: text(
                "SELECT pg_advisory_xact_lock(hashtextextended('pillarbox destinations {schema}', 0))",
            ),
            known: text(
                "SELECT d.start, d.since, d.removed_at, d.removed_why, d.unpublished, d.deferred, d.dead_letters, \
                   EXISTS (SELECT FROM {schema}.cursor c WHERE c.destination = $1) AS there \
                 FROM (SELECT $1::text AS name) n LEFT JOIN {schema}.destination d ON d.name = n.name",
            ),
            list: text(
                "SELECT n.name, coalesce(d.start, 'earliest') AS start, d.since, d.replay, \
                   coalesce(d.created_at, clock_timestamp()) AS created_at, coalesce(d.unserved, 0) AS unserved \
                 FROM (SELECT DISTINCT c.destination AS name FROM {schema}.cursor c) n \
                 LEFT JOIN {schema}.destination d ON d.name = n.name ORDER BY n.name",
            ),
            cursors: text(&format!(
                "SELECT c.destination, c.partition, greatest(c.base, c.last) AS position, c.epoch, c.upto IS NOT NULL AS open, \
                   c.expires_at > clock_timestamp() AS held, \
                   coalesce(extract(epoch FROM clock_timestamp() - oldest.created_at) * 1000, 0)::bigint AS age, \
                   coalesce(newest.position - oldest.position + 1, 0)::bigint AS behind \
                 FROM {{schema}}.cursor c \
                 LEFT JOIN LATERAL (SELECT o.position, o.created_at FROM {{schema}}.outbox o WHERE {AHEAD} \
                   ORDER BY o.position LIMIT 1) oldest ON true \
                 LEFT JOIN LATERAL (SELECT o.position FROM {{schema}}.outbox o WHERE o.partition = c.partition \
                   ORDER BY o.position DESC LIMIT 1) newest ON true \
                 ORDER BY c.destination, c.partition"
            )),
            start: text(&format!(
                "INSERT INTO {{schema}}.cursor (destination, partition) SELECT $1, p FROM {partitions}"
            )),
            start_now: cut("seen, base", &format!("cut.at, {highest}")),
            start_replay: cut("upto", "cut.at"),
            note: text(
                "INSERT INTO {schema}.destination AS d (name, start, since, replay) \
                 VALUES ($1, $2, timestamptz 'epoch' + $3 * interval '1 microsecond', $4) \
                 ON CONFLICT (name) DO UPDATE SET start = $2, since = excluded.since, replay = $4, \
                   created_at = clock_timestamp(), looked_at = NULL, unserved = 0, removed_at = NULL, removed_why = NULL, \
                   unpublished = 0, deferred = 0, dead_letters = 0",
            ),
            others: text(
                "SELECT count(DISTINCT c.destination) AS others FROM {schema}.cursor c \
                 WHERE c.destination <> $1 AND c.destination NOT LIKE 'replay:%'",
            ),
            // A replay has not lost what lies behind its end.
            remove: text(&format!(
                "WITH gone AS (DELETE FROM {{schema}}.cursor c WHERE c.destination = $1 RETURNING c.*) \
                 SELECT count(*) AS cursors, coalesce(sum(ahead.n + late.n), 0)::bigint AS unpublished FROM gone c, \
                 LATERAL (SELECT count(*) AS n FROM (SELECT FROM {{schema}}.outbox o WHERE {AHEAD} \
                   AND (NOT $2 OR coalesce(pg_visible_in_snapshot(o.xact_id, c.upto), false)) LIMIT {COUNTED}) o) ahead, \
                 LATERAL (SELECT count(*) AS n FROM (SELECT FROM pg_snapshot_xip(c.seen) x, {{schema}}.outbox o \
                   WHERE o.xact_id = x AND (o.partition + 0) = c.partition AND o.position > c.last AND o.position <= c.base \
                   AND (NOT $2 OR coalesce(pg_visible_in_snapshot(x, c.upto), false)) LIMIT {COUNTED}) o) late"
            )),
            lines: text("DELETE FROM {schema}.deferred d WHERE d.side = 'relay' AND d.scope = $1"),
            inherit: text(
                "UPDATE {schema}.dead_letter d SET scope = $2 WHERE d.side = 'relay' AND d.scope = $1 \
                 AND NOT EXISTS (SELECT FROM {schema}.dead_letter h \
                   WHERE h.side = 'relay' AND h.scope = $2 AND h.source = d.source AND h.id = d.id)",
            ),
            letters: text(
                "DELETE FROM {schema}.dead_letter d WHERE d.side = 'relay' AND d.scope = $1",
            ),
            record: text(
                "INSERT INTO {schema}.destination AS d (name, removed_at, removed_why, unpublished, deferred, dead_letters) \
                 VALUES ($1, clock_timestamp(), $2, $3, $4, $5) \
                 ON CONFLICT (name) DO UPDATE SET removed_at = excluded.removed_at, removed_why = $2, unpublished = $3, \
                   deferred = $4, dead_letters = $5 RETURNING d.removed_at",
            ),
            removed: text(
                "SELECT d.name, d.removed_at, d.removed_why, d.unpublished, d.deferred, d.dead_letters \
                 FROM {schema}.destination d WHERE d.removed_at IS NOT NULL ORDER BY d.removed_at DESC",
            ),
            // Names of replays come new each time.
            forget: text(
                "DELETE FROM {schema}.destination d WHERE d.name LIKE 'replay:%' \
                 AND d.removed_at < clock_timestamp() - interval '30 days'",
            ),
            enter: text(
                "INSERT INTO {schema}.destination (name) SELECT DISTINCT c.destination FROM {schema}.cursor c \
                 WHERE NOT EXISTS (SELECT FROM {schema}.destination d WHERE d.name = c.destination) ON CONFLICT DO NOTHING",
            ),
            // A gap between looks counts a minute and a half at most: while no relay ran, nobody could have been served.
            watch: text(
                "UPDATE {schema}.destination d SET looked_at = clock_timestamp(), unserved = CASE \
                   WHEN EXISTS (SELECT FROM {schema}.cursor c \
                     WHERE c.destination = d.name AND c.expires_at > clock_timestamp()) THEN 0 \
                   ELSE d.unserved + greatest(0, least(90000, \
                     coalesce(extract(epoch FROM clock_timestamp() - d.looked_at) * 1000, 0)))::bigint END \
                 WHERE d.removed_at IS NULL AND EXISTS (SELECT FROM {schema}.cursor c WHERE c.destination = d.name) \
                 RETURNING d.name, d.unserved",
            ),
            extent: text(
                "SELECT oldest.position, oldest.created_at, i.gone_position, i.gone_time, greatest( \
                   (SELECT max(n.position) FROM generate_series(0, 63) p, LATERAL (SELECT o.position FROM {schema}.outbox o \
                     WHERE o.partition = p ORDER BY o.position DESC LIMIT 1) n), i.gone_position) AS newest \
                 FROM {schema}.installation i LEFT JOIN LATERAL (SELECT o.position, o.created_at \
                   FROM generate_series(0, 63) p, LATERAL (SELECT o.position, o.created_at FROM {schema}.outbox o \
                     WHERE o.partition = p ORDER BY o.position LIMIT 1) o ORDER BY o.position LIMIT 1) oldest ON true",
            ),
            count: text(&format!(
                "SELECT count(*) AS events, min(o.created_at) AS first, max(o.created_at) AS last, \
                   count(*) FILTER (WHERE o.created_at < clock_timestamp() - $8 * interval '1 millisecond') AS older \
                 FROM (SELECT o.created_at FROM {{schema}}.outbox o \
                   WHERE ($1::bigint IS NULL OR o.created_at >= timestamptz 'epoch' + $1 * interval '1 microsecond') \
                     AND ($2::bigint IS NULL OR o.created_at < timestamptz 'epoch' + $2 * interval '1 microsecond') \
                     AND ($3::bigint IS NULL OR o.position >= $3) AND ($4::bigint IS NULL OR o.position <= $4) \
                     AND ($5::text IS NULL OR o.topic = $5) AND ($6::text IS NULL OR o.type = $6) \
                     AND ($7::text IS NULL OR o.key = $7) \
                     AND (o.deliver_at IS NULL OR o.deliver_at <= clock_timestamp()) LIMIT {COUNTED}) o"
            )),
        }
    }
}

impl Inner {
    pub(super) async fn destinations(&self) -> Result<Vec<Registered>> {
        let read = |e| self.engine.failed(LIST, e);
        let mut all = Vec::new();
        let names = self.engine.fetch(LIST, || query(&self.destination.list));
        for row in names.await? {
            all.push(registered(&row).map_err(read)?);
        }
        let cursors = self.engine.fetch(LIST, || query(&self.destination.cursors));
        for row in cursors.await? {
            let name: String = row.try_get("destination").map_err(read)?;
            let found = all.iter_mut().find(|k| k.destination.name == name);
            if let Some(Registered { destination, .. }) = found {
                enter(destination, &row).map_err(read)?;
            }
        }
        Ok(all)
    }

    pub(super) async fn add_destination(&self, new: &NewDestination) -> Result<Added> {
        let mut tx = self.engine.begin(ADD, DEADLINE, Commit::Durable).await?;
        let outcome = self.add(&mut tx, new).await;
        tx.end(outcome).await
    }

    async fn add(&self, tx: &mut Tx<'_>, new: &NewDestination) -> Result<Added> {
        tx.run(query(&self.destination.lock)).await?;
        let q = query(&self.destination.known).bind(new.name.clone());
        let read = |e| self.engine.failed(ADD, e);
        let mut added = Added::New;
        if let Some(row) = tx.fetch_one(q).await? {
            let start: Option<String> = row.try_get("start").map_err(read)?;
            let since = row::deliver_at(&row, "since").map_err(read)?;
            if row.try_get("there").map_err(read)? {
                let start = start.unwrap_or_default();
                return Ok(Added::There(Start::read(&start, since)));
            }
            if row::deliver_at(&row, "removed_at").map_err(read)?.is_some() {
                added = Added::Removed(removed(&row, new.name.clone()).map_err(read)?);
                if !new.again {
                    return Ok(added);
                }
            }
        }
        // First of all that writes: the cut lists no transaction id of its own.
        let start = match (new.start, &new.replay) {
            (_, Some(_)) => &self.destination.start_replay,
            (Start::Now, None) => &self.destination.start_now,
            (Start::Earliest | Start::At(_), None) => &self.destination.start,
        };
        tx.run(query(start).bind(new.name.clone())).await?;
        let note = query(&self.destination.note)
            .bind(new.name.clone())
            .bind(new.start.word())
            .bind(new.start.time().map(row::micros))
            .bind(new.replay.clone());
        tx.run(note).await?;
        tx.run(query(&self.destination.forget)).await?;
        Ok(added)
    }

    pub(super) async fn remove_destination(
        &self,
        name: &str,
        why: &str,
        heir: Option<&str>,
    ) -> Result<Option<Removed>> {
        let mut tx = self.engine.begin(REMOVE, DEADLINE, Commit::Durable).await?;
        let outcome = self.remove(&mut tx, name, why, heir).await;
        tx.end(outcome).await
    }

    async fn remove(
        &self,
        tx: &mut Tx<'_>,
        name: &str,
        why: &str,
        heir: Option<&str>,
    ) -> Result<Option<Removed>> {
        let read = |e| self.engine.failed(REMOVE, e);
        let of = |text: &Text| query(text).bind(name.to_owned());
        tx.run(query(&self.destination.lock)).await?;
        let is_replay = as_replay(name).is_some();
        let others = tx.fetch_one(of(&self.destination.others)).await?;
        let others: i64 = others.map_or(Ok(0), |row| row.try_get("others").map_err(read))?;
        // Locks the cursors: from here on no relay settles, defers or gives up anything for it.
        let gone = of(&self.destination.remove).bind(is_replay);
        let Some(row) = tx.fetch_one(gone).await? else {
            return Ok(None);
        };
        if row.try_get::<i64, _>("cursors").map_err(read)? == 0 {
            return Ok(None);
        }
        if others == 0 && !is_replay {
            return Err(last_one(REMOVE, name));
        }
        let unpublished: i64 = row.try_get("unpublished").map_err(read)?;
        let deferred = tx.run(of(&self.destination.lines)).await?;
        if let Some(heir) = heir {
            tx.run(of(&self.destination.inherit).bind(heir.to_owned()))
                .await?;
        }
        let dead_letters = tx.run(of(&self.destination.letters)).await?;
        let record = of(&self.destination.record)
            .bind(row::storable(why).into_owned())
            .bind(unpublished)
            .bind(i64::try_from(deferred).unwrap_or(i64::MAX))
            .bind(i64::try_from(dead_letters).unwrap_or(i64::MAX));
        let at = match tx.fetch_one(record).await? {
            Some(row) => row::time(&row, "removed_at").map_err(read)?,
            None => SystemTime::now(),
        };
        Ok(Some(Removed {
            name: name.to_owned(),
            at,
            why: why.to_owned(),
            unpublished: unpublished.unsigned_abs(),
            deferred,
            dead_letters,
        }))
    }

    /// Refuses a destination that was removed, whose relay goes on.
    pub(super) async fn check_removed(&self, tx: &mut Tx<'_>, name: &str) -> Result<()> {
        let read = |e| self.engine.failed(LIST, e);
        let q = query(&self.destination.known).bind(name.to_owned());
        let Some(row) = tx.fetch_one(q).await? else {
            return Ok(());
        };
        let is_there: bool = row.try_get("there").map_err(read)?;
        if is_there || row::deliver_at(&row, "removed_at").map_err(read)?.is_none() {
            return Ok(());
        }
        let removed = removed(&row, name.to_owned()).map_err(read)?;
        Err(gone("acquire lease", &removed))
    }

    pub(super) async fn removed_destinations(&self) -> Result<Vec<Removed>> {
        let rows = self
            .engine
            .fetch(LIST, || query(&self.destination.removed))
            .await?;
        let read = |row: &PgRow| removed(row, row.try_get("name")?);
        let all: sqlx::Result<Vec<_>> = rows.iter().map(read).collect();
        all.map_err(|e| self.engine.failed(LIST, e))
    }

    pub(super) async fn watch_destinations(&self, lease: &Lease) -> Result<Vec<Unserved>> {
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(WATCH, bound, Commit::Soon).await?;
        let outcome = async {
            self.fence(&mut tx, WATCH, lease).await?;
            tx.run(query(&self.destination.enter)).await?;
            tx.fetch(query(&self.destination.watch)).await
        };
        let outcome = outcome.await;
        let rows = tx.end(outcome).await?;
        let read = |row: &PgRow| {
            let unserved: i64 = row.try_get("unserved")?;
            Ok(Unserved {
                name: row.try_get("name")?,
                unserved: Duration::from_millis(unserved.unsigned_abs()),
            })
        };
        let all: sqlx::Result<Vec<_>> = rows.iter().map(read).collect();
        all.map_err(|e| self.engine.failed(WATCH, e))
    }

    pub(super) async fn log_extent(&self) -> Result<Extent> {
        let read = |e| self.engine.failed(COUNT, e);
        let rows = self
            .engine
            .fetch(COUNT, || query(&self.destination.extent))
            .await?;
        let Some(row) = rows.first() else {
            return Ok(Extent::default());
        };
        let position: Option<i64> = row.try_get("position").map_err(read)?;
        let time = row::deliver_at(row, "created_at").map_err(read)?;
        let gone_time = row::deliver_at(row, "gone_time").map_err(read)?;
        let gone: i64 = row.try_get("gone_position").map_err(read)?;
        let newest: Option<i64> = row.try_get("newest").map_err(read)?;
        Ok(Extent {
            oldest: position.zip(time),
            newest: newest.unwrap_or(0),
            gone: gone_time.map(|time| Gone {
                position: gone,
                time,
            }),
        })
    }

    pub(super) async fn count_events(
        &self,
        selection: &Selection,
        remember: Duration,
    ) -> Result<Counted> {
        let s = selection;
        let q = || -> Query<'_> {
            query(&self.destination.count)
                .bind(s.since.map(row::micros))
                .bind(s.before.map(row::micros))
                .bind(s.from)
                .bind(s.to)
                .bind(s.topic.clone())
                .bind(s.kind.clone())
                .bind(s.key.clone())
                .bind(crate::store::millis(remember))
        };
        let read = |e| self.engine.failed(COUNT, e);
        let rows = self.engine.fetch(COUNT, q).await?;
        let Some(row) = rows.first() else {
            return Ok(Counted::default());
        };
        let events: i64 = row.try_get("events").map_err(read)?;
        let older: i64 = row.try_get("older").map_err(read)?;
        let first = row::deliver_at(row, "first").map_err(read)?;
        let last = row::deliver_at(row, "last").map_err(read)?;
        Ok(Counted {
            events: events.unsigned_abs(),
            between: first.zip(last),
            older: older.unsigned_abs(),
        })
    }
}

fn registered(row: &PgRow) -> sqlx::Result<Registered> {
    let start: String = row.try_get("start")?;
    let unserved: i64 = row.try_get("unserved")?;
    let start = Start::read(&start, row::deliver_at(row, "since")?);
    let unserved = Duration::from_millis(unserved.unsigned_abs());
    Ok(Registered {
        destination: Destination::new(
            row.try_get("name")?,
            start,
            row::time(row, "created_at")?,
            unserved,
        ),
        replay: row.try_get("replay")?,
    })
}

fn enter(destination: &mut Destination, row: &PgRow) -> sqlx::Result<()> {
    let partition: i16 = row.try_get("partition")?;
    let (age, behind): (i64, i64) = (row.try_get("age")?, row.try_get("behind")?);
    let age = Duration::from_millis(u64::try_from(age).unwrap_or_default());
    destination.lag = destination.lag.max(age);
    destination.behind += u64::try_from(behind).unwrap_or_default();
    destination.cursors.push(DestinationCursor {
        partition: partition.unsigned_abs(),
        position: row.try_get("position")?,
        epoch: row.try_get("epoch")?,
        held: row.try_get("held")?,
        open: row.try_get("open")?,
    });
    Ok(())
}

fn removed(row: &PgRow, name: String) -> sqlx::Result<Removed> {
    let count = |column: &str| row.try_get::<i64, _>(column).map(i64::unsigned_abs);
    let why: Option<String> = row.try_get("removed_why")?;
    Ok(Removed {
        name,
        at: row::time(row, "removed_at")?,
        why: why.unwrap_or_default(),
        unpublished: count("unpublished")?,
        deferred: count("deferred")?,
        dead_letters: count("dead_letters")?,
    })
}
