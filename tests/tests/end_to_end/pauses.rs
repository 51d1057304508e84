//! What operators hold back: it is not sent, not read, not counted, and goes on in order, also across a restart.

use std::time::Duration;

use pillarbox_core::{
    Admin, Database, Failure, Kind, Pool, RelaySettings, RetentionSettings, Running,
    admin::{Pause, Target},
    window::Limits,
};
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, in_both_worlds, numbers_by_key, on_servers_alone,
    tables::{self, dead_letters, deferred},
    until,
    wire::Client,
};

use crate::retry;

in_both_worlds!(
    a_paused_destination_sends_nothing_and_goes_on_in_order,
    a_paused_topic_waits_and_says_when_it_holds_its_neighbours_back,
    a_paused_key_waits_in_its_line_and_its_neighbours_go_on,
    a_paused_key_fills_its_room_and_no_more,
    a_paused_group_reads_nothing_and_goes_on_in_order,
    a_paused_key_of_a_group_waits_and_its_neighbours_go_on,
    a_pause_ends_by_itself_and_is_removed,
);

on_servers_alone!(who_cannot_see_the_pauses_yet_sends_and_reads_nothing);

const HOUR: Duration = Duration::from_secs(3_600);

/// Long enough for what should not happen to happen: a look at the pauses, a read, a publish.
async fn a_while() {
    tokio::time::sleep(Duration::from_millis(2_500)).await;
}

async fn pause(admin: &Admin, running: &Running, target: &Target) -> Pause {
    let pause = admin.pause(target, HOUR, "a test").await.expect("a pause");
    obeys(running, &pause).await;
    pause
}

async fn obeys(running: &Running, pause: &Pause) {
    until("it obeys", async || running.health().pauses.contains(pause)).await;
}

async fn resume(admin: &Admin, running: &Running, target: &Target) {
    admin.resume(target, "the test goes on").await.expect("one");
    until("it goes on", async || running.health().pauses.is_empty()).await;
}

fn ticks(key: &str, numbers: std::ops::RangeInclusive<u32>) -> Vec<Tick> {
    numbers.map(|n| Tick::new(key, n)).collect()
}

async fn assert_in_order(world: &World, key: &str, up_to: u32) {
    let effects = world.effects().await;
    let numbers = numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n)));
    let expected: Vec<u32> = (1..=up_to).collect();
    assert_eq!(numbers.get(key), Some(&expected), "{key}");
}

async fn a_paused_destination_sends_nothing_and_goes_on_in_order(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    world.commit(&outbox, &ticks("a", 1..=50)).await;
    world.until_effects(50).await;

    let main = Target::destination("main");
    let paused = pause(&admin, &way.relay, &main).await;
    world.commit(&outbox, &ticks("a", 51..=100)).await;
    a_while().await;
    assert_eq!(world.count_effects().await, 50, "it was sent");
    let health = way.relay.health();
    assert_eq!(health.held, health.of, "it keeps its leases");
    let trouble = health.trouble.expect("it says so");
    for part in ["paused until ", "by \"ada\"", "because \"a test\""] {
        assert!(trouble.contains(part), "{trouble}");
    }

    // Who starts during a pause obeys it from its first event on.
    way.relay.shutdown().await.expect("it ends well");
    let relay = world.relay(&outbox).spawn();
    obeys(&relay, &paused).await;
    world.commit(&outbox, &ticks("a", 101..=150)).await;
    a_while().await;
    assert_eq!(world.count_effects().await, 50, "it was sent");
    assert_eq!(deferred(&world.producer).await, 0, "an attempt was burned");

    resume(&admin, &relay, &main).await;
    world.until_effects(150).await;
    until("no trouble is left", async || {
        relay.health().trouble.is_none()
    })
    .await;
    relay.shutdown().await.expect("it ends well");
    way.consumer.shutdown().await.expect("it ends well");
    assert_in_order(&world, "a", 150).await;
    assert_eq!(dead_letters(&world.producer).await, []);
}

async fn a_paused_topic_waits_and_says_when_it_holds_its_neighbours_back(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let defaults = World::relay_settings();
    let settings = RelaySettings {
        window: Limits {
            held: 40,
            ..defaults.window
        },
        ..defaults
    };
    let relay = world.relay(&outbox).settings(settings);
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    let main = Target::destination("main");
    let (other, this) = (main.clone().topic("another.topic"), main.topic(TOPIC));
    pause(&admin, &way.relay, &other).await;
    world.commit(&outbox, &ticks("a", 1..=10)).await;
    world.until_effects(10).await;
    resume(&admin, &way.relay, &other).await;

    pause(&admin, &way.relay, &this).await;
    // In one partition, so that its window is surely full.
    world.commit(&outbox, &ticks("a", 11..=200)).await;
    until("it says that the window is full", async || {
        let trouble = way.relay.health().trouble.unwrap_or_default();
        trouble.contains("window") && trouble.contains(TOPIC)
    })
    .await;
    a_while().await;
    assert_eq!(world.count_effects().await, 10, "it was sent");
    assert_eq!(deferred(&world.producer).await, 0);
    resume(&admin, &way.relay, &this).await;
    world.until_effects(200).await;
    until("no trouble is left", async || {
        way.relay.health().trouble.is_none()
    })
    .await;
    way.stop().await;
    assert_in_order(&world, "a", 200).await;
}

