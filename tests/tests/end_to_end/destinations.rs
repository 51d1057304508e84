//! Several destinations over one log, and a move from one broker to another.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use pillarbox_amqp::Amqp;
use pillarbox_core::{Admin, Consumer, Event as _, Outbox, Relay, Start, admin::Destination};
use pillarbox_testkit::servers;
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, amqp_config, in_both_worlds,
    ledger::{Plan, Writers, assert_effects},
    numbers_by_key, on_servers_alone, seed, tables, until,
};
use pillarbox_transport::Transport;

in_both_worlds!(a_destination_gets_its_topics_from_its_time_on);
on_servers_alone!(a_move_between_brokers_loses_nothing);

async fn named(admin: &Admin, name: &str) -> Option<Destination> {
    let all = admin.destinations().await.expect("destinations");
    all.into_iter().find(|d| d.name == name)
}

async fn a_destination_gets_its_topics_from_its_time_on(world: World) {
    let outbox = world.outbox();
    world
        .commit(&outbox, &[Tick::new("a", 0), Tick::new("a", 1)])
        .await;
    let admin = Admin::new(&world.producer, "ada");
    let everything = |d: Destination| d.behind == 0;
    let after = until_later(&world).await;
    world.commit(&outbox, &[Tick::new("a", 2)]).await;
    let other = Tick::new("a", 3).message(Tick::TYPE);
    let other = pillarbox_transport::Message {
        topic: "other.events".to_owned(),
        ..other
    };
    world.commit_messages(&outbox, vec![other]).await;
    world.commit(&outbox, &[Tick::new("a", 4)]).await;
    let audit = world
        .relay(&outbox)
        .destination("audit")
        .start(Start::At(after))
        .topics([TOPIC]);
    let way = world
        .start_with(audit, world.ticks(TickHandler::new()))
        .await;
    world.until_effects(2).await;
    until("the audit is through", async || {
        named(&admin, "audit").await.is_some_and(everything)
    })
    .await;
    way.stop().await;
    let effects = world.effects().await;
    let numbers = numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n)));
    assert_eq!(numbers["a"], [2, 4]);
    // The other destination has all of it before itself.
    assert!(named(&admin, "main").await.is_some_and(|d| d.behind >= 5));
}

/// A time after everything that was written, by the database's clock.
async fn until_later(world: &World) -> SystemTime {
    let clock = if tables::is_postgres(&world.producer) {
        "SELECT CAST((extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS TEXT)"
    } else {
        "SELECT CAST(CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000 AS TEXT)"
    };
    let begin = tables::number(&world.producer, clock).await;
    // SQLite's has milliseconds.
    let mut now = begin;
    until("the clock moves on", async || {
        now = tables::number(&world.producer, clock).await;
        now > begin + 1_000
    })
    .await;
    let micros = u64::try_from(now - 500).expect("after 1970");
    SystemTime::UNIX_EPOCH + Duration::from_micros(micros)
}

/// The group's consumer on any broker: one inbox for both.
fn consumer(world: &World, transport: &Arc<dyn Transport>, seen: &Arc<AtomicUsize>) -> Consumer {
    let seen = seen.clone();
    let handler = TickHandler::judging(move |_| {
        seen.fetch_add(1, Relaxed);
        Ok(())
    });
    Consumer::new(&world.consumer, transport.clone(), &*world.group)
        .settings(World::consumer_settings())
        .on::<Tick>(handler)
}

fn next_relay(outbox: &Outbox, transport: &Arc<dyn Transport>) -> Relay {
    Relay::new(outbox, transport.clone())
        .source("producer")
        .settings(World::relay_settings())
        .destination("next")
}

/// While writers write: the new destination begins before the old consumers' position, both are relayed and consumed side by
/// side, and then the old one goes.
async fn a_move_between_brokers_loses_nothing(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let plan = Plan {
        writers: 4,
        keys: 20,
        events: 100_000,
        // Slower than the slowest consumer: the old queue must run dry while they write.
        pause: Duration::from_millis(50),
    };
    let writers = Writers::start(&outbox, plan, seed()).await;
    let on_old = Arc::new(AtomicUsize::new(0));
    let way = world
        .start_with(
            world.relay(&outbox),
            consumer(&world, &world.transport, &on_old),
        )
        .await;
    world.until_effects(200).await;

    // 1. The new broker, with its queues; 2. the destination, from the start of the log.
    let Some(rabbitmq) = servers::required(servers::rabbitmq().await) else {
        return;
    };
    let vhost = rabbitmq.create_vhost().await.expect("a vhost");
    let broker = Amqp::new(amqp_config(&vhost, &world.group)).expect("a valid config");
    let broker: Arc<dyn Transport> = Arc::new(broker);
    let on_new = Arc::new(AtomicUsize::new(0));
    let mut new_consumer = consumer(&world, &broker, &on_new);
    new_consumer.bind().await.expect("bind");
    let new_consumer = new_consumer.spawn();
    let added = admin.add_destination("next", Start::Earliest).await;
    assert!(added.expect("a destination"));
    let new_relay = next_relay(&outbox, &broker).spawn();

    // 3. Both run until the new one is where the writers are.
    until("the new destination has caught up", async || {
        named(&admin, "next").await.is_some_and(|d| d.behind < 50) && on_new.load(Relaxed) > 20
    })
    .await;

    // 4. The old relay stops, the old queue runs dry, the old consumer stops; 5. the old destination goes.
    way.relay.shutdown().await.expect("the relay ends well");
    let client =
        pillarbox_tests::wire::Client::connect(world.amqp_url.as_deref().expect("a broker")).await;
    until("the old queue is empty", async || {
        client.depth(&world.queue()).await == 0
    })
    .await;
    way.consumer
        .shutdown()
        .await
        .expect("the consumer ends well");
    let removed = admin.remove_destination("main", "moved to next").await;
    assert_eq!(removed.expect("it was there").dead_letters, 0);

    // 6. Life goes on.
    let before = world.count_effects().await;
    world.until_effects(before + 200).await;
    let ledger = writers.stop().await;
    until("all is through", async || {
        named(&admin, "next").await.is_some_and(|d| d.behind == 0)
    })
    .await;
    world.until_effects(ledger.committed.len()).await;
    new_relay.shutdown().await.expect("the relay ends well");
    new_consumer
        .shutdown()
        .await
        .expect("the consumer ends well");
    let log = ledger.log(&world.producer).await;
    assert_effects(&log, &world.effects().await);
    assert!(on_old.load(Relaxed) > 0);
    // Nothing is kept for the one that is gone.
    let settled = "SELECT CAST(bool_and({t}settled(s))::int AS TEXT) FROM generate_series(0, 3) s";
    assert_eq!(tables::number(&world.producer, settled).await, 1);
}
