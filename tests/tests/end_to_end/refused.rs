//! What the relay meets: rows that no broker may see, types that nobody wants, brokers that take nothing now.

use std::{collections::HashSet, time::Duration};

use lapin::types::AMQPValue;
use pillarbox_tests::{
    Tick, TickHandler, World, amqp_config, embedded_alone, in_both_worlds, numbers_by_key,
    on_servers_alone,
    tables::{self, dead_letters, deferred},
    until,
    wire::{Arrived, Client},
};

use crate::retry;

in_both_worlds!(
    rows_that_a_plain_insert_made_wrong_are_dead_letters_and_the_relay_goes_on,
    ten_unroutable_events_in_a_window_of_1000_are_blamed_and_no_other,
    a_type_that_needs_no_consumer_counts_as_sent,
);
on_servers_alone!(
    a_full_queue_costs_nothing_but_time,
    a_missing_exchange_costs_nothing_but_time,
);
embedded_alone!(a_group_that_does_not_read_costs_nothing_but_time);

async fn rows_that_a_plain_insert_made_wrong_are_dead_letters_and_the_relay_goes_on(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let (blob, bytes, no_json) = if tables::is_postgres(&world.producer) {
        (
            "convert_to(repeat('x', 983041), 'UTF8')",
            "convert_to('{}', 'UTF8')",
            "'[]'",
        )
    } else {
        ("zeroblob(983041)", "CAST('{}' AS BLOB)", "'not JSON'")
    };
    // (topic, type, key, payload, headers, attributes), and what the reason names.
    let rows = [
        ("'bad topic'", "'t'", "'k1'", bytes, "NULL", "NULL", "topic"),
        (
            "'test.events'",
            "'bad type'",
            "'k2'",
            bytes,
            "NULL",
            "NULL",
            "type",
        ),
        (
            "'test.events'",
            "'test.tick'",
            "'k' || chr(10)",
            bytes,
            "NULL",
            "NULL",
            "key",
        ),
        (
            "'test.events'",
            "'test.tick'",
            "'k3'",
            blob,
            "NULL",
            "NULL",
            "983041 bytes",
        ),
        (
            "'test.events'",
            "'test.tick'",
            "'k4'",
            bytes,
            no_json,
            "NULL",
            "headers",
        ),
        (
            "'test.events'",
            "'test.tick'",
            "'k5'",
            bytes,
            "'{\"CC\":\"x\"}'",
            "NULL",
            "reserved",
        ),
        (
            "'test.events'",
            "'test.tick'",
            "'k6'",
            bytes,
            "'{\"a\":[1]}'",
            "NULL",
            "headers",
        ),
        (
            "'test.events'",
            "'test.tick'",
            "'k7'",
            bytes,
            "NULL",
            "'{\"Bad\":\"1\"}'",
            "Bad",
        ),
    ];
    for (topic, kind, key, payload, headers, attributes, _) in rows {
        let mut sql = format!(
            "INSERT INTO {{t}}outbox (topic, type, key, payload, headers, attributes) \
             VALUES ({topic}, {kind}, {key}, {payload}, {headers}, {attributes})"
        );
        if !tables::is_postgres(&world.producer) {
            sql = sql.replace("chr(10)", "char(10)");
        }
        tables::query(&world.producer, &sql).await;
    }
    world.commit(&outbox, &[Tick::new("k3", 1)]).await;
    world.until_effects(1).await;
    until("all are dead letters", async || {
        dead_letters(&world.producer).await.len() == rows.len()
    })
    .await;
    // Written by hand, and good.
    let good = format!(
        "INSERT INTO {{t}}outbox (topic, type, key, payload) VALUES ('test.events', 'test.tick', 'k5', {})",
        bytes.replace("{}", "{\"key\":\"k5\",\"n\":7}")
    );
    tables::query(&world.producer, &good).await;
    world.until_effects(2).await;
    way.stop().await;

    let dead = dead_letters(&world.producer).await;
    for (_, _, key, _, _, _, reason) in rows {
        let key = key.trim_matches('\'').replace("' || chr(10)", "\n");
        let dead = dead.iter().find(|d| d.key.as_deref() == Some(key.as_str()));
        let dead = dead.unwrap_or_else(|| panic!("no dead letter of {key:?}"));
        assert_eq!(dead.side, "relay");
        assert!(dead.reason.contains(reason), "{key:?}: {}", dead.reason);
        assert!(!dead.reason.contains("xxxx"), "no payload in a reason");
    }
    assert_eq!(dead.len(), rows.len());
    assert_eq!(world.effects().await.len(), 2);
    assert_eq!(dead_letters(&world.consumer).await, []);
}

