//! The operators' side: dead letters listed, put back into their lines, discarded.

use std::time::Duration;

use sqlx::{Row, postgres::PgRow};

use super::{
    Inner,
    engine::{Commit, Query, Text, query},
    row,
    unit::barrier,
};
use crate::{
    admin::{DryRun, Filter, Letter, LetterId, Shown},
    error::{Kind, Result},
    failure::{LineId, RETRIED, Side, UNREADABLE},
    store::{Letters, Order},
};

/// Letters counted at most, and events of the log looked at behind one.
const COUNTED: u32 = 100_000;
const BEHIND: u32 = 10_000;
/// How long to wait for a group's open transactions at a time: new ones stand behind this one meanwhile. And how often.
const WAIT: &str = "SET LOCAL lock_timeout = '500ms'";
const TRIES: u32 = 12;

/// What a list shows.
const COLUMNS: &str = "side, scope, source, id, seq, topic, type, key, time, position, attempts, reason, first_failure, \
     last_failure, maybe_sent, CASE WHEN attributes ->> '{RETRIED}' ~ '^[0-9]{1,8}$' THEN (attributes ->> '{RETRIED}')::int ELSE 0 END AS retried, \
     attributes ? '{UNREADABLE}' AS unreadable";

/// $1 to $9: what a filter names.
const NAMED: &str = "($1::text IS NULL OR side = $1) AND ($2::text IS NULL OR scope = $2) AND ($3::text IS NULL OR topic = $3) \
     AND ($4::text IS NULL OR key = $4) AND ($5::text IS NULL OR type = $5) AND ($6::text IS NULL OR strpos(reason, $6) > 0) \
     AND ($7::bigint IS NULL OR last_failure >= timestamptz 'epoch' + $7 * interval '1 microsecond') \
     AND ($8::bigint IS NULL OR last_failure < timestamptz 'epoch' + $8 * interval '1 microsecond') \
     AND ($9::text IS NULL OR id = $9)";

/// $1 to $4: one event.
const ONE: &str = "side = $1 AND scope = $2 AND source = $3 AND id = $4";

/// $1 to $4: many of a place.
const THESE: &str = "USING unnest($3::text[], $4::text[]) AS r (source, id) \
     WHERE d.side = $1 AND d.scope = $2 AND d.source = r.source AND d.id = r.id";

/// Events that were given up: they are in `dead_letter`, or still first in their lines.
const DEAD: &str = "{schema}.dead_letter d WHERE true";
const PARKED: &str = "{schema}.deferred d WHERE parked";

struct Lists {
    newest: Text,
    oldest: Text,
    lines: Text,
}

pub(super) struct Statements {
    dead: Lists,
    parked: Lists,
    show: Text,
    show_parked: Text,
    count: Text,
    newer: Text,
    waits: Text,
    barrier: Text,
    retry: Text,
    discard: Text,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let schema = format!("\"{schema}\"");
        let text = |template: String| {
            let template = template
                .replace("{schema}", &schema)
                .replace("{RETRIED}", RETRIED)
                .replace("{UNREADABLE}", UNREADABLE);
            Text::from(template)
        };
        let list = |from: &str, order: Order| {
            text(format!(
                "SELECT {COLUMNS} FROM {from} AND {NAMED} AND seq > $10 AND seq < $11 \
                 AND (position, seq) > ($12, $13) ORDER BY {} LIMIT $14",
                order.by()
            ))
        };
        let lists = |from: &str| Lists {
            newest: list(from, Order::Newest(None)),
            oldest: list(from, Order::Oldest(None)),
            lines: list(
                from,
                Order::Lines {
                    after: None,
                    through: 0,
                },
            ),
        };
        let show = |from: &str| {
            text(format!(
                "SELECT {COLUMNS}, attributes, headers, payload FROM {from} AND {ONE}"
            ))
        };
        Self {
            dead: lists(DEAD),
            parked: lists(PARKED),
            show: show(DEAD),
            show_parked: show(PARKED),
            count: text(format!(
                "SELECT count(*) AS letters, count(DISTINCT (topic, key)) FILTER (WHERE key IS NOT NULL) AS keys, \
                   count(*) FILTER (WHERE key IS NULL) AS keyless, count(*) FILTER (WHERE maybe_sent) AS maybe_sent \
                 FROM (SELECT topic, key, maybe_sent FROM {{schema}}.dead_letter WHERE {NAMED} LIMIT {COUNTED}) d"
            )),
            newer: text(newer()),
            waits: text(format!("SELECT 1 FROM {{schema}}.deferred WHERE {ONE}")),
            barrier: "SELECT pg_advisory_xact_lock($1)".into(),
            retry: text(retry()),
            discard: text(format!(
                "WITH dead AS (DELETE FROM {{schema}}.dead_letter d {THESE} RETURNING d.side, d.scope, d.source, d.id, d.time), \
                 parked AS (DELETE FROM {{schema}}.deferred d {THESE} AND d.parked RETURNING d.side, d.scope, d.source, d.id, d.time), \
                 gone AS (SELECT *, floor(nullif(extract(epoch FROM time), 0) / 21600)::bigint AS slot \
                   FROM (SELECT * FROM dead UNION ALL SELECT * FROM parked) both_parts) \
                 SELECT count(*) AS n FROM gone WHERE side <> 'consumer' OR {{schema}}.remember(scope, \
                   (((slot % 8) + 8) % 8)::smallint, slot, source, id, true) IS NOT NULL"
            )),
        }
    }
}

