//! `[store]`: which database, and opening it.

#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;

use std::{fmt, path::PathBuf, time::Duration};

use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Deserializer};

use super::{
    problem::{Scope, Wrong, cut, nearest},
    tables::{lasting, within},
};
use crate::{
    connection::{Database, Pool, SCHEMA},
    error::{Error, Kind, Result},
};

const OPERATION: &str = "open database";
const FORMS: &str = "postgres://user:password@host:5432/database or sqlite://folder/file.db";

/// `[store]`: the database of the program's own data and of the engine's tables in it.
///
/// `Debug` shows no URL.
#[derive(Clone)]
pub struct StoreSettings {
    /// The PostgreSQL schema, or the prefix in SQLite, of the engine's tables. Defaults to `pillarbox`.
    pub schema: String,
    /// The most connections of the pool; the engine's own few come on top. Defaults to 10.
    pub max_connections: u32,
    /// The most time for opening a connection, and for waiting for a free one. Defaults to 10 s.
    pub connect_timeout: Duration,
    url: Option<SecretString>,
    url_file: Option<PathBuf>,
    scope: Scope,
}

/// `[store]` as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct StoreTable {
    #[serde(deserialize_with = "secret")]
    url: Option<SecretString>,
    url_file: Option<PathBuf>,
    schema: String,
    max_connections: u32,
    #[serde(with = "humantime_serde")]
    connect_timeout: Duration,
}

fn secret<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SecretString>, D::Error> {
    Ok(Option::<String>::deserialize(d)?.map(SecretString::from))
}

impl Default for StoreTable {
    fn default() -> Self {
        Self {
            url: None,
            url_file: None,
            schema: SCHEMA.to_owned(),
            max_connections: 10,
            connect_timeout: Duration::from_secs(10),
        }
    }
}

impl Default for StoreSettings {
    fn default() -> Self {
        let table = StoreTable::default();
        Self {
            schema: table.schema,
            max_connections: table.max_connections,
            connect_timeout: table.connect_timeout,
            url: table.url,
            url_file: table.url_file,
            scope: Scope::default(),
        }
    }
}

