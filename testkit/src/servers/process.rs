//! Processes that end with their owner, in a temporary folder that ends with them. Knows no server.
//!
//! **Invariant**: once a [`Nest`] stands, nothing in it outlives the process that made it, not even one killed by
//! SIGKILL. A small shell, the keeper, holds the other end of a pipe; when the pipe closes, for whatever reason, it ends
//! by number what was started and removes the folder.

use std::ffi::OsStr;
use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;

/// `$1` is the folder. Its `run/` holds one file for each process: its number, and the signal that ends it.
/// Moving `run/` away first makes a process that is just being started fail to enter itself, so it never starts.
const KEEPER: &str = r#"
trap '' HUP INT TERM
while read -r _; do :; done
mv "$1/run" "$1/ended" 2>/dev/null

alive() { # an ended process that nobody has collected counts as ended
    kill -0 "$1" 2>/dev/null || return 1
    case $(cat "/proc/$1/stat" 2>/dev/null) in *') Z '*) return 1 ;; esac
}
each() { # each COMMAND: for every process that is still there
    left=0
    for file in "$folder"/ended/*.pid; do
        read -r pid signal 2>/dev/null <"$file" || continue
        alive "$pid" || continue
        left=1
        "$@"
    done
}
ask() { kill -CONT "$pid"; kill "-$signal" "$pid"; }
force() { kill -KILL "$pid"; }
patience() { # patience TENTHS
    tenths=$1
    while each true; [ "$left" = 1 ] && [ "$tenths" -gt 0 ]; do sleep 0.1; tenths=$((tenths - 1)); done
}

folder=$1
each ask 2>/dev/null
each true; [ "$left" = 0 ] || sleep 0.02
patience 60
each force 2>/dev/null
patience 20
for _ in 1 2 3 4 5; do rm -rf "$folder" 2>/dev/null && break; sleep 0.2; done
"#;

/// Enters its own number before it becomes the program, so that no started process is ever unknown to the keeper.
const STARTER: &str = r#"
entry=$1 signal=$2; shift 2
echo "$$ $signal" >"$entry.new" && mv "$entry.new" "$entry.pid" && exec "$@"
"#;

/// The user that a process runs as, when it may not be this one.
#[derive(Clone, Copy, Debug)]
pub(super) struct User {
    uid: u32,
    gid: u32,
}

impl User {
    /// The first of `names` that this machine has. `None` unless this process is root: nobody else can switch.
    pub(super) fn instead_of_root(names: &[&str]) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let accounts = std::fs::read_to_string("/etc/passwd").ok()?;
        names.iter().find_map(|name| {
            let account = accounts
                .lines()
                .find(|line| line.split(':').next() == Some(name))?;
            let mut ids = account.split(':').skip(2);
            Some(Self {
                uid: ids.next()?.parse().ok()?,
                gid: ids.next()?.parse().ok()?,
            })
        })
    }

    fn give(user: Option<Self>, path: &Path) -> io::Result<()> {
        user.map_or(Ok(()), |User { uid, gid }| {
            std::os::unix::fs::chown(path, Some(uid), Some(gid))
        })
    }
}

/// A private temporary folder, and the keeper that ends what runs in it.
#[derive(Debug)]
pub(super) struct Nest {
    folder: PathBuf,
    user: Option<User>,
    /// Closing the pipe is the order to end everything. `None` once that is done.
    keeper: Option<(Child, ChildStdin)>,
}

impl Nest {
    /// Makes the folder, owned by `user`, and starts the keeper.
    pub(super) fn new(name: &str, user: Option<User>) -> io::Result<Self> {
        // TMPDIR may be root's alone, where the other user cannot go.
        let parent = if user.is_some() {
            PathBuf::from("/tmp")
        } else {
            std::env::temp_dir()
        };
        let folder = tempfile::Builder::new()
            .prefix(&format!("pillarbox-{name}-"))
            .tempdir_in(parent)?;
        let run = folder.path().join("run");
        std::fs::create_dir(&run)?;
        User::give(user, folder.path())?;
        User::give(user, &run)?;

        let mut nest = Self {
            folder: folder.path().to_owned(),
            user,
            keeper: None,
        };
        let mut keeper = nest
            .command("/bin/sh")
            .args(["-c", KEEPER, "pillarbox-keeper"])
            .arg(folder.path())
            .current_dir("/")
            .stdin(Stdio::piped())
            .spawn()?;
        let pipe = keeper
            .stdin
            .take()
            .ok_or_else(|| io::Error::other("no pipe to the keeper"))?;
        nest.folder = folder.keep();
        nest.keeper = Some((keeper, pipe));
        Ok(nest)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a file that the nest's user owns and nobody else reads.
    pub(super) fn write(&self, name: &str, content: &str) -> io::Result<PathBuf> {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = self.folder.join(name);
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?
            .write_all(content.as_bytes())?;
        User::give(self.user, &path)?;
        Ok(path)
    }

    /// A command in the folder with an environment of its own: what this process inherited (`PG…`, `RABBITMQ_…`, `LANG`)
    /// must not reach a test server. In a process group of its own: Ctrl-C must not end it before the tests.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env(
                "PATH",
                std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into()),
            )
            .env("HOME", &self.folder)
            .env("LANG", "C.UTF-8")
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        if let Some(User { uid, gid }) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Starts `program` with its output appended to `ROLE.log` in the folder. When the nest ends, it gets `end`
    /// (a signal's name without SIG), six seconds later KILL.
    pub(super) fn start<'a>(
        &self,
        role: &str,
        end: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = &'a str>,
        environment: &[(String, String)],
    ) -> io::Result<Process> {
        let entry = self.folder.join("run").join(role);
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.log(role))?;
        User::give(self.user, &self.log(role))?;
        let mut child = self
            .command("/bin/sh")
            .args(["-c", STARTER, "pillarbox-starter"])
            .arg(&entry)
            .arg(end)
            .arg(program)
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let pid = child.id();
        let (sender, exit) = watch::channel(None);
        // A thread, not a tokio child: a server shared by many tests outlives the runtime that it was started on.
        std::thread::Builder::new()
            .name(format!("wait-{role}"))
            .spawn(move || {
                let status = child.wait();
                // Its number is free for others from now on: the keeper must not signal it.
                let _ = std::fs::remove_file(entry.with_extension("pid"));
                sender.send_replace(status.ok());
            })?;
        Ok(Process { pid, exit })
    }

    fn log(&self, role: &str) -> PathBuf {
        self.folder.join(format!("{role}.log"))
    }

    /// The last lines that `role` wrote.
    pub(super) fn last_words(&self, role: &str) -> String {
        last_lines(&self.log(role))
    }

    /// Ends everything in the nest and waits until it is gone.
    pub(super) async fn end(mut self) {
        if let Some((mut keeper, pipe)) = self.keeper.take() {
            drop(pipe);
            let _ = tokio::task::spawn_blocking(move || keeper.wait()).await;
        }
    }
}

impl Drop for Nest {
    fn drop(&mut self) {
        if let Some((mut keeper, pipe)) = self.keeper.take() {
            drop(pipe);
            // Collects the keeper; without the thread it would be collected when this process ends.
            let _ = std::thread::Builder::new().spawn(move || keeper.wait());
        }
    }
}

/// One running process of a nest.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    exit: watch::Receiver<Option<ExitStatus>>,
}

impl Process {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it has ended, however that came.
    pub(super) async fn ended(&self) {
        // An error means that the waiting thread is gone, and it goes when the process has.
        let _ = self.exit.clone().wait_for(Option::is_some).await;
    }

    pub(super) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Whether it ended with exit code 0.
    pub(super) fn succeeded(&self) -> bool {
        self.exit.borrow().is_some_and(|status| status.success())
    }

    /// Sends a signal; nothing happens when the process has ended.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.has_ended() {
            return Ok(());
        }
        signal_pid(self.pid, signal)
    }

    /// Sends `signal` and waits until the process has ended, `limit` at most.
    pub(super) async fn end_by(&self, signal: Signal, limit: Duration) -> io::Result<()> {
        self.signal(signal)?;
        let ended = tokio::time::timeout(limit, self.ended()).await;
        ended.map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("still there {limit:?} after the signal"),
            )
        })
    }

    /// Waits until `ready` says so. The error tells why it never will.
    pub(super) async fn until(
        &self,
        limit: Duration,
        mut ready: impl AsyncFnMut() -> bool,
    ) -> Result<(), String> {
        let poll = async {
            // A foreign process sends no signal when it is ready, so it is asked.
            while !ready().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = poll => Ok(()),
            () = self.ended() => Err("it ended by itself".into()),
            () = tokio::time::sleep(limit) => Err(format!("not ready after {limit:?}")),
        }
    }
}

/// Sends a signal to a process by its number.
pub(super) fn signal_pid(pid: u32, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("not a process number"))?;
    kill_process(pid, signal).map_err(io::Error::from)
}

/// The end of a log, enough to see why a server did not start.
pub(super) fn last_lines(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// A program in one of `folders`, else on the PATH.
pub(super) fn find(program: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders
        .iter()
        .chain(&on_path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// A port on 127.0.0.1 that stays ours while this value lives, also when the server on it is down.
///
/// Two test runs at the same time must not draw the same port between choosing and listening, so the UDP port of the same
/// number is held as a claim: exclusive, free of files, and gone with the process.
#[derive(Debug)]
pub(super) struct Port {
    number: u16,
    _claim: UdpSocket,
}

impl Port {
    /// Below the range that systems hand out by themselves (32768 on Linux), else an outgoing connection could take the
    /// port of a server that is being restarted; away from the well-known ports of brokers and databases.
    const RANGE: std::ops::Range<u16> = 26_000..30_000;

    pub(super) fn claim() -> io::Result<Self> {
        let width = u128::from(Self::RANGE.end - Self::RANGE.start);
        let first = uuid::Uuid::new_v4().as_u128() % width;
        for step in 0..width {
            let offset = u16::try_from((first + step) % width).unwrap_or_default();
            let number = Self::RANGE.start + offset;
            let Ok(claim) = UdpSocket::bind((Ipv4Addr::LOCALHOST, number)) else {
                continue;
            };
            if TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok() {
                return Ok(Self {
                    number,
                    _claim: claim,
                });
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("no free port in {:?}", Self::RANGE),
        ))
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }
}
