//! Sixteen writers at their worst, and readers that forget: nothing lost, nothing twice, nothing out of order.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pillarbox_core::{
    Database,
    lease::{Acquired, LeaseKey},
    migrate_with,
    store::Store,
};
use rand::random_range;
use sqlx::PgConnection;
use tokio::task::JoinSet;

use super::{Db, number, run};
use crate::suite::{Bench, acquire, term};

const WRITERS: u32 = 16;
const KEYS: u32 = 12;
const PARTITIONS: u16 = 4;

/// How long they write; longer in a soak.
fn writing() -> Duration {
    let seconds = std::env::var("TEST_STRESS_SECONDS");
    let seconds = seconds.ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(6))
}

/// What a reader has taken over for good: the numbers of each key in order, and of keyless events how many.
#[derive(Default)]
struct Taken {
    keys: BTreeMap<String, Vec<i64>>,
    keyless: i64,
    late: usize,
    highest: i64,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_doubled_or_out_of_order() {
    let Some(db) = Db::new().await else { return };
    let database = db.database().await;
    migrate_with(&database, PARTITIONS).await.unwrap();
    db.execute(&format!(
        "CREATE TABLE keys (key text PRIMARY KEY, n bigint NOT NULL); \
         INSERT INTO keys SELECT 'k' || k, 0 FROM generate_series(1, {KEYS}) k; \
         CREATE TABLE keyless (writer int PRIMARY KEY, n bigint NOT NULL); \
         INSERT INTO keyless SELECT w, 0 FROM generate_series(1, {WRITERS}) w"
    ))
    .await;

    let written = Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for partition in 0..PARTITIONS {
        let (database, written) = (database.clone(), written.clone());
        readers.spawn(async move { read(&database, partition, &written).await });
    }
    let mut writers = JoinSet::new();
    for writer in 1..=WRITERS {
        let connection = db.raw().await;
        writers.spawn(tokio::time::timeout(
            writing() + Duration::from_secs(60),
            scribble(connection, writer),
        ));
    }
    for done in writers.join_all().await {
        done.expect("a writer is stuck");
    }
    written.store(true, Ordering::Relaxed);
    let taken = readers.join_all().await;
    check(&db, taken).await;
}

async fn check(db: &Db, taken: Vec<Taken>) {
    let mut raw = db.raw().await;
    let late: usize = taken.iter().map(|t| t.late).sum();
    let mut total = 0;
    let keyless: i64 = taken.iter().map(|t| t.keyless).sum();
    for key in (1..=KEYS).map(|k| format!("k{k}")) {
        let n = number(&mut raw, &format!("SELECT n FROM keys WHERE key = '{key}'")).await;
        let read: Vec<i64> = taken
            .iter()
            .filter_map(|t| t.keys.get(&key))
            .flatten()
            .copied()
            .collect();
        assert_eq!(read, (1..=n).collect::<Vec<_>>(), "{key}");
        total += n;
    }
    let expected = number(&mut raw, "SELECT sum(n)::bigint FROM keyless").await;
    assert_eq!(keyless, expected);
    let rows = number(&mut raw, "SELECT count(*) FROM {outbox}").await;
    assert_eq!(total + keyless, rows);
    println!("{total} events with a key, {keyless} without, {late} below a higher position");
    assert!(
        total > 300 && late > 0,
        "{total} events, {late} late: hardly a trial"
    );
}

/// Transactions that draw an xid early, sleep, touch several keys, nest, roll back, and commit in two phases.
async fn scribble(mut c: PgConnection, writer: u32) {
    let started = tokio::time::Instant::now();
    let mut turn = 0;
    while started.elapsed() < writing() {
        turn += 1;
        run(&mut c, "BEGIN").await;
        if random_range(0..3) == 0 {
            run(&mut c, "SELECT pg_current_xact_id()").await;
            sleep(30).await;
        }
        // In one order, or writers would end in deadlocks.
        let mut keys: Vec<u32> = (0..random_range(1..=3))
            .map(|_| random_range(1..=KEYS))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            event(&mut c, key).await;
            sleep(if random_range(0..100) == 0 { 800 } else { 6 }).await;
        }
        if random_range(0..4) == 0 {
            run(
                &mut c,
                &format!(
                    "UPDATE keyless SET n = n + 1 WHERE writer = {writer}; \
                     INSERT INTO {{outbox}} (topic, type, payload) VALUES ('t', 'a', 'none')"
                ),
            )
            .await;
        }
        end(&mut c, &format!("w{writer}t{turn}")).await;
    }
}

