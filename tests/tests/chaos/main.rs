//! Processes, connections and servers that end at any moment: nothing is lost, nothing doubled, the order kept.

mod held;
mod joining;
mod kills;
mod network;
mod outages;
mod poison;
mod restarts;
mod secrets;
mod shares;
mod storm;
mod zombies;

use std::time::Duration;

use pillarbox_tests::{
    World,
    ledger::{Ledger, Plan, assert_arrived, assert_effects},
    tables::{dead_letters, deferred},
    until,
    wire::Client,
};

/// The child program.
const NODE: &str = env!("CARGO_BIN_EXE_pillarbox-test-node");

/// Writers that go on until they are told to stop.
const STEADY: Plan = Plan {
    writers: 3,
    keys: 20,
    events: usize::MAX / 8,
    pause: Duration::from_millis(20),
};

/// A queue that gets everything, where there is a broker.
async fn tap(world: &World) {
    if let Some(url) = &world.amqp_url {
        Client::connect(url).await.tap().await;
    }
}

/// Waits until everything that was committed has had its effect.
async fn until_all_applied(world: &World, ledger: &Ledger) {
    let log = ledger.log(&world.producer).await;
    world.until_effects(log.len()).await;
    until("nothing waits", async || {
        deferred(&world.producer).await + deferred(&world.consumer).await == 0
    })
    .await;
}

/// Promises 1 to 5, after everything has come to rest. Answers how many events were sent again.
async fn assert_whole(world: &World, ledger: &Ledger) -> usize {
    let log = ledger.log(&world.producer).await;
    assert!(log.len() > 100, "{} events show nothing", log.len());
    assert_effects(&log, &world.effects().await);
    assert_eq!(dead_letters(&world.producer).await, []);
    assert_eq!(dead_letters(&world.consumer).await, []);
    let Some(url) = &world.amqp_url else { return 0 };
    let arrived = Client::connect(url).await.drain("tap").await;
    ledger.assert_not_sent(arrived.iter().map(|a| a.id.as_str()));
    assert_arrived(&log, &arrived)
}
