//! Emptying the log's and the inbox's rings, and trimming dead letters.
//!
//! What may go is proved by the functions of `retention.sql`, in the transaction that removes it. The lease only keeps two
//! cleaners from doing the same work; its row is locked first, because nobody may wait for it behind a table's lock.

use std::time::Duration;

use sqlx::{Row, postgres::PgRow};

use super::{
    Inner,
    engine::{Commit, Query, Text, query},
};
use crate::{
    backpressure::Backlog,
    error::Result,
    failure::Side,
    lease::Lease,
    store::{Cleaned, Trimmed, millis},
};

/// The longest that a step of cleaning takes.
pub(super) const DEADLINE: Duration = Duration::from_secs(300);
/// Rows deleted or copied in one transaction.
const ROWS: i32 = 1_000;

const LOG: &str = "clean the log";
const INBOX: &str = "clean the inbox";
const DEAD: &str = "trim dead letters";

pub(super) struct Statements {
    fit: Text,
    log: Text,
    tick: Text,
    inbox: Text,
    quiet: Text,
    laggards: Text,
    carry: Text,
    timeless: Text,
    scopes: Text,
    backlog: Text,
    aged: Text,
    too_many: Text,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let schema = format!("\"{schema}\"");
        let text = |template: &str| Text::from(template.replace("{schema}", &schema));
        let trim = |which: &str| {
            text(&format!(
                "WITH old AS (SELECT d.source, d.id FROM ( \
                   SELECT d.* FROM {{schema}}.dead_letter d WHERE d.side = $1 AND d.scope = $2 ORDER BY d.seq LIMIT $3 \
                 ) d WHERE {which}), \
                 gone AS (DELETE FROM {{schema}}.dead_letter d USING old \
                   WHERE d.side = $1 AND d.scope = $2 AND d.source = old.source AND d.id = old.id \
                   RETURNING d.side = 'consumer' AND d.copied_at IS NULL AS uncopied) \
                 SELECT count(*) AS removed, count(*) FILTER (WHERE uncopied) AS uncopied FROM gone"
            ))
        };
        Self {
            fit: text("SELECT {schema}.fit_slots($1 * interval '1 millisecond') AS found"),
            log: text("SELECT {schema}.clean_log($1, $2 * interval '1 millisecond') AS found"),
            tick: text("SELECT {schema}.inbox_tick($1 * interval '1 millisecond')"),
            inbox: text(
                "SELECT {schema}.clean_inbox($1, $2 * interval '1 millisecond', \
                 timestamptz 'epoch' + $3 * interval '1 microsecond') AS found",
            ),
            quiet: text(
                "SELECT (extract(epoch FROM {schema}.quiet_inbox($1)) * 1000000)::bigint AS newest",
            ),
            laggards: text(
                "SELECT s.grp, s.source, coalesce((extract(epoch FROM upto.at) * 1000000)::bigint, 0) AS upto \
                 FROM {schema}.inbox_sources('{schema}.inbox_' || $1) s, \
                 LATERAL (SELECT {schema}.forgettable(s.grp, s.source, $2 * interval '1 millisecond') AS at) upto \
                 WHERE upto.at IS NULL OR s.newest > upto.at",
            ),
            carry: text(&format!(
                "WITH part AS MATERIALIZED (SELECT i.arrived, i.dead, i.id FROM {{schema}}.inbox i \
                   WHERE i.ring = $1 AND i.grp = $2 AND i.source = $3 \
                     AND i.arrived > timestamptz 'epoch' + $4 * interval '1 microsecond' \
                   ORDER BY i.arrived FETCH FIRST {ROWS} ROWS WITH TIES), \
                 kept AS (INSERT INTO {{schema}}.inbox_timeless (arrived, dead, grp, source, id) \
                   SELECT arrived, dead, $2, $3, id FROM part ON CONFLICT DO NOTHING) \
                 SELECT (extract(epoch FROM max(arrived)) * 1000000)::bigint AS upto FROM part"
            )),
            timeless: text(
                "SELECT {schema}.forget_timeless($1 * interval '1 millisecond', $2) AS removed",
            ),
            scopes: text(
                "WITH RECURSIVE s AS ( \
                   SELECT (SELECT min(d.scope) FROM {schema}.dead_letter d WHERE d.side = $1) AS scope UNION ALL \
                   SELECT (SELECT min(d.scope) FROM {schema}.dead_letter d WHERE d.side = $1 AND d.scope > s.scope) \
                   FROM s WHERE s.scope IS NOT NULL) SELECT scope FROM s WHERE scope IS NOT NULL",
            ),
            // Above the cursors: what commits late, below them, is soon read. A replay is behind by nature.
            backlog: text(
                "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - oldest.created_at)) * 1000, 0)::bigint AS age, \
                   coalesce(max(newest.position) - min(oldest.position) + 1, 0)::bigint AS events \
                 FROM {schema}.cursor c, LATERAL (SELECT o.position, o.created_at FROM {schema}.outbox o \
                   WHERE o.partition = c.partition AND o.position > greatest(c.base, c.last) \
                   ORDER BY o.position LIMIT 1) oldest, \
                 LATERAL (SELECT o.position FROM {schema}.outbox o WHERE o.partition = c.partition \
                   ORDER BY o.position DESC LIMIT 1) newest WHERE c.destination NOT LIKE 'replay:%'",
            ),
            // Those of which the broker is to get a copy stay until it has it, unless they are too many.
            aged: trim(
                "d.created_at < clock_timestamp() - $4 * interval '1 millisecond' \
                 AND (d.side = 'relay' OR d.copied_at IS NOT NULL)",
            ),
            too_many: trim(
                "d.seq <= (SELECT n.seq FROM {schema}.dead_letter n WHERE n.side = $1 AND n.scope = $2 \
                 ORDER BY n.seq DESC OFFSET $4 LIMIT 1)",
            ),
        }
    }
}

