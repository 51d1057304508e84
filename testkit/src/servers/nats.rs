//! NATS for tests: one server with JetStream, on loopback, beside any other server of this machine.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;

use super::process::{Nest, Port, Process, find};
use super::{ServerError, variable};
use crate::address;

const NAME: &str = "NATS";
/// Where tests look for a server's address.
const URL: &str = "TEST_NATS_URL";
/// The folder where accounts of the server at [`URL`] are claimed; [`Nats::environment`] names it to other processes.
const ACCOUNTS: &str = "TEST_NATS_ACCOUNTS";
/// Accounts of a server, for as many tests. An account without users costs the server nothing to speak of.
const ACCOUNT_COUNT: usize = 600;
/// The oldest version that has what Pillarbox needs of JetStream.
const OLDEST: (u32, u32) = (2, 10);
const PATIENCE: Duration = Duration::from_secs(60);

/// A NATS server with JetStream: one that was started here and ends with this value (or with the process, also a killed
/// one), or one whose address came from the environment, which can only be used.
pub struct Nats {
    /// With the user of an account that all may use.
    url: String,
    accounts: Option<PathBuf>,
    local: Option<Local>,
}

#[derive(Debug)]
struct Local {
    nest: Nest,
    program: PathBuf,
    process: Option<Process>,
    port: Port,
}

impl Nats {
    /// Starts a server of the caller's own, whatever the environment says, and waits until it greets clients.
    ///
    /// It listens on 127.0.0.1 alone, flushes each message to disk before it acknowledges it, takes messages of 2 MiB, and
    /// has accounts for tests. Takes about a tenth of a second.
    ///
    /// # Errors
    /// [`ServerError::Missing`] without a program of version 2.10 or later; [`ServerError::Failed`] with the end of its log
    /// when it does not start within a minute.
    pub async fn start() -> Result<Self, ServerError> {
        let password = uuid::Uuid::new_v4().simple().to_string();
        let mut accounts = String::new();
        for n in 0..ACCOUNT_COUNT {
            let user = account(n);
            accounts.push_str(&format!(
                "  {user} {{ jetstream: enabled, users: [{{ user: {user}, password: \"{password}\" }}] }}\n"
            ));
        }
        let settings = format!("max_payload: 2MB\naccounts {{\n{accounts}}}\n");
        // The first account is the one of `url`.
        let login = format!("{}:{password}@", account(0));
        Self::start_as(&login, &settings, true).await
    }

    /// Starts a server with these lines in its configuration in place of the accounts and `max_payload`:
    /// `"authorization { token: \"t\" }"`. [`Nats::url`] then names no user.
    ///
    /// # Errors
    /// As [`Nats::start`]; an unknown setting is a failed start.
    pub async fn start_with(settings: &str) -> Result<Self, ServerError> {
        Self::start_as("", settings, false).await
    }

    async fn start_as(
        login: &str,
        settings: &str,
        with_accounts: bool,
    ) -> Result<Self, ServerError> {
        let missing = ServerError::Missing {
            server: NAME,
            packages: "golang-go, then go install github.com/nats-io/nats-server/v2@v2.10.29, for Debian's nats-server is older than 2.10",
            variable: URL,
        };
        let program = program().ok_or(missing)?;
        let mut tries = 3;
        loop {
            match Self::try_start(&program, login, settings, with_accounts).await {
                // Somebody who does not claim ports as we do was faster.
                Err(ServerError::Failed { log, .. })
                    if tries > 1 && log.contains("address already in use") =>
                {
                    tries -= 1;
                }
                done => return done,
            }
        }
    }

