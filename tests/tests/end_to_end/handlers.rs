//! What a handler may answer, and what follows: attempts, waits, dead letters, order, neighbours.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use pillarbox_core::{Connection, Failure, failure::Retry};
use pillarbox_tests::{
    Tick, TickHandler, World, in_both_worlds, numbers_by_key,
    tables::{dead_letters, deferred, rewind},
    until,
    wire::Client,
};

use crate::retry;

in_both_worlds!(
    one_that_fails_twice_is_called_again_after_1s_and_2s,
    one_that_always_fails_ends_as_a_dead_letter_after_1s_2s_4s,
    one_that_panics_has_failed,
    one_that_takes_too_long_has_failed,
    one_that_ends_the_transaction_itself_has_failed,
    reject_skip_and_retry_in_do_as_they_say,
    slow_ones_outlast_no_lease,
);

/// An error like any other.
fn error(text: &'static str) -> Failure {
    Failure::from(std::io::Error::other(text))
}

async fn one_that_fails_twice_is_called_again_after_1s_and_2s(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::judging(|d| match (d.event.n, d.attempts) {
        (1, 0 | 1) if d.event.key.as_deref() == Some("bad") => Err(error("not yet")),
        _ => Ok(()),
    });
    let consumer = world.ticks(handler.clone()).retry(Retry {
        jitter: 0.0,
        ..Retry::default()
    });
    let way = world.start(&outbox, consumer).await;
    let ticks = [
        Tick::new("bad", 1),
        Tick::new("bad", 2),
        Tick::new("good", 1),
    ];
    world.commit(&outbox, &ticks).await;
    world.until_effects(3).await;
    way.stop().await;

    let calls = handler.calls_of("bad", 1);
    let attempts: Vec<u32> = calls.iter().map(|c| c.attempts).collect();
    assert_eq!(attempts, [0, 1, 2]);
    assert!(calls[1].at - calls[0].at >= Duration::from_secs(1));
    assert!(calls[2].at - calls[1].at >= Duration::from_secs(2));
    let keys: Vec<_> = world
        .effects()
        .await
        .into_iter()
        .map(|e| (e.key, e.n))
        .collect();
    let expected = [("good", 1), ("bad", 1), ("bad", 2)];
    assert_eq!(keys, expected.map(|(key, n)| (key.to_owned(), n)));
    assert_eq!(deferred(&world.consumer).await, 0);
    assert_eq!(dead_letters(&world.consumer).await, []);
}

pub(super) async fn one_that_always_fails_ends_as_a_dead_letter_after_1s_2s_4s(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::judging(|d| match (d.event.key.as_deref(), d.event.n) {
        (Some("bad"), 1) => Err(error("never works")),
        _ => Ok(()),
    });
    let consumer = world.ticks(handler.clone()).retry(Retry {
        jitter: 0.0,
        ..Retry::default()
    });
    let way = world.start(&outbox, consumer).await;
    world
        .commit(&outbox, &[Tick::new("bad", 1), Tick::new("bad", 2)])
        .await;
    let begun = Instant::now();
    for n in 1..=20 {
        let ticks = ["a", "b", "c"].map(|key| Tick::new(key, n));
        world.commit(&outbox, &ticks).await;
    }
    world.until_effects(60).await;
    assert!(
        begun.elapsed() < Duration::from_secs(6),
        "the neighbours waited"
    );
    world.commit(&outbox, &[Tick::new("bad", 3)]).await;
    world.until_effects(62).await;
    until("the broker has its copy", async || {
        dead_letters(&world.consumer).await.iter().all(|d| d.copied)
    })
    .await;
    way.stop().await;

    let calls = handler.calls_of("bad", 1);
    let attempts: Vec<u32> = calls.iter().map(|c| c.attempts).collect();
    assert_eq!(attempts, [0, 1, 2, 3]);
    for (pair, seconds) in calls.windows(2).zip([1, 2, 4]) {
        assert!(pair[1].at - pair[0].at >= Duration::from_secs(seconds));
    }
    let dead = dead_letters(&world.consumer).await;
    assert_eq!(dead.len(), 1);
    assert_eq!((dead[0].side.as_str(), dead[0].attempts), ("consumer", 4));
    assert_eq!(dead[0].reason, "never works");
    let effects = world.effects().await;
    let numbers = numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n)));
    assert_eq!(numbers["bad"], [2, 3], "in order, after the dead one");
    assert_eq!(numbers["a"], (1..=20).collect::<Vec<_>>());
    assert_copy(&world, &dead[0].id, "never works").await;
}

