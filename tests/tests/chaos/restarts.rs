//! Servers that stop, crash and come back.

use std::{collections::HashSet, time::Duration};

use pillarbox_testkit::servers::{self, Postgres, RabbitMq, Shutdown};
use pillarbox_tests::{
    Kind, Tick, TickHandler, Way, World, is_soak,
    ledger::{Plan, Writers, assert_arrived, assert_effects},
    one_world, seed, tables, until,
    wire::Client,
};

use crate::{STEADY, assert_whole, tap, until_all_applied};

/// A world on servers of its own, which it may restart.
pub(crate) async fn own() -> Option<(World, Postgres, RabbitMq)> {
    let (postgres, rabbitmq) = tokio::join!(Postgres::start(), RabbitMq::start());
    let postgres = servers::required(postgres)?;
    let rabbitmq = servers::required(rabbitmq)?;
    let urls = (
        postgres.create_database().await.expect("a database"),
        postgres.create_database().await.expect("a database"),
    );
    let world = World::at(urls, rabbitmq.url()).await;
    tap(&world).await;
    Some((world, postgres, rabbitmq))
}

async fn end(world: &World, way: Way, writers: Writers) {
    let ledger = writers.stop().await;
    until_all_applied(world, &ledger).await;
    way.stop().await;
    assert_whole(world, &ledger).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_restarts_costs_nothing_but_time() {
    one_world::assert_listed(
        "a_broker_that_restarts_costs_nothing_but_time",
        Kind::Servers,
    );
    let Some((world, _postgres, mut rabbitmq)) = own().await else {
        return;
    };
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let writers = Writers::start(&outbox, STEADY, seed()).await;
    for kill in [false, true] {
        let so_far = world.count_effects().await;
        world.until_effects(so_far + 200).await;
        if kill {
            rabbitmq.kill().await.expect("killed");
        } else {
            rabbitmq.stop().await.expect("stopped");
        }
        until("both tell what they wait for", async || {
            way.relay.health().trouble.is_some() && way.consumer.health().trouble.is_some()
        })
        .await;
        let rows = async || tables::count(&world.producer, "{t}outbox").await;
        let before = rows().await;
        until("enqueue goes on", async || rows().await > before + 200).await;
        assert_eq!(
            tables::deferred(&world.producer).await,
            0,
            "an attempt was burned"
        );
        assert_eq!(tables::dead_letters(&world.producer).await, []);
        rabbitmq.start_again().await.expect("started");
    }
    end(&world, way, writers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_restarts_costs_nothing_but_time() {
    one_world::assert_listed(
        "a_database_that_restarts_costs_nothing_but_time",
        Kind::Servers,
    );
    let Some((world, mut postgres, _rabbitmq)) = own().await else {
        return;
    };
    let outbox = world.outbox();
    // Long enough for the database to go in the middle of it.
    let handler = TickHandler::acting(|_, _| {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(2)).await;
            Ok(())
        })
    });
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    let writers = Writers::start(&outbox, STEADY, seed()).await;
    let rounds = if is_soak() { 30 } else { 3 };
    for round in 0..rounds {
        let so_far = world.count_effects().await;
        world.until_effects(so_far + 200).await;
        match round % 3 {
            0 => postgres.restart(Shutdown::Fast).await.expect("restarted"),
            1 => postgres
                .restart(Shutdown::Immediate)
                .await
                .expect("restarted"),
            _ => postgres.kill_backend().await.expect("recovered"),
        }
    }
    end(&world, way, writers).await;
    assert!(
        handler.calls().iter().all(|c| c.attempts == 0),
        "an attempt was burned"
    );
}

/// Nothing reaches the disk by itself.
const ASYNCHRONOUS: [(&str, &str); 5] = [
    ("synchronous_commit", "off"),
    ("wal_writer_delay", "10s"),
    ("wal_writer_flush_after", "0"),
    ("autovacuum", "off"),
    ("bgwriter_lru_maxpages", "0"),
];

/// A world with one database on a server that loses what it was not told to flush, and the other on the shared one.
async fn forgetful(producer: bool) -> Option<(World, Postgres)> {
    let postgres = servers::required(Postgres::start_with(&ASYNCHRONOUS).await)?;
    let shared = servers::required(servers::postgres().await)?;
    let rabbitmq = servers::required(servers::rabbitmq().await)?;
    let forgetful = postgres.create_database().await.expect("a database");
    let faithful = shared.create_database().await.expect("a database");
    let urls = if producer {
        (forgetful, faithful)
    } else {
        (faithful, forgetful)
    };
    let world = World::at(urls, &rabbitmq.create_vhost().await.expect("a vhost")).await;
    tap(&world).await;
    Some((world, postgres))
}

fn crashes() -> u64 {
    if is_soak() { 50 } else { 5 }
}

/// A commit that is not on disk yet is visible all the same: what a crash can undo is not sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crashed_database_lost_was_not_sent() {
    one_world::assert_listed("what_a_crashed_database_lost_was_not_sent", Kind::Servers);
    let Some((world, mut postgres)) = forgetful(true).await else {
        return;
    };
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let plan = Plan {
        pause: Duration::from_millis(1),
        ..STEADY
    };
    let (mut lost, seed) = (0, seed());
    for round in 0..crashes() {
        let writers = Writers::start(&outbox, plan, seed.wrapping_add(round)).await;
        let so_far = world.count_effects().await;
        world.until_effects(so_far + 150).await;
        postgres.stop(Shutdown::Immediate).await.expect("stopped");
        writers.halt();
        postgres.start_again().await.expect("started");
        let ledger = writers.done().await;
        let log = tables::log(&world.producer).await;
        let kept: HashSet<&str> = log.iter().map(|e| e.id.as_str()).collect();
        lost += ledger
            .committed
            .iter()
            .filter(|w| !kept.contains(w.id.as_str()))
            .count();
    }
    world.commit(&outbox, &[Tick::new("last", 1)]).await;
    let log = tables::log(&world.producer).await;
    world.until_effects(log.len()).await;
    way.stop().await;
    assert!(lost > 0, "the database lost nothing: this shows nothing");
    assert_effects(&log, &world.effects().await);
    let url = world.amqp_url.as_deref().expect("a broker");
    assert_arrived(&log, &Client::connect(url).await.drain("tap").await);
}

/// What was acknowledged is gone from the broker: its effect must be on disk before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_crash() {
    one_world::assert_listed("what_was_acknowledged_survives_a_crash", Kind::Servers);
    let Some((world, mut postgres)) = forgetful(false).await else {
        return;
    };
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let writers = Writers::start(&outbox, STEADY, seed()).await;
    for _ in 0..crashes() {
        let so_far = world.count_effects().await;
        world.until_effects(so_far + 150).await;
        postgres
            .restart(Shutdown::Immediate)
            .await
            .expect("restarted");
    }
    end(&world, way, writers).await;
}
