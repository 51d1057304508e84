//! An event's way from commit to effect, in both worlds.

mod bounds;
mod chain;
mod destinations;
mod duplicates;
mod effects;
mod enqueue;
mod failing;
mod handlers;
mod late;
mod later;
mod nats;
mod operators;
mod owners;
mod panics;
mod pauses;
mod poison;
mod refused;
mod replays;
mod settings;
mod shares;
mod start;
mod suspects;
mod way;
mod workers;

use std::time::Duration;

use pillarbox_core::failure::Retry;
use pillarbox_tests::one_world;

/// A schedule without chance.
fn retry(delays: &[u64]) -> Retry {
    Retry {
        delays: delays.iter().map(|ms| Duration::from_millis(*ms)).collect(),
        jitter: 0.0,
        ..Retry::default()
    }
}

/// What one of the worlds cannot have, for whoever wonders about a test that has no twin.
#[test]
fn each_case_of_one_world_has_its_reason() {
    for (test, world, reason) in one_world::CASES {
        println!("{test}: {world:?} alone; {reason}");
        assert!(reason.len() > 20, "{test} needs a reason");
    }
}