/// The broker's dead-letter address has the one event, with the reason.
async fn assert_copy(world: &World, id: &str, reason: &str) {
    if let Some(memory) = &world.memory {
        let copies = memory.dead_lettered();
        let found: Vec<_> = copies
            .iter()
            .map(|m| (m.id.as_str(), m.attribute("pillarboxreason")))
            .collect();
        assert_eq!(found, [(id, Some(reason))]);
    }
    if let Some(url) = &world.amqp_url {
        let client = Client::connect(url).await;
        let copies = client.drain(&format!("{}.dlq", world.queue())).await;
        let found: Vec<_> = copies
            .iter()
            .map(|c| (c.id.as_str(), c.attribute("pillarboxreason")))
            .collect();
        assert_eq!(found, [(id, Some(reason))]);
    }
}

async fn one_that_panics_has_failed(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::judging(|d| {
        assert!(d.event.key.as_deref() != Some("bad"), "on purpose");
        Ok(())
    });
    let consumer = world.ticks(handler.clone()).retry(retry(&[50]));
    let way = world.start(&outbox, consumer).await;
    let ticks = ["good", "bad", "other"].map(|key| Tick::new(key, 1));
    world.commit(&outbox, &ticks).await;
    until("a dead letter", async || {
        !dead_letters(&world.consumer).await.is_empty()
    })
    .await;
    world.until_effects(2).await;
    way.stop().await;
    let dead = dead_letters(&world.consumer).await;
    assert_eq!(dead[0].attempts, 2);
    assert!(
        dead[0].reason.contains("the handler panicked"),
        "{}",
        dead[0].reason
    );
    assert_eq!(world.effects().await.len(), 2);
}

/// Also in the middle of a statement, where there is one that takes its time.
async fn one_that_takes_too_long_has_failed(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::acting(|d, connection| {
        let slow = d.event.key.as_deref() == Some("slow");
        Box::pin(async move {
            match connection {
                _ if !slow => {}
                Connection::Postgres(c) => {
                    sqlx::query("SELECT pg_sleep(3600)").execute(c).await?;
                }
                Connection::Sqlite(_) => std::future::pending().await,
            }
            Ok(())
        })
    });
    let consumer = world.ticks(handler.clone()).retry(retry(&[50]));
    let way = world.start(&outbox, consumer).await;
    let ticks = ["a", "slow", "b"].map(|key| Tick::new(key, 1));
    world.commit(&outbox, &ticks).await;
    world.commit(&outbox, &[Tick::new("a", 2)]).await;
    until("a dead letter", async || {
        !dead_letters(&world.consumer).await.is_empty()
    })
    .await;
    world.until_effects(3).await;
    way.stop().await;
    let dead = dead_letters(&world.consumer).await;
    assert_eq!((dead.len(), dead[0].attempts), (1, 2));
    assert!(
        dead[0].reason.contains("the handler took longer than"),
        "{}",
        dead[0].reason
    );
    let effects = world.effects().await;
    let numbers = numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n)));
    assert_eq!(numbers["a"], [1, 2]);
    assert_eq!(effects.len(), 3);
}

