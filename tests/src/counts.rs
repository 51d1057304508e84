//! The metrics of this process, for tests that assert what was counted. One recorder for all tests: tell them apart by
//! their labels (a group's name).

use std::{
    collections::HashMap,
    sync::{
        Arc, LazyLock, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use metrics::{
    Counter, CounterFn, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit,
};

type Counters = Mutex<HashMap<Key, Arc<Count>>>;

static COUNTERS: LazyLock<&'static Counters> = LazyLock::new(|| {
    let counters: &'static Counters = Box::leak(Box::default());
    metrics::set_global_recorder(Counting(counters)).expect("the first recorder");
    counters
});

struct Counting(&'static Counters);

#[derive(Default)]
struct Count(AtomicU64);

impl CounterFn for Count {
    fn increment(&self, value: u64) {
        self.0.fetch_add(value, Relaxed);
    }
    fn absolute(&self, value: u64) {
        self.0.fetch_max(value, Relaxed);
    }
}

impl Recorder for Counting {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Counter::from_arc(Arc::clone(counters.entry(key.clone()).or_default()))
    }
    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }
    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// Starts to count. What was counted before the first call is lost.
pub fn start() {
    LazyLock::force(&COUNTERS);
}

/// What a group's consumers have counted under `outcome`.
#[must_use]
pub fn consumed(group: &str, outcome: &str) -> u64 {
    count(
        "pillarbox_consumer_events_total",
        &[("group", group), ("outcome", outcome)],
    )
}

/// The sum of the counters with this name and these labels.
#[must_use]
pub fn count(name: &str, labels: &[(&str, &str)]) -> u64 {
    let counters = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
    let has = |key: &Key, (name, value): &(&str, &str)| {
        key.labels()
            .any(|l| l.key() == *name && l.value() == *value)
    };
    counters
        .iter()
        .filter(|(key, _)| key.name() == name && labels.iter().all(|l| has(key, l)))
        .map(|(_, count)| count.0.load(Relaxed))
        .sum()
}