async fn ten_unroutable_events_in_a_window_of_1000_are_blamed_and_no_other(world: World) {
    let outbox = world.outbox();
    let consumer = world.ticks(TickHandler::new());
    let messages: Vec<_> = (0..1_000)
        .map(|i| {
            let kind = if i % 100 == 37 {
                "test.nowhere"
            } else {
                "test.tick"
            };
            Tick::new(format!("key-{:02}", i % 50), i).message(kind)
        })
        .collect();
    let nowhere: Vec<String> = messages
        .iter()
        .filter(|m| m.kind == "test.nowhere")
        .map(|m| m.id.clone())
        .collect();
    // One transaction: they meet the relay together.
    world.commit_messages(&outbox, messages).await;
    let relay = world.relay(&outbox).retry(retry(&[100, 200]));
    let way = world.start_with(relay, consumer).await;
    world.until_effects(990).await;
    until("ten dead letters", async || {
        dead_letters(&world.producer).await.len() >= 10
    })
    .await;
    way.stop().await;

    let mut dead = dead_letters(&world.producer).await;
    dead.sort_by(|a, b| a.id.cmp(&b.id));
    let ids: Vec<&str> = dead.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids, nowhere.iter().map(String::as_str).collect::<Vec<_>>());
    for dead in &dead {
        assert_eq!((dead.side.as_str(), dead.attempts), ("relay", 3));
        assert!(dead.reason.contains("test.nowhere"), "{}", dead.reason);
    }
    assert_eq!(deferred(&world.producer).await, 0);
    let effects = world.effects().await;
    assert_eq!(effects.len(), 990);
    for (key, numbers) in numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n))) {
        assert!(numbers.is_sorted(), "{key}: {numbers:?}");
    }
}

async fn a_type_that_needs_no_consumer_counts_as_sent(world: World) {
    let outbox = world.outbox();
    let relay = world
        .relay(&outbox)
        .retry(retry(&[]))
        .accept_unrouted(["test.nowhere"]);
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    let messages = (1..=5).map(|n| Tick::new("a", n).message("test.nowhere"));
    world.commit_messages(&outbox, messages.collect()).await;
    world.commit(&outbox, &[Tick::new("a", 6)]).await;
    world.until_effects(1).await;
    way.stop().await;
    assert_eq!(dead_letters(&world.producer).await, []);
    assert_eq!(deferred(&world.producer).await, 0);
}

/// Nothing was counted, nothing was given up.
async fn assert_uncounted(world: &World) {
    assert_eq!(deferred(&world.producer).await, 0);
    assert_eq!(dead_letters(&world.producer).await, []);
}

fn distinct(arrived: &[Arrived]) -> usize {
    arrived.iter().map(|a| &a.id).collect::<HashSet<_>>().len()
}

fn assert_all_in_order(arrived: &[Arrived], keys: usize, each: u32) {
    let mut seen = HashSet::new();
    let first = arrived.iter().filter(|a| seen.insert(a.id.as_str()));
    let pairs = first.map(|a| {
        (
            a.key.as_deref().unwrap_or_default(),
            a.n.unwrap_or_default(),
        )
    });
    let numbers = numbers_by_key(pairs);
    assert_eq!(numbers.len(), keys);
    for (key, numbers) in numbers {
        assert_eq!(numbers, (1..=each).collect::<Vec<_>>(), "{key}");
    }
}

