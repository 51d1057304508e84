//! Statements that a network holds back until long after their lease, and then delivers.

use std::time::Duration;

use pillarbox_testkit::proxy::Direction;
use pillarbox_tests::{
    TickHandler, World, is_soak, ledger::Writers, on_servers_alone, seed, until,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{STEADY, assert_whole, network::Behind, tap, until_all_applied};

on_servers_alone!(statements_held_back_past_the_lease_change_nothing);

/// The heir starts while the other's transactions stand open on the servers, with their locks.
async fn statements_held_back_past_the_lease_change_nothing(world: World) {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    tap(&world).await;
    let outbox = world.outbox();
    let writers = Writers::start(&outbox, STEADY, seed).await;
    for _ in 0..if is_soak() { 30 } else { 3 } {
        let behind = Behind::start(&world).await;
        Behind::goes_on(&world).await;
        // Any moment: before BEGIN, inside a transaction, before its COMMIT, before the answer to that.
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..200))).await;
        for proxy in [&behind.producer, &behind.consumer] {
            let both = [Direction::ToServer, Direction::ToClient];
            proxy.hold(both[usize::from(rng.random::<bool>())]);
        }
        until("its leases are no longer trusted", async || {
            behind.relay.health().held + behind.running.health().held == 0
        })
        .await;
        let heir = world.start(&outbox, world.ticks(TickHandler::new())).await;
        Behind::goes_on(&world).await;
        behind.producer.release();
        behind.consumer.release();
        Behind::goes_on(&world).await;
        behind.stop().await;
        Behind::goes_on(&world).await;
        heir.stop().await;
    }
    let heir = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let ledger = writers.stop().await;
    until_all_applied(&world, &ledger).await;
    heir.stop().await;
    assert_whole(&world, &ledger).await;
}
