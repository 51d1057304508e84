//! Writers whose keys are serialized by a row lock, what they know of their transactions, and what must follow from it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use pillarbox_core::{Connection, Database, Outbox, Pool};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;

use crate::{
    effect::{Tick, Ticked},
    tables::{self, Logged},
    wire::Arrived,
};

/// An event as its writer knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Its id.
    pub id: String,
    /// Its key.
    pub key: String,
    /// The n-th committed of its key: drawn under the key's row lock, before the enqueue.
    pub n: u32,
}

/// What writers know.
#[derive(Debug, Default)]
pub struct Ledger {
    /// The COMMIT was answered.
    pub committed: Vec<Written>,
    /// Rolled back.
    pub rolled_back: Vec<Written>,
    /// The answer to the COMMIT was lost.
    pub unknown: Vec<Written>,
}

/// How writers write.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Tasks at the same time.
    pub writers: usize,
    /// Keys.
    pub keys: usize,
    /// Events after which they stop by themselves.
    pub events: usize,
    /// Between two transactions of a writer.
    pub pause: Duration,
}

/// Writers at work.
pub struct Writers {
    tasks: JoinSet<Ledger>,
    stop: Arc<AtomicBool>,
}

impl Writers {
    /// Starts them. One transaction in twelve is rolled back; the others have one to eight events.
    pub async fn start(outbox: &Outbox, plan: Plan, seed: u64) -> Self {
        let table = "CREATE TABLE IF NOT EXISTS counter (key text PRIMARY KEY, n bigint NOT NULL)";
        tables::query(outbox.database(), table).await;
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for writer in 0..plan.writers {
            let rng = StdRng::seed_from_u64(seed.wrapping_add(writer as u64));
            tasks.spawn(write_on(outbox.clone(), plan, rng, stop.clone()));
        }
        Self { tasks, stop }
    }

    /// Waits until they have written their events.
    pub async fn done(mut self) -> Ledger {
        let mut all = Ledger::default();
        while let Some(ledger) = self.tasks.join_next().await {
            let ledger = ledger.expect("a writer");
            all.committed.extend(ledger.committed);
            all.rolled_back.extend(ledger.rolled_back);
            all.unknown.extend(ledger.unknown);
        }
        all
    }

    /// Tells them to stop after the transaction under way.
    pub fn halt(&self) {
        self.stop.store(true, Relaxed);
    }

    /// Stops them where they are.
    pub async fn stop(self) -> Ledger {
        self.halt();
        self.done().await
    }
}

async fn write_on(outbox: Outbox, plan: Plan, mut rng: StdRng, stop: Arc<AtomicBool>) -> Ledger {
    let mut ledger = Ledger::default();
    let share = plan.events / plan.writers;
    while ledger.committed.len() < share && !stop.load(Relaxed) {
        let most = (share - ledger.committed.len()).min(8);
        let mut keys: Vec<String> = (0..rng.random_range(1..=most))
            .map(|_| format!("key-{:03}", rng.random_range(0..plan.keys)))
            .collect();
        // In one order, so that writers wait for each other and never in a circle.
        keys.sort();
        let commit = rng.random_range(0..12) != 0;
        transaction(&outbox, &keys, commit, &mut ledger).await;
        outbox.wake();
        tokio::time::sleep(plan.pause).await;
    }
    ledger
}

/// One transaction. A database that is away costs nothing: nothing was promised.
async fn transaction(outbox: &Outbox, keys: &[String], commit: bool, ledger: &mut Ledger) {
    macro_rules! run {
        ($begin:expr, $variant:ident) => {{
            let Ok(mut tx) = $begin.await else { return };
            let Some(written) = enqueue(outbox, Connection::$variant(&mut tx), keys).await else {
                return;
            };
            if !commit {
                // Whatever the answer: without a COMMIT it is rolled back.
                let _ = tx.rollback().await;
                return ledger.rolled_back.extend(written);
            }
            match tx.commit().await {
                Ok(()) => ledger.committed.extend(written),
                Err(_) => ledger.unknown.extend(written),
            }
        }};
    }
    match outbox.database().pool().expect("a pool") {
        Pool::Postgres(pool) => run!(pool.begin(), Postgres),
        Pool::Sqlite(pool) => run!(pool.begin_with("BEGIN IMMEDIATE"), Sqlite),
    }
}

