//! RabbitMQ for tests: one node with an epmd of its own, both on loopback, beside any other node of this machine.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Once;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::process::{Nest, Port, Process, find, last_lines};
use super::{ServerError, fresh_name, variable};
use crate::address;

const NAME: &str = "RabbitMQ";
/// Where tests look for a broker's address.
const URL: &str = "TEST_AMQP_URL";
/// A file that tells how to command the broker at [`URL`]; [`RabbitMq::environment`] names it to other processes.
const CONTROL: &str = "TEST_AMQP_CONTROL";
const USER: &str = "pillarbox";
/// A busy machine takes several times the usual three seconds.
const PATIENCE: Duration = Duration::from_secs(90);

/// A RabbitMQ broker: one that was started here and ends with this value (or with the process, also a killed one), or one
/// whose address came from the environment, which can only be used and, where `pillarbox-servers` started it, commanded.
pub struct RabbitMq {
    /// Of the default vhost, with a user who may do everything.
    url: String,
    control: Option<Control>,
    local: Option<Local>,
}

#[derive(Debug)]
struct Local {
    nest: Nest,
    process: Option<Process>,
    amqp: Port,
    /// Held so that nobody takes them while the node is down.
    _ports: [Port; 2],
    _epmd: Process,
}

/// What it takes to command a node: the folder of its scripts, and the environment that points them to it.
#[derive(Clone, Debug)]
struct Control {
    scripts: PathBuf,
    environment: Vec<(String, String)>,
}

impl RabbitMq {
    /// Starts a broker of the caller's own, whatever the environment says, and waits until it greets AMQP clients.
    ///
    /// It listens on 127.0.0.1 alone, has no plugins, and a user with a password of its own (the URLs carry it). Takes
    /// about three seconds.
    ///
    /// # Errors
    /// [`ServerError::Missing`] without the programs; [`ServerError::Failed`] with the end of its log when it does not
    /// start within 90 s.
    pub async fn start() -> Result<Self, ServerError> {
        Self::start_with(&[]).await
    }

    /// As [`RabbitMq::start`], with lines for `rabbitmq.conf`: `[("consumer_timeout", "60000")]`.
    ///
    /// # Errors
    /// As [`RabbitMq::start`]; an unknown setting is a failed start.
    pub async fn start_with(settings: &[(&str, &str)]) -> Result<Self, ServerError> {
        let missing = ServerError::Missing {
            server: NAME,
            packages: "rabbitmq-server",
            variable: URL,
        };
        let programs = Programs::find().ok_or(missing)?;
        let mut tries = 3;
        loop {
            match Self::try_start(&programs, settings).await {
                // Somebody who does not claim ports as we do was faster.
                Err(ServerError::Failed { log, .. }) if tries > 1 && address_in_use(&log) => {
                    tries -= 1
                }
                done => return done,
            }
        }
    }

