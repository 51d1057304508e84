//! The waiting rooms have a maximum: at it, the partition or the source waits, and nothing is lost.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use pillarbox_core::{ConsumerSettings, Context, Delivery, Event, Failure, Handler, RelaySettings};
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, in_both_worlds, numbers_by_key,
    tables::{dead_letters, deferred},
    until,
};

use crate::retry;

in_both_worlds!(
    a_relay_with_a_full_waiting_room_waits,
    a_consumer_with_a_full_waiting_room_waits,
);

/// A type that nobody handles, until somebody does.
#[derive(serde::Deserialize)]
struct Elsewhere(#[allow(dead_code)] serde_json::Value);

impl Event for Elsewhere {
    const TYPE: &'static str = "test.elsewhere";
    const TOPIC: &'static str = TOPIC;
}

#[derive(Clone, Default)]
struct Ids(Arc<std::sync::Mutex<Vec<String>>>);

impl Handler<Elsewhere> for Ids {
    async fn handle(&self, d: Delivery<Elsewhere>, _: &mut Context<'_>) -> Result<(), Failure> {
        self.0.lock().expect("no panic").push(d.message.id);
        Ok(())
    }
}

async fn a_relay_with_a_full_waiting_room_waits(world: World) {
    let outbox = world.outbox();
    let relay = world
        .relay(&outbox)
        .retry(retry(&[3_000, 3_000]))
        .settings(RelaySettings {
            deferred: 5,
            ..World::relay_settings()
        });
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    let strange = |n: u32| Tick::new(format!("key-{n}"), n).message("test.elsewhere");
    let mut ids = Vec::new();
    for n in 1..=10 {
        let message = strange(n);
        ids.push(message.id.clone());
        world.commit_messages(&outbox, vec![message]).await;
        if n <= 5 {
            until("it waits", async || {
                deferred(&world.producer).await == n as usize
            })
            .await;
        }
    }
    until("it says that no more can wait", async || {
        way.relay
            .health()
            .trouble
            .is_some_and(|t| t.contains("the maxima are 5"))
    })
    .await;
    assert!(deferred(&world.producer).await <= 5);
    // Its neighbours go on for as long as the window has room.
    world.commit(&outbox, &[Tick::new("a", 1)]).await;
    world.until_effects(1).await;
    let seen = Ids::default();
    let other = world
        .group_of(&format!("{}_b", world.group))
        .on::<Elsewhere>(seen.clone());
    let other = other.spawn();
    until("all ten came", async || {
        seen.0.lock().expect("no panic").len() >= 10
    })
    .await;
    until("nothing waits", async || {
        deferred(&world.producer).await == 0
    })
    .await;
    way.stop().await;
    other.shutdown().await.expect("the other consumer");
    let mut seen = seen.0.lock().expect("no panic").clone();
    seen.sort();
    ids.sort();
    assert_eq!(seen, ids);
    assert_eq!(dead_letters(&world.producer).await, []);
}

async fn a_consumer_with_a_full_waiting_room_waits(world: World) {
    let outbox = world.outbox();
    let healed = Arc::new(AtomicBool::new(false));
    let is_healed = healed.clone();
    let handler = TickHandler::judging(move |d| {
        let bad = d.event.key.as_deref().is_some_and(|k| k.starts_with("bad"));
        if bad && !is_healed.load(Relaxed) {
            return Err(std::io::Error::other("not yet").into());
        }
        Ok(())
    });
    let consumer = world
        .ticks(handler)
        .retry(retry(&[1_000; 20]))
        .settings(ConsumerSettings {
            deferred: 3,
            ..World::consumer_settings()
        });
    let way = world.start(&outbox, consumer).await;
    for n in 1..=3 {
        world
            .commit(&outbox, &[Tick::new(format!("bad-{n}"), 1)])
            .await;
        until("it waits", async || {
            deferred(&world.consumer).await == n as usize
        })
        .await;
    }
    for n in 4..=8 {
        world
            .commit(&outbox, &[Tick::new(format!("bad-{n}"), 1)])
            .await;
    }
    world
        .commit(&outbox, &[Tick::new("bad-1", 2), Tick::new("good", 1)])
        .await;
    until("it says that no more can wait", async || {
        way.consumer
            .health()
            .trouble
            .is_some_and(|t| t.contains("the maxima are 3"))
    })
    .await;
    assert_eq!(deferred(&world.consumer).await, 3);
    healed.store(true, Relaxed);
    world.until_effects(10).await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    until("the trouble is over", async || {
        way.consumer.health().trouble.is_none()
    })
    .await;
    way.stop().await;
    let effects = world.effects().await;
    let numbers = numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n)));
    assert_eq!(effects.len(), 10);
    assert_eq!(numbers["bad-1"], [1, 2]);
    assert_eq!(dead_letters(&world.consumer).await, []);
}
