//! A deterministic simulation: the real relay and the real consumer over a model database and a model broker, on one
//! thread and a paused clock, with one seed for all that is random.
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
mod consumed;
mod consumption;
mod database;
mod drained;
mod exceptions;
#[cfg(test)]
mod keeping;
mod plan;
mod process;
mod queue;
mod slices;
mod store;
#[cfg(test)]
mod tests;
mod transaction;
mod unit;
mod world;

pub(crate) use chance::jitter;
pub(crate) use process::task;

use std::{sync::Arc, time::Duration};

use chance::{Chance, Jitter};
use chaos::{Fleet, Role};
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

/// Runs the schedule of a seed: relays between the model database and the model broker.
///
/// # Panics
/// If no runtime can be built.
#[must_use]
pub fn relay(seed: u64, tell: bool) -> Outcome {
    run(seed, tell, Role::Relay)
}

/// Runs the schedule of a seed: consumers between the model broker and the model database.
///
/// # Panics
/// If no runtime can be built.
#[must_use]
pub fn consume(seed: u64, tell: bool) -> Outcome {
    run(seed, tell, Role::Consumer)
}

fn run(seed: u64, tell: bool, role: Role) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(schedule(seed, tell, role)),
        Err(e) => panic!("no runtime: {e}"),
    }
}

async fn schedule(seed: u64, tell: bool, role: Role) -> Outcome {
    let mut chance = Chance::new(seed);
    let _jitter = Jitter::seeded(chance.next());
    let plan = Plan::new(&mut chance.fork());
    let world = World::new(plan, chance, tell);
    world.with(|w| {
        let plan = format!("{:#?}", w.plan);
        w.tell(|| plan);
    });
    let mut fleet = Fleet::start(&world, role);
    match role {
        Role::Relay => application::start(&world, &fleet.outbox()),
        Role::Consumer => drop(tokio::spawn(consumption::give(world.clone()))),
    }
    fleet.suffer().await;
    fleet.heal();
    drain(&world, role).await;
    afterwards(&world, role).await;
    if role == Role::Relay {
        balance(&world).await;
    }
    if world.with(|w| w.checks.wrong.is_empty()) {
        fleet.finish().await;
        world.with(|w| match role {
            Role::Relay => w.check_end(),
            Role::Consumer => w.check_consumption(),
        });
    }
    let elapsed = world.elapsed();
    world.with(|w| Outcome {
        wrong: std::mem::take(&mut w.checks.wrong),
        digest: w.digest(),
        story: w.story(),
        events: w.application.events.len() + w.consumption.events.len(),
        elapsed,
    })
}

/// Every key takes the straight way again.
async fn afterwards(world: &Arc<World>, role: Role) {
    // Longer than any retry of the schedule: what it knew to be late is over.
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.with(|w| {
        w.straight = true;
        match role {
            Role::Relay => w.write_for_each_key(),
            Role::Consumer => w.give_for_each_key(),
        }
    });
    drain(world, role).await;
}

/// Nobody has more than its share, and everything has an owner.
async fn balance(world: &Arc<World>) {
    let end = tokio::time::Instant::now() + DRAIN;
    while !world.with(|w| w.is_balanced() || !w.checks.wrong.is_empty()) {
        if tokio::time::Instant::now() >= end {
            return world.with(|w| {
                let owners = w.checks.owners.clone();
                w.wrong(format!("it is not balanced: {owners:?}"));
            });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn drain(world: &Arc<World>, role: Role) {
    let end = tokio::time::Instant::now() + DRAIN;
    let drained = |w: &mut world::Inner| match role {
        Role::Relay => w.is_drained(),
        Role::Consumer => w.is_consumed(),
    };
    while !world.with(|w| drained(w) || !w.checks.wrong.is_empty()) {
        if tokio::time::Instant::now() >= end {
            return world.with(|w| match role {
                Role::Relay => w.check_drained(),
                Role::Consumer => w.check_consumed(),
            });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