/// A count of those behind a letter in its partition of the log that are settled, and neither wait nor were given up.
fn newer() -> String {
    let elsewhere = |table: &str| {
        format!(
            "NOT EXISTS (SELECT FROM {{schema}}.{table} x WHERE x.side = $1 AND x.scope = $2 AND x.topic = o.topic \
             AND x.key = o.key AND x.id = o.id::text)"
        )
    };
    format!(
        "SELECT count(*) AS n FROM {{schema}}.dead_letter d \
         JOIN {{schema}}.cursor c ON c.destination = d.scope AND c.partition = d.shard, \
         LATERAL (SELECT o.id, o.topic, o.key, o.position, o.xact_id FROM {{schema}}.outbox o \
           WHERE o.partition = d.shard AND o.position > d.position ORDER BY o.position LIMIT {BEHIND}) o \
         WHERE d.side = $1 AND d.scope = $2 AND d.source = $3 AND d.id = $4 AND o.topic = d.topic AND o.key = d.key \
           AND (pg_visible_in_snapshot(o.xact_id, c.seen) \
             OR (c.upto IS NOT NULL AND pg_visible_in_snapshot(o.xact_id, c.upto) AND o.position <= c.last)) \
           AND {} AND {}",
        elsewhere("deferred"),
        elsewhere("dead_letter")
    )
}

/// A parked event stays where it is, and is due: the same as if its row were moved, because nobody works on a parked one.
/// The consumer's lines run by arrival behind position 0: what comes back stands before what waits there.
fn retry() -> String {
    let freed = THESE.replace("USING", "FROM");
    const KEPT: &str = "side, scope, shard, time, source, id, topic, type, key, headers, payload, reason, first_failure, last_failure, maybe_sent";
    format!(
        "WITH gone AS (DELETE FROM {{schema}}.dead_letter d {THESE} AND NOT d.attributes ? '{{UNREADABLE}}' RETURNING d.*), \
         back AS (INSERT INTO {{schema}}.deferred ({KEPT}, attributes, position, attempts, due) \
           SELECT {KEPT}, attributes || jsonb_build_object('{{RETRIED}}', (CASE WHEN attributes ->> '{{RETRIED}}' ~ '^[0-9]{{1,8}}$' \
               THEN (attributes ->> '{{RETRIED}}')::int + 1 ELSE 1 END)::text), \
             CASE side WHEN 'consumer' THEN -1 ELSE position END, 0, clock_timestamp() \
           FROM gone ORDER BY position, seq ON CONFLICT DO NOTHING), \
         freed AS (UPDATE {{schema}}.deferred d SET parked = false, attempts = 0, due = clock_timestamp() \
           {freed} AND d.parked RETURNING d.id) \
         SELECT (SELECT count(*) FROM gone) + (SELECT count(*) FROM freed) AS n"
    )
}

fn bind<'q>(q: Query<'q>, filter: &Filter) -> Query<'q> {
    let text = |text: &Option<String>| text.as_deref().map(|t| row::storable(t).into_owned());
    q.bind(filter.side.map(Side::as_str))
        .bind(text(&filter.scope))
        .bind(text(&filter.topic))
        .bind(text(&filter.key))
        .bind(text(&filter.kind))
        .bind(text(&filter.reason))
        .bind(filter.since.map(row::micros))
        .bind(filter.before.map(row::micros))
        .bind(filter.id.as_deref().map(row::named))
}

fn one<'q>(q: Query<'q>, id: &LetterId) -> Query<'q> {
    q.bind(id.side.as_str())
        .bind(row::storable(&id.scope).into_owned())
        .bind(row::named(&id.source))
        .bind(row::named(&id.id))
}

fn these<'q>(q: Query<'q>, side: Side, scope: &str, ids: &[LineId]) -> Query<'q> {
    let (sources, ids): (Vec<_>, Vec<_>) = ids
        .iter()
        .map(|(source, id)| (row::named(source), row::named(id)))
        .unzip();
    q.bind(side.as_str())
        .bind(row::storable(scope).into_owned())
        .bind(sources)
        .bind(ids)
}

impl Inner {
    pub(super) async fn letters(&self, letters: &Letters) -> Result<Vec<Letter>> {
        const OPERATION: &str = "list dead letters";
        let lists = if letters.parked {
            &self.letters.parked
        } else {
            &self.letters.dead
        };
        let statement = match letters.order {
            Order::Newest(_) => &lists.newest,
            Order::Oldest(_) => &lists.oldest,
            Order::Lines { .. } => &lists.lines,
        };
        let (above, below, (position, number)) = letters.order.bounds();
        let q = || {
            bind(query(statement), &letters.filter)
                .bind(above)
                .bind(below)
                .bind(position)
                .bind(number)
                .bind(i64::from(letters.limit))
        };
        let rows = self.engine.fetch(OPERATION, q).await?;
        let letters: sqlx::Result<_> = rows.iter().map(letter).collect();
        letters.map_err(|e| self.engine.failed(OPERATION, e))
    }

