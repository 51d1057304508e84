//! A broker that is away for long, a database that takes no writes, COMMITs whose answers are lost.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use pillarbox_core::{Admin, BreakerState, Kind, admin::Target};
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, is_soak,
    ledger::Writers,
    on_servers_alone, one_world, seed,
    tables::{dead_letters, deferred},
    until,
};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use tracing_subscriber::{filter::LevelFilter, util::SubscriberInitExt};

use crate::{STEADY, assert_whole, network::Behind, restarts, tap, until_all_applied};

on_servers_alone!(
    a_read_only_database_costs_nothing_but_time,
    a_commit_whose_answer_is_lost_changes_nothing,
);

/// The lines that a program's log gets, at INFO and above.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn take(&self) -> Vec<String> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&std::mem::take(&mut *bytes)).into_owned();
        text.lines().map(str::to_owned).collect()
    }
}

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How long it lasts: the five minutes that are promised, or enough of them to see every line that is not a summary.
fn outage() -> Duration {
    Duration::from_secs(if is_soak() { 300 } else { 20 })
}

// One thread: then every task of relay and consumer writes into this test's log.
#[tokio::test(flavor = "current_thread")]
async fn an_outage_of_the_broker_is_quiet_and_soon_over() {
    one_world::assert_listed(
        "an_outage_of_the_broker_is_quiet_and_soon_over",
        pillarbox_tests::Kind::Servers,
    );
    let Some((world, _postgres, mut rabbitmq)) = restarts::own().await else {
        return;
    };
    let lines = Lines::default();
    let sink = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::INFO)
        .with_ansi(false)
        .with_writer(move || sink.clone())
        .finish();
    let _log = subscriber.set_default();

    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let keys: Vec<String> = (0..20).map(|n| format!("key-{n}")).collect();
    let mut n = 0;
    let mut each_key = || {
        n += 1;
        keys.iter().map(|k| Tick::new(k, n)).collect::<Vec<_>>()
    };
    world.commit(&outbox, &each_key()).await;
    world.until_effects(20).await;
    assert!(!lines.take().is_empty(), "the log is seen");

    rabbitmq.kill().await.expect("killed");
    let begun = Instant::now();
    let mut written = 20;
    let mut opened = false;
    while begun.elapsed() < outage() {
        // Promise 5: enqueue does not notice.
        world.commit(&outbox, &each_key()).await;
        written += 20;
        opened |= way.relay.health().breaker == BreakerState::Open;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(opened, "the breaker never opened");
    let health = way.relay.health();
    assert_ne!(health.breaker, BreakerState::Closed);
    assert!(health.trouble.is_some(), "it says so");
    assert_eq!(health.held, health.of, "it keeps its leases");
    assert_eq!(deferred(&world.producer).await, 0, "an attempt was burned");
    assert_eq!(dead_letters(&world.producer).await, []);

    let away = lines.take();
    rabbitmq.start_again().await.expect("started");
    let back = Instant::now();
    until("the breaker closes", async || {
        way.relay.health().breaker == BreakerState::Closed
    })
    .await;
    let closed = back.elapsed();
    world.until_effects(written).await;
    until("no trouble is left", async || {
        way.relay.health().trouble.is_none() && way.consumer.health().trouble.is_none()
    })
    .await;
    let after = lines.take();
    way.stop().await;
    let minutes = usize::try_from(outage().as_secs() / 60).expect("a few");
    // What five minutes have beyond a shorter outage: a summary a minute.
    let in_five = away.len() + (5 - minutes);
    println!(
        "closed {closed:?} after the broker's return; {in_five} lines in five minutes, {} at its return:",
        after.len()
    );
    for line in away.iter().chain(&after) {
        println!("{line}");
    }
    assert!(closed < Duration::from_secs(10), "it took {closed:?}");
    // Six and five here; a broker that is still starting may take a connection and drop it again.
    assert!(in_five < 14, "{in_five} lines: {away:#?}");
    assert!(after.len() < 20, "{after:#?}");
    let opened = away.iter().filter(|l| l.contains("the broker is away"));
    assert_eq!(opened.count(), 1, "{away:#?}");
}

/// A connection of a test's own that writes whatever the database's default is.
async fn writes(url: &str) -> PgConnection {
    let mut c = PgConnection::connect(url).await.expect("a connection");
    c.execute("SET default_transaction_read_only = off")
        .await
        .expect("set");
    c
}

