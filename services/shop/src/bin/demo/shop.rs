//! The shop as a child process.

use std::{fs, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

use crate::{Result, driver::Addresses, sibling, stage::Stage};

/// How long a start may take, and how long until everything flows: a killed process leaves leases that have to run out.
const START: Duration = Duration::from_secs(90);
/// How long a gentle stop may take.
const STOP: Duration = Duration::from_secs(60);
/// How often a probe is asked.
const PROBE: Duration = Duration::from_millis(50);
/// How much of the log is shown where the shop fails.
const LAST_LINES: usize = 15;

pub(crate) struct Shop {
    child: Child,
    addresses: Addresses,
    log: std::path::PathBuf,
    // Kept open: a program must not fail for want of a reader.
    _stdout: Lines<BufReader<ChildStdout>>,
}

impl Shop {
    /// Starts it and reads where it listens.
    pub(crate) async fn start(stage: &Stage) -> Result<Self> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(stage.log())?;
        let mut child = Command::new(sibling("shop")?)
            .arg("--config")
            .arg(stage.config())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().ok_or("the shop has no stdout")?;
        let mut lines = BufReader::new(stdout).lines();
        let addresses = tokio::time::timeout(START, addresses(&mut lines)).await;
        match addresses {
            Ok(Ok(Some(addresses))) => Ok(Self {
                child,
                addresses,
                log: stage.log(),
                _stdout: lines,
            }),
            Ok(Err(e)) => Err(e),
            Ok(Ok(None)) => Err(failed("the shop ended at its start", &stage.log())),
            Err(_) => Err(failed("the shop does not start", &stage.log())),
        }
    }

    pub(crate) fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Waits until relays and consumers of both services run.
    pub(crate) async fn ready(&self) -> Result<()> {
        let client = reqwest::Client::new();
        let wait = async {
            for address in [&self.addresses.inventory, &self.addresses.orders] {
                while !is_ready(&client, address).await {
                    tokio::time::sleep(PROBE).await;
                }
            }
        };
        let waited = tokio::time::timeout(START, wait).await;
        waited.map_err(|_| failed("the shop does not become ready", &self.log))
    }

    /// Ends it as a crash would: SIGKILL.
    pub(crate) async fn kill(mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Ends it gently: SIGTERM, and it finishes what is in flight.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let id = self
            .child
            .id()
            .and_then(|id| Pid::from_raw(id.try_into().ok()?));
        kill_process(id.ok_or("the shop has ended by itself")?, Signal::TERM)?;
        let status = tokio::time::timeout(STOP, self.child.wait()).await;
        match status {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(_) => Err(failed("the shop did not stop cleanly", &self.log)),
            Err(_) => Err(failed("the shop does not stop", &self.log)),
        }
    }
}

/// Reads `NAME listens on ADDRESS` of both services; none if the shop ends before.
async fn addresses(lines: &mut Lines<BufReader<ChildStdout>>) -> Result<Option<Addresses>> {
    let (mut inventory, mut orders) = (None, None);
    while let Some(line) = lines.next_line().await? {
        if let Some(address) = line.strip_prefix("inventory listens on ") {
            inventory = Some(address.to_owned());
        } else if let Some(address) = line.strip_prefix("orders listens on ") {
            orders = Some(address.to_owned());
        }
        if let (Some(inventory), Some(orders)) = (&inventory, &orders) {
            let (inventory, orders) = (inventory.clone(), orders.clone());
            return Ok(Some(Addresses { inventory, orders }));
        }
    }
    Ok(None)
}

async fn is_ready(client: &reqwest::Client, address: &str) -> bool {
    let Ok(response) = client.get(format!("{address}/health/ready")).send().await else {
        return false;
    };
    let body: Result<Value, _> = response.json().await;
    body.is_ok_and(|body| body["status"] == "ready")
}

fn failed(what: &str, log: &std::path::Path) -> Box<dyn std::error::Error + Send + Sync> {
    let log = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    let last = lines
        .get(lines.len().saturating_sub(LAST_LINES)..)
        .unwrap_or_default();
    format!("{what}; its last words:\n{}", last.join("\n")).into()
}
