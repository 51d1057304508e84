//! Processes that stand still past their leases and then go on, believing that nothing happened.

use std::time::Duration;

use pillarbox_core::Pool;
use pillarbox_tests::{
    Kind, World, connect, in_both_worlds,
    ledger::Writers,
    node::{Node, Task},
    seed, tables, until,
};

use crate::{NODE, STEADY, assert_whole, tap, until_all_applied};

in_both_worlds!(one_that_was_frozen_past_its_lease_settles_nothing);

async fn one_that_was_frozen_past_its_lease_settles_nothing(world: World) {
    let seed = seed();
    tap(&world).await;
    let writers = Writers::start(&world.outbox(), STEADY, seed).await;
    let mut zombie = Node::start(NODE, &Task::both(&world));
    zombie.says("works").await;
    world.until_effects(200).await;
    freeze(&zombie, &world).await;
    let frozen_at = zombie.said().len();
    let mut heir = Node::start(NODE, &Task::both(&world));
    let so_far = world.count_effects().await;
    world.until_effects(so_far + 200).await;
    let ledger = writers.stop().await;
    until_all_applied(&world, &ledger).await;
    until_still(&world).await;
    let (cursors, effects) = (cursors(&world).await, world.effects().await.len());

    zombie.thaw();
    let gone = match world.kind {
        Kind::Embedded => "lost the lease",
        Kind::Servers | Kind::Nats => "holds 0 of",
    };
    zombie.says_after(frozen_at, gone).await;
    // What it had under way may still be going on.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        self::cursors(&world).await,
        cursors,
        "the zombie moved a cursor"
    );
    assert_eq!(
        world.effects().await.len(),
        effects,
        "the zombie applied something"
    );
    assert!(heir.end().await, "{}", heir.last_words());
    assert!(zombie.end().await, "{}", zombie.last_words());
    assert_whole(&world, &ledger).await;
}

/// Not in the middle of a SQLite transaction: that would lock everybody out until it goes on, and nothing could be shown.
async fn freeze(node: &Node, world: &World) {
    loop {
        node.freeze();
        if is_free(&world.urls.0).await && is_free(&world.urls.1).await {
            return;
        }
        node.thaw();
        tokio::time::sleep(Duration::from_millis(7)).await;
    }
}

async fn is_free(url: &str) -> bool {
    let Some(Pool::Sqlite(pool)) = connect(&format!("{url}?mode=rw")).pool() else {
        return true;
    };
    let mut connection = pool.acquire().await.expect("a connection");
    let sql = "PRAGMA busy_timeout = 0; BEGIN IMMEDIATE; ROLLBACK";
    sqlx::raw_sql(sql).execute(&mut *connection).await.is_ok()
}

/// Where the relay's cursors stand. Who has them is no matter: one that goes on takes its share again, by a lease of its own.
async fn cursors(world: &World) -> Vec<Vec<Option<String>>> {
    let columns = if tables::is_postgres(&world.producer) {
        "CAST(seen AS TEXT), CAST(base AS TEXT), CAST(upto AS TEXT), CAST(last AS TEXT)"
    } else {
        "CAST(last AS TEXT)"
    };
    let sql =
        format!("SELECT CAST(partition AS TEXT), {columns} FROM {{t}}cursor ORDER BY partition");
    tables::query(&world.producer, &sql).await
}

/// Cursors move a little after the last effect.
async fn until_still(world: &World) {
    let mut last = (tokio::time::Instant::now(), cursors(world).await);
    until("the cursors stand still", async || {
        let now = cursors(world).await;
        if now != last.1 {
            last = (tokio::time::Instant::now(), now);
        }
        last.0.elapsed() > Duration::from_secs(1)
    })
    .await;
}
