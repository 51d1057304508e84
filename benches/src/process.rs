//! A relay or a consumer in a process of its own, and what the system says about such a process.

use std::{io::Write as _, process::Stdio, sync::Arc, time::Duration};

use clap::Args;
use pillarbox::{Consumer, Outbox, transport::Transport};
use pillarbox_amqp::QueueType;
use sqlx::postgres::PgPoolOptions;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
};

use crate::{
    Measured,
    consume::{Insert, Tick},
    discard::Discard,
    stage::{Count, Counting, amqp, relay},
};

/// How often a process says how far it is: the grain of what is measured by it.
const SAYS: Duration = Duration::from_millis(20);
/// The system counts processor time in hundredths of a second, on every architecture.
const TICKS: f64 = 100.0;

/// Runs until its standard input ends.
#[derive(Args)]
pub(crate) struct Part {
    #[arg(long)]
    database: String,
    /// The broker; without one, a relay discards.
    #[arg(long)]
    amqp: Option<String>,
    /// A consumer, instead of a relay.
    #[arg(long)]
    consumer: bool,
}

impl Part {
    pub(crate) async fn run(&self) -> Measured<()> {
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect(&self.database)
            .await?;
        let (transport, count) = match &self.amqp {
            Some(url) => Counting::new(amqp(url, QueueType::Quorum, 4)?, u64::MAX),
            None => Counting::new(Discard, u64::MAX),
        };
        let running = if self.consumer {
            Consumer::new(&pool, transport as Arc<dyn Transport>, "bench")
                .on::<Tick>(Insert::at_once())
                .spawn()
        } else {
            relay(&Outbox::new(&pool), transport, 1_024).spawn()
        };
        let told = tokio::spawn(tell(count, running.watch()));
        tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()))
            .await??;
        told.abort();
        running.shutdown().await?;
        Ok(())
    }
}

/// `CONFIRMED HELD`, whenever one of them has changed.
async fn tell(count: Arc<Count>, health: watch::Receiver<pillarbox::Health>) {
    let mut looks = tokio::time::interval(SAYS);
    let mut told = (u64::MAX, usize::MAX);
    loop {
        looks.tick().await;
        let now = (count.stored(), health.borrow().held);
        if now != told {
            told = now;
            let mut out = std::io::stdout().lock();
            // The parent may be gone.
            let _ = writeln!(out, "{} {}", now.0, now.1).and_then(|()| out.flush());
        }
    }
}

/// How far a process is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Progress {
    pub(crate) confirmed: u64,
    /// Partitions or sources.
    pub(crate) held: usize,
}

/// A part at work. Killed when it is dropped.
pub(crate) struct Process {
    child: Child,
    progress: watch::Receiver<Progress>,
    reads: JoinHandle<()>,
}

impl Process {
    pub(crate) fn relay(database: &str, amqp: Option<&str>) -> Measured<Self> {
        Self::start(database, amqp, false)
    }

    pub(crate) fn consumer(database: &str, amqp: &str) -> Measured<Self> {
        Self::start(database, Some(amqp), true)
    }

    fn start(database: &str, amqp: Option<&str>, consumer: bool) -> Measured<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["part", "--database", database]);
        if let Some(url) = amqp {
            command.args(["--amqp", url]);
        }
        if consumer {
            command.arg("--consumer");
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let out = child.stdout.take().ok_or("no standard output")?;
        let (sender, progress) = watch::channel(Progress::default());
        let reads = tokio::spawn(async move {
            let mut lines = BufReader::new(out).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let mut words = line.split(' ').map(str::parse);
                if let (Some(Ok(confirmed)), Some(Ok(held))) = (words.next(), words.next()) {
                    let held = usize::try_from(held).unwrap_or_default();
                    sender.send_replace(Progress { confirmed, held });
                }
            }
        });
        Ok(Self {
            child,
            progress,
            reads,
        })
    }

    pub(crate) fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Waits until it is as far as that.
    pub(crate) async fn until(&mut self, far: impl FnMut(&Progress) -> bool) -> Measured<Progress> {
        let reached = self.progress.wait_for(far).await;
        Ok(*reached.map_err(|_| "the process ended early, see its errors above")?)
    }

    /// Lets it stop in order.
    pub(crate) async fn end(mut self) -> Measured<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().await?;
        self.reads.await?;
        if status.success() {
            return Ok(());
        }
        Err(format!("the process ended with {status}").into())
    }

    /// Its memory now, in MiB.
    pub(crate) fn rss(&self) -> Measured<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()?))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let kib: f64 = line
            .and_then(|l| l.split_whitespace().next())
            .ok_or("no VmRSS")?
            .parse()?;
        Ok(kib / 1_024.0)
    }

    /// Processor time so far, in seconds.
    pub(crate) fn cpu(&self) -> Measured<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id()?))?;
        // Behind the name, which may hold anything: state is the first, user and system time are the 12th and 13th.
        let (_, behind) = stat.rsplit_once(") ").ok_or("no stat")?;
        let times: Vec<&str> = behind.split(' ').skip(11).take(2).collect();
        let mut ticks = 0.0;
        for time in times {
            ticks += time.parse::<f64>()?;
        }
        Ok(ticks / TICKS)
    }

    fn id(&self) -> Measured<u32> {
        Ok(self.child.id().ok_or("it has ended")?)
    }
}
