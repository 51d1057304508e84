//! SQLite under the suite, and what only SQLite promises.

use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;
use pillarbox_core::{Database, lease::LeaseKey};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteSynchronous},
};

use crate::suite::{self, Bench};

/// A file in a folder of its own.
struct File {
    folder: tempfile::TempDir,
}

impl File {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("test.db")
    }

    fn options(&self) -> SqliteConnectOptions {
        SqliteConnectOptions::new()
            .filename(self.path())
            .create_if_missing(true)
    }

    async fn raw(&self) -> SqliteConnection {
        self.options().connect().await.unwrap()
    }
}

fn tables(sql: &str) -> AssertSqlSafe<String> {
    let mut sql = sql.to_owned();
    for table in ["outbox", "deferred", "dead_letter", "inbox"] {
        sql = sql.replace(&format!("{{{table}}}"), &format!("pillarbox_{table}"));
    }
    AssertSqlSafe(sql)
}

#[async_trait]
impl Bench for File {
    async fn database(&self) -> Database {
        // As a host may well have it: two connections, and less durable than the engine's.
        let options = self.options().synchronous(SqliteSynchronous::Normal);
        let pool = SqlitePoolOptions::new().max_connections(2);
        Database::from(&pool.connect_with(options).await.unwrap())
    }

    async fn execute(&self, sql: &str) {
        let mut raw = self.raw().await;
        sqlx::raw_sql(tables(sql)).execute(&mut raw).await.unwrap();
    }

    async fn number(&self, sql: &str) -> i64 {
        let mut raw = self.raw().await;
        let query = sqlx::query_scalar(tables(sql));
        query.fetch_one(&mut raw).await.unwrap()
    }

    async fn outdate(&self) {
        self.execute("UPDATE pillarbox_schema SET oldest_program = 1000, version = 1000")
            .await;
    }

    async fn expire(&self, key: &LeaseKey, seconds: i64) {
        let table = match key {
            LeaseKey::Relay { .. } => "cursor",
            LeaseKey::Source { .. } => "source",
            LeaseKey::Duty { .. } => "lease",
        };
        let statement = format!(
            "UPDATE pillarbox_{table} SET expires_at = (unixepoch('now') + {seconds}) * 1000000"
        );
        self.execute(&statement).await;
    }

    async fn open_transactions(&self) -> i64 {
        let options = self.options().busy_timeout(Duration::ZERO);
        let mut raw = options.connect().await.unwrap();
        // Only with no reader and no writer at work can the whole write-ahead log be moved and cut.
        let checkpoint = sqlx::query_scalar("PRAGMA wal_checkpoint(TRUNCATE)");
        let open: i64 = checkpoint.fetch_one(&mut raw).await.unwrap_or(1);
        raw.close().await.unwrap();
        open
    }
}

suite::exercise!(std::future::ready(Some(File::new())));
