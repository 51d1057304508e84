//! The plain way: what is committed has its effect once, in order; what is rolled back has none.

use std::collections::BTreeMap;

use pillarbox_tests::{Tick, TickHandler, World, effects, in_both_worlds, until};

in_both_worlds!(
    committed_events_have_one_effect_each_in_order,
    rolled_back_events_have_none,
);

async fn committed_events_have_one_effect_each_in_order(world: World) {
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
    until("500 effects", || async {
        effects(&world.consumer).await.len() >= 500
    })
    .await;
    relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");
    let effects = effects(&world.consumer).await;
    assert_eq!(effects.len(), 500, "an effect happened twice");
    let mut of_key = BTreeMap::<String, Vec<u32>>::new();
    for effect in effects {
        of_key.entry(effect.key).or_default().push(effect.n);
    }
    for (key, numbers) in of_key {
        assert_eq!(numbers, (0..50).collect::<Vec<_>>(), "order of {key}");
    }
}

async fn rolled_back_events_have_none(world: World) {
    let outbox = world.outbox();
    let consumer = world.ticks(TickHandler::new()).spawn();
    let relay = world.relay(&outbox).spawn();
    for n in 0..20 {
        world.roll_back(&outbox, &[Tick::new("undone", n)]).await;
        world.commit(&outbox, &[Tick::new("done", n)]).await;
    }
    until("20 effects", || async {
        effects(&world.consumer).await.len() >= 20
    })
    .await;
    relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");
    assert!(
        effects(&world.consumer)
            .await
            .iter()
            .all(|e| e.key == "done")
    );
}