    async fn try_start(
        programs: &Programs,
        settings: &[(&str, &str)],
    ) -> Result<Self, ServerError> {
        const DOING: &str = "prepare RabbitMQ";
        let claim = || Port::claim().map_err(ServerError::io("find a port for RabbitMQ"));
        let (amqp, distribution, mapper) = (claim()?, claim()?, claim()?);
        let nest = Nest::new("rabbitmq", None).map_err(ServerError::io(DOING))?;
        let password = uuid::Uuid::new_v4().simple().to_string();
        let ports = [&amqp, &distribution, &mapper];
        let environment = prepare(&nest, &programs.scripts, ports, &password, settings)
            .map_err(ServerError::io(DOING))?;

        let port = mapper.number().to_string();
        let epmd = nest
            // In the foreground: as a daemon it would outlive the node, under a number that nobody knows.
            .start(
                "epmd",
                "KILL",
                &programs.epmd,
                ["-port", &port, "-address", "127.0.0.1"],
                &environment,
            )
            .map_err(ServerError::io("start epmd"))?;
        let listening = async || {
            TcpStream::connect(("127.0.0.1", mapper.number()))
                .await
                .is_ok()
        };
        if let Err(reason) = epmd.until(PATIENCE, listening).await {
            return Err(ServerError::Failed {
                server: NAME,
                operation: "start epmd",
                reason,
                log: nest.last_words("epmd"),
            });
        }
        let process = launch(&nest, &programs.scripts, &environment, amqp.number()).await?;
        let control = Control {
            scripts: programs.scripts.clone(),
            environment,
        };
        nest.write("control", &control.to_text())
            .map_err(ServerError::io(DOING))?;
        Ok(Self {
            url: format!("amqp://{USER}:{password}@127.0.0.1:{}/%2f", amqp.number()),
            control: Some(control),
            local: Some(Local {
                nest,
                process: Some(process),
                amqp,
                _ports: [distribution, mapper],
                _epmd: epmd,
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
        let control = variable(CONTROL)
            .map(|file| Control::read(Path::new(&file)))
            .transpose();
        Ok(Self {
            url,
            control: control.map_err(ServerError::io("read TEST_AMQP_CONTROL"))?,
            local: None,
        })
    }

    /// The address of the default vhost. The port stays the same over restarts.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Creates a vhost under a name that nobody else has, and gives its address.
    ///
    /// A broker from the environment that cannot be commanded (no `TEST_AMQP_CONTROL`) gives the vhost of its address to
    /// all, and that is printed once: names in tests must be unique all the same.
    ///
    /// # Errors
    /// [`ServerError::Failed`] with what `rabbitmqctl` says, [`ServerError::Io`] when it cannot be run.
    pub async fn create_vhost(&self) -> Result<String, ServerError> {
        const DOING: &str = "create a vhost for a test";
        if self.control.is_none() {
            static SAY: Once = Once::new();
            SAY.call_once(|| {
                let _ = writeln!(
                    std::io::stderr(),
                    "no {CONTROL}: all tests share the vhost of {URL}"
                );
            });
            return Ok(self.url.clone());
        }
        let name = fresh_name();
        // One command for the vhost and its permissions: each start of rabbitmqctl costs a quarter of a second.
        let definitions = format!(
            r#"{{"vhosts":[{{"name":"{name}"}}],"permissions":[{{"user":"{USER}","vhost":"{name}","configure":".*","write":".*","read":".*"}}]}}"#
        );
        let mut file = tempfile::NamedTempFile::new().map_err(ServerError::io(DOING))?;
        file.write_all(definitions.as_bytes())
            .map_err(ServerError::io(DOING))?;
        let path = file.path().display().to_string();
        self.ctl(&["import_definitions", &path]).await?;
        Ok(address::with_path(&self.url, &name).unwrap_or_else(|| self.url.clone()))
    }

    /// Runs `rabbitmqctl --quiet ARGUMENTS` against this node and gives what it printed.
    ///
    /// # Errors
    /// [`ServerError::NotOurs`] for a broker from the environment without `TEST_AMQP_CONTROL`; [`ServerError::Failed`]
    /// with what it printed when it exits with an error or takes over 90 s.
    pub async fn ctl(&self, arguments: &[&str]) -> Result<String, ServerError> {
        let not_ours = ServerError::NotOurs {
            server: "RabbitMq",
            operation: "run rabbitmqctl on",
            variable: URL,
        };
        let control = self.control.as_ref().ok_or(not_ours)?;
        let failed = |reason: String, log: String| ServerError::Failed {
            server: NAME,
            operation: "run rabbitmqctl",
            reason,
            log,
        };
        let mut command = tokio::process::Command::new(control.scripts.join("rabbitmqctl"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LANG", "C.UTF-8")
            .envs(
                control
                    .environment
                    .iter()
                    .map(|(name, value)| (name, value)),
            )
            .arg("--quiet")
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output())
            .await
            .map_err(|_| {
                failed(
                    format!("{arguments:?} took over {PATIENCE:?}"),
                    String::new(),
                )
            })?
            .map_err(ServerError::io("run rabbitmqctl"))?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(printed);
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        Err(failed(
            format!("{arguments:?}: {}", output.status),
            format!("{printed}{complaint}").trim().to_owned(),
        ))
    }

    /// The number of the node's process; `None` while it is stopped, and for a broker from the environment.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.local.as_ref()?.process.as_ref().map(Process::pid)
    }

    /// Stops the node in order (SIGTERM) and waits until it is gone. Nothing happens when it is stopped already.
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], or [`ServerError::Io`] when it is still there after 90 s.
    pub async fn stop(&mut self) -> Result<(), ServerError> {
        self.end_node(Signal::TERM, "stop").await
    }

    /// Kills the node (SIGKILL): what a broker had in memory alone is lost.
    ///
    /// # Errors
    /// As [`RabbitMq::stop`].
    pub async fn kill(&mut self) -> Result<(), ServerError> {
        self.end_node(Signal::KILL, "kill").await
    }

    async fn end_node(
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
            .map_err(ServerError::io("stop RabbitMQ"))?;
        local.process = None;
        Ok(())
    }

    /// Starts the stopped node again, on the same ports and data. Nothing happens when it runs.
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], or as [`RabbitMq::start`].
    pub async fn start_again(&mut self) -> Result<(), ServerError> {
        let control = self.control.clone();
        let local = self.local("start")?;
        if local
            .process
            .as_ref()
            .is_some_and(|process| !process.has_ended())
        {
            return Ok(());
        }
        if let Some(Control {
            scripts,
            environment,
        }) = control
        {
            local.process =
                Some(launch(&local.nest, &scripts, &environment, local.amqp.number()).await?);
        }
        Ok(())
    }

    /// [`RabbitMq::stop`] and [`RabbitMq::start_again`].
    ///
    /// # Errors
    /// As those two.
    pub async fn restart(&mut self) -> Result<(), ServerError> {
        self.stop().await?;
        self.start_again().await
    }

    /// Stops the node's process where it stands (SIGSTOP): connections stay open and nothing answers, until
    /// [`RabbitMq::thaw`].
    ///
    /// # Errors
    /// [`ServerError::NotOurs`], [`ServerError::Io`].
    pub fn freeze(&mut self) -> Result<(), ServerError> {
        self.signal(Signal::STOP, "freeze")
    }

    /// Lets a frozen node go on.
    ///
    /// # Errors
    /// As [`RabbitMq::freeze`].
    pub fn thaw(&mut self) -> Result<(), ServerError> {
        self.signal(Signal::CONT, "thaw")
    }

    fn signal(&mut self, signal: Signal, operation: &'static str) -> Result<(), ServerError> {
        match &self.local(operation)?.process {
            Some(process) => process
                .signal(signal)
                .map_err(ServerError::io("send RabbitMQ a signal")),
            None => Ok(()),
        }
    }

    /// What another process needs in its environment to use and command this broker as its own tests' broker.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let control = match &self.local {
            Some(local) => Some(local.nest.folder().join("control").display().to_string()),
            None => variable(CONTROL),
        };
        let url = (URL.to_owned(), self.url.clone());
        std::iter::once(url)
            .chain(control.map(|file| (CONTROL.to_owned(), file)))
            .collect()
    }