    async fn try_start(
        program: &Path,
        login: &str,
        settings: &str,
        with_accounts: bool,
    ) -> Result<Self, ServerError> {
        const DOING: &str = "prepare NATS";
        let port = Port::claim().map_err(ServerError::io("find a port for NATS"))?;
        let nest = Nest::new("nats", None).map_err(ServerError::io(DOING))?;
        let data = nest.folder().join("data");
        let configuration = format!(
            "listen: \"127.0.0.1:{port}\"\nserver_name: \"pillarbox-{port}\"\n\
             # What was acknowledged survives a power cut: promises are tested.\n\
             jetstream {{ store_dir: \"{data}\", sync_interval: always, max_file_store: 20GB }}\n{settings}\n",
            port = port.number(),
            data = data.display(),
        );
        nest.write("nats.conf", &configuration)
            .map_err(ServerError::io(DOING))?;
        let accounts = nest.folder().join("accounts");
        if with_accounts {
            std::fs::create_dir(&accounts).map_err(ServerError::io(DOING))?;
        }
        let process = launch(&nest, program, port.number()).await?;
        Ok(Self {
            url: format!("nats://{login}127.0.0.1:{}", port.number()),
            accounts: with_accounts.then_some(accounts),
            local: Some(Local {
                nest,
                program: program.to_owned(),
                process: Some(process),
                port,
            }),
        })
    }

    /// The server at the address in the environment, else one that is started now.
    ///
    /// # Errors
    /// As `start`.
    pub async fn given_or_started() -> Result<Self, ServerError> {
        let Some(url) = variable(URL) else {
            return Self::start().await;
        };
        Ok(Self {
            url,
            accounts: variable(ACCOUNTS).map(PathBuf::from),
            local: None,
        })
    }

    /// The server's address. The port stays the same over restarts.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Gives the address of an account that nobody else has: streams and subjects of its own.
    ///
    /// A server from the environment without `TEST_NATS_ACCOUNTS` gives the account of its address to all, and that is
    /// printed once: names in tests must be unique all the same.
    ///
    /// # Errors
    /// [`ServerError::Failed`] when all accounts are taken, [`ServerError::Io`] when none can be claimed.
    pub fn create_account(&self) -> Result<String, ServerError> {
        let Some(folder) = &self.accounts else {
            static SAY: Once = Once::new();
            SAY.call_once(|| {
                let _ = writeln!(
                    std::io::stderr(),
                    "no {ACCOUNTS}: all tests share the account of {URL}"
                );
            });
            return Ok(self.url.clone());
        };
        for n in 1..ACCOUNT_COUNT {
            let name = account(n);
            // Of several processes only one makes the file.
            match std::fs::File::create_new(folder.join(&name)) {
                Ok(_) => {
                    let url = address::with_user(&self.url, &name);
                    return Ok(url.unwrap_or_else(|| self.url.clone()));
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(ServerError::io("claim an account of NATS")(e)),
            }
        }
        Err(ServerError::Failed {
            server: NAME,
            operation: "give an account",
            reason: format!("all {ACCOUNT_COUNT} are taken"),
            log: String::new(),
        })
    }

    /// The number of the server's process; `None` while it is stopped, and for a server from the environment.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.local.as_ref()?.process.as_ref().map(Process::pid)
    }

