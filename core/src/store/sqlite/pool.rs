//! The engine's own connections and its transactions.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, SqlSafeStr as _, SqliteConnection,
    SqlitePool,
    pool::PoolConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Kind, Result, is_away};

/// One that writes, the others read beside it.
const CONNECTIONS: u32 = 4;
/// How long a write waits for the one writer's place.
const WAIT: Duration = Duration::from_secs(5);
/// The database's clock; see `schema.sql`.
const NOW: &str = "(CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000)";

/// Table names and the clock, for statements.
pub(super) struct Names {
    prefix: String,
}

impl Names {
    /// A statement with `{p}` (the prefix) and `{now}` filled in.
    pub(super) fn sql(&self, text: &str) -> AssertSqlSafe<String> {
        // Safe: the prefix is a checked identifier, values are always bound.
        AssertSqlSafe(text.replace("{p}", &self.prefix).replace("{now}", NOW))
    }

    /// The prefix, without the `_` at its end.
    pub(super) fn prefix(&self) -> &str {
        self.prefix.strip_suffix('_').unwrap_or(&self.prefix)
    }

    /// A table with its prefix.
    pub(super) fn table(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// An error of a statement; missing tables are told apart.
    pub(super) fn failed(&self, operation: &'static str, e: sqlx::Error) -> Error {
        let missing = format!("no such table: {}", self.prefix);
        if e.as_database_error()
            .is_some_and(|d| d.message().starts_with(&missing))
        {
            return self.not_migrated(operation).caused_by(e);
        }
        Error::database(operation, e)
    }

    /// The tables are not there.
    pub(super) fn not_migrated(&self, operation: &'static str) -> Error {
        let text = format!(
            "the tables {}* are not in this database or not complete: call pillarbox::migrate once at start",
            self.prefix
        );
        Error::new(Kind::NotMigrated, operation, text)
    }
}

/// The engine's way to the database. Cheap to clone.
#[derive(Clone)]
pub(super) struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    host: SqlitePool,
    own: OnceCell<Own>,
    names: Arc<Names>,
    /// One engine transaction at a time: first come, first served, where SQLite's busy handler is a lottery.
    turn: Arc<Semaphore>,
}

struct Own {
    pool: SqlitePool,
    /// A memory database is reached through the host's pool alone, and its connections keep the host's settings.
    memory: bool,
}