/// A handler must not. What it undid is undone for its own event alone, and what it committed happens once all the same.
async fn one_that_ends_the_transaction_itself_has_failed(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::acting(|d, connection| {
        let sql = match d.event.key.as_deref() {
            Some("commits") => "COMMIT",
            Some("undoes") => "ROLLBACK",
            _ => "SELECT 1",
        };
        Box::pin(async move {
            match connection {
                Connection::Postgres(c) => sqlx::raw_sql(sql).execute(c).await.map(drop)?,
                Connection::Sqlite(c) => sqlx::raw_sql(sql).execute(c).await.map(drop)?,
            }
            Ok(())
        })
    });
    let consumer = world.ticks(handler.clone()).retry(retry(&[50]));
    let way = world.start(&outbox, consumer).await;
    let ticks = ["a", "undoes", "b", "commits", "c"].map(|key| Tick::new(key, 1));
    world.commit(&outbox, &ticks).await;
    world
        .commit(&outbox, &["a", "commits"].map(|key| Tick::new(key, 2)))
        .await;
    until("a dead letter", async || {
        !dead_letters(&world.consumer).await.is_empty()
    })
    .await;
    world.until_effects(6).await;
    way.stop().await;
    let dead = dead_letters(&world.consumer).await;
    assert_eq!(dead.len(), 1, "{dead:?}");
    assert_eq!(dead[0].key.as_deref(), Some("undoes"));
    assert!(dead[0].reason.contains("ended"), "{}", dead[0].reason);
    let effects = world.effects().await;
    let numbers = numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n)));
    assert_eq!(effects.len(), 6, "{numbers:?}");
    assert_eq!(
        (&numbers["a"][..], &numbers["commits"][..]),
        (&[1, 2][..], &[1, 2][..])
    );
}

async fn reject_skip_and_retry_in_do_as_they_say(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::judging(|d| match (d.event.key.as_deref(), d.attempts) {
        (Some("reject"), _) => Err(Failure::reject("not for me")),
        (Some("skip"), _) => Err(Failure::skip()),
        (Some("later"), 0) => Err(Failure::retry_in(Duration::from_millis(700), "later")),
        _ => Ok(()),
    });
    let consumer = world.ticks(handler.clone()).retry(retry(&[50]));
    let way = world.start(&outbox, consumer).await;
    let keys = ["reject", "skip", "later", "good"];
    world
        .commit(&outbox, &keys.map(|key| Tick::new(key, 1)))
        .await;
    world.until_effects(2).await;
    until("a dead letter", async || {
        !dead_letters(&world.consumer).await.is_empty()
    })
    .await;
    // Each comes again: nothing happens any more.
    way.stop().await;
    rewind(&world.producer).await;
    let consumer = world.ticks(handler.clone()).retry(retry(&[50]));
    let way = world.start(&outbox, consumer).await;
    world
        .commit(
            &outbox,
            &["reject", "skip", "later", "good"].map(|key| Tick::new(key, 2)),
        )
        .await;
    world.until_effects(4).await;
    way.stop().await;

    let dead = dead_letters(&world.consumer).await;
    assert_eq!(
        (dead[0].attempts, dead[0].reason.as_str()),
        (1, "not for me")
    );
    let later = handler.calls_of("later", 1);
    assert_eq!(later.iter().map(|c| c.attempts).collect::<Vec<_>>(), [0, 1]);
    assert!(later[1].at - later[0].at >= Duration::from_millis(700));
    assert_eq!(handler.calls_of("reject", 1).len(), 1);
    assert_eq!(handler.calls_of("skip", 1).len(), 1);
    let effects = world.effects().await;
    let numbers = numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n)));
    // What a skipped handler wrote is undone.
    assert_eq!(numbers.keys().collect::<Vec<_>>(), ["good", "later"]);
    assert!(numbers.values().all(|n| n == &[1, 2]), "{numbers:?}");
}

/// Many in one batch, together far longer than the lease.
async fn slow_ones_outlast_no_lease(world: World) {
    let outbox = world.outbox();
    let aborted = Arc::new(AtomicBool::new(false));
    let seen = aborted.clone();
    let handler = TickHandler::acting(move |_, _| {
        let seen = seen.clone();
        Box::pin(async move {
            // Time is what is tested.
            let whole = AbortMark(seen);
            tokio::time::sleep(Duration::from_millis(200)).await;
            std::mem::forget(whole);
            Ok(())
        })
    });
    let ticks: Vec<Tick> = (1..=30).map(|n| Tick::new(format!("key-{n}"), n)).collect();
    world.commit(&outbox, &ticks).await;
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    world.until_effects(30).await;
    way.stop().await;
    assert_eq!(handler.calls().len(), 30, "a batch was begun anew");
    assert!(!aborted.load(Relaxed), "a handler was cut short");
    assert_eq!(world.effects().await.len(), 30);
}

struct AbortMark(Arc<AtomicBool>);

impl Drop for AbortMark {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
