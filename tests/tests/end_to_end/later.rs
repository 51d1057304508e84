//! Events that are sent at a time of their own, and keys that wait for an operator.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use pillarbox_core::{
    Admin, Failure, RelaySettings, Scheduled,
    admin::{Filter, Page},
    failure::{OnExhausted, Retry},
};
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, in_both_worlds,
    tables::{self, dead_letters, deferred},
    until,
};

use crate::retry;

in_both_worlds!(
    an_event_is_sent_when_its_time_comes_and_holds_nothing_back,
    a_cancelled_event_is_never_sent_whether_the_relay_has_read_it_or_not,
    scheduled_events_have_a_room_of_their_own,
    a_parked_key_of_a_relay_waits_and_no_other,
    a_parked_key_of_a_consumer_waits_and_no_other,
);

fn parking(delays: &[u64]) -> Retry {
    Retry {
        on_exhausted: OnExhausted::Park,
        ..retry(delays)
    }
}

async fn schedule(world: &World, tick: Tick, at: SystemTime) -> Scheduled {
    let outbox = world.outbox();
    let mut event = None;
    world
        .transact(&outbox, true, async |c| {
            event = Some(outbox.enqueue_at(c, &tick, at).await.expect("enqueue"));
        })
        .await;
    event.expect("a receipt")
}

async fn cancel(world: &World, event: &Scheduled) -> bool {
    let outbox = world.outbox();
    let mut is_cancelled = false;
    world
        .transact(&outbox, true, async |c| {
            is_cancelled = outbox.cancel(c, event).await.expect("an answer");
        })
        .await;
    is_cancelled
}

async fn numbers(world: &World, key: &str) -> Vec<u32> {
    let effects = world.effects().await;
    effects
        .into_iter()
        .filter(|e| e.key == key)
        .map(|e| e.n)
        .collect()
}

async fn an_event_is_sent_when_its_time_comes_and_holds_nothing_back(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let now = SystemTime::now();
    let second = Duration::from_secs(1);
    schedule(&world, Tick::new("a", 10), now + 4 * second).await;
    schedule(&world, Tick::new("a", 9), now + 3 * second).await;
    schedule(&world, Tick::new("a", 1), now - second).await;
    world.until_effects(1).await;
    for n in 2..=4 {
        world.commit(&outbox, &[Tick::new("a", n)]).await;
    }
    world.until_effects(4).await;
    assert!(
        SystemTime::now() < now + 3 * second,
        "nothing was held back"
    );
    // The next owner finds what waits, too.
    way.relay.shutdown().await.expect("the relay ends well");
    assert_eq!(deferred(&world.producer).await, 2);
    let relay = world.relay(&outbox).spawn();
    world.until_effects(6).await;
    assert!(SystemTime::now() >= now + 4 * second, "not before its time");
    world.commit(&outbox, &[Tick::new("a", 11)]).await;
    world.until_effects(7).await;
    until("nothing waits", async || {
        deferred(&world.producer).await == 0
    })
    .await;
    relay.shutdown().await.expect("the relay ends well");
    way.consumer
        .shutdown()
        .await
        .expect("the consumer ends well");
    assert_eq!(numbers(&world, "a").await, [1, 2, 3, 4, 9, 10, 11]);
}

async fn a_cancelled_event_is_never_sent_whether_the_relay_has_read_it_or_not(world: World) {
    let outbox = world.outbox();
    let soon = SystemTime::now() + Duration::from_secs(4);
    let unread = schedule(&world, Tick::new("a", 1), soon).await;
    assert!(cancel(&world, &unread).await);
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let read = schedule(&world, Tick::new("a", 2), soon).await;
    let kept = schedule(&world, Tick::new("a", 3), soon).await;
    until("the relay has read them", async || {
        deferred(&world.producer).await == 3
    })
    .await;
    assert!(cancel(&world, &read).await);
    // A cancel that is undone is none.
    world
        .transact(&outbox, false, async |c| {
            assert!(outbox.cancel(c, &kept).await.expect("an answer"));
        })
        .await;
    world.until_effects(1).await;
    until("nothing waits", async || {
        deferred(&world.producer).await == 0
    })
    .await;
    assert!(!cancel(&world, &kept).await, "it was sent");
    world.commit(&outbox, &[Tick::new("a", 4)]).await;
    world.until_effects(2).await;
    way.stop().await;
    assert_eq!(numbers(&world, "a").await, [3, 4]);
    assert_eq!(dead_letters(&world.producer).await, []);
}

async fn scheduled_events_have_a_room_of_their_own(world: World) {
    let outbox = world.outbox();
    let settings = RelaySettings {
        scheduled: 3,
        deferred: 2,
        ..World::relay_settings()
    };
    let relay = world.relay(&outbox).retry(retry(&[100])).settings(settings);
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    let soon = SystemTime::now() + Duration::from_secs(5);
    // One key, one partition: the fourth finds the room full, and the events behind it go on.
    for n in 1..=5 {
        schedule(&world, Tick::new("a", n), soon).await;
    }
    let nowhere = Tick::new("a", 6).message("test.nowhere");
    world.commit_messages(&outbox, vec![nowhere]).await;
    until("it was given up: the other room is not full", async || {
        dead_letters(&world.producer).await.len() == 1
    })
    .await;
    world.commit(&outbox, &[Tick::new("a", 7)]).await;
    world.until_effects(1).await;
    assert!(SystemTime::now() < soon);
    world.until_effects(6).await;
    way.stop().await;
    assert_eq!(numbers(&world, "a").await, [7, 1, 2, 3, 4, 5]);
}