impl Engine {
    pub(super) fn new(host: SqlitePool, schema: &str) -> Self {
        let shared = Shared {
            host,
            own: OnceCell::new(),
            names: Arc::new(Names {
                prefix: format!("{schema}_"),
            }),
            turn: Arc::new(Semaphore::new(1)),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    pub(super) fn names(&self) -> &Names {
        &self.shared.names
    }

    pub(super) async fn close(&self) {
        if let Some(own) = self.shared.own.get() {
            own.pool.close().await;
        }
        self.shared.host.close().await;
    }

    /// A connection to read with.
    pub(super) async fn reader(
        &self,
        operation: &'static str,
    ) -> Result<PoolConnection<sqlx::Sqlite>> {
        let own = self.own(operation).await?;
        own.pool
            .acquire()
            .await
            .map_err(|e| Error::database(operation, e))
    }

    /// Runs `work` in a transaction of its own and commits it; to its end, also when the caller goes away.
    pub(super) async fn write<T, F>(&self, operation: &'static str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'t> FnOnce(&'t mut Transaction) -> BoxFuture<'t, Result<T>> + Send + 'static,
    {
        let engine = self.clone();
        uncancelled(operation, async move {
            let mut tx = engine.begin(operation, WAIT).await?;
            match work(&mut tx).await {
                Ok(answer) => tx.commit().await.map(|()| answer),
                Err(e) => {
                    // The first error is the one to tell.
                    let _ = tx.rollback().await;
                    Err(e)
                }
            }
        })
        .await
    }

    /// Begins a transaction that waits at most `wait` for its turn. A `begin` that is dropped half-way could leave an
    /// open transaction in the pool; this one is never dropped.
    pub(super) async fn begin_uncancelled(
        &self,
        operation: &'static str,
        wait: Duration,
    ) -> Result<Transaction> {
        let engine = self.clone();
        uncancelled(
            operation,
            async move { engine.begin(operation, wait).await },
        )
        .await
    }

    async fn begin(&self, operation: &'static str, wait: Duration) -> Result<Transaction> {
        let wait = wait.min(WAIT);
        let own = self.own(operation).await?;
        let turn = tokio::time::timeout(wait, self.shared.turn.clone().acquire_owned())
            .await
            .map_err(|_| busy(operation))?
            .map_err(|_| busy(operation))?;
        let connection = own
            .pool
            .acquire()
            .await
            .map_err(|e| Error::database(operation, e))?;
        let statement = if own.memory {
            "BEGIN IMMEDIATE".to_owned()
        } else {
            // `synchronous` belongs to the connection, and a hook of the host's may have set it: every time, then.
            format!(
                "PRAGMA busy_timeout = {}; PRAGMA synchronous = FULL; BEGIN IMMEDIATE",
                wait.as_millis()
            )
        };
        let inner =
            sqlx::Transaction::begin(connection, Some(AssertSqlSafe(statement).into_sql_str()))
                .await
                .map_err(|e| Error::database(operation, e))?;
        Ok(Transaction {
            inner,
            operation,
            names: self.shared.names.clone(),
            _turn: turn,
        })
    }

    async fn own(&self, operation: &'static str) -> Result<&Own> {
        let host = &self.shared.host;
        self.shared
            .own
            .get_or_try_init(|| open(host, operation))
            .await
    }

    /// Says so when the host's own connections run with `synchronous = OFF`: then no later write of ours can bring its
    /// commits to the disk, and an event may be published that a power cut undoes.
    pub(super) async fn warn_if_unsafe(&self) {
        let Some(mut connection) = self.shared.host.try_acquire() else {
            return;
        };
        let level = sqlx::query_scalar::<_, i64>("PRAGMA synchronous")
            .fetch_one(&mut *connection)
            .await;
        let memory = self.shared.own.get().is_some_and(|own| own.memory);
        if matches!(level, Ok(0)) && !memory {
            tracing::warn!(
                "SQLite runs with synchronous = OFF on the host's connections: a power cut can undo events that were \
                 already published; use FULL, or NORMAL at the least"
            );
        }
    }
}

/// One transaction of the engine's: the only writer while it lives. Dropped, it is rolled back.
pub(super) struct Transaction {
    // Before the turn: what is dropped first is rolled back first.
    inner: sqlx::Transaction<'static, sqlx::Sqlite>,
    operation: &'static str,
    names: Arc<Names>,
    _turn: OwnedSemaphorePermit,
}

impl Transaction {
    pub(super) fn names(&self) -> &Names {
        &self.names
    }

    pub(super) fn connection(&mut self) -> &mut SqliteConnection {
        &mut self.inner
    }

    /// What [`Transaction::failed`] names from now on.
    pub(super) fn doing(&mut self, operation: &'static str) {
        self.operation = operation;
    }

    pub(super) fn operation(&self) -> &'static str {
        self.operation
    }

    pub(super) fn failed(&self, e: sqlx::Error) -> Error {
        self.names.failed(self.operation, e)
    }

    /// Runs one statement and answers how many rows it changed.
    pub(super) async fn run(
        &mut self,
        query: sqlx::query::Query<'_, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
    ) -> Result<u64> {
        let done = query.execute(&mut *self.inner).await;
        done.map(|d| d.rows_affected()).map_err(|e| self.failed(e))
    }

    pub(super) async fn commit(self) -> Result<()> {
        let (names, operation) = (self.names, self.operation);
        let done = self.inner.commit().await;
        done.map_err(|e| names.failed(operation, e))
    }

    /// Undoes everything. When a handler has ended the transaction behind sqlx's back, sqlx still counts one: an empty
    /// one is begun for it to end, so that the connection goes back clean.
    pub(super) async fn rollback(self) -> Result<()> {
        let Self {
            mut inner,
            operation,
            _turn,
            ..
        } = self;
        // Refused, and without effect, where the transaction is still open.
        let _ = sqlx::raw_sql("BEGIN").execute(&mut *inner).await;
        let done = inner.rollback().await;
        done.map_err(|e| Error::database(operation, e))
    }
}

/// Opens the engine's own pool with the host's options and hooks, in WAL mode and with `synchronous = FULL`.
async fn open(host: &SqlitePool, operation: &'static str) -> Result<Own> {
    if is_memory(host, operation).await? {
        tracing::info!(
            "a memory database: the engine uses the host's connections, and nothing outlives them"
        );
        return Ok(Own {
            pool: host.clone(),
            memory: true,
        });
    }
    let options = (*host.connect_options())
        .clone()
        .shared_cache(false)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(WAIT);
    enter_wal(&options, operation).await?;
    let pool = host
        .options()
        .clone()
        .min_connections(0)
        .max_connections(CONNECTIONS)
        .acquire_timeout(WAIT)
        .after_release(|connection, _| {
            Box::pin(async move {
                // Normally refused: a transaction that was dropped is rolled back by now.
                let _ = sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await;
                Ok(!connection.is_in_transaction())
            })
        })
        .connect_lazy_with(options);
    tracing::debug!(
        connections = CONNECTIONS,
        "the engine has opened its own pool"
    );
    Ok(Own {
        pool,
        memory: false,
    })
}

/// Puts the database file into WAL mode, where it stays. The switch needs the file for itself and SQLite does not wait
/// for that, so it is tried again.
async fn enter_wal(options: &SqliteConnectOptions, operation: &'static str) -> Result<()> {
    let until = tokio::time::Instant::now() + WAIT;
    loop {
        match journal_mode(options).await {
            Ok(mode) if mode.eq_ignore_ascii_case("wal") => return Ok(()),
            Ok(mode) => {
                let text = format!(
                    "the database stays in journal mode {mode:?}; Pillarbox needs WAL, on a local disk"
                );
                return Err(Error::new(Kind::Configuration, operation, text));
            }
            Err(e) if is_away(&e) && tokio::time::Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(e) => return Err(Error::database(operation, e)),
        }
    }
}

async fn journal_mode(options: &SqliteConnectOptions) -> sqlx::Result<String> {
    let mut connection = options.connect().await?;
    let mode = sqlx::query_scalar("PRAGMA journal_mode")
        .fetch_one(&mut connection)
        .await;
    connection.close().await?;
    mode
}

/// Whether the database lives in memory. The options keep that to themselves (and their `to_url_lossy` panics on
/// `:memory:`), so where no file of that name exists, a connection of the host's is asked.
async fn is_memory(host: &SqlitePool, operation: &'static str) -> Result<bool> {
    if host.connect_options().get_filename().is_file() {
        return Ok(false);
    }
    let file: Option<String> =
        sqlx::query_scalar("SELECT file FROM pragma_database_list WHERE name = 'main'")
            .fetch_one(host)
            .await
            .map_err(|e| Error::database(operation, e))?;
    Ok(file.is_none_or(|f| f.is_empty()))
}

/// Runs a future in a task of its own, so that the caller's going away does not stop it.
pub(super) async fn uncancelled<T: Send + 'static>(
    operation: &'static str,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|e| {
        let kind = if e.is_cancelled() {
            Kind::Unavailable
        } else {
            Kind::Database
        };
        Err(Error::new(kind, operation, "the task did not end").caused_by(e))
    })
}

fn busy(operation: &'static str) -> Error {
    let text = "another transaction of this process holds the database for too long";
    Error::new(Kind::Unavailable, operation, text)
}