async fn a_paused_key_waits_in_its_line_and_its_neighbours_go_on(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let key = Target::destination("main").key(TOPIC, "a");
    pause(&admin, &way.relay, &key).await;
    world.commit(&outbox, &ticks("a", 1..=30)).await;
    world.commit(&outbox, &ticks("b", 1..=30)).await;
    world.commit(&outbox, &[Tick::keyless(1)]).await;
    world.until_effects(31).await;
    until("its events wait", async || {
        deferred(&world.producer).await == 30
    })
    .await;
    a_while().await;
    assert_eq!(world.count_effects().await, 31, "it was sent");
    until("a key is nobody's trouble", async || {
        way.relay.health().trouble.is_none()
    })
    .await;

    // Its owner goes; the next one finds line and pause.
    way.relay.shutdown().await.expect("it ends well");
    let relay = world.relay(&outbox).spawn();
    until("it sees the pause", async || {
        !relay.health().pauses.is_empty()
    })
    .await;
    world.commit(&outbox, &ticks("a", 31..=60)).await;
    world.commit(&outbox, &ticks("b", 31..=60)).await;
    world.until_effects(61).await;
    until("all its events wait", async || {
        deferred(&world.producer).await == 60
    })
    .await;
    a_while().await;
    assert_eq!(world.count_effects().await, 61, "it was sent");

    resume(&admin, &relay, &key).await;
    // Beside its line's going on.
    world.commit(&outbox, &ticks("a", 61..=90)).await;
    world.until_effects(151).await;
    until("nothing waits", async || {
        deferred(&world.producer).await == 0
    })
    .await;
    // Paused without an event, and resumed: the key is free again.
    pause(&admin, &relay, &key).await;
    resume(&admin, &relay, &key).await;
    world.commit(&outbox, &ticks("a", 91..=92)).await;
    world.until_effects(153).await;
    relay.shutdown().await.expect("it ends well");
    way.consumer.shutdown().await.expect("it ends well");
    assert_in_order(&world, "a", 92).await;
    assert_in_order(&world, "b", 60).await;
    assert_eq!(dead_letters(&world.producer).await, []);
}

async fn a_paused_key_fills_its_room_and_no_more(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let settings = RelaySettings {
        deferred_per_key: 20,
        ..World::relay_settings()
    };
    let relay = world.relay(&outbox).settings(settings);
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    let key = Target::destination("main").key(TOPIC, "a");
    pause(&admin, &way.relay, &key).await;
    world.commit(&outbox, &ticks("a", 1..=20)).await;
    until("the room is full", async || {
        deferred(&world.producer).await == 20
    })
    .await;
    world.commit(&outbox, &ticks("a", 21..=40)).await;
    until("its partition says that the room is full", async || {
        let trouble = way.relay.health().trouble.unwrap_or_default();
        trouble.contains("of one key")
    })
    .await;
    a_while().await;
    assert_eq!(deferred(&world.producer).await, 20);
    assert_eq!(world.count_effects().await, 0);
    resume(&admin, &way.relay, &key).await;
    world.until_effects(40).await;
    way.stop().await;
    assert_in_order(&world, "a", 40).await;
}

async fn a_paused_group_reads_nothing_and_goes_on_in_order(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.consumer, "ada");
    // A line that waits must not go on either.
    let handler = TickHandler::judging(|d| match (d.event.key.as_deref(), d.attempts) {
        (Some("failing"), 0) => Err(Failure::retry_in(Duration::from_secs(2), "not yet")),
        _ => Ok(()),
    });
    let reader = || world.ticks(handler.clone()).retry(retry(&[2_000]));
    let way = world.start(&outbox, reader()).await;
    world.commit(&outbox, &ticks("a", 1..=20)).await;
    world.commit(&outbox, &[Tick::new("failing", 1)]).await;
    world.until_effects(20).await;
    until("one waits", async || deferred(&world.consumer).await == 1).await;

    let group = Target::group(&world.group);
    let paused = pause(&admin, &way.consumer, &group).await;
    until("it gives its source back", async || {
        way.consumer.health().held == 0
    })
    .await;
    let trouble = way.consumer.health().trouble.expect("it says so");
    assert!(trouble.contains("because \"a test\""), "{trouble}");
    world.commit(&outbox, &ticks("a", 21..=60)).await;
    a_while().await;
    a_while().await;
    assert_eq!(world.count_effects().await, 20, "it was read");
    assert_eq!(handler.calls_of("failing", 1).len(), 1, "its line went on");

    way.consumer.shutdown().await.expect("it ends well");
    let mut again = reader();
    again.bind().await.expect("bind");
    let again = again.spawn();
    obeys(&again, &paused).await;
    a_while().await;
    assert_eq!(world.count_effects().await, 20, "it was read");
    assert_eq!(again.health().held, 0);

    resume(&admin, &again, &group).await;
    world.until_effects(61).await;
    again.shutdown().await.expect("it ends well");
    way.relay.shutdown().await.expect("it ends well");
    assert_in_order(&world, "a", 60).await;
    assert_in_order(&world, "failing", 1).await;
    assert_eq!(dead_letters(&world.consumer).await, []);
}