impl StoreSettings {
    /// The defaults, for the database at `url`: `postgres://user:password@host:port/database`, or `sqlite://path`.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: Some(SecretString::from(url.into())),
            ..Self::default()
        }
    }

    pub(super) fn build(table: StoreTable, scope: Scope) -> Result<Self, Wrong> {
        if table.url.is_some() && table.url_file.is_some() {
            let found = "both url and url_file";
            return Err(Wrong {
                path: Vec::new(),
                found: found.into(),
                expected: "one of them".into(),
            });
        }
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3_600));
        Ok(Self {
            schema: table.schema,
            max_connections: within("max_connections", table.max_connections, 1, 1_000)?,
            connect_timeout: lasting("connect_timeout", table.connect_timeout, second / 10, hour)?,
            url: table.url,
            url_file: table.url_file,
            scope,
        })
    }

    /// Opens the database: tries once, for at most `connect_timeout`, and gives back what is connected.
    ///
    /// `url_file` is read now. A SQLite file that is missing is made, with rights for its owner alone, and so is its
    /// folder; it is used in WAL mode, with `synchronous = FULL`, foreign keys, and 5 s of patience with a busy writer.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when the database cannot be reached or does not answer in time;
    /// [`Kind::Configuration`] when it refuses the user or has no such database, and for a URL that is none. The text
    /// names the database (host, port and name, or the file), never the password.
    pub async fn open(&self) -> Result<Database> {
        let url = self.current_url().await?;
        let url = url.expose_secret();
        let scheme = url.split_once(':').map(|(scheme, _)| scheme);
        let pool = match scheme {
            Some("postgres" | "postgresql") => self.open_postgres(url)?,
            Some("sqlite") => self.open_sqlite(url).await?,
            Some(other)
                if other.len() <= 20 && other.bytes().all(|b| b.is_ascii_alphanumeric()) =>
            {
                let near = nearest(other, ["postgres", "sqlite"].into_iter());
                let near = near.map(|n| format!(" ({n}?)")).unwrap_or_default();
                return Err(self.wrong(
                    format!("a URL that begins with {other}:"),
                    format!("{FORMS}{near}"),
                ));
            }
            _ => return Err(self.wrong("a text that is no URL (not shown)", FORMS)),
        };
        let database = Database::in_schema(pool.clone(), &self.schema);
        let database = database.map_err(|_| self.wrong_schema())?;
        self.reach(pool).await?;
        Ok(database)
    }

    /// [`migration_script`](crate::migration_script) for this database. Connects to nothing.
    ///
    /// # Errors
    /// [`Kind::Configuration`] for SQLite, and for a schema whose name is none; [`Kind::Invalid`] for another number of partitions
    /// than [`migrate_with`](crate::migrate_with) takes.
    #[cfg(feature = "postgres")]
    pub fn migration_script(&self, partitions: u16) -> Result<String> {
        let url = self.url.as_ref().map(|url| url.expose_secret());
        if url.is_some_and(|url| url.starts_with("sqlite:")) {
            let expected = "one of PostgreSQL: a script for SQLite would not be done as a whole or not at all; migrate without printing";
            return Err(self.wrong("a URL of SQLite", expected));
        }
        crate::connection::check_identifier(&self.schema).map_err(|_| self.wrong_schema())?;
        crate::connection::migration_script(&self.schema, partitions)
    }

    async fn current_url(&self) -> Result<SecretString> {
        if let Some(url) = &self.url {
            return Ok(url.clone());
        }
        let Some(file) = &self.url_file else {
            let text = "one of them, such as url = \"sqlite://data/events.db\"";
            return Err(self
                .scope
                .wrong(&["store"], "neither url nor url_file", text));
        };
        let read = tokio::fs::read_to_string(file).await.map_err(|e| {
            let found = format!("{}, which cannot be read", file.display());
            let expected = "a file that holds the URL";
            self.scope
                .wrong(&["store", "url_file"], found, expected)
                .caused_by(e)
        })?;
        Ok(SecretString::from(read.trim()))
    }

    #[cfg(feature = "postgres")]
    fn open_postgres(&self, url: &str) -> Result<Pool> {
        postgres::pool(self, url).map(Pool::Postgres)
    }

    #[cfg(not(feature = "postgres"))]
    fn open_postgres(&self, _: &str) -> Result<Pool> {
        Err(self.wrong(
            "a URL of PostgreSQL",
            "the feature \"postgres\", which this program was built without",
        ))
    }

    #[cfg(feature = "sqlite")]
    async fn open_sqlite(&self, url: &str) -> Result<Pool> {
        sqlite::pool(self, url).await.map(Pool::Sqlite)
    }

    #[cfg(not(feature = "sqlite"))]
    async fn open_sqlite(&self, _: &str) -> Result<Pool> {
        Err(self.wrong(
            "a URL of SQLite",
            "the feature \"sqlite\", which this program was built without",
        ))
    }

    /// Connects once, so that what is wrong is said now, and by the database itself: a pool would try for all its time
    /// and then say only that it did.
    async fn reach(&self, pool: Pool) -> Result<()> {
        match pool {
            #[cfg(feature = "postgres")]
            Pool::Postgres(pool) => postgres::reach(self, &pool).await,
            #[cfg(feature = "sqlite")]
            Pool::Sqlite(pool) => sqlite::reach(self, &pool).await,
        }
    }

    fn wrong_schema(&self) -> Error {
        let expected = "a lower-case letter or '_', then lower-case letters, digits or '_', 63 characters at most";
        let found = format_args!("{:?}", cut(&self.schema));
        self.scope.wrong(&["store", "schema"], found, expected)
    }

    /// An error about the URL.
    fn wrong(&self, found: impl fmt::Display, expected: impl fmt::Display) -> Error {
        let key = match self.url {
            Some(_) => "url",
            None => "url_file",
        };
        self.scope.wrong(&["store", key], found, expected)
    }

    /// The error for a database that did not answer in time.
    fn late(&self, target: &str) -> Error {
        let limit = humantime_serde::re::humantime::format_duration(self.connect_timeout);
        let text = format!("{target} gave no answer within {limit}");
        Error::new(Kind::Unavailable, OPERATION, text)
    }
}

impl fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreSettings")
            .field("url", &self.url.as_ref().map(|_| "***"))
            .field("url_file", &self.url_file)
            .field("schema", &self.schema)
            .field("max_connections", &self.max_connections)
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

/// The names and values after a URL's `?`.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
fn parameters(url: &str) -> impl Iterator<Item = (&str, &str)> {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// A parameter's name as an error may show it: it may be the rest of a password with a `?` in it.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
fn shown(name: &str) -> String {
    let good = name.len() <= 30
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b"_-".contains(&b));
    match good {
        true => format!("the parameter {name:?}"),
        false => {
            "a parameter (not shown: if it is part of a password, write its '?' as %3F)".to_owned()
        }
    }
}
