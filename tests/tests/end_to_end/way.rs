//! The plain way: what is committed has its effect once, in order; what is rolled back has none.

use std::time::Duration;

use pillarbox_core::Event as _;
use pillarbox_tests::{
    Tick, TickHandler, World, in_both_worlds, is_soak,
    ledger::{Plan, Writers, assert_arrived, assert_effects},
    numbers_by_key, seed, tables,
    wire::{Arrived, Client},
};

in_both_worlds!(
    committed_events_have_one_effect_each_in_order,
    rolled_back_events_have_none,
    ten_thousand_events_of_200_keys_arrive_in_commit_order,
);

pub(super) async fn committed_events_have_one_effect_each_in_order(world: World) {
    let outbox = world.outbox();
    let mut consumer = world.ticks(TickHandler::new());
    consumer.bind().await.expect("bind");
    let relay = world.relay(&outbox).spawn();
    let consumer = consumer.spawn();
    for n in 0..50 {
        let ticks: Vec<Tick> = (0..10)
            .map(|key| Tick::new(format!("key-{key}"), n))
            .collect();
        world.commit(&outbox, &ticks).await;
    }
    world.until_effects(500).await;
    relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");
    let effects = world.effects().await;
    assert_eq!(effects.len(), 500, "an effect happened twice");
    for (key, numbers) in numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n))) {
        assert_eq!(numbers, (0..50).collect::<Vec<_>>(), "order of {key}");
    }
}

pub(super) async fn rolled_back_events_have_none(world: World) {
    let outbox = world.outbox();
    let consumer = world.ticks(TickHandler::new()).spawn();
    let relay = world.relay(&outbox).spawn();
    for n in 0..20 {
        world.roll_back(&outbox, &[Tick::new("undone", n)]).await;
        world.commit(&outbox, &[Tick::new("done", n)]).await;
    }
    world.until_effects(20).await;
    relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");
    assert!(world.effects().await.iter().all(|e| e.key == "done"));
}

/// Seen by a client that is not ours where there is a wire, and by the effects in both worlds.
pub(super) async fn ten_thousand_events_of_200_keys_arrive_in_commit_order(world: World) {
    let outbox = world.outbox();
    let client = match &world.amqp_url {
        Some(url) => Some(Client::connect(url).await),
        None => None,
    };
    if let Some(client) = &client {
        client.tap().await;
    }
    let mut consumer = world.ticks(TickHandler::new());
    consumer.bind().await.expect("bind");
    let relay = world.relay(&outbox).spawn();
    let consumer = consumer.spawn();
    let plan = Plan {
        writers: 8,
        keys: 200,
        events: if is_soak() { 100_000 } else { 10_000 },
        pause: Duration::ZERO,
    };
    let ledger = Writers::start(&outbox, plan, seed()).await.done().await;
    world.until_effects(plan.events).await;
    relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");

    let log = ledger.log(&world.producer).await;
    assert_eq!(log.len(), plan.events);
    assert_effects(&log, &world.effects().await);
    if let Some(client) = client {
        let arrived = client.drain("tap").await;
        assert_eq!(assert_arrived(&log, &arrived), 0, "sent twice without need");
        ledger.assert_not_sent(arrived.iter().map(|a| a.id.as_str()));
        assert_envelope(&world, &arrived[0]).await;
    }
}

/// CloudEvents 1.0 in binary mode, as the contract names each part.
async fn assert_envelope(world: &World, a: &Arrived) {
    let time = a.attribute("time").expect("a time");
    let sql = format!(
        "SELECT CAST(position AS TEXT), convert_from(payload, 'UTF8'), \
         CAST(created_at = CAST('{time}' AS timestamptz) AS TEXT) FROM {{t}}outbox WHERE id = '{}'",
        a.id
    );
    let row = tables::query(&world.producer, &sql).await.remove(0);
    assert_eq!(a.body, row[1].as_deref().expect("a payload").as_bytes());
    assert_eq!(
        row[2].as_deref(),
        Some("true"),
        "the time of the commit's row"
    );
    let key = a.key.as_deref();
    let expected = [
        ("specversion", Some("1.0")),
        ("id", Some(a.id.as_str())),
        ("type", Some(Tick::TYPE)),
        ("source", Some("producer")),
        ("partitionkey", key),
        ("dataversion", Some("1")),
        ("pillarboxposition", row[0].as_deref()),
    ];
    for (name, value) in expected {
        assert_eq!(a.attribute(name), value, "{name}");
    }
    assert!(key.is_some_and(|k| k.starts_with("key-")));
    let epoch = a.attribute("pillarboxepoch").expect("an epoch");
    assert!(epoch.parse::<u64>().is_ok_and(|e| e >= 1), "{epoch}");
    assert_eq!(a.attribute("datacontenttype"), None, "it is a property");
    let text = |s: &Option<lapin::types::ShortString>| s.as_ref().map(ToString::to_string);
    assert_eq!(
        text(a.properties.content_type()).as_deref(),
        Some("application/json")
    );
    assert_eq!(text(a.properties.kind()).as_deref(), Some(Tick::TYPE));
    assert_eq!(*a.properties.delivery_mode(), Some(2), "persistent");
    assert_eq!(a.routing_key, Tick::TYPE);
}
