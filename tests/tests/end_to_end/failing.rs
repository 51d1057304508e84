//! Trouble that is nobody's fault burns no attempt: a database that is away, a lost transaction, a dependency.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use pillarbox_core::{Connection, Failure};
use pillarbox_tests::{
    Tick, TickHandler, World, embedded_alone, in_both_worlds, numbers_by_key, on_servers_alone,
    tables::{dead_letters, deferred},
    until,
};
use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};

in_both_worlds!(
    a_database_that_is_away_burns_no_attempt,
    a_dependency_that_is_away_burns_no_attempt_and_keeps_the_order,
    a_stop_waits_for_no_dependency_that_stays_away,
    what_came_before_it_in_its_batch_is_kept,
);
on_servers_alone!(sqlstates_that_are_nobodys_fault_burn_no_attempt);
embedded_alone!(a_database_that_is_busy_burns_no_attempt);

/// No call of this handler counted as a failure, and all ticks had their effect in order.
async fn assert_nothing_burned(world: &World, handler: &TickHandler, ticks: usize) {
    let attempts: Vec<u32> = handler.calls().iter().map(|c| c.attempts).collect();
    assert!(attempts.iter().all(|a| *a == 0), "{attempts:?}");
    assert_eq!(dead_letters(&world.consumer).await, []);
    assert_eq!(deferred(&world.consumer).await, 0);
    let effects = world.effects().await;
    assert_eq!(effects.len(), ticks);
    for (key, numbers) in numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n))) {
        assert!(numbers.is_sorted(), "{key}: {numbers:?}");
    }
}

/// Ticks of two keys, whose handler meets trouble at `first/1`.
fn ticks() -> Vec<Tick> {
    let of = |key: &'static str| (1..=5).map(move |n| Tick::new(key, n));
    of("first").chain(of("second")).collect()
}

async fn a_database_that_is_away_burns_no_attempt(world: World) {
    let outbox = world.outbox();
    let healed = Arc::new(AtomicBool::new(false));
    let is_healed = healed.clone();
    let handler = TickHandler::judging(move |d| {
        let trouble = d.event.n == 1 && !is_healed.load(Relaxed);
        if trouble {
            return Err(sqlx::Error::PoolTimedOut.into());
        }
        Ok(())
    });
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    world.commit(&outbox, &ticks()).await;
    // Whichever of the two keys came first: the source waits for it.
    until("it was tried three times", async || {
        // Of whichever key came first: the other's turn does not come.
        handler.calls().iter().filter(|c| c.n == 1).count() >= 3
    })
    .await;
    assert!(
        way.consumer.health().trouble.is_some(),
        "the trouble is told"
    );
    healed.store(true, Relaxed);
    world.until_effects(10).await;
    until("the trouble is over", async || {
        way.consumer.health().trouble.is_none()
    })
    .await;
    way.stop().await;
    assert_nothing_burned(&world, &handler, 10).await;
}

async fn a_dependency_that_is_away_burns_no_attempt_and_keeps_the_order(world: World) {
    let outbox = world.outbox();
    let healed = Arc::new(AtomicBool::new(false));
    let is_healed = healed.clone();
    let handler = TickHandler::judging(move |d| {
        if d.event.n == 2 && !is_healed.load(Relaxed) {
            return Err(Failure::unavailable("the price list is away"));
        }
        Ok(())
    });
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    world.commit(&outbox, &ticks()).await;
    let tries = async || handler.calls().iter().filter(|c| c.n == 2).count();
    until("it was tried three times", async || tries().await >= 3).await;
    let trouble = way.consumer.health().trouble.unwrap_or_default();
    assert!(trouble.contains("the price list is away"), "{trouble:?}");
    healed.store(true, Relaxed);
    world.until_effects(10).await;
    way.stop().await;
    assert_nothing_burned(&world, &handler, 10).await;
}

