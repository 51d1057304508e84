//! The tables: made, completed, and looked at.

use crate::{
    admin::Installation,
    error::{Error, Kind, Result},
    store::{PROGRAM, SCHEMA_VERSION},
};

use super::pool::{Engine, Transaction};

/// The steps from each version to the next. A step only adds, and is never changed once released.
const STEPS: &[(i32, &str)] = &[
    (1, include_str!("schema.sql")),
    (2, include_str!("retention.sql")),
    (3, include_str!("schema_3.sql")),
    (4, include_str!("pause.sql")),
    (5, include_str!("destinations.sql")),
    (6, include_str!("schema_6.sql")),
];
const OPERATION: &str = "open schema";

/// Makes what is missing. Its transaction holds the writer's lock, so that others who do the same wait.
pub(super) async fn migrate(tx: &mut Transaction) -> Result<()> {
    let known = tx.names().table("installation");
    let exists: bool = sqlx::query_scalar(
        "SELECT count(*) > 0 FROM sqlite_master WHERE type = 'table' AND name = ?",
    )
    .bind(known)
    .fetch_one(tx.connection())
    .await
    .map_err(|e| tx.failed(e))?;
    let mut found = 0;
    if exists {
        let query = tx
            .names()
            .sql("SELECT version, oldest_program FROM {p}installation");
        let (version, oldest): (i32, i32) = sqlx::query_as(query)
            .fetch_one(tx.connection())
            .await
            .map_err(|e| tx.failed(e))?;
        allow("migrate", oldest)?;
        if version >= SCHEMA_VERSION {
            return Ok(());
        }
        found = version;
    }
    for (to, step) in STEPS.iter().filter(|(to, _)| *to > found) {
        let step = tx.names().sql(step);
        sqlx::raw_sql(step)
            .execute(tx.connection())
            .await
            .map_err(|e| tx.failed(e))?;
        if *to == 1 {
            make_main(tx).await?;
        }
    }
    let row = tx.names().sql(
        "INSERT INTO {p}installation (one, version, oldest_program, partitions) VALUES (1, ?, ?, 1) \
         ON CONFLICT (one) DO UPDATE SET version = excluded.version, oldest_program = excluded.oldest_program",
    );
    tx.run(sqlx::query(row).bind(SCHEMA_VERSION).bind(PROGRAM))
        .await
        .map(drop)
}

/// A destination without a row would not hold retention back. Once: one that an operator removed stays away.
async fn make_main(tx: &mut Transaction) -> Result<()> {
    let main = tx.names().sql(
        "INSERT INTO {p}cursor (destination, partition) VALUES ('main', 0) ON CONFLICT DO NOTHING",
    );
    tx.run(sqlx::query(main)).await.map(drop)
}

/// The number of log partitions, if this program may use the schema.
pub(super) async fn partitions(engine: &Engine) -> Result<u16> {
    let found = installation(engine).await?;
    if !found.is_complete() {
        return Err(engine.names().not_migrated(OPERATION));
    }
    Ok(found.partitions)
}

/// What the schema says of itself.
pub(super) async fn installation(engine: &Engine) -> Result<Installation> {
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let query = names.sql("SELECT version, oldest_program, partitions FROM {p}installation");
    let row: Option<(i32, i32, u16)> = sqlx::query_as(query)
        .fetch_optional(&mut *reader)
        .await
        .map_err(|e| names.failed(OPERATION, e))?;
    let (version, oldest, partitions) = row.ok_or_else(|| names.not_migrated(OPERATION))?;
    allow(OPERATION, oldest)?;
    Ok(Installation {
        schema: names.prefix().to_owned(),
        version: version.unsigned_abs(),
        needed: SCHEMA_VERSION.unsigned_abs(),
        partitions,
    })
}

fn allow(operation: &'static str, oldest: i32) -> Result<()> {
    if oldest <= PROGRAM {
        return Ok(());
    }
    let text = format!(
        "the schema asks for programs of generation {oldest} or later, and this one is of generation {PROGRAM}: update it"
    );
    Err(Error::new(Kind::Incompatible, operation, text))
}