    /// Stops the server in order (SIGTERM) and waits until it is gone. Nothing happens when it is stopped already.
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], or [`ServerError::Io`] when it is still there after a minute.
    pub async fn stop(&mut self) -> Result<(), ServerError> {
        self.end_process(Signal::TERM, "stop").await
    }

    /// Kills the server (SIGKILL): what it had in memory alone is lost.
    ///
    /// # Errors
    /// As [`Nats::stop`].
    pub async fn kill(&mut self) -> Result<(), ServerError> {
        self.end_process(Signal::KILL, "kill").await
    }

    async fn end_process(
        &mut self,
        signal: Signal,
        operation: &'static str,
    ) -> Result<(), ServerError> {
        let local = self.local(operation)?;
        let Some(process) = &local.process else {
            return Ok(());
        };
        process
            .end_by(signal, PATIENCE)
            .await
            .map_err(ServerError::io("stop NATS"))?;
        local.process = None;
        Ok(())
    }

    /// Starts the stopped server again, on the same port and data. Nothing happens when it runs.
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], or as [`Nats::start`].
    pub async fn start_again(&mut self) -> Result<(), ServerError> {
        let local = self.local("start")?;
        if local.process.as_ref().is_some_and(|p| !p.has_ended()) {
            return Ok(());
        }
        local.process = Some(launch(&local.nest, &local.program, local.port.number()).await?);
        Ok(())
    }

    /// [`Nats::stop`] and [`Nats::start_again`].
    ///
    /// # Errors
    /// As those two.
    pub async fn restart(&mut self) -> Result<(), ServerError> {
        self.stop().await?;
        self.start_again().await
    }

    /// Stops the server's process where it stands (SIGSTOP): connections stay open and nothing answers, until
    /// [`Nats::thaw`].
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], [`ServerError::Io`].
    pub fn freeze(&mut self) -> Result<(), ServerError> {
        self.signal(Signal::STOP, "freeze")
    }

    /// Lets a frozen server go on.
    ///
    /// # Errors
    /// As [`Nats::freeze`].
    pub fn thaw(&mut self) -> Result<(), ServerError> {
        self.signal(Signal::CONT, "thaw")
    }

    fn signal(&mut self, signal: Signal, operation: &'static str) -> Result<(), ServerError> {
        match &self.local(operation)?.process {
            Some(process) => process
                .signal(signal)
                .map_err(ServerError::io("send NATS a signal")),
            None => Ok(()),
        }
    }

    /// What another process needs in its environment to use this server as its own tests' server.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let accounts = self.accounts.as_ref();
        let accounts = accounts.map(|f| (ACCOUNTS.to_owned(), f.display().to_string()));
        std::iter::once((URL.to_owned(), self.url.clone()))
            .chain(accounts)
            .collect()
    }

    /// Ends the server, removes its folder, and returns when all is done. Dropping does the same without waiting.
    pub async fn end(self) {
        if let Some(local) = self.local {
            local.nest.end().await;
        }
    }

    fn local(&mut self, operation: &'static str) -> Result<&mut Local, ServerError> {
        self.local.as_mut().ok_or(ServerError::NotOurs {
            server: "Nats",
            operation,
            variable: URL,
        })
    }
}

/// Without the address: it holds a password.
impl fmt::Debug for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nats")
            .field("local", &self.local)
            .field("accounts", &self.accounts)
            .finish_non_exhaustive()
    }
}

fn account(n: usize) -> String {
    format!("test{n}")
}

/// The first program that is new enough: where Go puts it, then on the PATH, then where Debian puts it.
fn program() -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = variable("GOBIN").map(PathBuf::from).into_iter().collect();
    folders.extend(variable("GOPATH").map(|path| PathBuf::from(path).join("bin")));
    folders.extend(variable("HOME").map(|home| PathBuf::from(home).join("go/bin")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&path));
    folders.extend(["/usr/local/bin", "/usr/sbin", "/opt/homebrew/bin"].map(PathBuf::from));
    folders
        .into_iter()
        .filter_map(|folder| find("nats-server", std::slice::from_ref(&folder)))
        .find(|program| version(program).is_some_and(|version| version >= OLDEST))
}

/// `nats-server: v2.10.29`
fn version(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let printed = String::from_utf8(output.stdout).ok()?;
    let mut numbers = printed.trim().rsplit_once('v')?.1.split('.');
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

async fn launch(nest: &Nest, program: &Path, port: u16) -> Result<Process, ServerError> {
    let process = nest
        // KILL: the data goes with it.
        .start("server", "KILL", program, ["--config", "nats.conf"], &[])
        .map_err(ServerError::io("start NATS"))?;
    match process
        .until(PATIENCE, async || greets(port).await.is_some())
        .await
    {
        Ok(()) => Ok(process),
        Err(reason) => {
            let _ = process.end_by(Signal::KILL, PATIENCE).await;
            Err(ServerError::Failed {
                server: NAME,
                operation: "start",
                reason,
                log: nest.last_words("server"),
            })
        }
    }
}

/// Whether the server says `INFO {…}`. It listens once JetStream has recovered, so one that waits for a TLS handshake
/// before it says anything is there too.
async fn greets(port: u16) -> Option<()> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    let mut line = String::new();
    let mut stream = BufReader::new(stream);
    match tokio::time::timeout(Duration::from_secs(1), stream.read_line(&mut line)).await {
        Ok(_) => line.starts_with("INFO ").then_some(()),
        Err(_) => Some(()),
    }
}
