//! The program, its configuration, and psql.

use std::{
    fs::Permissions, io::Write as _, os::unix::fs::PermissionsExt as _, path::PathBuf,
    process::Stdio, time::Duration,
};

use pillarbox_tests::World;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_pillarbox");

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A configuration in a folder of its own.
pub(crate) struct Config {
    folder: TempDir,
}

/// What a run left behind.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// Its answer; fails if it did not exit with this code.
    #[track_caller]
    pub(crate) fn json(&self, code: i32) -> Value {
        assert_eq!(self.code, code, "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Fails unless it exited with this code and said all of this on stderr.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, says: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        for text in says {
            assert!(self.err.contains(text), "{text:?} is not in {self:?}");
        }
        assert!(!self.err.contains("panicked"), "{self:?}");
    }
}

impl Config {
    pub(crate) fn new(toml: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("shop.toml");
        let mut file = std::fs::File::create(&path).unwrap();
        file.set_permissions(Permissions::from_mode(0o600)).unwrap();
        file.write_all(toml.as_bytes()).unwrap();
        Self { folder }
    }

    /// A database alone.
    pub(crate) fn of(url: &str) -> Self {
        Self::new(&format!(
            "[store]\nurl = '{url}'\n[transport]\nkind = 'memory'\n"
        ))
    }

    /// The producer's side of a world.
    pub(crate) fn producer(world: &World) -> Self {
        Self::of(&world.urls.0)
    }

    /// A new SQLite file beside the configuration.
    pub(crate) fn sqlite() -> Self {
        let config = Self::new("");
        let url = format!(
            "sqlite://{}",
            config.folder.path().join("shop.db").display()
        );
        let toml = format!("[store]\nurl = '{url}'\n[transport]\nkind = 'memory'\n");
        std::fs::write(config.path(), toml).unwrap();
        config
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("shop.toml")
    }

    /// The command with `--config`, reading nothing.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = bare(arguments);
        command.arg("--config").arg(self.path());
        command
    }

    pub(crate) async fn run(&self, arguments: &[&str]) -> Ran {
        finish(self.command(arguments)).await
    }
}

/// The program with these arguments alone.
pub(crate) fn bare(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(arguments)
        .env_remove("RUST_LOG")
        .env("USER", "ada")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

pub(crate) async fn finish(mut command: Command) -> Ran {
    let child = command.spawn().unwrap();
    ended(child).await
}

/// Waits for its end.
pub(crate) async fn ended(child: Child) -> Ran {
    ended_within(PATIENCE, child).await
}

/// Waits for the end of something that fetches or builds.
pub(crate) async fn ended_within(patience: Duration, child: Child) -> Ran {
    let output = tokio::time::timeout(patience, child.wait_with_output());
    let output = output.await.expect("it ends in time").unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs a script as a person would. The client comes with the server that the tests need anyway.
pub(crate) async fn psql(url: &str, script: &str) -> Ran {
    let mut command = Command::new("psql");
    command
        .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", url])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().expect("psql");
    let mut input = child.stdin.take().unwrap();
    let script = script.to_owned();
    let write = async move {
        use tokio::io::AsyncWriteExt as _;
        // It may have ended at an error.
        let _ = input.write_all(script.as_bytes()).await;
    };
    let (ran, ()) = tokio::join!(ended(child), write);
    ran
}
