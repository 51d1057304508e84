//! Processes killed with SIGKILL.

use std::time::Duration;

use pillarbox_tests::{
    Kind, Tick, World, in_both_worlds, is_soak,
    ledger::Writers,
    node::{Node, Task},
    seed,
    tables::rewind,
    until,
    wire::Client,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{NODE, STEADY, assert_whole, tap, until_all_applied};

in_both_worlds!(
    killed_at_twenty_random_moments,
    a_consumer_killed_between_commit_and_acknowledgement,
    two_processes_on_one_pair_of_databases,
);

/// One process with both ends on `memory`; relay and consumer apart where a broker lies between them.
fn tasks(world: &World) -> Vec<Task> {
    match world.kind {
        Kind::Embedded => vec![Task::both(world)],
        Kind::Servers | Kind::Nats => vec![Task::relay(world), Task::consumer(world)],
    }
}

async fn killed_at_twenty_random_moments(world: World) {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    tap(&world).await;
    // Retries under way are killed too.
    let mut tasks = tasks(&world);
    tasks.iter_mut().for_each(|t| t.fails_each = 7);
    let mut nodes: Vec<Node> = tasks.iter().map(|t| Node::start(NODE, t)).collect();
    let writers = Writers::start(&world.outbox(), STEADY, seed).await;
    let kills = if is_soak() { 200 } else { 20 };
    for kill in 1..=kills {
        // Time is what is random: from before the lease to long after it.
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..3_500))).await;
        let victim = rng.random_range(0..nodes.len());
        eprintln!("kill {kill}: process {victim}");
        nodes[victim].kill().await;
        nodes[victim] = Node::start(NODE, &tasks[victim]);
    }
    let ledger = writers.stop().await;
    until_all_applied(&world, &ledger).await;
    for node in &mut nodes {
        assert!(node.end().await, "{}", node.last_words());
    }
    assert_whole(&world, &ledger).await;
}

/// The effect is there and the broker does not know it: it delivers again, and nothing happens.
async fn a_consumer_killed_between_commit_and_acknowledgement(world: World) {
    let ticks: Vec<Tick> = (1..=50)
        .map(|n| Tick::new(format!("key-{}", n % 5), n))
        .collect();
    world.commit(&world.outbox(), &ticks).await;
    let tasks = tasks(&world);
    let mut relay = (tasks.len() > 1).then(|| Node::start(NODE, &tasks[0]));
    let consumer = tasks.last().expect("a task");
    let mut node = Node::start(
        NODE,
        &Task {
            hold_acks: true,
            ..consumer.clone()
        },
    );
    node.says("keeps the ack of").await;
    let before = world.effects().await;
    assert!(!before.is_empty(), "committed before it acknowledges");
    node.kill().await;
    if let Some(url) = &world.amqp_url {
        let client = Client::connect(url).await;
        until("the broker has them back", async || {
            client.depth(&world.queue()).await > 0
        })
        .await;
    }
    let mut again = Node::start(NODE, consumer);
    world.until_effects(50).await;
    if let Some(relay) = &mut relay {
        assert!(relay.end().await, "{}", relay.last_words());
    }
    assert!(again.end().await, "{}", again.last_words());
    for effect in &before {
        let call = format!("handles {} {}\n", effect.key, effect.n);
        assert!(
            !again.said().contains(&call),
            "{call}: its handler ran again"
        );
    }
    let effects = world.effects().await;
    assert_eq!(effects.len(), 50, "an effect happened twice");
    assert_eq!(effects[..before.len()], before);
}

/// On `memory` the second one waits for the first to end; on servers they share the work.
async fn two_processes_on_one_pair_of_databases(world: World) {
    let seed = seed();
    tap(&world).await;
    let outbox = world.outbox();
    let writers = Writers::start(&outbox, STEADY, seed).await;
    // Long enough for a busy machine: the first one must not lose it by being slow.
    let task = Task {
        lease_ms: 6_000,
        ..Task::both(&world)
    };
    let mut first = Node::start(NODE, &task);
    first.says("works").await;
    let mut second = Node::start(NODE, &task);
    second.says("ready").await;
    world.until_effects(300).await;
    if world.kind == Kind::Embedded {
        second
            .says("another process runs the memory transport")
            .await;
        assert!(
            !second.said().contains("works\n"),
            "{}",
            second.last_words()
        );
        assert!(
            !second.said().contains("handles"),
            "{}",
            second.last_words()
        );
    }
    // Killed, then ended: the other goes on each time.
    first.kill().await;
    second.says("works\n").await;
    let so_far = world.count_effects().await;
    world.until_effects(so_far + 300).await;
    let mut third = Node::start(NODE, &task);
    third.says("ready").await;
    assert!(second.end().await, "{}", second.last_words());
    third.says("works\n").await;
    let so_far = world.count_effects().await;
    world.until_effects(so_far + 300).await;
    let ledger = writers.stop().await;
    until_all_applied(&world, &ledger).await;
    assert!(third.end().await, "{}", third.last_words());
    assert_whole(&world, &ledger).await;
    // The whole log once more, as after a restore: no effect more.
    rewind(&world.producer).await;
    let count = world.count_effects().await;
    let mut fourth = Node::start(NODE, &task);
    fourth.says("works\n").await;
    world.commit(&outbox, &[Tick::new("last", 1)]).await;
    world.until_effects(count + 1).await;
    assert!(fourth.end().await, "{}", fourth.last_words());
    assert_eq!(world.effects().await.len(), count + 1);
}
