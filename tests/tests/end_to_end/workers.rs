//! Several workers of one source: each key's order holds, through failures, stops and hand-overs.

use std::{sync::Arc, time::Duration};

use pillarbox_core::{Consumer, ConsumerSettings, Delivery, Effect, Failure};
use pillarbox_tests::{
    Tick, TickHandler, World, in_both_worlds,
    ledger::{Plan, Writers, assert_effects},
    seed,
    tables::{count, dead_letters, deferred},
    until,
};
use tokio::sync::{Barrier, Notify, Semaphore};

use crate::retry;

in_both_worlds!(
    each_keys_order_holds_through_failures,
    effects_run_side_by_side,
    a_stop_waits_for_each_of_them,
    one_that_waits_does_not_hold_back_the_others,
    three_consumers_that_join_and_leave_keep_order_and_effects,
);

fn settings(workers: usize) -> ConsumerSettings {
    ConsumerSettings {
        workers,
        batch: 20,
        ..World::consumer_settings()
    }
}

/// Each third event of a key fails at first.
fn moody() -> TickHandler {
    TickHandler::judging(|d| {
        if d.event.n % 3 == 0 && d.attempts == 0 {
            return Err(std::io::Error::other("on purpose").into());
        }
        Ok(())
    })
}

fn moody_consumer(world: &World, workers: usize) -> Consumer {
    world
        .ticks(moody())
        .settings(settings(workers))
        .retry(retry(&[50, 50, 50]))
}

async fn each_keys_order_holds_through_failures(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, moody_consumer(&world, 4)).await;
    let plan = Plan {
        writers: 4,
        keys: 25,
        events: 600,
        pause: Duration::ZERO,
    };
    let ledger = Writers::start(&outbox, plan, seed()).await.done().await;
    let log = ledger.log(&world.producer).await;
    // Without a key there is no order, and nothing is lost either.
    let keyless: Vec<Tick> = (1..=50).map(Tick::keyless).collect();
    world.commit(&outbox, &keyless).await;
    world.until_effects(650).await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    way.stop().await;
    let effects = world.effects().await;
    assert_eq!(effects.len(), 650);
    let keyed: Vec<_> = effects.into_iter().filter(|e| !e.key.is_empty()).collect();
    assert_effects(&log, &keyed);
    assert_eq!(dead_letters(&world.consumer).await, []);
}

/// None of these ends before all four have begun.
struct Together(Arc<Barrier>);

impl Effect<Tick> for Together {
    async fn run(&self, _: &Delivery<Tick>) -> Result<(), Failure> {
        self.0.wait().await;
        Ok(())
    }
}

async fn effects_run_side_by_side(world: World) {
    let outbox = world.outbox();
    let consumer = world
        .group_of(&world.group)
        .settings(settings(4))
        .on_effect::<Tick>(Together(Arc::new(Barrier::new(4))));
    // Each of the four has many keys of these.
    let ticks: Vec<Tick> = (1..=200)
        .map(|n| Tick::new(format!("key-{n}"), n))
        .collect();
    world.commit(&outbox, &ticks).await;
    let way = world.start(&outbox, consumer).await;
    until("all four have met", async || {
        count(&world.consumer, "{t}inbox").await >= 4
    })
    .await;
    // The last of them never meet.
    way.relay.abort();
    way.consumer.abort();
}

async fn a_stop_waits_for_each_of_them(world: World) {
    let outbox = world.outbox();
    let (began, go_on) = (Arc::new(Notify::new()), Arc::new(Semaphore::new(0)));
    let handler = TickHandler::acting({
        let (began, go_on) = (began.clone(), go_on.clone());
        move |_, _| {
            let (began, go_on) = (began.clone(), go_on.clone());
            Box::pin(async move {
                began.notify_one();
                go_on.acquire().await.map(drop)?;
                Ok(())
            })
        }
    });
    let ticks: Vec<Tick> = (1..=40).map(|n| Tick::new(format!("key-{n}"), n)).collect();
    world.commit(&outbox, &ticks).await;
    let consumer = world.ticks(handler.clone()).settings(settings(3));
    let way = world.start(&outbox, consumer).await;
    began.notified().await;
    let stopping = tokio::spawn(way.consumer.shutdown());
    go_on.add_permits(1_000);
    stopping.await.expect("no panic").expect("it ends well");
    way.relay.shutdown().await.expect("relay");
    let called = handler.calls().len();
    assert!(called > 0);
    assert_eq!(
        world.effects().await.len(),
        called,
        "all that began is kept"
    );
}

async fn one_that_waits_does_not_hold_back_the_others(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::judging(|d| match d.event.key.as_deref() {
        Some("stuck") => Err(Failure::unavailable("for good")),
        _ => Ok(()),
    });
    let consumer = world.ticks(handler.clone()).settings(settings(4));
    let way = world.start(&outbox, consumer).await;
    world.commit(&outbox, &[Tick::new("stuck", 1)]).await;
    until("it is stuck", async || !handler.calls().is_empty()).await;
    // Three quarters of them have another worker.
    let ticks: Vec<Tick> = (1..=40).map(|n| Tick::new(format!("key-{n}"), n)).collect();
    world.commit(&outbox, &ticks).await;
    world.until_effects(15).await;
    let trouble = way.consumer.health().trouble;
    assert!(trouble.is_some_and(|t| t.contains("for good")));
    way.stop().await;
    assert!(handler.calls().iter().all(|c| c.attempts == 0));
}

async fn three_consumers_that_join_and_leave_keep_order_and_effects(world: World) {
    let outbox = world.outbox();
    let relay = world.relay(&outbox).spawn();
    let mut first = moody_consumer(&world, 3);
    first.bind().await.expect("bind");
    let first = first.spawn();
    let plan = Plan {
        writers: 3,
        keys: 20,
        events: 1_500,
        pause: Duration::from_millis(1),
    };
    let writers = Writers::start(&outbox, plan, seed()).await;
    world.until_effects(150).await;
    let second = moody_consumer(&world, 1).spawn();
    let third = moody_consumer(&world, 5).spawn();
    world.until_effects(300).await;
    // One leaves in order, one as in a crash, one comes back.
    first.shutdown().await.expect("the first consumer");
    world.until_effects(600).await;
    third.abort();
    let third = moody_consumer(&world, 2).spawn();
    world.until_effects(900).await;
    second.shutdown().await.expect("the second consumer");
    let ledger = writers.done().await;
    world.until_effects(1_500).await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    relay.shutdown().await.expect("relay");
    third.shutdown().await.expect("the third consumer");
    assert_effects(&ledger.log(&world.producer).await, &world.effects().await);
    assert_eq!(dead_letters(&world.consumer).await, []);
}
