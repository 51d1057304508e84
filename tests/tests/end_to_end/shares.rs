//! Several relays of one destination: each has its share, and partitions change hands without a loss or a repeat.

use std::time::Duration;

use pillarbox_core::{RelaySettings, Running, lease::LeaseTerm, repartition};
use pillarbox_tests::{
    TickHandler, World,
    ledger::{Plan, Writers, assert_arrived, assert_effects},
    on_servers_alone, seed,
    tables::{log, number},
    until,
    wire::Client,
};

on_servers_alone!(
    relays_that_come_and_go_share_the_partitions_out,
    more_partitions_keep_the_order,
);

fn held(relays: &[&Running]) -> Vec<usize> {
    relays.iter().map(|r| r.health().held).collect()
}

async fn until_held(relays: &[&Running], expected: &[usize]) {
    let what = format!("they hold {expected:?}");
    until(&what, async || held(relays) == expected).await;
}

/// How often partitions have changed hands.
async fn hands(world: &World) -> i64 {
    let sql = "SELECT CAST(sum(epoch) AS TEXT) FROM {t}cursor";
    number(&world.producer, sql).await
}

async fn relays_that_come_and_go_share_the_partitions_out(world: World) {
    let url = world.amqp_url.clone().expect("a broker");
    let client = Client::connect(&url).await;
    client.tap().await;
    let outbox = world.outbox();
    let relay = |seconds| {
        world.relay(&outbox).settings(RelaySettings {
            lease: LeaseTerm::new(Duration::from_secs(seconds)),
            ..RelaySettings::default()
        })
    };
    let mut consumer = world.ticks(TickHandler::new());
    consumer.bind().await.expect("bind");
    let consumer = consumer.spawn();
    let first = relay(30).spawn();
    until_held(&[&first], &[4]).await;
    let plan = Plan {
        writers: 3,
        keys: 40,
        events: usize::MAX / 8,
        pause: Duration::from_millis(5),
    };
    let writers = Writers::start(&outbox, plan, seed()).await;

    // The leases last for 30 s: whoever waited for an expiry would be seen.
    let begun = tokio::time::Instant::now();
    let second = relay(30).spawn();
    until_held(&[&first, &second], &[2, 2]).await;
    let third = relay(30).spawn();
    until_held(&[&first, &second, &third], &[2, 1, 1]).await;
    let hands_then = hands(&world).await;
    // Three looks of each: they are content. What is waited for here is that nothing happens.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(hands(&world).await, hands_then, "partitions go to and fro");
    first.shutdown().await.expect("a relay");
    until_held(&[&second, &third], &[2, 2]).await;
    // A newcomer sits down behind the others: one partition moves.
    let hands_then = hands(&world).await;
    let fourth = relay(3).spawn();
    until_held(&[&second, &third, &fourth], &[2, 1, 1]).await;
    assert!(hands(&world).await <= hands_then + 1);
    let spent = begun.elapsed();
    assert!(spent < Duration::from_secs(29), "they waited: {spent:?}");

    // One that is killed is forgotten when its leases have expired.
    fourth.abort();
    until_held(&[&second, &third], &[2, 2]).await;
    let ledger = writers.stop().await;
    world.until_effects(log(&world.producer).await.len()).await;
    for one in [second, third, consumer] {
        one.shutdown().await.expect("it ends well");
    }
    let log = ledger.log(&world.producer).await;
    assert_effects(&log, &world.effects().await);
    assert_arrived(&log, &client.drain("tap").await);
}

async fn more_partitions_keep_the_order(world: World) {
    let url = world.amqp_url.clone().expect("a broker");
    let client = Client::connect(&url).await;
    client.tap().await;
    let outbox = world.outbox();
    let plan = Plan {
        writers: 3,
        keys: 40,
        events: usize::MAX / 8,
        pause: Duration::from_millis(5),
    };
    let writers = Writers::start(&outbox, plan, seed()).await;
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    world.until_effects(200).await;
    let told = repartition(&world.producer, 8).await.expect_err("it runs");
    assert!(told.to_string().contains("relays of main run"), "{told}");
    way.relay.shutdown().await.expect("a relay");
    // Some are written while no relay runs.
    let so_far = log(&world.producer).await.len();
    until("more is written", async || {
        log(&world.producer).await.len() > so_far + 50
    })
    .await;
    repartition(&world.producer, 8)
        .await
        .expect("more partitions");
    let relay = world.relay(&outbox).spawn();
    until_held(&[&relay], &[8]).await;
    let so_far = world.count_effects().await;
    world.until_effects(so_far + 200).await;
    let ledger = writers.stop().await;
    world.until_effects(log(&world.producer).await.len()).await;
    relay.shutdown().await.expect("a relay");
    way.consumer.shutdown().await.expect("a consumer");
    let log = ledger.log(&world.producer).await;
    assert_effects(&log, &world.effects().await);
    // What was confirmed behind an event that still waited for its key's turn comes again, and no more.
    let repeated = assert_arrived(&log, &client.drain("tap").await);
    assert!(
        repeated < log.len() / 2,
        "{repeated} of {} again",
        log.len()
    );
}
