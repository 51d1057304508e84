//! Relays as processes: they share the partitions, and take over those of one that is killed.

use pillarbox_tests::{
    World,
    ledger::Writers,
    node::{Node, Task},
    on_servers_alone, seed,
};

use crate::{NODE, STEADY, assert_whole, tap, until_all_applied};

on_servers_alone!(processes_share_the_partitions_and_take_over_a_killed_ones);

async fn processes_share_the_partitions_and_take_over_a_killed_ones(world: World) {
    tap(&world).await;
    let task = Task {
        lease_ms: 5_000,
        ..Task::relay(&world)
    };
    let mut consumer = Node::start(NODE, &Task::consumer(&world));
    let mut first = Node::start(NODE, &task);
    first.says("holds 4 of 4").await;
    let writers = Writers::start(&world.outbox(), STEADY, seed()).await;
    let mut second = Node::start(NODE, &task);
    second.says("holds 2 of 4").await;
    first.says("holds 2 of 4").await;
    first.kill().await;
    second.says("holds 4 of 4").await;
    let so_far = second.said().len();
    let mut third = Node::start(NODE, &task);
    third.says("holds 2 of 4").await;
    second.says_after(so_far, "holds 2 of 4").await;
    // It stands still past its leases, and then finds that all of it is another's.
    let so_far = (second.said().len(), third.said().len());
    second.freeze();
    third.says_after(so_far.1, "holds 4 of 4").await;
    second.thaw();
    second.says_after(so_far.0, "holds 0 of 4").await;
    second.says_after(so_far.0, "holds 2 of 4").await;
    let now = world.count_effects().await;
    world.until_effects(now + 100).await;
    let ledger = writers.stop().await;
    until_all_applied(&world, &ledger).await;
    for node in [&mut second, &mut third, &mut consumer] {
        assert!(node.end().await, "{}", node.last_words());
    }
    assert_whole(&world, &ledger).await;
}