    /// Ends the node and its epmd, removes its folder, and returns when all is done. Dropping does the same without
    /// waiting.
    pub async fn end(self) {
        if let Some(local) = self.local {
            local.nest.end().await;
        }
    }

    fn local(&mut self, operation: &'static str) -> Result<&mut Local, ServerError> {
        self.local.as_mut().ok_or(ServerError::NotOurs {
            server: "RabbitMq",
            operation,
            variable: URL,
        })
    }
}

/// Without the address: it holds a password.
impl fmt::Debug for RabbitMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMq")
            .field("local", &self.local)
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl Control {
    fn to_text(&self) -> String {
        let lines: Vec<String> = self
            .environment
            .iter()
            .map(|(name, value)| format!("{name}={value}\n"))
            .collect();
        format!("{}\n{}", self.scripts.display(), lines.concat())
    }

    fn read(file: &Path) -> std::io::Result<Self> {
        let text = std::fs::read_to_string(file)?;
        let mut lines = text.lines();
        let scripts = PathBuf::from(lines.next().unwrap_or_default());
        let environment = lines
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.into(), value.into()));
        Ok(Self {
            scripts,
            environment: environment.collect(),
        })
    }
}

/// Where the broker's scripts and epmd are.
struct Programs {
    scripts: PathBuf,
    epmd: PathBuf,
}

impl Programs {
    fn find() -> Option<Self> {
        // Debian's scripts on the PATH refuse ordinary users and change the user as root: those in the library folder first.
        let library = [
            "/usr/lib/rabbitmq/bin",
            "/opt/homebrew/sbin",
            "/usr/local/sbin",
        ]
        .map(PathBuf::from);
        let server = find("rabbitmq-server", &library)?;
        find("erl", &[])?;
        let epmd = find(
            "epmd",
            &[
                "/usr/lib/erlang/bin",
                "/usr/lib64/erlang/bin",
                "/opt/homebrew/bin",
            ]
            .map(PathBuf::from),
        )?;
        Some(Self {
            scripts: server.parent()?.to_owned(),
            epmd,
        })
    }
}

