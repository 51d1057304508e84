//! What comes again has its effect once.

use pillarbox_tests::{
    Tick, TickHandler, World, counts, in_both_worlds, numbers_by_key, tables::rewind, until,
    wire::Client,
};

in_both_worlds!(
    a_message_that_was_published_twice_has_one_effect,
    a_log_that_comes_again_as_a_whole_has_no_further_effects,
);

pub(super) async fn a_message_that_was_published_twice_has_one_effect(world: World) {
    counts::start();
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let first = Tick::new("a", 1)
        .message("test.tick")
        .with_attribute("source", "stranger");
    // The same id from another source is another event.
    let other = first.clone().with_attribute("source", "another");
    world
        .inject(vec![first.clone(), first.clone(), other])
        .await;
    world
        .inject(vec![first, Tick::new("a", 2).message("test.tick")])
        .await;
    world.until_effects(3).await;
    way.stop().await;
    let effects = world.effects().await;
    assert_eq!(effects.iter().map(|e| e.n).collect::<Vec<_>>(), [1, 1, 2]);
    assert_eq!(counts::consumed(&world.group, "duplicate"), 2);
    assert_eq!(counts::consumed(&world.group, "applied"), 3);
}

async fn a_log_that_comes_again_as_a_whole_has_no_further_effects(world: World) {
    counts::start();
    let outbox = world.outbox();
    let client = match &world.amqp_url {
        Some(url) => Some(Client::connect(url).await),
        None => None,
    };
    if let Some(client) = &client {
        client.tap().await;
    }
    let handler = TickHandler::new();
    for (round, n) in [(0, 1..=100), (1, 101..=200)] {
        let way = world.start(&outbox, world.ticks(handler.clone())).await;
        for n in n {
            world
                .commit(&outbox, &["a", "b"].map(|key| Tick::new(key, n)))
                .await;
        }
        world.until_effects(200 * (round + 1)).await;
        until("what came again is known", async || {
            counts::consumed(&world.group, "duplicate") == 200 * round as u64
        })
        .await;
        way.stop().await;
        rewind(&world.producer).await;
    }
    let effects = world.effects().await;
    assert_eq!(handler.calls().len(), 400);
    for (key, numbers) in numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n))) {
        assert_eq!(numbers, (1..=200).collect::<Vec<_>>(), "{key}");
    }
    if let Some(client) = client {
        assert_eq!(
            client.drain("tap").await.len(),
            600,
            "the whole log was sent again"
        );
    }
}
