//! Three instances of a consumer that come and go.

use std::time::Duration;

use pillarbox_tests::{
    Kind, World, in_both_worlds, is_soak,
    ledger::Writers,
    node::{Node, Task},
    seed,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{Instant, sleep};

use crate::{NODE, STEADY, assert_whole, tap, until_all_applied};

in_both_worlds!(instances_that_join_and_leave_keep_order_and_effects);

const INSTANCES: usize = 3;

/// Killed, or stopped in order; another one joins a little later. On `memory` one of the three works and the others wait.
async fn instances_that_join_and_leave_keep_order_and_effects(world: World) {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    tap(&world).await;
    let consumer = match world.kind {
        Kind::Embedded => Task::both(&world),
        Kind::Servers | Kind::Nats => Task::consumer(&world),
    };
    // Retries are under way while they come and go.
    let task = Task {
        fails_each: 7,
        ..consumer
    };
    let mut relay = (world.kind != Kind::Embedded).then(|| Node::start(NODE, &Task::relay(&world)));
    let mut instances: Vec<Node> = (0..INSTANCES).map(|_| Node::start(NODE, &task)).collect();
    let writers = Writers::start(&world.outbox(), STEADY, seed).await;
    let end = Instant::now() + Duration::from_secs(if is_soak() { 60 } else { 15 });
    while Instant::now() < end {
        // From before it has joined to long after.
        sleep(Duration::from_millis(rng.random_range(200..3_000))).await;
        let victim = rng.random_range(0..INSTANCES);
        if rng.random() {
            instances[victim].kill().await;
        } else {
            // It may have been told to go before it could hear it.
            instances[victim].says("ready").await;
            let ended = instances[victim].end().await;
            assert!(ended, "{}", instances[victim].last_words());
        }
        sleep(Duration::from_millis(rng.random_range(0..1_500))).await;
        instances[victim] = Node::start(NODE, &task);
    }
    let ledger = writers.stop().await;
    until_all_applied(&world, &ledger).await;
    for node in instances.iter_mut().chain(&mut relay) {
        node.says("ready").await;
        assert!(node.end().await, "{}", node.last_words());
    }
    assert_whole(&world, &ledger).await;
}
