use std::{process::Stdio, sync::Arc};

use clap::Args;
use pillarbox::Outbox;
use pillarbox_amqp::QueueType;
use sqlx::postgres::PgPoolOptions;
use tokio::process::Command;

use crate::{
    Measured,
    stage::{Counting, Stage, amqp, relay},
};

#[derive(Args)]
pub(crate) struct Memory {
    /// The small backlog.
    #[arg(long, default_value_t = 10_000)]
    small: u32,
    /// The large one.
    #[arg(long, default_value_t = 1_000_000)]
    large: u32,
}

/// A relay in a process of its own.
#[derive(Args)]
pub(crate) struct Child {
    #[arg(long)]
    database: String,
    #[arg(long)]
    amqp: String,
    /// Ends after so many confirms; 0: runs until its standard input ends.
    #[arg(long, default_value_t = 0)]
    events: u32,
}

impl Memory {
    pub(crate) async fn run(&self) -> Measured<()> {
        let small = peak(self.small).await?;
        let large = peak(self.large).await?;
        println!("backlog {:>9}: peak {small:.1} MiB", self.small);
        println!("backlog {:>9}: peak {large:.1} MiB", self.large);
        println!("difference {:.1} MiB", large - small);
        Ok(())
    }
}

async fn peak(events: u32) -> Measured<f64> {
    let stage = Stage::new().await?;
    stage.fill(events, 450, 1_000).await?;
    let child = child(&stage, events)?.wait_with_output().await?;
    let text = String::from_utf8(child.stdout)?;
    let kib: f64 = text
        .trim()
        .parse()
        .map_err(|_| format!("the relay said {text:?}"))?;
    Ok(kib / 1_024.0)
}

/// A relay of this stage in a process of its own.
pub(crate) fn child(stage: &Stage, events: u32) -> Measured<tokio::process::Child> {
    let child = Command::new(std::env::current_exe()?)
        .args([
            "relay",
            "--database",
            &stage.database_url,
            "--amqp",
            &stage.amqp_url,
        ])
        .args(["--events", &events.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    Ok(child)
}

impl Child {
    pub(crate) async fn run(&self) -> Measured<()> {
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect(&self.database)
            .await?;
        let (transport, count) = Counting::new(
            amqp(&self.amqp, QueueType::Classic, 1)?,
            u64::from(self.events),
        );
        let running = relay(&Outbox::new(&pool), Arc::clone(&transport) as _, 1_024).spawn();
        if self.events > 0 {
            count.reached().await;
        } else {
            tokio::task::spawn_blocking(|| {
                std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
            })
            .await??;
        }
        running.shutdown().await?;
        let status = std::fs::read_to_string("/proc/self/status")?;
        let peak = status
            .lines()
            .find_map(|l| l.strip_prefix("VmHWM:"))
            .unwrap_or("0 kB");
        println!("{}", peak.trim().trim_end_matches("kB").trim());
        Ok(())
    }
}