/// As a server is after a failover that made it a standby, or while an operator fences it off.
async fn make_read_only(c: &mut PgConnection, on: bool) {
    let name: String = sqlx::query_scalar("SELECT current_database()")
        .fetch_one(&mut *c)
        .await
        .expect("a name");
    let how = if on {
        "SET default_transaction_read_only = on"
    } else {
        "RESET default_transaction_read_only"
    };
    let sql = format!("ALTER DATABASE \"{name}\" {how}");
    c.execute(AssertSqlSafe(sql)).await.expect("altered");
    if on {
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        c.execute(end).await.expect("terminated");
    }
}

async fn a_read_only_database_costs_nothing_but_time(world: World) {
    tap(&world).await;
    let outbox = world.outbox();
    let handler = TickHandler::new();
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    let writers = Writers::start(&outbox, STEADY, seed()).await;
    let (producer, consumer) = (&world.urls.0, &world.urls.1);
    for (url, running) in [(producer, &way.relay), (consumer, &way.consumer)] {
        let so_far = world.count_effects().await;
        world.until_effects(so_far + 100).await;
        let mut c = writes(url).await;
        make_read_only(&mut c, true).await;
        until("it says what it waits for", async || {
            let trouble = running.health().trouble.unwrap_or_default();
            trouble.contains("read-only")
        })
        .await;
        // Whoever enqueues is told by the database, and nothing is written.
        if url == producer {
            let pool = world.producer.pool().expect("a pool");
            let pillarbox_core::Pool::Postgres(pool) = pool else {
                panic!("PostgreSQL")
            };
            let mut tx = pool.begin().await.expect("begin");
            let refused = outbox.enqueue(&mut tx, &Tick::new("refused", 1)).await;
            let refused = refused.expect_err("the server is read-only");
            assert_eq!(refused.kind(), Kind::Unavailable, "{refused}");
            assert!(refused.is_temporary());
        }
        // Nobody ends their connections this time: those that cannot write are given up one by one.
        make_read_only(&mut c, false).await;
        let held = async || running.health().held == running.health().of;
        until("it has its leases again", held).await;
        let so_far = world.count_effects().await;
        // The host's own connections may remember the setting: they are the host's to renew.
        if url == producer {
            make_read_only_connections_end(&mut c).await;
        }
        world.until_effects(so_far + 100).await;
    }
    let ledger = writers.stop().await;
    until_all_applied(&world, &ledger).await;
    until("no trouble is left", async || {
        way.relay.health().trouble.is_none() && way.consumer.health().trouble.is_none()
    })
    .await;
    way.stop().await;
    assert_whole(&world, &ledger).await;
    assert!(
        handler.calls().iter().all(|c| c.attempts == 0),
        "an attempt was burned"
    );
}

/// What a host does for its own pool: connections of before the end of the read-only time go.
async fn make_read_only_connections_end(c: &mut PgConnection) {
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
               AND pid <> pg_backend_pid() AND application_name NOT LIKE '%(engine)'";
    c.execute(end).await.expect("terminated");
}

/// Whoever asked cannot know whether it was committed: a settle, a renewal, events on their way into a line, an effect.
async fn a_commit_whose_answer_is_lost_changes_nothing(world: World) {
    tap(&world).await;
    let behind = Behind::start(&world).await;
    // Its events go into a line, so that deferring is among what is cut off.
    let admin = Admin::new(&world.producer, "ada");
    let key = Target::destination("main").key(TOPIC, "key-003");
    let pause = admin.pause(&key, Duration::from_secs(3_600), "a test");
    pause.await.expect("a pause");
    let writers = Writers::start(&world.outbox(), STEADY, seed()).await;
    Behind::goes_on(&world).await;
    let rounds = if is_soak() { 100 } else { 8 };
    for _ in 0..rounds {
        for proxy in [&behind.producer, &behind.consumer] {
            proxy.cut_before_answer(b"COMMIT\0");
            until("a COMMIT was cut off", async || !proxy.awaits_text()).await;
            Behind::goes_on(&world).await;
        }
    }
    assert!(deferred(&world.producer).await > 0, "nothing was deferred");
    admin.resume(&key, "the test ends").await.expect("a pause");
    let ledger = writers.stop().await;
    until_all_applied(&world, &ledger).await;
    until("no trouble is left", async || {
        behind.relay.health().trouble.is_none() && behind.running.health().trouble.is_none()
    })
    .await;
    behind.stop().await;
    assert_whole(&world, &ledger).await;
}
