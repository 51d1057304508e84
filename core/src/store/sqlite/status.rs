//! Who holds which lease, and how far the cursors are.

use std::time::Duration;

use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{
    admin::{DutyStatus, Owner, PartitionStatus, SourceStatus},
    error::Result,
    failure::Side,
    lease::LeaseTerm,
    store::Standings,
};

use super::{pool::Engine, row};

const OPERATION: &str = "look at the status";

/// Who holds a lease, as a lease counts: one that expires later than any can comes from a clock that was set back.
fn held() -> String {
    let longest = row::micros(LeaseTerm::LONGEST);
    format!(
        "owner, CASE WHEN expires_at > {{now}} AND expires_at <= {{now}} + {longest} \
         THEN expires_at - {{now}} END AS expires_in"
    )
}

const PARTITIONS: &str = "SELECT destination, partition, epoch, {held}, last AS settled, \
     coalesce((SELECT {now} - CAST(o.created_at AS INTEGER) FROM {p}outbox o WHERE o.position > last \
       ORDER BY o.position LIMIT 1), 0) AS lag, \
     coalesce((SELECT max(position) FROM {p}outbox) \
       - (SELECT o.position FROM {p}outbox o WHERE o.position > last ORDER BY o.position LIMIT 1) + 1, 0) AS behind \
     FROM {p}cursor ORDER BY destination, partition";
const SOURCES: &str = "SELECT grp, transport, cluster, name, partition, epoch, position, {held} \
     FROM {p}source_cursor ORDER BY grp, transport, cluster, name, partition";
const DUTIES: &str = "SELECT kind, scope, shard, {held} FROM {p}lease ORDER BY kind, scope, shard";
const SCOPES: &str = "SELECT DISTINCT side, scope FROM {p}dead_letter UNION SELECT DISTINCT side, scope FROM {p}deferred";

pub(super) async fn standings(engine: &Engine) -> Result<Standings> {
    let clock = rows(engine, "SELECT {now} AS now", |r| r.try_get("now")).await?;
    let now = clock.first().copied().unwrap_or_default();
    let mut standings = Standings::new(row::time(now));
    for (destination, one) in rows(engine, PARTITIONS, partition).await? {
        standings.partition(&destination, one);
    }
    for (group, one) in rows(engine, SOURCES, source).await? {
        standings.source(&group, one);
    }
    standings.duties = rows(engine, DUTIES, duty).await?;
    let scope = |r: &SqliteRow| Ok((text(r, "side")?, text(r, "scope")?));
    for (side, scope) in rows(engine, SCOPES, scope).await? {
        if let Some(side) = Side::read(&side) {
            standings.scope(side, &scope);
        }
    }
    Ok(standings)
}

async fn rows<T>(
    engine: &Engine,
    statement: &str,
    read: impl Fn(&SqliteRow) -> sqlx::Result<T>,
) -> Result<Vec<T>> {
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let statement = names.sql(&statement.replace("{held}", &held()));
    let rows = sqlx::query(statement).fetch_all(&mut *reader).await;
    rows.and_then(|rows| rows.iter().map(read).collect())
        .map_err(|e| names.failed(OPERATION, e))
}

fn text(row: &SqliteRow, column: &str) -> sqlx::Result<String> {
    row.try_get(column)
}

fn number(row: &SqliteRow, column: &str) -> sqlx::Result<u64> {
    Ok(u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or_default())
}

fn owner(row: &SqliteRow) -> sqlx::Result<Option<Owner>> {
    let expires_in: Option<i64> = row.try_get("expires_in")?;
    let id: Option<String> = row.try_get("owner")?;
    Ok(id.zip(expires_in).map(|(id, expires_in)| Owner {
        id,
        expires_in: Duration::from_micros(expires_in.unsigned_abs()),
    }))
}

fn partition(row: &SqliteRow) -> sqlx::Result<(String, PartitionStatus)> {
    let partition = PartitionStatus {
        partition: u16::try_from(number(row, "partition")?).unwrap_or_default(),
        owner: owner(row)?,
        epoch: row.try_get("epoch")?,
        settled: row.try_get("settled")?,
        lag: Duration::from_micros(number(row, "lag")?),
        behind: number(row, "behind")?,
    };
    Ok((text(row, "destination")?, partition))
}

fn source(row: &SqliteRow) -> sqlx::Result<(String, SourceStatus)> {
    let position: Option<i64> = row.try_get("position")?;
    let source = SourceStatus {
        transport: text(row, "transport")?,
        cluster: text(row, "cluster")?,
        name: text(row, "name")?,
        partition: u32::try_from(number(row, "partition")?).unwrap_or_default(),
        owner: owner(row)?,
        epoch: row.try_get("epoch")?,
        position: position.map(i64::unsigned_abs),
    };
    Ok((text(row, "grp")?, source))
}

fn duty(row: &SqliteRow) -> sqlx::Result<DutyStatus> {
    Ok(DutyStatus {
        kind: text(row, "kind")?,
        scope: text(row, "scope")?,
        shard: u16::try_from(number(row, "shard")?).unwrap_or_default(),
        owner: owner(row)?,
    })
}
