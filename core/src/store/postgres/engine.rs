//! The engine's own few connections, and transactions that nothing outside can change, cut short or leave open.

use std::{
    borrow::Cow,
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool, Postgres,
    pool::PoolConnection,
    postgres::{PgArguments, PgRow},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::Instrument;

use crate::{
    error::{Error, Kind, Result, is_away, is_conflict, sqlstate},
    lease::LeaseTerm,
    store::millis,
};

/// Connections of the engine, beside the host's, unless consumers have many workers.
const CONNECTIONS: usize = 8;
/// The most that it has with those.
const MOST: u32 = 1_000;
/// Of these, at most so many are lent to consumers' transactions: handlers must not keep a lease from being renewed.
const UNITS: usize = 5;
/// How long to wait for a free connection or a new one.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest that anything without a lease takes.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

pub(super) type Query<'q> = sqlx::query::Query<'q, Postgres, PgArguments>;

/// A statement's text, made once.
pub(super) type Text = Arc<str>;

/// A prepared statement.
pub(super) fn query<'q>(text: &Text) -> Query<'q> {
    sqlx::query(AssertSqlSafe(Arc::clone(text)))
}

/// The connections.
pub(super) struct Engine {
    host: PgPool,
    schema: String,
    pool: OnceLock<PgPool>,
    /// Connections that are lent: the pool's own bound cannot grow.
    all: Arc<Semaphore>,
    units: Arc<Semaphore>,
    wanted: Mutex<Wanted>,
    /// The shortest term of a lease that this process took, in milliseconds.
    term: AtomicU64,
}

/// Transactions of consumers beyond [`UNITS`].
#[derive(Default)]
struct Wanted {
    now: usize,
    /// The most that there were at a time; connections that are not used end by themselves.
    most: usize,
}

impl Engine {
    pub(super) fn new(host: PgPool, schema: &str) -> Self {
        Self {
            host,
            schema: schema.to_owned(),
            pool: OnceLock::new(),
            all: Arc::new(Semaphore::new(CONNECTIONS)),
            units: Arc::new(Semaphore::new(UNITS)),
            wanted: Mutex::default(),
            term: AtomicU64::new(milliseconds(LeaseTerm::default().term())),
        }
    }

    pub(super) fn host(&self) -> &PgPool {
        &self.host
    }

    /// Notes the term of a lease, so that statements which are told none stay below it too.
    pub(super) fn heed(&self, term: LeaseTerm) {
        self.term
            .fetch_min(milliseconds(term.term()), Ordering::Relaxed);
    }

    /// The term of the leases here.
    pub(super) fn term(&self) -> LeaseTerm {
        LeaseTerm::new(Duration::from_millis(self.term.load(Ordering::Relaxed)))
    }

    pub(super) async fn close(&self) {
        if let Some(own) = self.pool.get() {
            own.close().await;
        }
        self.host.close().await;
    }

    /// Makes room for so many more consumers' transactions.
    pub(super) fn widen(&self, more: usize) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.now += more;
        let grown = wanted.now.saturating_sub(wanted.most);
        wanted.most += grown;
        if grown > 0 {
            self.units.add_permits(grown);
            self.all.add_permits(grown);
            let connections = CONNECTIONS + wanted.most;
            tracing::info!(
                schema = self.schema,
                connections,
                "the engine uses more connections, for consumers' workers"
            );
        }
    }

    pub(super) fn narrow(&self, less: usize) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.now = wanted.now.saturating_sub(less);
    }

    /// Made at the first use: building a `Database` neither connects nor needs a runtime.
    fn pool(&self) -> &PgPool {
        self.pool.get_or_init(|| {
            let host = self.host.connect_options();
            let name = host.get_application_name().unwrap_or("pillarbox");
            let options = (*host)
                .clone()
                .application_name(&format!("{name} (engine)"));
            tracing::info!(
                schema = self.schema,
                connections = CONNECTIONS,
                "the engine uses connections of its own, at most this many"
            );
            // With the host's hooks: what it sets on each connection, its handlers find here too.
            let pool = self.host.options().clone();
            pool.max_connections(MOST)
                .min_connections(0)
                .acquire_timeout(PATIENCE)
                .idle_timeout(Duration::from_secs(60))
                // Asking each time would cost a trip; one that has died is noticed by its first statement.
                .test_before_acquire(false)
                .connect_lazy_with(options)
        })
    }

    async fn connection(&self, operation: &'static str) -> Result<Session> {
        let permit = Arc::clone(&self.all).acquire_owned();
        let Ok(Ok(permit)) = tokio::time::timeout(PATIENCE, permit).await else {
            let text = "all connections of the engine are in use";
            return Err(Error::new(Kind::Unavailable, operation, text));
        };
        let connection = self.pool().acquire().await;
        let connection = connection.map_err(|e| self.failed(operation, e))?;
        let mut session = Session {
            connection,
            clean: false,
            operation,
            _permit: permit,
        };
        if !session.connection.is_in_transaction() {
            let prepared = prepare(&mut session.connection).await;
            prepared.map_err(|e| self.failed(operation, e))?;
        }
        Ok(session)
    }

    /// One reading statement on its own. Run again on another connection when the first one turns out to be dead.
    pub(super) async fn fetch<'q>(
        &self,
        operation: &'static str,
        q: impl Fn() -> Query<'q>,
    ) -> Result<Vec<PgRow>> {
        let mut dead = 0_usize;
        loop {
            let mut session = self.connection(operation).await?;
            match q().fetch_all(&mut *session.connection).await {
                Err(e) if (is_dead(&e) || is_stale(&e)) && dead < CONNECTIONS => dead += 1,
                rows => {
                    session.clean = !matches!(&rows, Err(e) if must_recycle(e));
                    return rows.map_err(|e| self.failed(operation, e));
                }
            }
        }
    }

    /// A session that has begun: on another connection when the first one turns out to be dead.
    async fn begun(&self, operation: &'static str, begin: String) -> Result<Session> {
        let mut dead = 0_usize;
        loop {
            let mut session = self.connection(operation).await?;
            match session.script(begin.clone()).await {
                Ok(()) => return Ok(session),
                Err(e) if is_dead(&e) && dead < CONNECTIONS => dead += 1,
                Err(e) => return Err(self.failed(operation, e)),
            }
        }
    }

    /// A transaction: READ COMMITTED whatever the host's default (under REPEATABLE READ each renewal that meets another fails
    /// with 40001), and bounded (a process that is stopped in the middle would hold its locks for ever). A server that was
    /// set read-only is obeyed: it may be the old one after a switch-over.
    pub(super) async fn begin(
        &self,
        operation: &'static str,
        bound: Duration,
        commit: Commit,
    ) -> Result<Tx<'_>> {
        let durable = match commit {
            Commit::Durable => "; SET LOCAL synchronous_commit = on",
            Commit::Soon => "; SET LOCAL synchronous_commit = off",
        };
        // The engine's statements go by an index each; a plan made while a table was empty would not.
        let begin = format!(
            "{}{durable}; SET LOCAL enable_seqscan = off; SET LOCAL jit = off",
            begin_text(bound)
        );
        Ok(Tx {
            session: self.begun(operation, begin).await?,
            engine: self,
        })
    }

    /// A transaction that sees one state of the database throughout: that of the moment after `first`, which takes a lock.
    pub(super) async fn begin_repeatable(
        &self,
        operation: &'static str,
        bound: Duration,
        first: &str,
    ) -> Result<Tx<'_>> {
        let bound = millis(bound).max(1);
        let begin = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ; SET LOCAL statement_timeout = {bound}; \
             SET LOCAL idle_in_transaction_session_timeout = {bound}; SET LOCAL synchronous_commit = on; {first}"
        );
        Ok(Tx {
            session: self.begun(operation, begin).await?,
            engine: self,
        })
    }

    /// A consumer's transaction, in which handlers write: the same bounds, and planner and durability as the host has them.
    pub(super) async fn begin_unit(
        &self,
        operation: &'static str,
        bound: Duration,
        durable: bool,
        mark: &str,
        barrier: i64,
    ) -> Result<(Session, OwnedSemaphorePermit)> {
        let permit = tokio::time::timeout(bound, Arc::clone(&self.units).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else {
            let text = "all connections for consumers' transactions are in use";
            return Err(Error::new(Kind::Unavailable, operation, text));
        };
        let durable = if durable {
            "; SET LOCAL synchronous_commit = on"
        } else {
            ""
        };
        let begin = format!(
            "{}{durable}; SET LOCAL pillarbox.unit = '{mark}'; SELECT pg_advisory_xact_lock_shared({barrier})",
            begin_text(bound)
        );
        Ok((self.begun(operation, begin).await?, permit))
    }

    /// By meaning. A lock or a statement that took too long may simply run again.
    pub(super) fn failed(&self, operation: &'static str, e: sqlx::Error) -> Error {
        let (kind, text) = match sqlstate(&e).as_deref() {
            Some("42P01" | "3F000" | "42883") => (Kind::NotMigrated, self.not_migrated()),
            Some("25006") => (
                Kind::Unavailable,
                "the server is read-only: a standby, or fenced off after a failover".to_owned(),
            ),
            _ if is_conflict(&e) => (
                Kind::Unavailable,
                "it waited for another transaction for too long, or lost to it".to_owned(),
            ),
            _ if must_recycle(&e) => (Kind::Unavailable, "the database is away".to_owned()),
            _ => return Error::database(operation, e),
        };
        Error::new(kind, operation, text).caused_by(e)
    }

    pub(super) fn not_migrated(&self) -> String {
        format!(
            "the schema \"{}\" is not there or not complete: call pillarbox::migrate once at the start",
            self.schema
        )
    }
}