/// Writes what the node reads, and gives the environment for it and for everything that speaks to it.
fn prepare(
    nest: &Nest,
    scripts: &Path,
    [amqp, distribution, mapper]: [&Port; 3],
    password: &str,
    settings: &[(&str, &str)],
) -> std::io::Result<Vec<(String, String)>> {
    let folder = |name: &str| nest.folder().join(name).display().to_string();
    let mut configuration = format!(
        "listeners.tcp.1 = 127.0.0.1:{}\n\
         default_user = {USER}\n\
         default_pass = {password}\n\
         # The default stops publishers on a disk that is nearly full, which would look like a fault of the test.\n\
         disk_free_limit.absolute = 1MB\n",
        amqp.number()
    );
    for (name, value) in settings {
        configuration.push_str(&format!("{name} = {value}\n"));
    }
    nest.write("rabbitmq.conf", &configuration)?;
    nest.write("rabbitmq-env.conf", "")?;
    nest.write("enabled_plugins", "[].\n")?;
    nest.write(".erlang.cookie", &uuid::Uuid::new_v4().simple().to_string())?;
    let pairs = [
        // Where Erlang looks for the cookie.
        ("HOME", nest.folder().display().to_string()),
        ("ERL_EPMD_PORT", mapper.number().to_string()),
        ("ERL_EPMD_ADDRESS", "127.0.0.1".into()),
        // For each Erlang program, rabbitmqctl too: it starts no epmd, which would outlive it, and listens on loopback.
        (
            "ERL_AFLAGS",
            "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}".into(),
        ),
        (
            "RABBITMQ_NODENAME",
            format!("pillarbox-{}@localhost", amqp.number()),
        ),
        ("RABBITMQ_DIST_PORT", distribution.number().to_string()),
        ("RABBITMQ_CTL_DIST_PORT_MIN", "0".into()),
        ("RABBITMQ_CTL_DIST_PORT_MAX", "0".into()),
        ("RABBITMQ_CONF_ENV_FILE", folder("rabbitmq-env.conf")),
        ("RABBITMQ_CONFIG_FILE", folder("rabbitmq.conf")),
        ("RABBITMQ_ADVANCED_CONFIG_FILE", folder("advanced.config")),
        ("RABBITMQ_GENERATED_CONFIG_DIR", folder("generated")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", folder("enabled_plugins")),
        ("RABBITMQ_MNESIA_BASE", folder("mnesia")),
        ("RABBITMQ_LOG_BASE", folder("log")),
        ("RABBITMQ_LOGS", folder("broker.log")),
        ("RABBITMQ_PID_FILE", folder("broker.pid")),
        // The script then becomes the node instead of watching over it, so the number that we know is the node's.
        ("RABBITMQ_ALLOW_INPUT", "1".into()),
        ("RABBITMQ_SERVER_START_ARGS", "-noinput +B i".into()),
    ];
    let mut environment = pairs.map(|(name, value)| (name.to_owned(), value)).to_vec();
    if let Some(core) = core_plugin(scripts) {
        // A folder with the broker's core alone saves the search through 60 others at each start: a second of 3.7.
        std::fs::create_dir(nest.folder().join("plugins"))?;
        std::os::unix::fs::symlink(
            &core,
            nest.folder()
                .join("plugins")
                .join(core.file_name().unwrap_or_default()),
        )?;
        environment.push(("RABBITMQ_PLUGINS_DIR".to_owned(), folder("plugins")));
    }
    Ok(environment)
}

/// The folder `plugins/rabbit-VERSION` beside the scripts, which holds the schema of the configuration file.
fn core_plugin(scripts: &Path) -> Option<PathBuf> {
    let real = scripts.join("rabbitmq-server").canonicalize().ok()?;
    let plugins = std::fs::read_dir(real.parent()?.parent()?.join("plugins")).ok()?;
    let mut folders = plugins.flatten().map(|entry| entry.path());
    folders.find(|path| path.join("priv/schema/rabbit.schema").is_file())
}

async fn launch(
    nest: &Nest,
    scripts: &Path,
    environment: &[(String, String)],
    amqp: u16,
) -> Result<Process, ServerError> {
    let process = nest
        // KILL: the data goes with it, and an orderly stop takes a second.
        .start(
            "node",
            "KILL",
            &scripts.join("rabbitmq-server"),
            [],
            environment,
        )
        .map_err(ServerError::io("start RabbitMQ"))?;
    match process
        .until(PATIENCE, async || greets(amqp).await.is_some())
        .await
    {
        Ok(()) => Ok(process),
        Err(reason) => {
            let _ = process.end_by(Signal::KILL, PATIENCE).await;
            let log = format!(
                "{}\n{}",
                nest.last_words("node"),
                last_lines(&nest.folder().join("broker.log"))
            );
            Err(ServerError::Failed {
                server: NAME,
                operation: "start",
                reason,
                log,
            })
        }
    }
}

/// Whether the broker answers the AMQP header with Connection.Start, the first method frame on channel 0.
async fn greets(port: u16) -> Option<()> {
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(b"AMQP\0\0\x09\x01").await.ok()?;
        let mut frame = [0; 11];
        stream.read_exact(&mut frame).await.ok()?;
        (frame[..3] == [1, 0, 0] && frame[7..] == [0, 10, 0, 10]).then_some(())
    };
    tokio::time::timeout(Duration::from_secs(5), exchange)
        .await
        .ok()?
}

fn address_in_use(log: &str) -> bool {
    let log = log.to_lowercase();
    log.contains("eaddrinuse") || log.contains("address already in use")
}