async fn a_stop_waits_for_no_dependency_that_stays_away(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::judging(|_| Err(Failure::unavailable("away for good")));
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    world.commit(&outbox, &ticks()).await;
    until("it was tried", async || handler.calls().len() >= 2).await;
    let stopped = tokio::time::timeout(Duration::from_secs(10), way.consumer.shutdown()).await;
    stopped.expect("it stops").expect("it ends well");
    // Nothing was lost by that.
    let handler = TickHandler::new();
    let consumer = world.ticks(handler.clone()).spawn();
    world.until_effects(10).await;
    way.relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");
    assert_nothing_burned(&world, &handler, 10).await;
}

/// Its neighbours are not called again for its sake.
async fn what_came_before_it_in_its_batch_is_kept(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::acting({
        let tries = std::sync::atomic::AtomicUsize::new(0);
        move |d, _| {
            let trouble = match d.event.key.as_deref() {
                Some("away") => Some(Failure::from(sqlx::Error::PoolTimedOut)),
                Some("unavailable") => Some(Failure::unavailable("the price list is away")),
                _ => None,
            };
            // Each fails twice.
            let verdict = match trouble {
                Some(trouble) if tries.fetch_add(1, Relaxed) % 3 < 2 => Err(trouble),
                _ => Ok(()),
            };
            Box::pin(async move { verdict })
        }
    });
    let of = |key: &'static str| (1..=5).map(move |n| Tick::new(format!("{key}-{n}"), n));
    let mut ticks: Vec<Tick> = of("a").collect();
    ticks.push(Tick::new("away", 1));
    ticks.extend(of("b"));
    ticks.push(Tick::new("unavailable", 1));
    ticks.extend(of("c"));
    // Before anybody reads: they come as one batch.
    world.commit(&outbox, &ticks).await;
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    world.until_effects(17).await;
    way.stop().await;
    for tick in ticks {
        let key = tick.key.unwrap_or_default();
        let calls = handler.calls_of(&key, tick.n).len();
        let troubled = matches!(key.as_str(), "away" | "unavailable");
        assert_eq!(calls, if troubled { 3 } else { 1 }, "{key}");
    }
    assert_nothing_burned(&world, &handler, 17).await;
}

/// Raised by the database itself, in the handler's transaction.
async fn sqlstates_that_are_nobodys_fault_burn_no_attempt(world: World) {
    const STATES: [&str; 8] = [
        "40001", "40P01", "55P03", "57014", "53100", "53300", "57P01", "08006",
    ];
    let outbox = world.outbox();
    let tries = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = tries.clone();
    let handler = TickHandler::acting(move |d, connection| {
        let state = (d.event.key.as_deref() == Some("first") && d.event.n == 1)
            .then(|| STATES.get(counted.fetch_add(1, Relaxed)))
            .flatten();
        Box::pin(async move {
            let (Some(state), Connection::Postgres(c)) = (state, connection) else {
                return Ok(());
            };
            let sql =
                format!("DO $$ BEGIN RAISE EXCEPTION 'as told' USING ERRCODE = '{state}'; END $$");
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(c).await?;
            Ok(())
        })
    });
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    world.commit(&outbox, &ticks()).await;
    world.until_effects(10).await;
    way.stop().await;
    assert!(tries.load(Relaxed) > STATES.len(), "each state was raised");
    assert_nothing_burned(&world, &handler, 10).await;
}

/// The engine's own transaction is the one writer: whoever else wants to write in a handler is refused.
async fn a_database_that_is_busy_burns_no_attempt(world: World) {
    let outbox = world.outbox();
    let url = world.urls.1.clone();
    let tries = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = tries.clone();
    let handler = TickHandler::acting(move |d, _| {
        let first = d.event.key.as_deref() == Some("first") && d.event.n == 1;
        let (busy, url) = (first && counted.fetch_add(1, Relaxed) < 3, url.clone());
        Box::pin(async move {
            if busy {
                let options: SqliteConnectOptions = url.parse()?;
                let options = options.busy_timeout(Duration::ZERO);
                let mut second = SqliteConnection::connect_with(&options).await?;
                sqlx::query("DELETE FROM effect")
                    .execute(&mut second)
                    .await?;
            }
            Ok(())
        })
    });
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    world.commit(&outbox, &ticks()).await;
    world.until_effects(10).await;
    way.stop().await;
    assert!(tries.load(Relaxed) > 3, "it was busy three times");
    assert_nothing_burned(&world, &handler, 10).await;
}
