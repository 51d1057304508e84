//! Transactions that commit long after others which began later, and transactions of strangers that never end.

use std::time::Duration;

use pillarbox_core::{Connection, Pool};
use pillarbox_tests::{
    Tick, TickHandler, World, in_both_worlds, numbers_by_key, on_servers_alone, tables,
};

on_servers_alone!(a_transaction_that_commits_late_is_delivered);
in_both_worlds!(a_strangers_long_transaction_stops_nobody);

/// Open for 5 s while others commit: its positions lie far below the cursor when it comes.
async fn a_transaction_that_commits_late_is_delivered(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let Some(Pool::Postgres(pool)) = world.producer.pool() else {
        panic!("PostgreSQL");
    };
    let mut late = pool.begin().await.expect("begin");
    outbox
        .enqueue(&mut late, &Tick::new("late", 1))
        .await
        .expect("enqueue");
    // One more that is open when the first commits, so that neither is the oldest all the time; and one that goes back.
    let mut later = pool.begin().await.expect("begin");
    let mut undone = pool.begin().await.expect("begin");
    outbox
        .enqueue(&mut undone, &Tick::new("undone", 1))
        .await
        .expect("enqueue");
    let mut n = 0;
    let mut others = tokio::time::interval(Duration::from_millis(10));
    let opened = tokio::time::Instant::now();
    while opened.elapsed() < Duration::from_secs(5) {
        others.tick().await;
        n += 1;
        world
            .commit(&outbox, &[Tick::new("a", n), Tick::new("b", n)])
            .await;
        if n == 20 {
            outbox
                .enqueue(&mut later, &Tick::new("later", 1))
                .await
                .expect("enqueue");
        }
        if n % 10 == 0 {
            let nested = Tick::new("late", 1 + n / 10);
            let mut savepoint = sqlx::Acquire::begin(&mut *late).await.expect("savepoint");
            outbox
                .enqueue(&mut savepoint, &nested)
                .await
                .expect("enqueue");
            savepoint.commit().await.expect("release");
        }
    }
    // Nobody waited for it.
    let others = 2 * n as usize;
    world.until_effects(others).await;
    late.commit().await.expect("commit");
    world.until_effects(others + 1 + n as usize / 10).await;
    later.commit().await.expect("commit");
    undone.rollback().await.expect("rollback");
    world.until_effects(others + 2 + n as usize / 10).await;
    way.stop().await;
    let effects = world.effects().await;
    let numbers = numbers_by_key(effects.iter().map(|e| (e.key.as_str(), e.n)));
    assert_eq!(numbers["a"], (1..=n).collect::<Vec<_>>());
    assert_eq!(numbers["late"], (1..=1 + n / 10).collect::<Vec<_>>());
    assert_eq!(numbers["later"], [1]);
    assert_eq!(effects.len(), others + 2 + n as usize / 10);
}

/// PostgreSQL: it has a transaction id and a snapshot. SQLite: it has a snapshot, and so keeps the log from being cleaned.
async fn a_strangers_long_transaction_stops_nobody(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    tables::query(&world.producer, "CREATE TABLE stranger (x int)").await;
    world.commit(&outbox, &[Tick::new("a", 1)]).await;
    world.until_effects(1).await;
    macro_rules! beside {
        ($tx:expr, $variant:ident, $sql:literal) => {{
            let mut stranger = $tx.await.expect("begin");
            let Connection::$variant(c) = Connection::$variant(&mut stranger) else {
                unreachable!()
            };
            sqlx::raw_sql($sql).execute(c).await.expect("its work");
            for n in 2..=50 {
                world.commit(&outbox, &[Tick::new("a", n)]).await;
            }
            world.until_effects(50).await;
            stranger.rollback().await.expect("rollback");
        }};
    }
    match world.producer.pool() {
        Some(Pool::Postgres(pool)) => beside!(
            pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ"),
            Postgres,
            "INSERT INTO stranger VALUES (1); SELECT count(*) FROM pillarbox.outbox"
        ),
        Some(Pool::Sqlite(pool)) => {
            beside!(
                pool.begin(),
                Sqlite,
                "SELECT count(*) FROM pillarbox_outbox"
            )
        }
        None => {}
    }
    way.stop().await;
    assert_eq!(world.effects().await.len(), 50);
}