/// The key's row is locked first: positions are drawn at the INSERT.
async fn event(c: &mut PgConnection, key: u32) {
    let one = format!(
        "WITH next AS (UPDATE keys SET n = n + 1 WHERE key = 'k{key}' RETURNING key, n) \
         INSERT INTO {{outbox}} (topic, type, key, payload) SELECT 't', 'a', key, convert_to(n::text, 'UTF8') FROM next"
    );
    if random_range(0..3) == 0 {
        run(c, "SAVEPOINT s").await;
        run(c, &one).await;
        let end = if random_range(0..2) == 0 {
            "ROLLBACK TO s"
        } else {
            "RELEASE s"
        };
        run(c, end).await;
    }
    run(c, &one).await;
}

async fn end(c: &mut PgConnection, name: &str) {
    match random_range(0..20) {
        0..3 => run(c, "ROLLBACK").await,
        3 => {
            let name = format!("{name}_{}", uuid::Uuid::new_v4().simple());
            run(c, &format!("PREPARE TRANSACTION '{name}'")).await;
            sleep(60).await;
            let end = if random_range(0..3) == 0 {
                "ROLLBACK"
            } else {
                "COMMIT"
            };
            run(c, &format!("{end} PREPARED '{name}'")).await;
        }
        _ => run(c, "COMMIT").await,
    }
}

async fn sleep(most: u64) {
    tokio::time::sleep(Duration::from_millis(random_range(0..=most))).await;
}

/// Reads batches of any size, takes over any part of each, and now and then forgets all but what it has settled.
async fn read(database: &Database, partition: u16, written: &AtomicBool) -> Taken {
    let store: &dyn Store = &**database.store();
    let key = LeaseKey::Relay {
        destination: "main".to_owned(),
        partition,
    };
    let mut taken = Taken::default();
    let Acquired {
        mut lease,
        progress: mut at,
        ..
    } = acquire(store, &key).await;
    loop {
        let last_round = written.load(Ordering::Relaxed);
        let slice = store
            .read(partition, &at, random_range(1..=100))
            .await
            .unwrap();
        if slice.events.is_empty() {
            if last_round {
                return taken;
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
            continue;
        }
        let all = slice.events.len();
        let accepted = if random_range(0..10) == 0 {
            random_range(0..all)
        } else {
            all
        };
        for event in &slice.events[..accepted] {
            taken.take(event);
        }
        if accepted == all {
            at = slice.end.unwrap();
        } else if accepted > 0 {
            at = slice.within.at(slice.events[accepted - 1].position);
        }
        store.settle(&lease, &at, term(), false).await.unwrap();
        if random_range(0..30) == 0 {
            store.release(&lease).await.unwrap();
            let again = acquire(store, &key).await;
            assert_eq!(again.progress, at);
            (lease, at) = (again.lease, again.progress);
        }
    }
}

impl Taken {
    fn take(&mut self, event: &pillarbox_core::store::Logged) {
        self.late += usize::from(event.position < self.highest);
        self.highest = self.highest.max(event.position);
        let payload = event.message.payload.clone().unwrap_or_default();
        match &event.message.key {
            Some(key) => {
                let n = std::str::from_utf8(&payload).unwrap().parse().unwrap();
                self.keys.entry(key.clone()).or_default().push(n);
            }
            None => self.keyless += 1,
        }
    }
}
