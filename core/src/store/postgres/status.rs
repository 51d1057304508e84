//! Who holds which lease, and how far the cursors are.

use std::time::Duration;

use sqlx::{Row, postgres::PgRow};

use super::{
    Inner,
    engine::{Text, query},
    row,
};
use crate::{
    admin::{DutyStatus, Owner, PartitionStatus, SourceStatus},
    error::Result,
    failure::Side,
    lease::LeaseTerm,
    store::Standings,
};

const OPERATION: &str = "look at the status";

pub(super) struct Statements {
    clock: Text,
    partitions: Text,
    sources: Text,
    duties: Text,
    scopes: Text,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let schema = format!("\"{schema}\"");
        // As a lease counts: one that expires later than any can comes from a clock that was set back.
        let longest = LeaseTerm::LONGEST.as_secs();
        let held = format!(
            "c.owner::text AS owner, CASE WHEN c.expires_at > clock_timestamp() \
             AND c.expires_at <= clock_timestamp() + interval '{longest} s' \
             THEN (extract(epoch FROM c.expires_at - clock_timestamp()) * 1000)::bigint END AS expires_in"
        );
        let text = |template: &str| {
            let template = template.replace("{schema}", &schema);
            Text::from(template.replace("{held}", &held))
        };
        // By the index, from one scope to the next.
        let scopes = |table: &str, name: &str| {
            format!(
                "SELECT v.side, s.scope FROM (VALUES ('relay'), ('consumer')) v (side), LATERAL (WITH RECURSIVE s AS ( \
                   SELECT (SELECT min(d.{name}) FROM {{schema}}.{table} d WHERE d.side = v.side) AS scope UNION ALL \
                   SELECT (SELECT min(d.{name}) FROM {{schema}}.{table} d WHERE d.side = v.side AND d.{name} > s.scope) \
                   FROM s WHERE s.scope IS NOT NULL) SELECT s.scope FROM s WHERE s.scope IS NOT NULL) s"
            )
        };
        Self {
            clock: "SELECT clock_timestamp() AS now".into(),
            // Above the cursors, as the backlog is: what commits late, below them, is soon read.
            partitions: text(
                "SELECT c.destination, c.partition, c.epoch, {held}, greatest(c.base, c.last) AS settled, \
                   coalesce(extract(epoch FROM clock_timestamp() - oldest.created_at) * 1000, 0)::bigint AS lag, \
                   coalesce(newest.position - oldest.position + 1, 0)::bigint AS behind \
                 FROM {schema}.cursor c \
                 LEFT JOIN LATERAL (SELECT o.position, o.created_at FROM {schema}.outbox o \
                   WHERE o.partition = c.partition AND o.position > greatest(c.base, c.last) \
                   ORDER BY o.position LIMIT 1) oldest ON true \
                 LEFT JOIN LATERAL (SELECT o.position FROM {schema}.outbox o WHERE o.partition = c.partition \
                   ORDER BY o.position DESC LIMIT 1) newest ON true \
                 ORDER BY c.destination, c.partition",
            ),
            sources: text(
                "SELECT c.grp, c.transport, c.cluster, c.name, c.partition, c.epoch, c.position, {held} \
                 FROM {schema}.source_cursor c ORDER BY c.grp, c.transport, c.cluster, c.name, c.partition",
            ),
            duties: text(
                "SELECT c.kind, c.scope, c.shard, {held} FROM {schema}.lease c ORDER BY c.kind, c.scope, c.shard",
            ),
            scopes: text(&format!(
                "{} UNION {}",
                scopes("dead_letter", "scope"),
                scopes("deferred", "scope")
            )),
        }
    }
}

impl Inner {
    pub(super) async fn standings(&self) -> Result<Standings> {
        let statements = &self.status;
        let clock = self
            .rows(&statements.clock, |r| row::time(r, "now"))
            .await?;
        let now = clock.into_iter().next().unwrap_or(std::time::UNIX_EPOCH);
        let mut standings = Standings::new(now);
        for (destination, one) in self.rows(&statements.partitions, partition).await? {
            standings.partition(&destination, one);
        }
        for (group, one) in self.rows(&statements.sources, source).await? {
            standings.source(&group, one);
        }
        standings.duties = self.rows(&statements.duties, duty).await?;
        let scope = |r: &PgRow| Ok((r.try_get::<String, _>("side")?, text(r, "scope")?));
        for (side, scope) in self.rows(&statements.scopes, scope).await? {
            if let Some(side) = Side::read(&side) {
                standings.scope(side, &scope);
            }
        }
        Ok(standings)
    }

    async fn rows<T>(
        &self,
        statement: &Text,
        read: impl Fn(&PgRow) -> sqlx::Result<T>,
    ) -> Result<Vec<T>> {
        let rows = self.engine.fetch(OPERATION, || query(statement)).await?;
        let all: sqlx::Result<Vec<T>> = rows.iter().map(read).collect();
        all.map_err(|e| self.engine.failed(OPERATION, e))
    }
}

fn text(row: &PgRow, column: &str) -> sqlx::Result<String> {
    Ok(row::text(row, column)?.0.unwrap_or_default())
}

fn owner(row: &PgRow) -> sqlx::Result<Option<Owner>> {
    let expires_in: Option<i64> = row.try_get("expires_in")?;
    let id: Option<String> = row.try_get("owner")?;
    Ok(id.zip(expires_in).map(|(id, expires_in)| Owner {
        id,
        expires_in: Duration::from_millis(expires_in.unsigned_abs()),
    }))
}

fn partition(row: &PgRow) -> sqlx::Result<(String, PartitionStatus)> {
    let partition = PartitionStatus {
        partition: row.try_get::<i16, _>("partition")?.unsigned_abs(),
        owner: owner(row)?,
        epoch: row.try_get("epoch")?,
        settled: row.try_get("settled")?,
        lag: Duration::from_millis(u64::try_from(row.try_get::<i64, _>("lag")?).unwrap_or(0)),
        behind: u64::try_from(row.try_get::<i64, _>("behind")?).unwrap_or(0),
    };
    Ok((text(row, "destination")?, partition))
}

fn source(row: &PgRow) -> sqlx::Result<(String, SourceStatus)> {
    let position: Option<i64> = row.try_get("position")?;
    let source = SourceStatus {
        transport: text(row, "transport")?,
        cluster: text(row, "cluster")?,
        name: text(row, "name")?,
        partition: row.try_get::<i32, _>("partition")?.unsigned_abs(),
        owner: owner(row)?,
        epoch: row.try_get("epoch")?,
        position: position.map(i64::unsigned_abs),
    };
    Ok((text(row, "grp")?, source))
}

fn duty(row: &PgRow) -> sqlx::Result<DutyStatus> {
    Ok(DutyStatus {
        kind: text(row, "kind")?,
        scope: text(row, "scope")?,
        shard: u16::try_from(row.try_get::<i32, _>("shard")?).unwrap_or_default(),
        owner: owner(row)?,
    })
}
