//! A service's own tables: apart from the engine's, idempotent, safe when several processes start at once.

use pillarbox::{Database, Pool};
use sqlx::AssertSqlSafe;

use crate::Result;

/// The steps of a service's schema, oldest first. A step that was released is never changed; a new one is added.
#[derive(Debug, Clone, Copy)]
pub struct Migrations {
    /// The service; its tables begin with this name.
    pub service: &'static str,
    /// For PostgreSQL.
    pub postgres: &'static [&'static str],
    /// For SQLite.
    pub sqlite: &'static [&'static str],
}

/// The same statements on either database's transaction. The service's name comes from the program, not from outside.
macro_rules! run {
    ($tx:ident, $service:expr, $steps:expr) => {
        let table = format!("{}_migration", $service);
        let make = format!(
            "CREATE TABLE IF NOT EXISTS {table} (step INTEGER PRIMARY KEY, \
             applied_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP)"
        );
        sqlx::query(AssertSqlSafe(make)).execute(&mut *$tx).await?;
        let newest = format!("SELECT coalesce(max(step), 0) FROM {table}");
        let newest: i32 = sqlx::query_scalar(AssertSqlSafe(newest))
            .fetch_one(&mut *$tx)
            .await?;
        for (step, sql) in (1..)
            .zip($steps.iter().copied())
            .filter(|(step, _)| *step > newest)
        {
            sqlx::raw_sql(sql).execute(&mut *$tx).await?;
            let applied = format!("INSERT INTO {table} (step) VALUES ($1)");
            sqlx::query(AssertSqlSafe(applied))
                .bind(step)
                .execute(&mut *$tx)
                .await?;
            tracing::info!(service = $service, step, "migrated");
        }
    };
}

/// Makes or completes a service's tables.
///
/// # Errors
/// The database's.
pub async fn migrate(database: &Database, migrations: &Migrations) -> Result<()> {
    let service = migrations.service;
    match database.pool() {
        Some(Pool::Postgres(pool)) => {
            let mut tx = pool.begin().await?;
            // That the table is there already is no news.
            sqlx::query("SET LOCAL client_min_messages = warning")
                .execute(&mut *tx)
                .await?;
            sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))")
                .bind(service)
                .execute(&mut *tx)
                .await?;
            run!(tx, service, migrations.postgres);
            tx.commit().await?;
        }
        Some(Pool::Sqlite(pool)) => {
            let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
            run!(tx, service, migrations.sqlite);
            tx.commit().await?;
        }
        None => {}
    }
    Ok(())
}