async fn a_paused_key_of_a_group_waits_and_its_neighbours_go_on(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.consumer, "ada");
    let handler = TickHandler::new();
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    let key = Target::group(&world.group).key(TOPIC, "a");
    let paused = pause(&admin, &way.consumer, &key).await;
    world.commit(&outbox, &ticks("a", 1..=30)).await;
    world.commit(&outbox, &ticks("b", 1..=30)).await;
    world.until_effects(30).await;
    until("its events wait", async || {
        deferred(&world.consumer).await == 30
    })
    .await;
    a_while().await;
    assert_eq!(world.count_effects().await, 30, "it was applied");

    way.consumer.shutdown().await.expect("it ends well");
    let mut again = world.ticks(handler.clone());
    again.bind().await.expect("bind");
    let again = again.spawn();
    obeys(&again, &paused).await;
    world.commit(&outbox, &ticks("a", 31..=60)).await;
    world.commit(&outbox, &ticks("b", 31..=60)).await;
    world.until_effects(60).await;
    until("all its events wait", async || {
        deferred(&world.consumer).await == 60
    })
    .await;
    a_while().await;
    assert_eq!(world.count_effects().await, 60, "it was applied");

    resume(&admin, &again, &key).await;
    world.commit(&outbox, &ticks("a", 61..=90)).await;
    world.until_effects(150).await;
    again.shutdown().await.expect("it ends well");
    way.relay.shutdown().await.expect("it ends well");
    assert_in_order(&world, "a", 90).await;
    assert_in_order(&world, "b", 60).await;
    assert!(
        handler.calls().iter().all(|c| c.attempts == 0),
        "an attempt was burned"
    );
}

async fn a_pause_ends_by_itself_and_is_removed(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let retention = RetentionSettings {
        interval: Duration::from_millis(200),
        ..RetentionSettings::default()
    };
    let main = Target::destination("main");
    let short = Duration::from_secs(4);
    // Before anybody runs, so that however long a start takes, nobody can be too late to obey.
    let pause = admin.pause(&main, short, "a test").await.expect("a pause");
    world.commit(&outbox, &ticks("a", 1..=5)).await;
    let relay = world.relay(&outbox).retention(retention);
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    world.until_effects(5).await;
    let now = std::time::SystemTime::now();
    // One machine, one clock.
    assert!(
        now + Duration::from_millis(50) > pause.until,
        "it was sent before the end"
    );
    until("its row is gone", async || {
        tables::count(&world.producer, "{t}pause").await == 0
    })
    .await;
    let over = admin.resume(&main, "too late").await.expect_err("none");
    assert_eq!(over.kind(), Kind::NotFound);
    way.stop().await;
    assert_in_order(&world, "a", 5).await;
}

/// Keeps everybody from seeing a database's pauses.
async fn hide_pauses(database: &Database) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let Some(Pool::Postgres(pool)) = database.pool() else {
        panic!("PostgreSQL")
    };
    let mut tx = pool.begin().await.expect("begin");
    let lock = "LOCK TABLE pillarbox.pause IN ACCESS EXCLUSIVE MODE";
    sqlx::query(lock).execute(&mut *tx).await.expect("a lock");
    tx
}

/// One that starts during a pause must not send first and look then.
async fn who_cannot_see_the_pauses_yet_sends_and_reads_nothing(world: World) {
    let outbox = world.outbox();
    let mut consumer = world.ticks(TickHandler::new());
    consumer.bind().await.expect("bind");
    world.commit(&outbox, &ticks("a", 1..=10)).await;

    let hidden = hide_pauses(&world.producer).await;
    let relay = world.relay(&outbox).spawn();
    until("it has its leases", async || {
        let health = relay.health();
        health.of > 0 && health.held == health.of
    })
    .await;
    a_while().await;
    let client = Client::connect(world.amqp_url.as_deref().expect("a broker")).await;
    assert_eq!(client.depth(&world.queue()).await, 0, "it was sent");
    hidden.rollback().await.expect("rolled back");
    until("it is sent", async || {
        client.depth(&world.queue()).await == 10
    })
    .await;

    let hidden = hide_pauses(&world.consumer).await;
    let consumer = consumer.spawn();
    a_while().await;
    assert_eq!(consumer.health().held, 0);
    assert_eq!(world.count_effects().await, 0, "it was read");
    hidden.rollback().await.expect("rolled back");
    world.until_effects(10).await;
    relay.shutdown().await.expect("it ends well");
    consumer.shutdown().await.expect("it ends well");
    assert_in_order(&world, "a", 10).await;
}
