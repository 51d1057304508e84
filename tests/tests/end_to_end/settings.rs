//! Rules that are easily lost: the host's isolation level, topic filters, what `memory` promises.

use std::str::FromStr as _;

use pillarbox_core::{Database, lease::LeaseTerm, memory};
use pillarbox_tests::{
    Tick, TickHandler, World, embedded_alone, in_both_worlds, on_servers_alone,
    tables::{self, number},
    until,
};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

in_both_worlds!(a_topic_filter_moves_the_cursor);
on_servers_alone!(the_hosts_isolation_level_is_not_the_engines);
embedded_alone!(
    memory_says_ok_once_every_group_has_committed,
    memory_is_held_by_one_at_a_time,
);

async fn a_topic_filter_moves_the_cursor(world: World) {
    let outbox = world.outbox();
    let consumer = world.ticks(TickHandler::new());
    let way = world
        .start_with(world.relay(&outbox).topics(["another.topic"]), consumer)
        .await;
    for n in 1..=500 {
        world
            .commit(&outbox, &[Tick::new(format!("key-{n}"), 1)])
            .await;
    }
    // The cursor's own columns: nothing of the log lies behind it.
    let behind = if tables::is_postgres(&world.producer) {
        "SELECT CAST(count(*) AS TEXT) FROM {t}outbox o JOIN {t}cursor c ON c.partition = o.partition \
         WHERE NOT pg_visible_in_snapshot(o.xact_id, c.seen)"
    } else {
        "SELECT CAST(count(*) AS TEXT) FROM {t}outbox o JOIN {t}cursor c ON c.partition = 0 \
         WHERE o.position > c.last"
    };
    until("the cursor passed them all", async || {
        number(&world.producer, behind).await == 0
    })
    .await;
    way.stop().await;
    // Nor do they come to whoever wants them later under the same name.
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    world.commit(&outbox, &[Tick::new("a", 1)]).await;
    world.until_effects(1).await;
    way.stop().await;
    assert_eq!(world.effects().await.len(), 1);
}

/// Under REPEATABLE READ each renewal that meets another would fail.
async fn the_hosts_isolation_level_is_not_the_engines(mut world: World) {
    let pool = |url: &str| {
        let options = PgConnectOptions::from_str(url)
            .expect("an address")
            .options([
                ("default_transaction_isolation", "repeatable read"),
                ("default_transaction_read_only", "off"),
                ("synchronous_commit", "off"),
            ]);
        Database::from(
            &PgPoolOptions::new()
                .max_connections(4)
                .connect_lazy_with(options),
        )
    };
    world.producer = pool(&world.urls.0);
    world.consumer = pool(&world.urls.1);
    let level = tables::query(&world.producer, "SHOW transaction_isolation").await;
    assert_eq!(level[0][0].as_deref(), Some("repeatable read"));
    let outbox = world.outbox();
    let settings = pillarbox_core::RelaySettings {
        lease: LeaseTerm::new(LeaseTerm::SHORTEST),
        ..World::relay_settings()
    };
    let relay = world.relay(&outbox).settings(settings);
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    let begun = tokio::time::Instant::now();
    let mut n = 0;
    while begun.elapsed() < LeaseTerm::SHORTEST * 4 {
        n += 1;
        let ticks: Vec<Tick> = (0..8)
            .map(|key| Tick::new(format!("key-{key}"), n))
            .collect();
        world.commit(&outbox, &ticks).await;
    }
    world.until_effects(8 * n as usize).await;
    let epochs = "SELECT CAST(max(epoch) AS TEXT) FROM {t}";
    let relay = number(&world.producer, &format!("{epochs}cursor")).await;
    let source = number(&world.consumer, &format!("{epochs}source_cursor")).await;
    way.stop().await;
    assert_eq!((relay, source), (1, 1), "a lease was lost");
    assert_eq!(world.effects().await.len(), 8 * n as usize);
}

/// Two groups: what one has and the other has not is not sent.
async fn memory_says_ok_once_every_group_has_committed(world: World) {
    let outbox = world.outbox();
    let second = || {
        let group = format!("{}_b", world.group);
        world
            .group_of(&group)
            .on::<Tick>(TickHandler::judging(|d| match d.event.n {
                3 => Err(std::io::Error::other("waits").into()),
                _ => Ok(()),
            }))
    };
    let first = TickHandler::new();
    let mut other = second();
    other.bind().await.expect("bind");
    let way = world.start(&outbox, world.ticks(first.clone())).await;
    world.commit(&outbox, &[Tick::new("a", 1)]).await;
    until("the first group has it", async || {
        way.relay.health().trouble.is_some_and(|t| t.contains("_b"))
    })
    .await;
    let last = "SELECT CAST(last AS TEXT) FROM {t}cursor";
    assert_eq!(number(&world.producer, last).await, 0, "not sent yet");
    let running = other.spawn();
    // A failed one that waits in its group's store is stored, and counts.
    world
        .commit(&outbox, &[Tick::new("a", 2), Tick::new("b", 3)])
        .await;
    until("the log is settled", async || {
        number(&world.producer, last).await == 3
    })
    .await;
    way.stop().await;
    running.shutdown().await.expect("the other group");
    let effects = world.effects().await;
    let of = |n: u32| effects.iter().filter(|e| e.n == n).count();
    assert_eq!(
        (of(1), of(2), of(3)),
        (2, 2, 1),
        "one effect for each group"
    );
    assert_eq!(first.calls().len(), 3);
}

async fn memory_is_held_by_one_at_a_time(world: World) {
    let term = LeaseTerm::new(LeaseTerm::SHORTEST);
    let databases = [&world.producer, &world.consumer];
    let held = memory::hold(&databases, term).await.expect("held");
    let again = memory::hold(&databases, term);
    // Longer than the lease lasts: it is kept.
    let waited = tokio::time::timeout(LeaseTerm::SHORTEST * 2, again).await;
    assert!(waited.is_err(), "held by two");
    let again = memory::hold(&databases, term);
    tokio::pin!(again);
    let first = tokio::time::timeout(LeaseTerm::SHORTEST / 2, &mut again).await;
    assert!(first.is_err(), "held by two");
    let begun = tokio::time::Instant::now();
    held.release().await.expect("release");
    let second = again.await.expect("held");
    assert!(
        begun.elapsed() < LeaseTerm::SHORTEST,
        "the next one waited for the expiry"
    );
    // Half of it is nothing: the second database is held by somebody else.
    drop(second);
    let half = memory::hold(&[&world.consumer], term).await.expect("held");
    let all = tokio::time::timeout(LeaseTerm::SHORTEST * 2, memory::hold(&databases, term)).await;
    assert!(all.is_err(), "held by two");
    let producer = [&world.producer];
    let first = memory::hold(&producer, term);
    let first = tokio::time::timeout(LeaseTerm::SHORTEST * 3, first).await;
    first
        .expect("the half was given back")
        .expect("held")
        .release()
        .await
        .expect("release");
    half.release().await.expect("release");
}
