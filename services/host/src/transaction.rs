//! Transactions of either database, and reads outside of one.

use std::{future::Future, sync::Arc};

use pillarbox::{Connection, Database, Kind, Outbox, Pool};
use sqlx::pool::PoolConnection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::Instrument as _;

use crate::{Error, Result};

/// Begins a service's transactions. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Transactions {
    pool: Pool,
    /// SQLite has one writer: first come, first served, where its busy handler would be a lottery.
    turn: Arc<Semaphore>,
}

impl Transactions {
    /// On the host's pool of this database.
    ///
    /// # Errors
    /// For a database without one, as only simulations have.
    pub fn new(database: &Database) -> Result<Self> {
        let pool = database.pool().ok_or_else(|| {
            let text = "this database has no pool";
            pillarbox::Error::new(Kind::Configuration, "open database", text)
        })?;
        Ok(Self {
            pool,
            turn: Arc::new(Semaphore::new(1)),
        })
    }

    /// Begins a transaction that is going to write. Call it inside of [`complete`].
    ///
    /// # Errors
    /// The database's.
    pub async fn begin(&self) -> Result<Transaction> {
        match &self.pool {
            Pool::Postgres(pool) => Ok(Transaction::Postgres(pool.begin().await?)),
            Pool::Sqlite(pool) => {
                let turn = self.turn.clone().acquire_owned().await;
                let turn = turn.map_err(|_| sqlx::Error::PoolClosed)?;
                // A transaction that reads first and writes later would be refused if another wrote in between.
                let inner = pool.begin_with("BEGIN IMMEDIATE").await?;
                Ok(Transaction::Sqlite { inner, _turn: turn })
            }
        }
    }

    /// A connection to look something up with, outside of a transaction.
    ///
    /// # Errors
    /// The database's.
    pub async fn read(&self) -> Result<Reading> {
        match &self.pool {
            Pool::Postgres(pool) => Ok(Reading::Postgres(pool.acquire().await?)),
            Pool::Sqlite(pool) => Ok(Reading::Sqlite(pool.acquire().await?)),
        }
    }
}

/// A transaction; dropped, it is rolled back.
#[derive(Debug)]
pub enum Transaction {
    /// On PostgreSQL.
    Postgres(sqlx::Transaction<'static, sqlx::Postgres>),
    /// On SQLite.
    Sqlite {
        /// Before the turn: what is dropped first is rolled back first.
        #[doc(hidden)]
        inner: sqlx::Transaction<'static, sqlx::Sqlite>,
        #[doc(hidden)]
        _turn: OwnedSemaphorePermit,
    },
}

impl Transaction {
    /// What repositories and the outbox write on.
    pub fn connection(&mut self) -> Connection<'_> {
        match self {
            Self::Postgres(tx) => Connection::Postgres(tx),
            Self::Sqlite { inner, .. } => Connection::Sqlite(inner),
        }
    }

    /// Commits, and tells the relay that there may be something to send.
    ///
    /// # Errors
    /// The database's; whether it has committed is then unknown.
    pub async fn commit(self, outbox: &Outbox) -> Result<()> {
        match self {
            Self::Postgres(tx) => tx.commit().await?,
            Self::Sqlite { inner, .. } => inner.commit().await?,
        }
        outbox.wake();
        Ok(())
    }
}

/// A connection outside of a transaction.
#[derive(Debug)]
pub enum Reading {
    /// On PostgreSQL.
    Postgres(PoolConnection<sqlx::Postgres>),
    /// On SQLite.
    Sqlite(PoolConnection<sqlx::Sqlite>),
}

impl Reading {
    /// What repositories read on.
    pub fn connection(&mut self) -> Connection<'_> {
        match self {
            Self::Postgres(c) => Connection::Postgres(c),
            Self::Sqlite(c) => Connection::Sqlite(c),
        }
    }
}

/// Runs a use case to its end, also when its caller goes away: a client that hangs up must neither cut a `begin` in
/// half, which sqlx 0.9.0 answers with an open transaction in the pool, nor leave a COMMIT's outcome unknown.
///
/// # Errors
/// The use case's; a panic in it is an internal error.
pub async fn complete<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work.in_current_span())
        .await
        .unwrap_or_else(|e| {
            let error = pillarbox::Error::new(Kind::Panicked, "use case", "it did not end");
            Err(Error::Engine(error.caused_by(e)))
        })
}
