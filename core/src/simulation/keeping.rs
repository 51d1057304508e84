//! The keeper alone, over calls that are slow, fail, or are answered late.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    chance::Chance,
    check::DESTINATION,
    plan::Plan,
    store::ModelStore,
    world::{Inner, World},
};
use crate::{
    lease::{Keeper, Lease, LeaseKey, LeaseTerm},
    store::Store,
};

const SEEDS: u64 = 1_000;

/// Whether the database would still refuse the lease to another owner.
fn runs(w: &Inner, lease: &Lease) -> bool {
    let row = w.database.held(lease);
    row.is_ok_and(|row| row.expires_at > w.now())
}

/// An owner that trusts a lease which has run out works beside the next one. Its trust counts from before it sent a
/// renewal, however late the answer comes.
async fn trust_ends_before_the_lease(seed: u64) {
    let mut chance = Chance::new(seed);
    let mut plan = Plan::new(&mut chance.fork());
    plan.faults.slow_call = 0.4;
    plan.faults.fails_before = 0.3;
    plan.faults.fails_after = 0.3;
    let world = World::new(plan, chance, false);
    let store = Arc::new(ModelStore {
        world: world.clone(),
        process: 0,
    });
    let term = LeaseTerm::new(Duration::from_secs(1));
    let key = LeaseKey::Relay {
        destination: DESTINATION.to_owned(),
        partition: 0,
    };
    let sent = Instant::now();
    let Ok(Some(acquired)) = store.acquire(&key, term).await else {
        return;
    };
    let lease = acquired.lease;
    let keeper = Keeper::start(store, lease.clone(), term, sent);
    while sent.elapsed() < 30 * term.term() {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if keeper.lost().is_cancelled() {
            return;
        }
        let runs = world.with(|w| runs(w, &lease));
        assert!(runs, "seed {seed}: trusted after {:?}", sent.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn an_owner_trusts_no_lease_that_has_run_out() {
    for seed in 0..SEEDS {
        trust_ends_before_the_lease(seed).await;
    }
}
