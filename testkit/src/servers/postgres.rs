//! PostgreSQL for tests. What promises rest on stays as in production: fsync on, full page writes on, UTF-8.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr as _;
use std::time::Duration;

use rustix::process::Signal;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection};

use super::process::{Nest, Port, Process, User, find, signal_pid};
use super::{ServerError, fresh_name, variable};
use crate::address;

const NAME: &str = "PostgreSQL";
/// Where tests look for a server's address.
const URL: &str = "TEST_POSTGRES_URL";
/// A busy machine is slow to start a server; a stuck one must not hold up a run for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a server is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Sessions end, then a checkpoint: a regular stop.
    Fast,
    /// At once, without a checkpoint: for the data the same as a crash, so the next start recovers from the WAL.
    Immediate,
}

/// A PostgreSQL server: one that was started here and ends with this value (or with the process, also a killed one), or
/// one whose address came from the environment, which can only be asked for databases.
pub struct Postgres {
    /// Of a superuser, or of a user who may create databases.
    url: String,
    local: Option<Local>,
}

#[derive(Debug)]
struct Local {
    nest: Nest,
    /// Held so that nobody takes it while the server is down.
    _port: Port,
    binaries: PathBuf,
    settings: BTreeMap<String, String>,
    process: Option<Process>,
}

impl Postgres {
    /// Starts a server of the caller's own, whatever the environment says, and waits until it takes connections.
    ///
    /// It listens on 127.0.0.1 alone, asks for a password (the URLs carry it), has fsync on, `max_prepared_transactions`
    /// 10 and databases in UTF-8 with locale C.UTF-8. As root it runs as `postgres`, else `nobody`.
    ///
    /// # Errors
    /// [`ServerError::Missing`] without the programs; [`ServerError::Failed`] with the end of its log when it does not
    /// start within a minute.
    pub async fn start() -> Result<Self, ServerError> {
        Self::start_with(&[]).await
    }

    /// As [`Postgres::start`], with settings that go before its own: `[("max_prepared_transactions", "0")]`.
    ///
    /// # Errors
    /// As [`Postgres::start`]; an unknown setting is a failed start.
    pub async fn start_with(settings: &[(&str, &str)]) -> Result<Self, ServerError> {
        let missing = ServerError::Missing {
            server: NAME,
            packages: "postgresql",
            variable: URL,
        };
        let binaries = binaries().ok_or(missing)?;
        let user = User::instead_of_root(&["postgres", "nobody"]);
        let nest =
            Nest::new("postgres", user).map_err(ServerError::io("make a folder for PostgreSQL"))?;
        let password = uuid::Uuid::new_v4().simple().to_string();
        initdb(&nest, &binaries, &password).await?;

        let mut tries = 3;
        let (port, process, settings) = loop {
            let port = Port::claim().map_err(ServerError::io("find a port for PostgreSQL"))?;
            let settings = own_settings(port.number(), settings);
            match launch(&nest, &binaries, &settings).await {
                Ok(process) => break (port, process, settings),
                // Somebody who does not claim ports as we do was faster.
                Err(ServerError::Failed { log, .. })
                    if tries > 1 && log.contains("could not bind") =>
                {
                    tries -= 1
                }
                Err(error) => return Err(error),
            }
        };
        let url = format!(
            "postgres://postgres:{password}@127.0.0.1:{}/postgres",
            port.number()
        );
        Ok(Self {
            url,
            local: Some(Local {
                nest,
                _port: port,
                binaries,
                settings,
                process: Some(process),
            }),
        })
    }

    /// The server at the address in the environment, else one that is started now.
    ///
    /// # Errors
    /// As `start`.
    pub async fn given_or_started() -> Result<Self, ServerError> {
        match variable(URL) {
            Some(url) => Ok(Self { url, local: None }),
            None => Self::start().await,
        }
    }

    /// One of the programs that come with the server, such as `pg_dump`; none where they are not installed.
    #[must_use]
    pub fn program(name: &str) -> Option<PathBuf> {
        let folder = binaries()?;
        // A link on the path leads to the others.
        let server = std::fs::canonicalize(folder.join("postgres")).ok();
        let beside = server.and_then(|server| Some(server.parent()?.join(name)));
        let mut places = [Some(folder.join(name)), beside].into_iter().flatten();
        places.find(|path| path.is_file())
    }

