//! PostgreSQL under the suite, and what only PostgreSQL promises: late commits, crashes of the server, other sessions.

mod anchor;
mod crash;
mod destinations;
mod fences;
mod log;
mod repartition;
mod retention;
mod standby;
mod stress;
mod traps;
mod units;
mod writers;

use std::{str::FromStr as _, time::Duration};

use async_trait::async_trait;
use pillarbox_core::{
    Database, Pool,
    connection::SCHEMA,
    cursor::Progress,
    lease::{LeaseKey, LeaseTerm},
    migrate_with,
    store::Store,
};
use pillarbox_testkit::servers::{self, Postgres};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::suite::{self, Bench, acquire, drain};

/// A database of one test's own.
pub(crate) struct Db {
    pub(crate) url: String,
}

impl Db {
    /// On the server that the tests share.
    pub(crate) async fn new() -> Option<Self> {
        let server = servers::required(servers::postgres().await)?;
        let url = server.create_database().await.unwrap();
        Some(Self { url })
    }

    /// The same, migrated, with one log partition.
    pub(crate) async fn migrated() -> Option<(Self, Database)> {
        let db = Self::new().await?;
        let database = db.database().await;
        migrate_with(&database, 1).await.unwrap();
        Some((db, database))
    }

    pub(crate) fn options(&self) -> PgConnectOptions {
        let options = PgConnectOptions::from_str(&self.url).unwrap();
        options.disable_statement_logging()
    }

    pub(crate) async fn raw(&self) -> PgConnection {
        self.options().connect().await.unwrap()
    }
}

/// A server of one test's own, with these settings, and a migrated database on it.
pub(crate) async fn alone(settings: &[(&str, &str)]) -> Option<(Postgres, Db, Database)> {
    let server = servers::required(Postgres::start_with(settings).await)?;
    let url = server.create_database().await.unwrap();
    let db = Db { url };
    let database = db.database().await;
    migrate_with(&database, 1).await.unwrap();
    Some((server, db, database))
}

/// A host's pool over these options, and a store of its own.
pub(crate) fn over(options: PgConnectOptions) -> Database {
    let pool = PgPoolOptions::new()
        .max_connections(4)
        .connect_lazy_with(options);
    Database::from(&pool)
}

pub(crate) fn pool(database: &Database) -> PgPool {
    match database.pool() {
        Some(Pool::Postgres(pool)) => pool,
        other => panic!("{other:?}"),
    }
}

fn tables(sql: &str) -> AssertSqlSafe<String> {
    let mut sql = sql.to_owned();
    for table in [
        "outbox",
        "cursor",
        "deferred",
        "dead_letter",
        "inbox",
        "inbox_clock",
    ] {
        sql = sql.replace(&format!("{{{table}}}"), &format!("{SCHEMA}.{table}"));
    }
    AssertSqlSafe(sql)
}

#[async_trait]
impl Bench for Db {
    async fn database(&self) -> Database {
        over(self.options())
    }

    async fn execute(&self, sql: &str) {
        run(&mut self.raw().await, sql).await;
    }

    async fn number(&self, sql: &str) -> i64 {
        number(&mut self.raw().await, sql).await
    }

    async fn outdate(&self) {
        self.execute("UPDATE pillarbox.installation SET oldest_program = 1000, version = 1000")
            .await;
    }

    async fn expire(&self, key: &LeaseKey, seconds: i64) {
        let table = match key {
            LeaseKey::Relay { .. } => "cursor",
            LeaseKey::Source { .. } => "source_cursor",
            LeaseKey::Duty { .. } => "lease",
        };
        let statement = format!(
            "UPDATE pillarbox.{table} SET expires_at = clock_timestamp() + {seconds} * interval '1 s'"
        );
        self.execute(&statement).await;
    }

    async fn open_transactions(&self) -> i64 {
        self.number(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
             AND xact_start IS NOT NULL AND backend_type = 'client backend'",
        )
        .await
    }

    async fn age_log(&self) {
        // Out of the slot of the present and the next one.
        self.execute(
            "UPDATE {outbox} SET slot = ((extract(epoch FROM clock_timestamp())::bigint / 1800 + 2) % 4)::smallint",
        )
        .await;
    }

