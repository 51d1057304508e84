//! An event whose handler ends the process, each time: it is found, and everything else has its effect.

use pillarbox_tests::{
    Tick, World, in_both_worlds,
    node::{Node, Task},
    tables::{dead_letters, deferred},
    until,
};

use crate::NODE;

in_both_worlds!(an_event_that_aborts_its_process_ends_as_a_dead_letter);

async fn an_event_that_aborts_its_process_ends_as_a_dead_letter(world: World) {
    let mut ticks: Vec<Tick> = (1..=40)
        .map(|n| Tick::new(format!("key-{}", n % 4), n))
        .collect();
    ticks.insert(20, Tick::new("poison", 1));
    world.commit(&world.outbox(), &ticks).await;
    let task = Task {
        lease_ms: 2_000,
        aborts_on: Some("poison".to_owned()),
        ..Task::both(&world)
    };
    let mut node = Node::start(NODE, &task);
    let mut deaths = 0;
    until("it is given up, and all else has its effect", async || {
        if node.has_ended() {
            deaths += 1;
            eprintln!("death {deaths}");
            node = Node::start(NODE, &task);
        }
        dead_letters(&world.consumer).await.len() == 1 && world.count_effects().await == 40
    })
    .await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    assert!(node.end().await, "{}", node.last_words());
    let dead = dead_letters(&world.consumer).await;
    assert_eq!(dead[0].key.as_deref(), Some("poison"));
    assert_eq!(dead[0].attempts, 4, "one for each time that it was alone");
    let told = "the process ended while it was handled, and nothing else was under way";
    assert_eq!(dead[0].reason, told);
    let effects = world.effects().await;
    assert_eq!(effects.len(), 40);
    for key in 0..4 {
        let key = format!("key-{key}");
        let numbers: Vec<u32> = effects
            .iter()
            .filter(|e| e.key == key)
            .map(|e| e.n)
            .collect();
        assert!(numbers.is_sorted(), "{key}: {numbers:?}");
    }
    // Two before it is suspected, four that count.
    assert!((6..=10).contains(&deaths), "{deaths} deaths");
}
