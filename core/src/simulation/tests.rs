use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::run;

/// Schedules in CI.
const SEEDS: u64 = 10_000;
/// So many failing seeds are enough to judge.
const FAILURES: usize = 5;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    match text.trim().parse() {
        Ok(n) => Some(n),
        Err(_) => panic!("{name}={text:?} is no number"),
    }
}

/// `PILLARBOX_SEED=n` runs that seed alone and tells what happens; `PILLARBOX_SEEDS=n` runs so many.
#[test]
fn every_promise_holds_in_every_schedule() {
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
    let seeds = number("PILLARBOX_SEEDS").unwrap_or(SEEDS);
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let failed = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds || failed.lock().unwrap().len() >= FAILURES {
                        return;
                    }
                    let outcome = run(seed, false);
                    if !outcome.wrong.is_empty() {
                        failed.lock().unwrap().insert(seed, outcome.wrong);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    let first = failed.keys().next().copied().unwrap_or_default();
    assert!(
        failed.is_empty(),
        "rerun with PILLARBOX_SEED={first}: {failed:#?}"
    );
    println!("{seeds} schedules in {:?}", begun.elapsed());
}

#[test]
fn a_seed_reruns_the_same() {
    for seed in 0..50 {
        let (first, second) = (run(seed, false), run(seed, false));
        assert_eq!(first.digest, second.digest, "seed {seed}");
        assert_eq!(first.elapsed, second.elapsed, "seed {seed}");
    }
}