impl Inner {
    /// One look at each slot of the log.
    pub(super) async fn clean_log(&self, lease: &Lease, keep: Duration) -> Result<Cleaned> {
        let mut cleaned = Cleaned::default();
        let fit = query(&self.retention.fit).bind(millis(keep));
        match self.found(LOG, lease, fit).await?.as_deref() {
            Some("denied") => {
                let why =
                    "slots of the time that `log` asks for need the rights of the table's owner";
                cleaned.held.push(("outbox".to_owned(), why));
            }
            Some("locked") => cleaned.held.push(("outbox".to_owned(), LOCKED)),
            _ => {}
        }
        for slot in 0..4 {
            let q = query(&self.retention.log).bind(slot).bind(millis(keep));
            let found = self.found(LOG, lease, q).await?;
            note(&mut cleaned, format!("outbox_{slot}"), found.as_deref());
        }
        Ok(cleaned)
    }

    /// One look at each part of the inbox's ring, and some of what is beside it.
    pub(super) async fn clean_inbox(&self, lease: &Lease, remember: Duration) -> Result<Cleaned> {
        let mut cleaned = Cleaned::default();
        let tick = query(&self.retention.tick).bind(millis(remember));
        self.cleaning(INBOX, lease, tick).await?;
        for ring in 0..8 {
            let mut found = self.empty(lease, ring, remember, None).await?;
            if found.as_deref() == Some("crowded") {
                found = self.carry(lease, ring, remember).await?;
            }
            note(&mut cleaned, format!("inbox_{ring}"), found.as_deref());
        }
        let timeless = query(&self.retention.timeless)
            .bind(millis(remember))
            .bind(ROWS);
        let removed = match self.cleaning(INBOX, lease, timeless).await? {
            Some(row) => self.column::<i64>(INBOX, &row, "removed")?,
            None => 0,
        };
        cleaned.removed += removed.unsigned_abs();
        cleaned.more = removed >= i64::from(ROWS);
        Ok(cleaned)
    }

    async fn empty(
        &self,
        lease: &Lease,
        ring: i32,
        remember: Duration,
        kept: Option<i64>,
    ) -> Result<Option<String>> {
        let q = query(&self.retention.inbox)
            .bind(ring)
            .bind(millis(remember))
            .bind(kept);
        self.found(INBOX, lease, q).await
    }