    /// The address of a database on this server. The port stays the same over restarts.
    ///
    /// A text from the environment that is no URL comes back as it is.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        address::with_path(&self.url, database).unwrap_or_else(|| self.url.clone())
    }

    /// Creates an empty database under a name that nobody else has, and gives its address.
    ///
    /// On a server from the environment it stays there afterwards, named `pillarbox_test_…`.
    ///
    /// # Errors
    /// [`ServerError::Sql`] when the server is down or the user may not create databases.
    pub async fn create_database(&self) -> Result<String, ServerError> {
        const DOING: &str = "create a database for a test";
        let name = fresh_name();
        let mut connection = self.connect(DOING).await?;
        // template0: nobody can be connected to it, and its encoding may be chosen.
        let sql = format!(r#"CREATE DATABASE "{name}" TEMPLATE template0 ENCODING 'UTF8'"#);
        sqlx::query(AssertSqlSafe(sql))
            .execute(&mut connection)
            .await
            .map_err(ServerError::sql(DOING))?;
        connection.close().await.map_err(ServerError::sql(DOING))?;
        Ok(self.url(&name))
    }

    /// The number of the postmaster; `None` while it is stopped, and for a server from the environment.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.local.as_ref()?.process.as_ref().map(Process::pid)
    }

    /// The data folder; `None` for a server from the environment.
    #[must_use]
    pub fn data_folder(&self) -> Option<PathBuf> {
        self.local.as_ref().map(|local| data(&local.nest))
    }

    /// Stops the server and waits until it is gone. Nothing happens when it is stopped already.
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], or [`ServerError::Io`] when it is still there after a minute.
    pub async fn stop(&mut self, how: Shutdown) -> Result<(), ServerError> {
        let local = self.local("stop")?;
        let Some(process) = &local.process else {
            return Ok(());
        };
        let signal = match how {
            Shutdown::Fast => Signal::INT,
            Shutdown::Immediate => Signal::QUIT,
        };
        process
            .end_by(signal, PATIENCE)
            .await
            .map_err(ServerError::io("stop PostgreSQL"))?;
        local.process = None;
        Ok(())
    }

    /// Starts the stopped server again, on the same port and data. Nothing happens when it runs.
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], or as [`Postgres::start`].
    pub async fn start_again(&mut self) -> Result<(), ServerError> {
        let local = self.local("start")?;
        if let Some(process) = &local.process
            && !process.has_ended()
        {
            return Ok(());
        }
        local.process = Some(launch(&local.nest, &local.binaries, &local.settings).await?);
        Ok(())
    }

    /// [`Postgres::stop`] and [`Postgres::start_again`].
    ///
    /// # Errors
    /// As those two.
    pub async fn restart(&mut self, how: Shutdown) -> Result<(), ServerError> {
        self.stop(how).await?;
        self.start_again().await
    }

    /// Kills one backend with SIGKILL, so that the server throws out all sessions and recovers from its WAL. Returns when
    /// it takes connections again.
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], [`ServerError::Sql`] when the server is down or does not come back within a minute.
    pub async fn kill_backend(&mut self) -> Result<(), ServerError> {
        const DOING: &str = "kill a backend of PostgreSQL";
        self.local("kill a backend of")?;
        let mut victim = self.connect(DOING).await?;
        let mut witness = self.connect(DOING).await?;
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(&mut victim)
            .await
            .map_err(ServerError::sql(DOING))?;
        signal_pid(pid.unsigned_abs(), Signal::KILL).map_err(ServerError::io(DOING))?;

        // Right after the kill the server may still take a connection, only to throw it out. Once it has thrown out the
        // witness, it takes none until it has recovered.
        let recovered = async {
            while sqlx::query("SELECT pg_sleep(0.005)")
                .execute(&mut witness)
                .await
                .is_ok()
            {}
            loop {
                match self.connect(DOING).await {
                    Ok(connection) => {
                        return connection.close().await.map_err(ServerError::sql(DOING));
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        let late = |_| ServerError::Failed {
            server: NAME,
            operation: "recover",
            reason: format!("no connection {PATIENCE:?} after a backend was killed"),
            log: String::new(),
        };
        tokio::time::timeout(PATIENCE, recovered)
            .await
            .map_err(late)?
    }

    /// What another process needs in its environment to use this server as its own tests' server.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        vec![(URL.into(), self.url.clone())]
    }

    /// Ends the server and removes its folder, and returns when both are done. Dropping does the same without waiting.
    pub async fn end(self) {
        if let Some(local) = self.local {
            local.nest.end().await;
        }
    }

    fn local(&mut self, operation: &'static str) -> Result<&mut Local, ServerError> {
        self.local.as_mut().ok_or(ServerError::NotOurs {
            server: "Postgres",
            operation,
            variable: URL,
        })
    }

    async fn connect(&self, operation: &'static str) -> Result<PgConnection, ServerError> {
        let options = PgConnectOptions::from_str(&self.url).map_err(ServerError::sql(operation))?;
        options
            .disable_statement_logging()
            .connect()
            .await
            .map_err(ServerError::sql(operation))
    }
}

/// Without the address: it holds a password.
impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres")
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

fn data(nest: &Nest) -> PathBuf {
    nest.folder().join("data")
}

/// The folder of the server programs: those on the PATH, else the newest version below the distributions' folders, where
/// Debian keeps them off the PATH.
fn binaries() -> Option<PathBuf> {
    let has_both =
        |folder: &Path| folder.join("initdb").is_file() && folder.join("postgres").is_file();
    let on_path = find("initdb", &[]).and_then(|initdb| initdb.parent().map(Path::to_owned));
    if let Some(folder) = on_path.filter(|folder| has_both(folder)) {
        return Some(folder);
    }
    let version = |folder: &Path| {
        folder
            .file_name()?
            .to_str()?
            .trim_start_matches("pgsql-")
            .parse::<u32>()
            .ok()
    };
    let debian = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let others = std::fs::read_dir("/usr")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let versions =
        debian.chain(others.filter(|path| path.to_string_lossy().starts_with("/usr/pgsql-")));
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|folder| Some((version(&folder)?, folder.join("bin"))))
        .filter(|(_, folder)| has_both(folder))
        .collect();
    found.sort();
    found.pop().map(|(_, folder)| folder)
}

async fn initdb(nest: &Nest, binaries: &Path, password: &str) -> Result<(), ServerError> {
    const DOING: &str = "make a data folder for PostgreSQL";
    let secret = nest
        .write("password", &format!("{password}\n"))
        .map_err(ServerError::io(DOING))?;
    // Without LANG, initdb would choose SQL_ASCII. `password` rather than SCRAM: it only travels over loopback, and SCRAM's
    // key derivation in an unoptimised build costs each connection many milliseconds. `trust` would make every local user
    // a superuser, who can run programs as this one.
    let arguments = [
        "--username=postgres",
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        "--auth=password",
        // Of the empty data folder alone; the server itself syncs.
        "--no-sync",
    ];
    let files = [
        format!("--pgdata={}", data(nest).display()),
        format!("--pwfile={}", secret.display()),
    ];
    let process = nest
        .start(
            "initdb",
            "KILL",
            &binaries.join("initdb"),
            arguments
                .into_iter()
                .chain(files.iter().map(String::as_str)),
            &[],
        )
        .map_err(ServerError::io(DOING))?;
    let in_time = tokio::time::timeout(PATIENCE, process.ended())
        .await
        .is_ok();
    if in_time && process.succeeded() {
        return Ok(());
    }
    let reason = if in_time {
        "initdb failed".into()
    } else {
        format!("initdb took over {PATIENCE:?}")
    };
    Err(ServerError::Failed {
        server: NAME,
        operation: "make a data folder",
        reason,
        log: nest.last_words("initdb"),
    })
}

fn own_settings(port: u16, given: &[(&str, &str)]) -> BTreeMap<String, String> {
    let port = port.to_string();
    let own = [
        ("listen_addresses", "127.0.0.1"),
        ("port", &port),
        // TCP only: a socket path under a long TMPDIR would exceed the system's 107 bytes.
        ("unix_socket_directories", ""),
        // In the data folder, which is removed, rather than in /dev/shm, which is not and may be small.
        ("dynamic_shared_memory_type", "mmap"),
        ("fsync", "on"),
        ("max_connections", "200"),
        ("max_prepared_transactions", "10"),
        // Many test servers share one disk.
        ("max_wal_size", "256MB"),
        ("log_line_prefix", "%m [%p] %q%d "),
    ];
    own.iter()
        .chain(given)
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

async fn launch(
    nest: &Nest,
    binaries: &Path,
    settings: &BTreeMap<String, String>,
) -> Result<Process, ServerError> {
    let data = data(nest);
    let mut arguments = vec!["-D".to_owned(), data.display().to_string()];
    arguments.extend(
        settings
            .iter()
            .flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")]),
    );
    let process = nest
        // QUIT: the postmaster ends its children itself and frees its shared memory; after KILL that would stay.
        .start(
            "postgres",
            "QUIT",
            &binaries.join("postgres"),
            arguments.iter().map(String::as_str),
            &[],
        )
        .map_err(ServerError::io("start PostgreSQL"))?;
    let pid = process.pid().to_string();
    let status = data.join("postmaster.pid");
    let ready = async || {
        // Written by the server itself: its number in the first line, its state in the eighth. After a crash there is an
        // old one.
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        text.lines().next() == Some(&pid)
            && text
                .lines()
                .nth(7)
                .is_some_and(|state| state.trim() == "ready")
    };
    match process.until(PATIENCE, ready).await {
        Ok(()) => Ok(process),
        Err(reason) => {
            // A half-started server must not stand in the way of the next try.
            let _ = process.end_by(Signal::QUIT, PATIENCE).await;
            Err(ServerError::Failed {
                server: NAME,
                operation: "start",
                reason,
                log: nest.last_words("postgres"),
            })
        }
    }
}
