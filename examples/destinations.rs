//! Every destination of a configuration, and what an operator does with them.
//!
//! ```text
//! cargo run --example destinations -- shop.toml relay
//! cargo run --example destinations -- shop.toml list
//! cargo run --example destinations -- shop.toml remove main "moved to the new broker"
//! cargo run --example destinations -- shop.toml replay main shop.order.placed
//! ```

#![allow(clippy::print_stdout)]

use std::time::{Duration, SystemTime};

use pillarbox::{
    Admin, Config, Database, Settings,
    admin::{ReplayRequest, Selection},
};

type Result = std::result::Result<(), Box<dyn std::error::Error>>;

#[tokio::main]
async fn main() -> Result {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [file, command @ ..] = arguments.as_slice() else {
        return Err("give a configuration and a command".into());
    };
    let settings = Config::load(file)?.settings()?;
    let database = settings.store.open().await?;
    pillarbox::migrate(&database).await?;
    let operator = std::env::var("USER").unwrap_or_else(|_| "nobody".to_owned());
    let admin = Admin::new(&database, operator);
    match command {
        ["relay"] => relay(&settings, &database).await,
        ["list"] => list(&admin).await,
        ["remove", name, why] => {
            let removed = admin.remove_destination(name, why).await?;
            println!(
                "{} unpublished, {} deferred, {} dead letters went with it",
                removed.unpublished, removed.deferred, removed.dead_letters
            );
            Ok(())
        }
        ["replay", destination, kind] => {
            replay(&settings, &database, &admin, destination, kind).await
        }
        _ => Err("relay, list, remove NAME WHY, or replay DESTINATION TYPE".into()),
    }
}

/// One relay for each destination, each with its own broker.
async fn relay(settings: &Settings, database: &Database) -> Result {
    let outbox = settings.new_outbox(database);
    let broker = pillarbox::connect(&settings.transport).await?;
    let mut running = Vec::new();
    for relay in pillarbox::relays(settings, &outbox, broker).await? {
        running.push(relay.spawn());
    }
    tokio::signal::ctrl_c().await?;
    for relay in running {
        relay.shutdown().await?;
    }
    Ok(())
}

async fn list(admin: &Admin) -> Result {
    for d in admin.destinations().await? {
        let served = if d.is_served() {
            "served"
        } else {
            "not served"
        };
        println!(
            "{} ({served}): {} behind, the oldest for {:?}; {} wait, {} were given up",
            d.name, d.behind, d.lag, d.deferred, d.dead_letters
        );
    }
    for gone in admin.removed_destinations().await? {
        println!("{} was removed: {}", gone.name, gone.why);
    }
    Ok(())
}

/// The last hour of a type, once more. Run again with the same arguments, it goes on.
async fn replay(
    settings: &Settings,
    database: &Database,
    admin: &Admin,
    destination: &str,
    kind: &str,
) -> Result {
    let name = format!("again-{kind}");
    if admin.replay(&name).await.is_err() {
        let request = ReplayRequest {
            remember: settings.consumer.remember,
            ..ReplayRequest::new(&name, destination)
        };
        let request = request.of(Selection {
            since: SystemTime::now().checked_sub(Duration::from_secs(3_600)),
            kind: Some(kind.to_owned()),
            ..Selection::default()
        });
        let plan = admin.plan_replay(&request).await?;
        println!(
            "{} events, of which {} are forgotten",
            plan.events, plan.forgotten
        );
        admin.start_replay(&request, "an example").await?;
    }
    let outbox = settings.new_outbox(database);
    let broker = pillarbox::connect(settings.transport_of(destination)?).await?;
    let relay = settings.new_relay_to(destination, &outbox, broker)?;
    let stop = async { drop(tokio::signal::ctrl_c().await) };
    let report = |at: &pillarbox::admin::Replay| println!("{} of {}", at.sent, at.events);
    let ended = admin.run_replay(&name, relay, stop, report).await?;
    println!(
        "{}",
        if ended.is_through {
            "through"
        } else {
            "stopped; it can go on"
        }
    );
    Ok(())
}
