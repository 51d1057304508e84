//! On NATS: the same bodies, and what is its own.

use pillarbox_testkit::servers::{self, Nats};
use pillarbox_tests::{
    Tick, TickHandler, World, nats, numbers_by_key, on_nats_too,
    tables::{self, rewind},
    until,
};

on_nats_too!(
    way::committed_events_have_one_effect_each_in_order,
    way::rolled_back_events_have_none,
    way::ten_thousand_events_of_200_keys_arrive_in_commit_order,
    duplicates::a_message_that_was_published_twice_has_one_effect,
    poison::payloads_that_do_not_fit_are_dead_letters_with_the_reason,
    handlers::one_that_always_fails_ends_as_a_dead_letter_after_1s_2s_4s,
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_comes_again_is_stored_once() {
    let Some(world) = World::nats().await else {
        return;
    };
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    for n in 1..=50 {
        world
            .commit(&outbox, &["a", "b"].map(|key| Tick::new(key, n)))
            .await;
    }
    world.until_effects(100).await;
    way.stop().await;
    rewind(&world.producer).await;
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    world.commit(&outbox, &[Tick::new("a", 51)]).await;
    world.until_effects(101).await;
    way.stop().await;
    let url = world.nats_url.as_deref().expect("a server");
    assert_eq!(nats::stored(url).await, 101, "the server knows their ids");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_or_crashes_costs_nothing_but_time() {
    let Some(mut server) = servers::required(Nats::start().await) else {
        return;
    };
    let url = server.create_account().expect("an account");
    let Some(world) = World::on_nats(&url).await else {
        return;
    };
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let mut last = 0;
    let commit = async |numbers: std::ops::RangeInclusive<u32>| {
        for n in numbers {
            let ticks = ["a", "b", "c"].map(|key| Tick::new(key, n));
            world.commit(&outbox, &ticks).await;
        }
    };
    for kill in [false, true] {
        commit(last + 1..=last + 30).await;
        world.until_effects(3 * (last as usize + 30)).await;
        if kill {
            server.kill().await.expect("killed");
        } else {
            server.stop().await.expect("stopped");
        }
        commit(last + 31..=last + 60).await;
        until("both tell what they wait for", async || {
            way.relay.health().trouble.is_some() && way.consumer.health().trouble.is_some()
        })
        .await;
        assert_eq!(
            tables::deferred(&world.producer).await,
            0,
            "an attempt was burned"
        );
        assert_eq!(tables::dead_letters(&world.producer).await, []);
        server.start_again().await.expect("started");
        last += 60;
    }
    world.until_effects(3 * last as usize).await;
    way.stop().await;
    let effects = world.effects().await;
    assert_eq!(effects.len(), 3 * last as usize, "an effect happened twice");
    for (key, numbers) in numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n))) {
        assert_eq!(numbers, (1..=last).collect::<Vec<_>>(), "order of {key}");
    }
}