/// When a commit may be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Commit {
    /// Once it is on disk, and wherever else the server's settings say.
    Durable,
    /// At once: a crash may undo it, with everything that was committed later.
    Soon,
}

impl Commit {
    pub(super) fn durable(yes: bool) -> Self {
        if yes { Self::Durable } else { Self::Soon }
    }
}

fn begin_text(bound: Duration) -> String {
    let bound = millis(bound).max(1);
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = {bound}; \
         SET LOCAL idle_in_transaction_session_timeout = {bound}"
    )
}

fn milliseconds(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// sqlx counts the transactions that are begun through it. The engine's begin and end by plain text: then a begin can set all
/// its bounds in one trip, and one that fails halfway is seen. The one that sqlx counts here and never sees end makes a
/// handler's own `begin` a savepoint inside the engine's.
///
/// A database that does not check its texts would else refuse to send a row with a bad one, and the rows around it.
async fn prepare(connection: &mut PgConnection) -> sqlx::Result<()> {
    std::mem::forget(connection.begin().await?);
    let text = "ROLLBACK; SELECT set_config('client_encoding', 'SQL_ASCII', false) \
                WHERE getdatabaseencoding() = 'SQL_ASCII'";
    let done = sqlx::raw_sql(text).execute(connection);
    done.await.map(drop)
}

/// A connection that goes back to the pool only when it is known to hold no transaction. sqlx 0.9.0 gives one back with its
/// transaction open when a `begin` is cut short; the next borrower's writes would be lost with it.
pub(super) struct Session {
    connection: PoolConnection<Postgres>,
    clean: bool,
    operation: &'static str,
    // After the connection: it goes back first.
    _permit: OwnedSemaphorePermit,
}

impl Session {
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Runs statements that take no parameters.
    pub(super) async fn script(&mut self, text: impl Into<Cow<'static, str>>) -> sqlx::Result<()> {
        let text = AssertSqlSafe(text.into());
        let done = sqlx::raw_sql(text).execute(&mut *self.connection);
        done.await.map(drop)
    }

    /// COMMIT. Only right after a statement that succeeded: COMMIT of a failed transaction answers without an error.
    pub(super) async fn commit(mut self) -> sqlx::Result<()> {
        self.script("COMMIT").await?;
        self.clean = true;
        Ok(())
    }

    /// ROLLBACK; the connection is closed if that fails too.
    pub(super) async fn rollback(mut self) {
        self.clean = self.script("ROLLBACK").await.is_ok();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.clean {
            tracing::debug!(operation = self.operation, "a connection is closed");
            self.connection.close_on_drop();
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("operation", &self.operation)
            .finish_non_exhaustive()
    }
}

/// An engine transaction.
pub(super) struct Tx<'a> {
    session: Session,
    engine: &'a Engine,
}

impl Tx<'_> {
    /// Runs a statement and answers the number of its rows.
    pub(super) async fn run(&mut self, q: Query<'_>) -> Result<u64> {
        let done = q.execute(self.session.connection()).await;
        match done {
            Ok(done) => Ok(done.rows_affected()),
            Err(e) => Err(self.failed(e)),
        }
    }

    /// Runs a statement and answers its rows.
    pub(super) async fn fetch(&mut self, q: Query<'_>) -> Result<Vec<PgRow>> {
        let rows = q.fetch_all(self.session.connection()).await;
        rows.map_err(|e| self.failed(e))
    }

    /// Runs a statement and answers its row, if there is one.
    pub(super) async fn fetch_one(&mut self, q: Query<'_>) -> Result<Option<PgRow>> {
        let row = q.fetch_optional(self.session.connection()).await;
        row.map_err(|e| self.failed(e))
    }

    /// Runs statements that take no parameters.
    pub(super) async fn script(&mut self, text: String) -> Result<()> {
        let done = self.session.script(text).await;
        done.map_err(|e| self.failed(e))
    }

    /// COMMIT after a success, ROLLBACK after a failure.
    pub(super) async fn end<T>(self, outcome: Result<T>) -> Result<T> {
        match outcome {
            Ok(value) => {
                let operation = self.session.operation;
                let done = self.session.commit().await;
                done.map_err(|e| self.engine.failed(operation, e))?;
                Ok(value)
            }
            Err(e) => {
                // Kept for an answer of the database's that says nothing against the connection; else closed.
                if !breaks_connection(&e) {
                    self.session.rollback().await;
                }
                Err(e)
            }
        }
    }

    fn failed(&self, e: sqlx::Error) -> Error {
        self.engine.failed(self.session.operation, e)
    }
}

