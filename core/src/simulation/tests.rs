use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant, SystemTime},
};

use super::{Outcome, consume, relay};

/// Schedules in CI, and in a soak.
const RELAY_SEEDS: u64 = 10_000;
const CONSUMER_SEEDS: u64 = 10_000;
const SOAK_SEEDS: u64 = 500_000;
/// So many failing seeds are enough to judge.
const FAILURES: u64 = 5;
const TOLD_EACH: u64 = 50_000;
/// A schedule takes milliseconds. One that takes this long goes round in a circle without its clock moving.
const STUCK: Duration = Duration::from_secs(120);

/// A schedule of one role: the seed, and whether to tell its story.
type Run = fn(u64, bool) -> Outcome;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    match text.trim().parse() {
        Ok(n) => Some(n),
        Err(_) => panic!("{name}={text:?} is no number"),
    }
}

/// The seeds to run: the same ones in CI each time, others in each soak, and those from `PILLARBOX_FROM` on if it is set.
fn seeds(count: u64) -> std::ops::Range<u64> {
    let soak = std::env::var_os("PILLARBOX_SOAK").is_some();
    let from = if soak {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.map_or(0, |t| t.as_secs()) * 1_000_000
    } else {
        0
    };
    let count = if soak { SOAK_SEEDS } else { count };
    let from = number("PILLARBOX_FROM").unwrap_or(from);
    from..from.saturating_add(number("PILLARBOX_SEEDS").unwrap_or(count))
}

/// `PILLARBOX_SEED=n` runs that seed alone and tells what happens; `PILLARBOX_SEEDS=n` runs so many.
fn every_schedule(test: &str, run: Run, count: u64) {
    if let Some(seed) = number("PILLARBOX_SEED") {
        let outcome = run(seed, true);
        println!("{}", outcome.story.join("\n"));
        assert!(
            outcome.wrong.is_empty(),
            "seed {seed}: {:#?}",
            outcome.wrong
        );
        return;
    }
    let (seeds, begun) = (seeds(count), Instant::now());
    let failed = run_all(run, &seeds);
    let first = failed.keys().next().copied().unwrap_or_default();
    assert!(
        failed.is_empty(),
        "{failed:#?}\nrun it again with:\n  PILLARBOX_SEED={first} cargo test -p pillarbox-core --all-features \
         --lib -- --nocapture simulation::tests::{test}"
    );
    println!("schedules {seeds:?} in {:?}", begun.elapsed());
}

#[test]
fn a_relay_keeps_every_promise_in_every_schedule() {
    every_schedule(
        "a_relay_keeps_every_promise_in_every_schedule",
        relay,
        RELAY_SEEDS,
    );
}

#[test]
fn a_consumer_keeps_every_promise_in_every_schedule() {
    every_schedule(
        "a_consumer_keeps_every_promise_in_every_schedule",
        consume,
        CONSUMER_SEEDS,
    );
}

/// Runs seeds on all cores until some have failed.
fn run_all(run: Run, seeds: &std::ops::Range<u64>) -> BTreeMap<u64, Vec<String>> {
    let most = number("PILLARBOX_FAILURES").unwrap_or(FAILURES);
    let next = AtomicU64::new(seeds.start);
    let failed = Mutex::new(BTreeMap::new());
    let count = || u64::try_from(failed.lock().unwrap().len()).unwrap_or(u64::MAX);
    std::thread::scope(|scope| {
        let (alive, watch) = mpsc::channel();
        for worker in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            let (alive, next, failed) = (alive.clone(), &next, &failed);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || count() >= most {
                        return;
                    }
                    let _ = alive.send((worker, seed));
                    let wrong = catch_unwind(AssertUnwindSafe(|| run(seed, false).wrong))
                        .unwrap_or_else(|_| vec!["it panicked, see above".to_owned()]);
                    if !wrong.is_empty() {
                        failed.lock().unwrap().insert(seed, wrong);
                    }
                }
            });
        }
        drop(alive);
        let mut running = BTreeMap::new();
        loop {
            match watch.recv_timeout(STUCK) {
                Ok((worker, seed)) => {
                    running.insert(worker, seed);
                    // A long run says how far it is.
                    let done = seed - seeds.start;
                    if done > 0 && done.is_multiple_of(TOLD_EACH) {
                        eprintln!("{done} of {} schedules", seeds.end - seeds.start);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("these seeds go round in a circle: {:?}", running.values());
                    std::process::abort();
                }
            }
        }
    });
    failed.into_inner().unwrap()
}

#[test]
fn a_seed_reruns_the_same() {
    let roles: [Run; 2] = [relay, consume];
    for (run, seed) in roles
        .into_iter()
        .flat_map(|run| (0..50).map(move |seed| (run, seed)))
    {
        let (first, second) = (run(seed, false), run(seed, false));
        assert_eq!(first.digest, second.digest, "seed {seed}");
        assert_eq!(first.elapsed, second.elapsed, "seed {seed}");
    }
}