    /// Sources that have been silent for longer than the ring turns must not keep it from being emptied, nor be forgotten:
    /// their events move out of it. Those of the running ones then go with the TRUNCATE.
    async fn carry(&self, lease: &Lease, ring: i32, remember: Duration) -> Result<Option<String>> {
        // Whoever was open could show an old arrival after its source was copied.
        let quiet = query(&self.retention.quiet).bind(ring);
        let newest = match self.cleaning(INBOX, lease, quiet).await? {
            Some(row) => self.column::<Option<i64>>(INBOX, &row, "newest")?,
            None => None,
        };
        let Some(newest) = newest else {
            return Ok(Some("locked".to_owned()));
        };
        let laggards = || {
            query(&self.retention.laggards)
                .bind(ring)
                .bind(millis(remember))
        };
        for row in self.engine.fetch(INBOX, laggards).await? {
            let group: String = self.column(INBOX, &row, "grp")?;
            let source: String = self.column(INBOX, &row, "source")?;
            let mut after: Option<i64> = Some(self.column(INBOX, &row, "upto")?);
            while let Some(upto) = after {
                let q = query(&self.retention.carry)
                    .bind(ring)
                    .bind(group.clone())
                    .bind(source.clone())
                    .bind(upto);
                after = match self.cleaning(INBOX, lease, q).await? {
                    Some(row) => self.column(INBOX, &row, "upto")?,
                    None => None,
                };
            }
        }
        self.empty(lease, ring, remember, Some(newest)).await
    }

    /// How far the destination is behind that is farthest.
    pub(super) async fn backlog(&self) -> Result<Backlog> {
        const OPERATION: &str = "look at the backlog";
        let rows = self
            .engine
            .fetch(OPERATION, || query(&self.retention.backlog))
            .await?;
        let Some(row) = rows.first() else {
            return Ok(Backlog::default());
        };
        let age: i64 = self.column(OPERATION, row, "age")?;
        let events: i64 = self.column(OPERATION, row, "events")?;
        Ok(Backlog {
            age: Duration::from_millis(u64::try_from(age).unwrap_or_default()),
            events: u64::try_from(events).unwrap_or_default(),
        })
    }

    /// At most so many dead letters of each scope.
    pub(super) async fn trim_dead_letters(
        &self,
        lease: &Lease,
        side: Side,
        keep: Duration,
        most: u64,
    ) -> Result<Vec<Trimmed>> {
        let scopes = || query(&self.retention.scopes).bind(side.as_str());
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let mut all = Vec::new();
        for row in self.engine.fetch(DEAD, scopes).await? {
            let scope: String = self.column(DEAD, &row, "scope")?;
            let trims = [
                (false, &self.retention.aged, millis(keep)),
                (true, &self.retention.too_many, most),
            ];
            for (too_many, text, bound) in trims {
                let q = query(text)
                    .bind(side.as_str())
                    .bind(scope.clone())
                    .bind(ROWS)
                    .bind(bound);
                let Some(row) = self.cleaning(DEAD, lease, q).await? else {
                    continue;
                };
                let removed: i64 = self.column(DEAD, &row, "removed")?;
                let uncopied: i64 = self.column(DEAD, &row, "uncopied")?;
                if removed > 0 {
                    all.push(Trimmed {
                        scope: scope.clone(),
                        too_many,
                        removed: removed.unsigned_abs(),
                        uncopied: uncopied.unsigned_abs(),
                    });
                }
            }
        }
        Ok(all)
    }

    /// What a cleaning function answers.
    async fn found(
        &self,
        operation: &'static str,
        lease: &Lease,
        q: Query<'_>,
    ) -> Result<Option<String>> {
        match self.cleaning(operation, lease, q).await? {
            Some(row) => self.column(operation, &row, "found"),
            None => Ok(None),
        }
    }

    /// One statement in a transaction of its own, under the lease.
    async fn cleaning(
        &self,
        operation: &'static str,
        lease: &Lease,
        q: Query<'_>,
    ) -> Result<Option<PgRow>> {
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(operation, bound, Commit::Soon).await?;
        let outcome = match self.fence(&mut tx, operation, lease).await {
            Ok(()) => tx.fetch_one(q).await,
            Err(e) => Err(e),
        };
        tx.end(outcome).await
    }

    fn column<'r, T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>>(
        &self,
        operation: &'static str,
        row: &'r PgRow,
        column: &str,
    ) -> Result<T> {
        row.try_get(column)
            .map_err(|e| self.engine.failed(operation, e))
    }
}

const LOCKED: &str = "a transaction that wrote or reads there is still open";

fn note(cleaned: &mut Cleaned, what: String, found: Option<&str>) {
    match found {
        Some("emptied") => cleaned.removed += 1,
        Some("locked") => cleaned.held.push((what, LOCKED)),
        Some("unsettled") => cleaned
            .held
            .push((what, "a destination is not done with what is in it")),
        Some("elsewhere") => cleaned.held.push((
            what,
            "the log was restored into another database cluster and is not anchored there",
        )),
        _ => {}
    }
}
