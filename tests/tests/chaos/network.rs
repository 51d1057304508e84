//! Connections that break or fall silent, at the broker's side and at the databases'.

use std::{sync::Arc, time::Duration};

use pillarbox_amqp::Amqp;
use pillarbox_core::{Consumer, Database, Outbox, Relay, Running};
use pillarbox_testkit::proxy::{Direction, Proxy};
use pillarbox_tests::{
    Tick, TickHandler, World, amqp_config, connect, is_soak,
    ledger::{Ledger, Writers},
    on_servers_alone, seed, until,
};
use pillarbox_transport::Transport;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{STEADY, assert_whole, tap, until_all_applied};

on_servers_alone!(
    broker_connections_that_break_in_mid_window,
    a_broker_that_falls_silent,
    database_connections_that_break_in_mid_work,
    databases_that_fall_silent,
);

/// A relay and a consumer behind proxies.
pub(crate) struct Behind {
    pub(crate) broker: Proxy,
    pub(crate) producer: Proxy,
    pub(crate) consumer: Proxy,
    pub(crate) relay: Running,
    pub(crate) running: Running,
}

impl Behind {
    pub(crate) async fn start(world: &World) -> Self {
        let amqp = world.amqp_url.as_deref().expect("a broker");
        let (broker, amqp) = Proxy::before(amqp).await.expect("a proxy");
        let (producer, producer_url) = Proxy::before(&world.urls.0).await.expect("a proxy");
        let (consumer, consumer_url) = Proxy::before(&world.urls.1).await.expect("a proxy");
        let config = amqp_config(&amqp, &world.group);
        let transport: Arc<dyn Transport> = Arc::new(Amqp::new(config).expect("a config"));
        let outbox = Outbox::new(connect(&producer_url));
        let relay = Relay::new(&outbox, transport.clone())
            .source("producer")
            .settings(World::relay_settings());
        let database: Database = connect(&consumer_url);
        let reader = Consumer::new(&database, transport, world.group.as_str())
            .settings(World::consumer_settings())
            .on::<Tick>(TickHandler::new());
        Self {
            broker,
            producer,
            consumer,
            relay: relay.spawn(),
            running: reader.spawn(),
        }
    }

    /// Waits until somebody has gone on, whatever happened.
    pub(crate) async fn goes_on(world: &World) {
        let so_far = world.count_effects().await;
        world.until_effects(so_far + 100).await;
    }

    pub(crate) async fn stop(self) {
        self.relay.shutdown().await.expect("relay");
        self.running.shutdown().await.expect("consumer");
    }
}

/// The same at work; writers and checks are not behind the proxies.
struct Load {
    behind: Behind,
    writers: Writers,
}

impl Load {
    async fn start(world: &World, seed: u64) -> Self {
        tap(world).await;
        let behind = Behind::start(world).await;
        let writers = Writers::start(&world.outbox(), STEADY, seed).await;
        Behind::goes_on(world).await;
        Self { behind, writers }
    }

    async fn end(self, world: &World) -> Ledger {
        let Self { behind, writers } = self;
        let ledger = writers.stop().await;
        until_all_applied(world, &ledger).await;
        until("no trouble is left", async || {
            behind.relay.health().trouble.is_none() && behind.running.health().trouble.is_none()
        })
        .await;
        behind.stop().await;
        ledger
    }
}

/// How many kinds of fault there are.
const KINDS: u32 = 6;

/// One fault on the wire, somewhere in what is under way.
async fn break_connections(proxy: &Proxy, kind: u32, rng: &mut StdRng) {
    let direction = if rng.random() {
        Direction::ToServer
    } else {
        Direction::ToClient
    };
    let bytes = rng.random_range(1..20_000);
    // What was delivered before the last fault can still have its effect without a connection.
    proxy.wait_for(|now| now.open > 0).await;
    let before = proxy.counters();
    match kind {
        0 => proxy.cut(),
        1 => proxy.reset(),
        // In the middle of a frame, at nearly every number.
        2 => proxy.reset_after_bytes(direction, bytes),
        3 => proxy.cut_after_bytes(direction, bytes),
        // Answers are on their way and never come; or what is asked never arrives.
        _ => {
            let held = [Direction::ToClient, Direction::ToServer];
            proxy.hold(held[usize::from(kind == 5)]);
            tokio::time::sleep(Duration::from_millis(rng.random_range(200..500))).await;
            proxy.reset();
            proxy.release();
        }
    }
    // A pool may have another connection left: only that one has ended can be waited for.
    let ended = proxy.wait_for(|now| now.connections - now.open > before.connections - before.open);
    if tokio::time::timeout(Duration::from_secs(30), ended)
        .await
        .is_err()
    {
        panic!(
            "no connection has ended by {kind}: {before:?}, {:?}",
            proxy.counters()
        );
    }
}

fn rounds() -> u32 {
    if is_soak() { 200 } else { 2 * KINDS }
}

async fn broker_connections_that_break_in_mid_window(world: World) {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let load = Load::start(&world, seed).await;
    let behind = &load.behind;
    for round in 0..rounds() {
        break_connections(&behind.broker, round % KINDS, &mut rng).await;
        Behind::goes_on(&world).await;
    }
    // Confirms and deliveries that come late, but come.
    for direction in [Direction::ToClient, Direction::ToServer] {
        behind.broker.hold(direction);
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        behind.broker.release();
        Behind::goes_on(&world).await;
    }
    let ledger = load.end(&world).await;
    let repeated = assert_whole(&world, &ledger).await;
    assert!(
        repeated > 0,
        "no confirm was lost: the faults showed nothing"
    );
}

/// Everything stands open and nothing answers, for longer than every deadline of the adapter.
async fn a_broker_that_falls_silent(world: World) {
    let seed = seed();
    let load = Load::start(&world, seed).await;
    let behind = &load.behind;
    behind.broker.black_hole(true);
    until("both tell what they wait for", async || {
        let troubles = (
            behind.relay.health().trouble,
            behind.running.health().trouble,
        );
        matches!(troubles, (Some(_), Some(_)))
    })
    .await;
    // Promise 5: enqueue does not notice.
    world
        .commit(&world.outbox(), &[Tick::new("meanwhile", 1)])
        .await;
    behind.broker.black_hole(false);
    Behind::goes_on(&world).await;
    let ledger = load.end(&world).await;
    assert_whole(&world, &ledger).await;
}

async fn database_connections_that_break_in_mid_work(world: World) {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let load = Load::start(&world, seed).await;
    let behind = &load.behind;
    for round in 0..rounds() {
        let victim = if rng.random() {
            &behind.producer
        } else {
            &behind.consumer
        };
        break_connections(victim, round % KINDS, &mut rng).await;
        Behind::goes_on(&world).await;
    }
    let ledger = load.end(&world).await;
    assert_whole(&world, &ledger).await;
}

/// For longer than the leases last: nobody may act on them.
async fn databases_that_fall_silent(world: World) {
    let seed = seed();
    let load = Load::start(&world, seed).await;
    let behind = &load.behind;
    for proxy in [&behind.producer, &behind.consumer] {
        proxy.black_hole(true);
        let held = async || {
            if std::ptr::eq(proxy, &raw const behind.producer) {
                behind.relay.health().held
            } else {
                behind.running.health().held
            }
        };
        until("the lease is no longer trusted", async || held().await == 0).await;
        proxy.black_hole(false);
        until("it is held again", async || held().await > 0).await;
        Behind::goes_on(&world).await;
    }
    let ledger = load.end(&world).await;
    assert_whole(&world, &ledger).await;
}