    async fn short_slots(&self) {
        self.execute(
            "UPDATE pillarbox.installation SET slot_seconds = 1; \
             ALTER TABLE {outbox} ALTER slot SET DEFAULT (extract(epoch FROM clock_timestamp())::bigint % 4)::smallint",
        )
        .await;
    }

    async fn log_bytes(&self) -> i64 {
        self.number(
            "SELECT sum(pg_total_relation_size('pillarbox.outbox_' || n))::bigint FROM generate_series(0, 3) n",
        )
        .await
    }

    async fn write_impatiently(&self, events: usize) -> usize {
        let mut writer = impatient(self).await;
        let mut written = 0;
        while written < events {
            let some = "INSERT INTO {outbox} (topic, type, key, payload) \
                        SELECT 't', 'a', 'k' || i, convert_to(repeat('x', 300), 'UTF8') FROM generate_series(1, 5) i";
            run(&mut writer, some).await;
            written += 5;
        }
        written
    }

    async fn grow_old(&self, seconds: i64) {
        let sql =
            format!("UPDATE {{outbox}} SET created_at = created_at - {seconds} * interval '1 s'");
        self.execute(&sql).await;
    }

    async fn pass(&self, seconds: i64) {
        let mut all = String::new();
        for (table, column) in [
            ("{inbox}", "arrived"),
            ("pillarbox.inbox_timeless", "arrived"),
            ("{inbox_clock}", "at"),
        ] {
            all +=
                &format!("UPDATE {table} SET {column} = {column} - {seconds} * interval '1 s'; ");
        }
        self.execute(&all).await;
    }
}

/// A writer that waits for no lock longer than 50 ms.
pub(crate) async fn impatient(db: &Db) -> PgConnection {
    let mut writer = db.raw().await;
    run(&mut writer, "SET lock_timeout = '50ms'").await;
    writer
}

suite::exercise!(Db::new());

pub(crate) async fn run(connection: &mut PgConnection, sql: &str) {
    let done = sqlx::raw_sql(tables(sql)).execute(connection).await;
    done.unwrap_or_else(|e| panic!("{sql}: {e}"));
}

/// The SQLSTATE of a statement that must fail.
pub(crate) async fn refused(connection: &mut PgConnection, sql: &str) -> String {
    let done = sqlx::raw_sql(tables(sql)).execute(connection).await;
    let error = done.expect_err(sql);
    let database = error
        .as_database_error()
        .unwrap_or_else(|| panic!("{error}"));
    format!(
        "{} {}",
        database.code().unwrap_or_default(),
        database.message()
    )
}

pub(crate) async fn number(connection: &mut PgConnection, sql: &str) -> i64 {
    let query = sqlx::query_scalar(tables(sql));
    query
        .fetch_one(connection)
        .await
        .unwrap_or_else(|e| panic!("{sql}: {e}"))
}

pub(crate) async fn text(connection: &mut PgConnection, sql: &str) -> String {
    let query = sqlx::query_scalar(tables(sql));
    query
        .fetch_one(connection)
        .await
        .unwrap_or_else(|e| panic!("{sql}: {e}"))
}

/// Writes one event whose payload is `name`.
pub(crate) async fn write(connection: &mut PgConnection, name: &str) {
    run(
        connection,
        &format!(
            "INSERT INTO {{outbox}} (topic, type, key, payload) VALUES ('t', 'a', 'k', '{name}')"
        ),
    )
    .await;
}

/// What a reader finds behind `from`, by name, and where that ends.
pub(crate) async fn names(
    store: &dyn Store,
    from: Progress,
    limit: u32,
) -> (Vec<String>, Progress) {
    let (events, end) = drain(store, from, limit).await;
    let name = |e: pillarbox_core::store::Logged| {
        String::from_utf8(e.message.payload.as_deref().unwrap_or_default().to_vec()).unwrap()
    };
    (events.into_iter().map(name).collect(), end)
}

pub(crate) async fn start(store: &dyn Store) -> Progress {
    acquire(store, &suite::relay()).await.progress
}

/// The shortest lease: what is bounded by it ends soon.
pub(crate) fn short() -> LeaseTerm {
    LeaseTerm::new(Duration::ZERO)
}

/// Waits for something that happens in the server.
pub(crate) async fn until(what: &str, mut happened: impl AsyncFnMut() -> bool) {
    let waited = async {
        while !happened().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waited)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}
