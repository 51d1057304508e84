//! Events whose time comes, and those that were cancelled before.

use std::time::Duration;

use sqlx::{Row, postgres::PgRow};

use super::{
    Inner,
    engine::{Commit, Text, Tx, query},
    failure::{self, MESSAGE, Place, WAITS},
};
use crate::{error::Result, lease::Lease, store::Due};

/// How long what somebody is just deciding to cancel is left alone.
const AGAIN: Duration = Duration::from_millis(100);
const OPERATION: &str = "let events fall due";

pub(super) struct Statements {
    due: Text,
    enter: Text,
    next: Text,
    forget: Text,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let schema = format!("\"{schema}\"");
        let text = |template: String| Text::from(template.replace("{schema}", &schema));
        let scheduled = "FROM {schema}.deferred d WHERE d.side = $1 AND d.scope = $2 AND d.shard = $3 AND d.scheduled";
        Self {
            // Whoever cancels holds the lock until its transaction ends: then the next look knows.
            due: text(format!(
                "SELECT source, id, pg_try_advisory_xact_lock(hashtextextended('pillarbox cancel ' || id, 0)) AS free FROM ( \
                   SELECT d.source, d.id {scheduled} AND d.due <= clock_timestamp() ORDER BY d.due, d.seq LIMIT $4 OFFSET 0) d"
            )),
            enter: text(format!(
                "WITH gone AS (DELETE FROM {{schema}}.deferred d USING unnest($4::text[], $5::text[]) AS r (source, id) \
                   WHERE d.side = $1 AND d.scope = $2 AND d.shard = $3 AND d.source = r.source AND d.id = r.id \
                     AND d.scheduled RETURNING d.*), \
                 entered AS (INSERT INTO {{schema}}.deferred (side, scope, shard, {MESSAGE}, position, attempts, maybe_sent, due) \
                   SELECT side, scope, shard, {MESSAGE}, greatest(position, $6, (SELECT max(x.position) \
                     FROM {{schema}}.deferred x WHERE x.side = g.side AND x.scope = g.scope AND x.line = g.line \
                       AND x.topic = g.topic AND x.key = g.key AND NOT x.scheduled)), 0, maybe_sent, due FROM gone g \
                   WHERE NOT EXISTS (SELECT FROM {{schema}}.cancelled c WHERE c.id = g.id) ORDER BY due, seq \
                   RETURNING topic, key, source, id, {WAITS}) \
                 SELECT * FROM entered"
            )),
            next: text(format!(
                "SELECT greatest(0, ceil(extract(epoch FROM least(min(d.due), clock_timestamp() + interval '1 day') \
                   - clock_timestamp()) * 1000))::bigint AS due_in {scheduled} HAVING min(d.due) IS NOT NULL"
            )),
            forget: text(
                "DELETE FROM {schema}.cancelled WHERE id IN (SELECT id FROM {schema}.cancelled \
                 WHERE deliver_at < clock_timestamp() - interval '30 days' ORDER BY deliver_at LIMIT 100)"
                    .to_owned(),
            ),
        }
    }
}

impl Inner {
    pub(super) async fn fall_due(&self, lease: &Lease, position: i64, limit: u32) -> Result<Due> {
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(OPERATION, bound, Commit::Durable).await?;
        let outcome = match self.enter(&mut tx, lease, position, limit).await {
            Ok(due) => self.fence(&mut tx, OPERATION, lease).await.map(|()| due),
            Err(e) => Err(e),
        };
        tx.end(outcome).await
    }

    async fn enter(
        &self,
        tx: &mut Tx<'_>,
        lease: &Lease,
        position: i64,
        limit: u32,
    ) -> Result<Due> {
        let place = Place::of(&lease.key);
        let read = |e| self.engine.failed(OPERATION, e);
        let q = place.bind(query(&self.schedule.due)).bind(i64::from(limit));
        let found = tx.fetch(q).await?;
        let (mut sources, mut ids) = (Vec::new(), Vec::new());
        for row in &found {
            if row.try_get::<bool, _>("free").map_err(read)? {
                sources.push(row.try_get::<String, _>("source").map_err(read)?);
                ids.push(row.try_get::<String, _>("id").map_err(read)?);
            }
        }
        let busy = ids.len() < found.len();
        let mut due = Due::default();
        if !ids.is_empty() {
            // A statement of its own: its snapshot, taken behind the locks, shows who was cancelled.
            let q = place
                .bind(query(&self.schedule.enter))
                .bind(sources)
                .bind(ids)
                .bind(position);
            let rows = tx.fetch(q).await?;
            let lines: sqlx::Result<_> = rows.iter().map(failure::line).collect();
            due.lines = lines.map_err(read)?;
            tx.run(query(&self.schedule.forget)).await?;
        }
        let row = tx.fetch_one(place.bind(query(&self.schedule.next))).await?;
        let next = |row: PgRow| row.try_get::<i64, _>("due_in").map(i64::unsigned_abs);
        let next = row.map(next).transpose().map_err(read)?;
        due.next = next.map(Duration::from_millis);
        if busy {
            due.next = due.next.map(|next| next.max(AGAIN));
        }
        Ok(due)
    }
}
