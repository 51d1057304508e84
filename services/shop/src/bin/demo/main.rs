//! Shows what the shop promises, on a real shop: drives its HTTP API with the orders of `orders.csv`, kills the whole
//! process twice in the middle, sends every event again, and lets an independent program count.
//!
//! Exits as the check does: with 1 when a promise is broken.

mod driver;
mod progress;
mod shop;
mod stage;

use std::{
    io::Write as _,
    path::PathBuf,
    process::{ExitCode, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Parser;
use tokio::{process::Command, sync::watch};

use driver::{Addresses, Driver, Order, Restock};
use progress::Progress;
use shop::Shop;
use stage::Stage;

pub(crate) type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Longer than this and something hangs.
const DEADLINE: Duration = Duration::from_secs(600);
/// How long the last events may take, in seconds: leases of killed processes have to run out.
const SETTLE_SECONDS: &str = "120";

const ORDERS: &str = include_str!("../../../orders.csv");
const PRODUCTS: &str = include_str!("../../../products.csv");

/// Runs the shop, kills it twice, and checks that no event was lost or applied twice.
#[derive(Parser)]
struct Options {
    /// The shop's configuration. Where it names SQLite files, new ones in a temporary folder take their place; else
    /// PILLARBOX_INVENTORY__STORE__URL and PILLARBOX_ORDERS__STORE__URL name two empty databases.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Place only so many orders.
    #[arg(long, value_name = "NUMBER")]
    orders: Option<usize>,
    /// So many orders a second at most: a shop with many customers, not one that is stormed.
    #[arg(long, value_name = "NUMBER", default_value_t = 60)]
    pace: u32,
    /// Leave databases and the shop's log where they are.
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let played = tokio::select! {
        played = tokio::time::timeout(DEADLINE, play(&options)) => {
            played.unwrap_or_else(|_| Err(format!("not done after {DEADLINE:?}").into()))
        }
        () = interrupted() => Err("interrupted".into()),
    };
    played.unwrap_or_else(|e| {
        say(format_args!("demo: {e}"));
        ExitCode::from(2)
    })
}

async fn play(options: &Options) -> Result<ExitCode> {
    let stage = Stage::set(&options.config, options.keep)?;
    let orders: Vec<Order> = lines(ORDERS)?;
    let count = options.orders.unwrap_or(orders.len()).min(orders.len());
    let orders = orders.get(..count).unwrap_or_default().to_vec();

    let (addresses, at) = watch::channel(None);
    let progress = Progress::new(count);
    let driver = Driver::new(at, progress.clone())?;
    let mut shop = open(&stage, &addresses).await?;
    driver.add_products(&lines(PRODUCTS)?).await?;
    say(format_args!(
        "the shop runs; {count} orders over HTTP, two kills on the way"
    ));

    progress.begin();
    let driving = tokio::spawn({
        let (driver, pace) = (driver.clone(), options.pace);
        async move { driver.run(orders, pace).await }
    });
    let mut restarts = Vec::new();
    // As many as may come before the shop is back: the second kill is to hit the middle too.
    driver.let_in(count / 2);
    progress.placed(count / 3).await;
    shop = restart(shop, &stage, &addresses, &mut restarts, async || Ok(())).await?;
    let restocks: Vec<Restock> = lines(PRODUCTS)?;
    driver.restock(&restocks).await?;
    driver.let_in(count);
    progress.placed(count * 2 / 3).await;
    shop = restart(shop, &stage, &addresses, &mut restarts, async || {
        let events = stage.set_back().await?;
        progress.note(&format!("cursors set back: {events} events come again"));
        Ok(())
    })
    .await?;
    driving.await??;
    progress.finish();

    // What it finds broken now it will find again, with the table.
    check(&stage, &[], &["--quiet", "--wait", SETTLE_SECONDS]).await?;
    shop.stop().await?;
    say(format_args!("\n{}", driver.summary()));
    let code = check(&stage, &restarts, &[]).await?;
    stage.end();
    Ok(ExitCode::from(code))
}

/// Starts the shop and waits until relays and consumers of both services run.
async fn open(stage: &Stage, addresses: &watch::Sender<Option<Addresses>>) -> Result<Shop> {
    let shop = Shop::start(stage).await?;
    addresses.send_replace(Some(shop.addresses().clone()));
    shop.ready().await?;
    Ok(shop)
}

/// Kills the shop, does something while it is down, and starts it again. The driver's requests go on meanwhile.
async fn restart(
    shop: Shop,
    stage: &Stage,
    addresses: &watch::Sender<Option<Addresses>>,
    restarts: &mut Vec<String>,
    meanwhile: impl AsyncFnOnce() -> Result<()>,
) -> Result<Shop> {
    let from = milliseconds();
    shop.kill().await?;
    addresses.send_replace(None);
    meanwhile().await?;
    let shop = open(stage, addresses).await?;
    restarts.push(format!("{from}..{}", milliseconds()));
    Ok(shop)
}

/// Runs the independent check; answers its exit code.
async fn check(stage: &Stage, restarts: &[String], more: &[&str]) -> Result<u8> {
    let mut command = Command::new(sibling("check")?);
    command.args(["--inventory", stage.inventory(), "--orders", stage.orders()]);
    command.arg("--products").arg(stage.products());
    for restart in restarts {
        command.args(["--restart", restart]);
    }
    let status = command
        .args(more)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await?;
    let code = status.code().ok_or("the check was killed")?;
    Ok(u8::try_from(code)?)
}

/// A program that was built with this one.
pub(crate) fn sibling(name: &str) -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    if path.exists() {
        return Ok(path);
    }
    Err(format!(
        "{} is missing: cargo build -p pillarbox-shop --bins",
        path.display()
    )
    .into())
}

/// Reads CSV without quotes, below a line of names.
fn lines<T: std::str::FromStr<Err = String>>(text: &str) -> Result<Vec<T>> {
    let read = |line: &str| {
        line.parse::<T>()
            .map_err(|e| format!("{line:?}: {e}").into())
    };
    text.lines().skip(1).map(read).collect()
}

fn milliseconds() -> u128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_millis()
}

async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate());
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        Some(_) = async { match &mut terminate { Ok(signal) => signal.recv().await, Err(_) => None } } => {}
    }
}

/// A line for people.
pub(crate) fn say(text: std::fmt::Arguments<'_>) {
    // Nobody is there to read it where this fails.
    let _ = writeln!(std::io::stdout(), "{text}");
}