fn breaks_connection(e: &Error) -> bool {
    std::error::Error::source(e)
        .and_then(|s| s.downcast_ref::<sqlx::Error>())
        .is_some_and(must_recycle)
}

/// Nobody has answered: what was asked on an idle connection that had died was never begun.
fn is_dead(e: &sqlx::Error) -> bool {
    is_away(e) && sqlstate(e).as_deref() != Some("25006")
}

/// A statement that was prepared before the log was written anew with more partitions: its rows have another shape now, and
/// the connection would refuse them for as long as it lives.
fn is_stale(e: &sqlx::Error) -> bool {
    sqlstate(e).as_deref() == Some("42804")
}

/// The connection is broken, or leads to a server that is no longer the one that writes (read-only after a failover, in
/// recovery, ended by a time-out): the next one may lead elsewhere.
fn must_recycle(e: &sqlx::Error) -> bool {
    is_away(e)
        || matches!(
            sqlstate(e).as_deref(),
            // Idle for too long; "recovery is in progress"; "cannot access unlogged relations during recovery".
            Some("25P03" | "55000" | "0A000")
        )
}

/// Runs work in a task of its own, so that a caller who gives up neither cuts a statement short nor leaves a transaction
/// open; and bounded, so that a network that swallows packets holds nobody for ever.
pub(super) async fn to_its_end<T: Send + 'static>(
    operation: &'static str,
    deadline: Duration,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let bounded = tokio::time::timeout(deadline, work);
    match tokio::spawn(bounded.in_current_span()).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => {
            let text = format!("no answer from the database within {deadline:?}");
            Err(Error::new(Kind::Unavailable, operation, text))
        }
        Err(e) => {
            let text = "the task that asked the database has ended";
            Err(Error::new(Kind::Unavailable, operation, text).caused_by(e))
        }
    }
}
