//! Several owners: they share, hand over in order, and never both.

use std::time::Duration;

use pillarbox_core::{ConsumerSettings, Database, Outbox, RelaySettings, lease::LeaseTerm};
use pillarbox_tests::{
    Tick, TickHandler, World, connect, in_both_worlds,
    ledger::{Plan, Writers, assert_arrived, assert_effects},
    seed,
    wire::Client,
};

in_both_worlds!(
    two_relays_and_two_consumers_lose_and_double_nothing,
    a_stop_drains_and_hands_over_at_once,
    an_owner_that_vanishes_is_replaced_after_its_lease,
);

async fn tapped(world: &World) -> Option<Client> {
    let client = Client::connect(world.amqp_url.as_deref()?).await;
    client.tap().await;
    Some(client)
}

/// Another process's view of the same databases.
fn other(world: &World) -> (Database, Database) {
    (connect(&world.urls.0), connect(&world.urls.1))
}

async fn two_relays_and_two_consumers_lose_and_double_nothing(mut world: World) {
    let client = tapped(&world).await;
    let outbox = world.outbox();
    let first = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let own = (world.producer.clone(), world.consumer.clone());
    (world.producer, world.consumer) = other(&world);
    let second_outbox = world.outbox();
    let relay = world.relay(&second_outbox).spawn();
    let consumer = world.ticks(TickHandler::new()).spawn();
    let plan = Plan {
        writers: 4,
        keys: 20,
        events: 1_000,
        pause: Duration::ZERO,
    };
    let before = Writers::start(&outbox, plan, seed()).await.done().await;
    // The first pair goes in the middle of the work, and the second takes over.
    let writers = Writers::start(&second_outbox, plan, seed()).await;
    first.stop().await;
    let mut ledger = writers.done().await;
    ledger.committed.extend(before.committed);
    ledger.rolled_back.extend(before.rolled_back);
    world.until_effects(2_000).await;
    relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");
    (world.producer, world.consumer) = own;
    let log = ledger.log(&world.producer).await;
    assert_effects(&log, &world.effects().await);
    if let Some(client) = client {
        let arrived = client.drain("tap").await;
        assert_arrived(&log, &arrived);
        ledger.assert_not_sent(arrived.iter().map(|a| a.id.as_str()));
    }
}

/// The lease would last a minute: whoever waited for its expiry would be seen.
async fn a_stop_drains_and_hands_over_at_once(world: World) {
    let client = tapped(&world).await;
    let lease = LeaseTerm::new(Duration::from_secs(60));
    let outbox = world.outbox();
    let way = async |outbox: &Outbox| {
        let relay = world.relay(outbox).settings(RelaySettings {
            lease,
            ..RelaySettings::default()
        });
        let consumer = world.ticks(TickHandler::new()).settings(ConsumerSettings {
            lease,
            ..ConsumerSettings::default()
        });
        world.start_with(relay, consumer).await
    };
    for round in 0..5 {
        let begun = tokio::time::Instant::now();
        let way = way(&outbox).await;
        let ticks: Vec<Tick> = (1..=300)
            .map(|n| Tick::new(format!("key-{}", n % 30), 300 * round + n))
            .collect();
        world.commit(&outbox, &ticks).await;
        // In the middle of the work, from the second round on: nothing is sent again.
        let enough = (300 * round + 1) as usize;
        world.until_effects(enough).await;
        way.stop().await;
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "round {round} waited"
        );
    }
    let last = way(&outbox).await;
    world.until_effects(1_500).await;
    last.stop().await;
    let effects = world.effects().await;
    assert_eq!(effects.len(), 1_500);
    if let Some(client) = client {
        let arrived = client.drain("tap").await;
        let log = pillarbox_tests::tables::log(&world.producer).await;
        assert_eq!(log.len(), 1_500);
        assert_eq!(
            arrived.len(),
            1_500,
            "a drained relay's events were sent again"
        );
    }
}

/// Aborted, as a crash would.
async fn an_owner_that_vanishes_is_replaced_after_its_lease(world: World) {
    let client = tapped(&world).await;
    let outbox = world.outbox();
    let plan = Plan {
        writers: 2,
        keys: 20,
        events: 3_000,
        pause: Duration::from_millis(2),
    };
    let writers = Writers::start(&outbox, plan, seed()).await;
    for round in 1..=3 {
        let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
        world.until_effects(200 * round).await;
        way.relay.abort();
        way.consumer.abort();
        way.stop().await;
    }
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let ledger = writers.done().await;
    world.until_effects(3_000).await;
    way.stop().await;
    let log = ledger.log(&world.producer).await;
    assert_effects(&log, &world.effects().await);
    if let Some(client) = client {
        assert_arrived(&log, &client.drain("tap").await);
    }
}
