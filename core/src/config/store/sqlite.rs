//! A SQLite file by its URL.

use std::{error::Error as _, io::ErrorKind, path::Path, time::Duration};

use sqlx::{
    ConnectOptions as _, Connection as _, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{FORMS, OPERATION, StoreSettings, parameters, shown};
use crate::error::{Error, Kind, Result, is_away, sqlstate};

/// How long a statement waits for the one writer.
const BUSY: Duration = Duration::from_secs(5);
/// Between tries to enter WAL mode, for which SQLite itself does not wait.
const AGAIN: Duration = Duration::from_millis(20);

pub(super) async fn pool(settings: &StoreSettings, url: &str) -> Result<SqlitePool> {
    let options = options(settings, url)?;
    if !parameters(url).any(|pair| pair == ("mode", "rw")) {
        make(settings, options.get_filename()).await?;
    }
    let pool = SqlitePoolOptions::new()
        .max_connections(settings.max_connections)
        .acquire_timeout(settings.connect_timeout)
        .connect_lazy_with(options);
    Ok(pool)
}

pub(super) async fn reach(settings: &StoreSettings, pool: &SqlitePool) -> Result<()> {
    let options = pool.connect_options();
    let target = target(options.get_filename());
    let deadline = Instant::now() + settings.connect_timeout;
    loop {
        let connection = timeout_at(deadline, options.connect())
            .await
            .map_err(|_| settings.late(&target))?;
        match connection {
            Ok(connection) => {
                // It is there; how it ends does not matter.
                drop(connection.close().await);
                return Ok(());
            }
            Err(e) if is_busy(&e) && Instant::now() + AGAIN < deadline => sleep(AGAIN).await,
            Err(e) => return Err(failed(&target, e)),
        }
    }
}

fn options(settings: &StoreSettings, url: &str) -> Result<SqliteConnectOptions> {
    for (name, value) in parameters(url) {
        match (name, value) {
            ("mode", "rw" | "rwc") => {}
            ("mode", _) => {
                let expected =
                    "mode=rw or mode=rwc: the engine writes, and what it writes must last";
                return Err(settings.wrong("another mode", expected));
            }
            _ => return Err(settings.wrong(shown(name), "mode, or none")),
        }
    }
    let options: SqliteConnectOptions = url.parse().map_err(|e: sqlx::Error| {
        let reason = e.source().map(ToString::to_string).unwrap_or_default();
        settings.wrong(format!("no URL of SQLite: {reason}"), FORMS)
    })?;
    let file = options.get_filename();
    let name = file.to_string_lossy();
    if url.contains(":memory:") || name.is_empty() {
        let expected = "a file, such as sqlite://data/events.db: what is in memory does not outlive the program";
        return Err(settings.wrong("no file", expected));
    }
    Ok(options
        .create_if_missing(false)
        .foreign_keys(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY))
}

/// Makes the file, and the last folder on the way to it. SQLite gives its `-wal` and `-shm` the rights of the file.
async fn make(settings: &StoreSettings, file: &Path) -> Result<()> {
    let failed = |e: std::io::Error| {
        let found = format!("{}, which cannot be made", file.display());
        let expected = "a file in a folder that is there and may be written";
        settings.wrong(found, expected).caused_by(e)
    };
    if let Some(folder) = file.parent().filter(|f| !f.as_os_str().is_empty()) {
        let mut builder = tokio::fs::DirBuilder::new();
        #[cfg(unix)]
        builder.mode(0o700);
        match builder.create(folder).await {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
    }
    let mut how = tokio::fs::OpenOptions::new();
    how.write(true).create_new(true);
    #[cfg(unix)]
    how.mode(0o600);
    match how.open(file).await {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(failed(e)),
    }
}

fn target(file: &Path) -> String {
    format!("the SQLite file {}", file.display())
}

fn is_busy(e: &sqlx::Error) -> bool {
    let code = sqlstate(e).and_then(|code| code.parse::<u32>().ok());
    code.is_some_and(|code| code & 0xff == 5)
}

fn failed(target: &str, e: sqlx::Error) -> Error {
    let kind = match is_away(&e) {
        true => Kind::Unavailable,
        false => Kind::Configuration,
    };
    Error::new(kind, OPERATION, format!("{target} cannot be used")).caused_by(e)
}
