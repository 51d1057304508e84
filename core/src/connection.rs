//! Both databases behind one type.

use std::{fmt, sync::Arc};

use crate::{
    error::{Error, Kind, Result},
    store::Store,
};

/// The host's pool.
#[derive(Debug, Clone)]
pub enum Pool {
    /// PostgreSQL.
    #[cfg(feature = "postgres")]
    Postgres(sqlx::PgPool),
    /// SQLite.
    #[cfg(feature = "sqlite")]
    Sqlite(sqlx::SqlitePool),
}

/// A connection inside a transaction, of either database: what a handler writes with and what enqueue accepts.
#[derive(Debug)]
pub enum Connection<'a> {
    /// PostgreSQL.
    #[cfg(feature = "postgres")]
    Postgres(&'a mut sqlx::PgConnection),
    /// SQLite.
    #[cfg(feature = "sqlite")]
    Sqlite(&'a mut sqlx::SqliteConnection),
}

impl Connection<'_> {
    /// The same connection for a shorter time.
    pub fn reborrow(&mut self) -> Connection<'_> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(c) => Connection::Postgres(c),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(c) => Connection::Sqlite(c),
        }
    }

    /// Whether sqlx has begun a transaction on it.
    #[must_use]
    pub fn is_in_transaction(&self) -> bool {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(c) => sqlx::Connection::is_in_transaction(&**c),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(c) => sqlx::Connection::is_in_transaction(&**c),
        }
    }
}

/// A database that holds, or shall hold, the engine's tables. Cheap to clone.
///
/// Made from a pool, `Database::from(&pool)`, with the tables in schema `pillarbox` (PostgreSQL) or with the prefix
/// `pillarbox_` (SQLite); [`Database::in_schema`] takes another name.
#[derive(Clone)]
pub struct Database {
    store: Arc<dyn Store>,
}

/// The schema's default name.
pub const SCHEMA: &str = "pillarbox";

impl Database {
    /// With the tables in another schema, or behind another prefix (`name_`).
    ///
    /// # Errors
    /// [`Kind::Invalid`] unless the name is a lower-case letter or `_` followed by at most 62 lower-case letters, digits or `_`.
    pub fn in_schema(pool: Pool, schema: &str) -> Result<Self> {
        check_identifier(schema)?;
        Ok(Self::checked(pool, schema))
    }

    fn checked(pool: Pool, schema: &str) -> Self {
        let store: Arc<dyn Store> = match pool {
            #[cfg(feature = "postgres")]
            Pool::Postgres(pool) => Arc::new(crate::store::postgres::Postgres::new(pool, schema)),
            #[cfg(feature = "sqlite")]
            Pool::Sqlite(pool) => Arc::new(crate::store::sqlite::Sqlite::new(pool, schema)),
        };
        Self { store }
    }

    /// Over any store.
    #[doc(hidden)]
    #[must_use]
    pub fn over(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// The store.
    #[doc(hidden)]
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The pool it was made from; none only in simulations.
    #[must_use]
    pub fn pool(&self) -> Option<Pool> {
        self.store.pool()
    }

    /// Closes the pool it was made from and the engine's own connections: for the end of a program, after its relays and
    /// consumers. SQLite then leaves one file, where there were three. Waits until every connection is given back.
    pub async fn close(&self) {
        self.store.close().await;
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Database")
            .field(&self.store.schema())
            .finish()
    }
}

impl From<&Database> for Database {
    fn from(database: &Database) -> Self {
        database.clone()
    }
}

#[cfg(feature = "postgres")]
impl From<&sqlx::PgPool> for Database {
    fn from(pool: &sqlx::PgPool) -> Self {
        Self::checked(Pool::Postgres(pool.clone()), SCHEMA)
    }
}

#[cfg(feature = "sqlite")]
impl From<&sqlx::SqlitePool> for Database {
    fn from(pool: &sqlx::SqlitePool) -> Self {
        Self::checked(Pool::Sqlite(pool.clone()), SCHEMA)
    }
}

/// Makes or completes the engine's tables: idempotent, safe when several programs start at once, apart from the host's
/// own migrations. On PostgreSQL the log gets 4 partitions; [`migrate_with`] takes another number.
///
/// # Errors
/// The database's own; [`Kind::Incompatible`] when a newer program made a schema that names this one too old.
pub async fn migrate(database: impl Into<Database>) -> Result<()> {
    migrate_with(database, 4).await
}

/// [`migrate`] with a number of log partitions: a power of two, 1 to 64. It counts only when the log is made;
/// [`repartition`] changes it later.
///
/// # Errors
/// As [`migrate`]; [`Kind::Invalid`] for another number.
pub async fn migrate_with(database: impl Into<Database>, partitions: u16) -> Result<()> {
    check_partitions("migrate", partitions)?;
    database.into().store.migrate(partitions).await
}

/// [`migrate_with`] as SQL for PostgreSQL, for teams whose database administrators run it: one statement, for any client, that
/// makes the tables in this schema or completes those of an older version, and changes nothing the next time.
///
/// ```
/// let script = pillarbox_core::migration_script("pillarbox", 4)?;
/// assert!(script.contains("CREATE TABLE"));
/// # Ok::<(), pillarbox_core::Error>(())
/// ```
///
/// # Errors
/// [`Kind::Invalid`] for a name that [`Database::in_schema`] refuses, or another number than [`migrate_with`] takes.
#[cfg(feature = "postgres")]
pub fn migration_script(schema: &str, partitions: u16) -> Result<String> {
    check_identifier(schema)?;
    check_partitions("migrate", partitions)?;
    Ok(crate::store::postgres::script(schema, partitions))
}

/// Gives the log of a PostgreSQL database more partitions, of which each has one relay at a time: a power of two, 1 to 64, and
/// not fewer than it has. The order of each key is kept, what is settled stays settled, and what waits goes on waiting.
///
/// Stop all relays first. Writers go on, but wait while the log is written anew: the fewer events it keeps, the shorter. Then
/// start the relays. The same number again does nothing.
///
/// ```no_run
/// # async fn f(pool: sqlx::PgPool) -> pillarbox_core::Result<()> {
/// pillarbox_core::repartition(&pool, 8).await
/// # }
/// ```
///
/// # Errors
/// [`Kind::Invalid`] for another number, for SQLite, whose log has one partition, and while a relay runs;
/// [`Kind::Unavailable`] when a transaction holds the log for longer than 3 s: nothing has changed then, try again.
pub async fn repartition(database: impl Into<Database>, partitions: u16) -> Result<()> {
    check_partitions("repartition", partitions)?;
    database.into().store.repartition(partitions).await
}

fn check_partitions(operation: &'static str, partitions: u16) -> Result<()> {
    if partitions.is_power_of_two() && partitions <= 64 {
        return Ok(());
    }
    let text = format!("{partitions} partitions; a power of two from 1 to 64 is expected");
    Err(Error::new(Kind::Invalid, operation, text))
}

pub(crate) fn check_identifier(name: &str) -> Result<()> {
    let first = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
    let rest = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if first && rest && name.len() <= 63 {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    let text = format!(
        "the schema name {shown:?} must begin with a lower-case letter or '_' and go on with lower-case letters, digits \
         or '_', 63 characters at most"
    );
    Err(Error::new(Kind::Invalid, "open database", text))
}
