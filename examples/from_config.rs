//! Database, broker, bounds and the program's own settings from one file and the environment.
//!
//! ```text
//! PILLARBOX_INVENTORY__STORE__URL=postgres://… cargo run --example from_config -- configs/rabbitmq.toml
//! ```

#![allow(clippy::print_stdout)]

use std::net::SocketAddr;

use pillarbox::Config;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Program {
    http: Http,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Http {
    listen: SocketAddr,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args()
        .nth(1)
        .ok_or("give the path of a configuration")?;
    let settings = Config::load(file)?.at("inventory")?;
    let program: Program = settings.host()?;
    println!("would listen on {}", program.http.listen);

    let database = settings.store.open().await?;
    pillarbox::migrate(&database).await?;
    let outbox = settings.new_outbox(&database);
    let broker = pillarbox::connect(&settings.transport).await?;
    let relay = settings.new_relay(&outbox, broker).spawn();
    println!("relaying; Ctrl-C ends it");
    tokio::signal::ctrl_c().await?;
    Ok(relay.shutdown().await?)
}
