//! The child program that chaos tests kill: what it is told, what it says, and the parent's handle on it.

use std::{
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
};

use crate::World;

/// What a child runs. Both databases and no broker: everything on `memory`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    /// Runs a relay from here.
    pub producer: Option<String>,
    /// Runs a consumer into here.
    pub consumer: Option<String>,
    /// The broker; none for `memory`.
    pub amqp: Option<String>,
    /// The consumer's group.
    pub group: String,
    /// The leases' term.
    pub lease_ms: u64,
    /// Acknowledgements are announced (`keeps the ack of ID`) and never sent.
    pub hold_acks: bool,
    /// What the handler takes for each event.
    pub work_ms: u64,
    /// The handler fails at its first attempt on each so-manieth of a key; 0 is never.
    pub fails_each: u32,
    /// Most events of a partition that a fault may repeat; 0 is the relay's default.
    pub window: usize,
    /// The handler ends the process over this key.
    pub aborts_on: Option<String>,
}

impl Task {
    /// Relay and consumer of a world.
    #[must_use]
    pub fn both(world: &World) -> Self {
        Self {
            producer: Some(world.urls.0.clone()),
            consumer: Some(world.urls.1.clone()),
            amqp: world.amqp_url.clone(),
            group: world.group.clone(),
            lease_ms: 2_000,
            hold_acks: false,
            work_ms: 0,
            fails_each: 0,
            window: 0,
            aborts_on: None,
        }
    }

    /// The relay alone.
    #[must_use]
    pub fn relay(world: &World) -> Self {
        Self {
            consumer: None,
            ..Self::both(world)
        }
    }

    /// The consumer alone.
    #[must_use]
    pub fn consumer(world: &World) -> Self {
        Self {
            producer: None,
            ..Self::both(world)
        }
    }
}

/// A running child. Killed when it is dropped.
pub struct Node {
    child: Child,
    said: Arc<Said>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Said {
    text: Mutex<String>,
    more: watch::Sender<()>,
}

impl Said {
    fn lock(&self) -> MutexGuard<'_, String> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(self: Arc<Self>, from: impl AsyncRead + Unpin) {
        let mut lines = BufReader::new(from).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let mut text = self.lock();
            text.push_str(&line);
            text.push('\n');
            drop(text);
            self.more.send_replace(());
        }
    }
}

impl Node {
    /// Starts `program` (`env!("CARGO_BIN_EXE_pillarbox-test-node")`).
    #[must_use]
    pub fn start(program: &str, task: &Task) -> Self {
        let mut child = Command::new(program)
            .arg(serde_json::to_string(task).expect("JSON"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("a child");
        let said = Arc::new(Said::default());
        let readers = vec![
            tokio::spawn(said.clone().read(child.stdout.take().expect("a pipe"))),
            tokio::spawn(said.clone().read(child.stderr.take().expect("a pipe"))),
        ];
        Self {
            child,
            said,
            readers,
        }
    }

    /// All that it has said, on both outputs.
    #[must_use]
    pub fn said(&self) -> String {
        self.said.lock().clone()
    }

    /// The end of it, for a test that fails.
    #[must_use]
    pub fn last_words(&self) -> String {
        let said = self.said.lock();
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Waits until it has said this.
    pub async fn says(&self, what: &str) {
        self.says_after(0, what).await;
    }

    /// Waits until it has said this behind the first `bytes` of what it said.
    ///
    /// # Panics
    /// After a minute, with what it said instead.
    pub async fn says_after(&self, bytes: usize, what: &str) {
        let mut more = self.said.more.subscribe();
        let heard = async {
            while !self.said.lock()[bytes..].contains(what) {
                // The sender lives as long as this value.
                let _ = more.changed().await;
            }
        };
        let heard = tokio::time::timeout(Duration::from_secs(60), heard).await;
        assert!(
            heard.is_ok(),
            "no {what:?}; it says:\n{}",
            self.last_words()
        );
    }

    /// SIGKILL; returns when it is gone.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("a kill");
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// SIGTERM: drains. Returns whether it ended well.
    pub async fn end(&mut self) -> bool {
        self.signal(Signal::TERM);
        let ended = tokio::time::timeout(Duration::from_secs(60), self.child.wait()).await;
        // Its last words.
        for reader in std::mem::take(&mut self.readers) {
            reader.await.expect("a reader");
        }
        let ended = ended.expect("it ends within a minute");
        ended.expect("an exit").success()
    }

    /// SIGSTOP: it stands still, its connections stay open.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok());
        let pid = id.and_then(Pid::from_raw).expect("a running child");
        kill_process(pid, signal).expect("a signal");
    }
}