    pub(super) async fn letter(&self, id: &LetterId) -> Result<Option<Shown>> {
        const OPERATION: &str = "show a dead letter";
        let q = || one(query(&self.letters.show), id);
        let mut rows = self.engine.fetch(OPERATION, q).await?;
        if rows.is_empty() {
            let q = || one(query(&self.letters.show_parked), id);
            rows = self.engine.fetch(OPERATION, q).await?;
        }
        let shown = |row: &PgRow| -> sqlx::Result<Shown> {
            Ok(Shown {
                letter: letter(row)?,
                message: row::message(row)?,
            })
        };
        let shown = rows.first().map(shown).transpose();
        shown.map_err(|e| self.engine.failed(OPERATION, e))
    }

    pub(super) async fn count_letters(&self, filter: &Filter) -> Result<DryRun> {
        const OPERATION: &str = "count dead letters";
        let rows = self
            .engine
            .fetch(OPERATION, || bind(query(&self.letters.count), filter))
            .await?;
        Ok(DryRun {
            letters: self.number(OPERATION, rows.first(), "letters")?,
            keys: self.number(OPERATION, rows.first(), "keys")?,
            keyless: self.number(OPERATION, rows.first(), "keyless")?,
            maybe_sent: self.number(OPERATION, rows.first(), "maybe_sent")?,
            newer: None,
        })
    }

    pub(super) async fn newer(&self, id: &LetterId) -> Result<u64> {
        const OPERATION: &str = "count newer events";
        let q = || one(query(&self.letters.newer), id);
        let rows = self.engine.fetch(OPERATION, q).await?;
        self.number(OPERATION, rows.first(), "n")
    }

    pub(super) async fn waits(&self, id: &LetterId) -> Result<bool> {
        let q = || one(query(&self.letters.waits), id);
        let rows = self.engine.fetch("look for a waiting event", q).await?;
        Ok(!rows.is_empty())
    }

    /// Puts letters back. A consumer's transactions that are under way are waited for, a while at a time.
    pub(super) async fn retry(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64> {
        let mut tries = 1;
        loop {
            match self.try_retry(side, scope, ids).await {
                Err(e)
                    if e.kind() == Kind::Unavailable && side == Side::Consumer && tries < TRIES =>
                {
                    tries += 1;
                    // Not at once: those who stood behind this one go first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                answer => return answer,
            }
        }
    }

    async fn try_retry(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64> {
        const OPERATION: &str = "retry dead letters";
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(OPERATION, bound, Commit::Durable).await?;
        let outcome = async {
            if side == Side::Consumer {
                tx.script(WAIT.to_owned()).await?;
                let lock = barrier(&self.name, scope);
                tx.fetch_one(query(&self.letters.barrier).bind(lock))
                    .await?;
            }
            let q = these(query(&self.letters.retry), side, scope, ids);
            let row = tx.fetch_one(q).await?;
            self.number(OPERATION, row.as_ref(), "n")
        }
        .await;
        tx.end(outcome).await
    }

    pub(super) async fn discard(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64> {
        const OPERATION: &str = "discard dead letters";
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(OPERATION, bound, Commit::Durable).await?;
        let q = these(query(&self.letters.discard), side, scope, ids);
        let outcome = tx
            .fetch_one(q)
            .await
            .and_then(|row| self.number(OPERATION, row.as_ref(), "n"));
        tx.end(outcome).await
    }

    fn number(&self, operation: &'static str, row: Option<&PgRow>, column: &str) -> Result<u64> {
        let row = row.ok_or(sqlx::Error::RowNotFound);
        row.and_then(|row| row.try_get::<i64, _>(column))
            .map(i64::unsigned_abs)
            .map_err(|e| self.engine.failed(operation, e))
    }
}

fn letter(row: &PgRow) -> sqlx::Result<Letter> {
    let required = |column| row::text(row, column).map(|(text, _)| text.unwrap_or_default());
    let count = |column| row.try_get::<i32, _>(column).map(i32::unsigned_abs);
    let side = required("side")?;
    Ok(Letter {
        id: LetterId {
            side: Side::read(&side)
                .ok_or_else(|| sqlx::Error::Decode(format!("side {side:?}").into()))?,
            scope: required("scope")?,
            source: required("source")?,
            id: required("id")?,
        },
        number: row.try_get("seq")?,
        topic: required("topic")?,
        kind: required("type")?,
        key: row::text(row, "key")?.0,
        time: row::time(row, "time")?,
        position: row.try_get("position")?,
        attempts: count("attempts")?,
        reason: required("reason")?,
        first_failure: row::time(row, "first_failure")?,
        last_failure: row::time(row, "last_failure")?,
        maybe_sent: row.try_get("maybe_sent")?,
        retried: count("retried")?,
        unreadable: row.try_get("unreadable")?,
    })
}