/// The broker answers with nacks.
async fn a_full_queue_costs_nothing_but_time(world: World) {
    let client = Client::connect(world.amqp_url.as_deref().expect("a broker")).await;
    let arguments = [
        ("x-max-length", AMQPValue::LongInt(40)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    client.queue("full", "test.tick", &arguments).await;
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    for n in 1..=30 {
        let ticks: Vec<Tick> = (0..10)
            .map(|key| Tick::new(format!("key-{key}"), n))
            .collect();
        world.commit(&outbox, &ticks).await;
    }
    until("the queue is full and told", async || {
        client.depth("full").await >= 40 && way.relay.health().trouble.is_some()
    })
    .await;
    // Each topic that is refused waits up to two seconds: several rounds of nacks.
    let waited = tokio::time::Instant::now();
    until("it was refused for a while", async || {
        waited.elapsed() > Duration::from_secs(2)
    })
    .await;
    assert_uncounted(&world).await;
    let mut arrived = Vec::new();
    until("all went through", async || {
        arrived.extend(client.take("full").await);
        distinct(&arrived) == 300
    })
    .await;
    world.until_effects(300).await;
    until("the trouble is over", async || {
        way.relay.health().trouble.is_none()
    })
    .await;
    way.stop().await;
    assert_all_in_order(&arrived, 10, 30);
    assert_uncounted(&world).await;
    assert_eq!(world.effects().await.len(), 300);
}

/// The relay may not declare, and what it publishes to is not there yet.
async fn a_missing_exchange_costs_nothing_but_time(world: World) {
    let url = world.amqp_url.clone().expect("a broker");
    let mut config = amqp_config(&url, &world.group);
    config.declare = false;
    config.queues.clear();
    let group = world.group.clone();
    let world = World::over(world.urls.clone(), config, &url, group).await;
    let outbox = world.outbox();
    let relay = world.relay(&outbox).spawn();
    for n in 1..=10 {
        let ticks: Vec<Tick> = (0..5)
            .map(|key| Tick::new(format!("key-{key}"), n))
            .collect();
        world.commit(&outbox, &ticks).await;
    }
    until("the trouble is told", async || {
        relay.health().trouble.is_some()
    })
    .await;
    let trouble = relay.health().trouble.unwrap_or_default();
    assert!(trouble.contains("test.events"), "{trouble}");
    let waited = tokio::time::Instant::now();
    until("it was missing for a while", async || {
        waited.elapsed() > Duration::from_secs(2)
    })
    .await;
    assert_uncounted(&world).await;
    let client = Client::connect(&url).await;
    client.tap().await;
    // An exchange without its queue is there for a moment, and what meets it is counted: at most once an event.
    let mut arrived = Vec::new();
    until("all went through", async || {
        arrived.extend(client.take("tap").await);
        distinct(&arrived) == 50
    })
    .await;
    relay.shutdown().await.expect("relay");
    assert_all_in_order(&arrived, 5, 10);
    assert_uncounted(&world).await;
}

/// The group is there, and its process has not begun to read: the counterpart of a full queue.
async fn a_group_that_does_not_read_costs_nothing_but_time(world: World) {
    let outbox = world.outbox();
    let mut consumer = world.ticks(TickHandler::new());
    consumer.bind().await.expect("bind");
    let relay = world.relay(&outbox).spawn();
    for n in 1..=30 {
        let ticks: Vec<Tick> = (0..10)
            .map(|key| Tick::new(format!("key-{key}"), n))
            .collect();
        world.commit(&outbox, &ticks).await;
    }
    until("the trouble is told", async || {
        relay.health().trouble.is_some()
    })
    .await;
    let trouble = relay.health().trouble.unwrap_or_default();
    assert!(trouble.contains(&world.group), "{trouble}");
    assert_uncounted(&world).await;
    let consumer = consumer.spawn();
    world.until_effects(300).await;
    until("the trouble is over", async || {
        relay.health().trouble.is_none()
    })
    .await;
    relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");
    let effects = world.effects().await;
    for (key, numbers) in numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n))) {
        assert_eq!(numbers, (1..=30).collect::<Vec<_>>(), "{key}");
    }
    assert_uncounted(&world).await;
}
