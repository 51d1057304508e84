//! A deterministic simulation: the real relay over a model database and a model broker, on one thread and a paused
//! clock, with one seed for all that is random.
//!
//! Two phases. First faults: crashes at any await, processes that stand still beyond their lease, late commits and
//! rollbacks, answers that are lost, late or out of order, refusals, outages, clocks that jump, a database that loses
//! what was not flushed. Then all is healed, and everything must drain in bounded time. [`check`] compares what
//! happened with the promises.
//!
//! It never touches a server, a file or the real clock: a seed reruns the same.

mod application;
mod broker;
mod chance;
mod chaos;
mod check;
mod database;
mod plan;
mod process;
mod store;
#[cfg(test)]
mod tests;
mod world;

pub(crate) use chance::jitter;
pub(crate) use process::task;

use std::{sync::Arc, time::Duration};

use chance::{Chance, Jitter};
use plan::Plan;
use world::World;

/// Simulated time in which everything must drain once it is healed: beyond the longest that a clock which was set back
/// can make a dead owner's lease last.
const DRAIN: Duration = Duration::from_secs(900);

/// What a schedule came to.
#[derive(Debug)]
pub struct Outcome {
    /// Broken promises, none if all is well.
    pub wrong: Vec<String>,
    /// Equal for two runs that went the same way.
    pub digest: u64,
    /// What happened, if it was asked for.
    pub story: Vec<String>,
    /// Events that were written.
    pub events: usize,
    /// Simulated time.
    pub elapsed: Duration,
}

/// Runs the schedule of a seed.
///
/// # Panics
/// If no runtime can be built.
#[must_use]
pub fn run(seed: u64, tell: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(schedule(seed, tell)),
        Err(e) => panic!("no runtime: {e}"),
    }
}

async fn schedule(seed: u64, tell: bool) -> Outcome {
    let mut chance = Chance::new(seed);
    let _jitter = Jitter::seeded(chance.next());
    let plan = Plan::new(&mut chance.fork());
    let world = World::new(plan, chance, tell);
    world.with(|w| {
        let plan = format!("{:#?}", w.plan);
        w.tell(|| plan);
        w.application.writers = w.plan.writers;
    });
    let locks = world.with(|w| application::locks(w));
    let mut relays = chaos::Relays::start(&world);
    for _ in 0..world.with(|w| w.plan.writers) {
        tokio::spawn(application::write(
            world.clone(),
            locks.clone(),
            relays.outbox(),
        ));
    }
    relays.suffer().await;
    relays.heal();
    drain(&world).await;
    if world.with(|w| w.checks.wrong.is_empty()) {
        relays.finish().await;
        world.with(world::Inner::check_end);
    }
    let elapsed = world.elapsed();
    world.with(|w| Outcome {
        wrong: std::mem::take(&mut w.checks.wrong),
        digest: w.digest(),
        story: w.story(),
        events: w.application.events.len(),
        elapsed,
    })
}

async fn drain(world: &Arc<World>) {
    let end = tokio::time::Instant::now() + DRAIN;
    loop {
        if world.with(|w| w.is_drained() || !w.checks.wrong.is_empty()) {
            return;
        }
        if tokio::time::Instant::now() >= end {
            return world.with(world::Inner::check_drained);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