async fn enqueue(
    outbox: &Outbox,
    mut connection: Connection<'_>,
    keys: &[String],
) -> Option<Vec<Written>> {
    const COUNT: &str = "INSERT INTO counter (key, n) VALUES ($1, 1) \
                         ON CONFLICT (key) DO UPDATE SET n = counter.n + 1 RETURNING n";
    let mut written = Vec::with_capacity(keys.len());
    for key in keys {
        let n: i64 = match connection.reborrow() {
            Connection::Postgres(c) => sqlx::query_scalar(COUNT)
                .bind(key)
                .fetch_one(c)
                .await
                .ok()?,
            Connection::Sqlite(c) => sqlx::query_scalar(COUNT)
                .bind(key)
                .fetch_one(c)
                .await
                .ok()?,
        };
        let n = u32::try_from(n).ok()?;
        let id = outbox
            .enqueue(connection.reborrow(), &Tick::new(key, n))
            .await;
        written.push(Written {
            id: id.ok()?.to_string(),
            key: key.clone(),
            n,
        });
    }
    Some(written)
}

impl Ledger {
    /// The log, once it was found to hold what was committed and nothing that was rolled back. What it holds is then
    /// what must arrive.
    pub async fn log(&self, producer: &Database) -> Vec<Logged> {
        let log = tables::log(producer).await;
        let ids: HashSet<&str> = log.iter().map(|e| e.id.as_str()).collect();
        for written in &self.committed {
            assert!(
                ids.contains(written.id.as_str()),
                "lost by the database: {written:?}"
            );
        }
        for written in &self.rolled_back {
            assert!(
                !ids.contains(written.id.as_str()),
                "rolled back, yet there: {written:?}"
            );
        }
        log
    }

    /// Nothing that was rolled back arrived.
    pub fn assert_not_sent<'a>(&self, ids: impl IntoIterator<Item = &'a str>) {
        let rolled_back: HashSet<&str> = self.rolled_back.iter().map(|w| w.id.as_str()).collect();
        for id in ids {
            assert!(!rolled_back.contains(id), "{id} was rolled back, and sent");
        }
    }
}

/// All of the log arrived, nothing else did, and the first arrivals of each key came in the order of the commits.
///
/// # Panics
/// Else. Answers how many arrived again.
pub fn assert_arrived(log: &[Logged], arrived: &[Arrived]) -> usize {
    let seen: Vec<(&str, &str, u32)> = arrived
        .iter()
        .map(|a| {
            let n = a.n.unwrap_or_else(|| panic!("{:?} has no number", a.id));
            (a.id.as_str(), a.key.as_deref().unwrap_or_default(), n)
        })
        .collect();
    assert_first_arrivals(log, &seen)
}

/// Each event of the log had its effect once, each key's in the order of the commits.
///
/// # Panics
/// Else.
pub fn assert_effects(log: &[Logged], effects: &[Ticked]) {
    let seen: Vec<(&str, &str, u32)> = effects
        .iter()
        .map(|e| (e.id.as_str(), e.key.as_str(), e.n))
        .collect();
    let repeated = assert_first_arrivals(log, &seen);
    assert_eq!(repeated, 0, "effects happened twice");
}

fn assert_first_arrivals(log: &[Logged], seen: &[(&str, &str, u32)]) -> usize {
    let mut missing: BTreeMap<&str, &Logged> = log.iter().map(|e| (e.id.as_str(), e)).collect();
    let known: HashSet<&str> = missing.keys().copied().collect();
    let mut next = HashMap::<&str, u32>::new();
    let mut repeated = 0;
    for (id, key, n) in seen {
        assert!(known.contains(id), "{id} ({key} {n}) was never committed");
        if missing.remove(id).is_none() {
            repeated += 1;
            continue;
        }
        let expected = next.entry(key).or_insert(1);
        assert_eq!(
            n, expected,
            "out of order: {key} {n} came where {expected} was due"
        );
        *expected += 1;
    }
    let lost: Vec<&Logged> = missing.into_values().collect();
    assert!(
        lost.is_empty(),
        "{} lost, the first is {:?}",
        lost.len(),
        lost[0]
    );
    repeated
}