async fn a_parked_key_of_a_relay_waits_and_no_other(world: World) {
    let outbox = world.outbox();
    let relay = world.relay(&outbox).retry(parking(&[100]));
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    let lost = Tick::new("a", 1).message("test.nowhere");
    let keyless = Tick::keyless(1).message("test.nowhere");
    world
        .commit_messages(&outbox, vec![lost.clone(), keyless.clone()])
        .await;
    for n in 2..=5 {
        world
            .commit(&outbox, &[Tick::new("a", n), Tick::new("b", n)])
            .await;
    }
    world.until_effects(4).await;
    until("its health tells", async || way.relay.health().parked == 1).await;
    let dead = dead_letters(&world.producer).await;
    assert_eq!(dead.len(), 1, "without a key nobody waits");
    assert_eq!(dead[0].id, keyless.id);

    let admin = Admin::new(&world.producer, "ada");
    let main = Filter::of_destination("main");
    let parked = admin.parked(&main, &Page::default()).await.expect("a list");
    let heads: Vec<_> = parked
        .iter()
        .map(|l| (l.id.id.as_str(), l.attempts))
        .collect();
    assert_eq!(heads, [(lost.id.as_str(), 2)]);
    // A new owner does not forget it, and a retry does not mend it.
    way.relay.shutdown().await.expect("the relay ends well");
    let relay = world.relay(&outbox).retry(parking(&[])).spawn();
    until("its health tells", async || relay.health().parked == 1).await;
    assert!(
        admin
            .retry(&parked[0].id, "let us see")
            .await
            .expect("a retry")
    );
    until("it is parked again", async || {
        let parked = admin.parked(&main, &Page::default()).await.expect("a list");
        parked.iter().any(|l| l.attempts == 1)
    })
    .await;
    assert_eq!(world.count_effects().await, 4);
    admin
        .discard(&parked[0].id, "nobody wants it")
        .await
        .expect("a discard");
    world.until_effects(8).await;
    world.commit(&outbox, &[Tick::new("a", 6)]).await;
    world.until_effects(9).await;
    until("its health tells", async || relay.health().parked == 0).await;
    relay.shutdown().await.expect("the relay ends well");
    way.consumer
        .shutdown()
        .await
        .expect("the consumer ends well");
    assert_eq!(numbers(&world, "a").await, [2, 3, 4, 5, 6]);
    assert_eq!(numbers(&world, "b").await, [2, 3, 4, 5]);
    assert_eq!(tables::count(&world.producer, "{t}deferred").await, 0);
}

async fn a_parked_key_of_a_consumer_waits_and_no_other(world: World) {
    let outbox = world.outbox();
    let mended = Arc::new(AtomicBool::new(false));
    let is_mended = mended.clone();
    let handler = TickHandler::judging(move |d| match (d.event.key.as_deref(), d.event.n) {
        (Some("a"), 1) if !is_mended.load(Relaxed) => Err(Failure::reject("no such account")),
        (Some("b"), 2) if !is_mended.load(Relaxed) => {
            Err(std::io::Error::other("the account is locked").into())
        }
        _ => Ok(()),
    });
    let consumer = world.ticks(handler.clone()).retry(parking(&[100]));
    let way = world.start(&outbox, consumer).await;
    for n in 1..=4 {
        let ticks = ["a", "b", "c"].map(|key| Tick::new(key, n));
        world.commit(&outbox, &ticks).await;
    }
    world.until_effects(5).await;
    until("its health tells", async || {
        way.consumer.health().parked == 2
    })
    .await;
    assert_eq!(numbers(&world, "c").await, [1, 2, 3, 4]);
    assert_eq!(numbers(&world, "b").await, [1]);
    assert_eq!(dead_letters(&world.consumer).await, []);

    let admin = Admin::new(&world.consumer, "ada");
    let group = Filter::of_group(&world.group);
    let parked = admin
        .parked(&group, &Page::default())
        .await
        .expect("a list");
    assert_eq!(parked.len(), 2);
    mended.store(true, Relaxed);
    for letter in &parked {
        assert_eq!(letter.topic, TOPIC);
        assert!(admin.retry(&letter.id, "mended").await.expect("a retry"));
    }
    world.until_effects(12).await;
    until("its health tells", async || {
        way.consumer.health().parked == 0
    })
    .await;
    way.stop().await;
    for key in ["a", "b", "c"] {
        assert_eq!(numbers(&world, key).await, [1, 2, 3, 4], "{key}");
    }
    assert_eq!(deferred(&world.consumer).await, 0);
}
