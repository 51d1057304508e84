//! What nobody needs goes; what somebody needs stays.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pillarbox_core::{
    Database, Outbox, Relay, RetentionSettings,
    failure::Side,
    lease::{Lease, LeaseKey},
    store::{Cleaned, Store},
    transport::{Message, memory::Memory},
};

use super::{
    Bench, acquire, drain, enqueue, ids, ids_of, letter, lost, message, migrated, relay, term,
};

pub(crate) const NONE: Duration = Duration::ZERO;
pub(crate) const HOUR: Duration = Duration::from_secs(3_600);
const LOG: &str = "SELECT count(*) FROM {outbox}";
pub(crate) const LETTERS: &str = "SELECT count(*) FROM {dead_letter}";

pub(crate) fn cleaner(scope: &str) -> LeaseKey {
    LeaseKey::Duty {
        kind: "cleaner",
        scope: scope.to_owned(),
        shard: 0,
    }
}

fn destination(name: &str) -> LeaseKey {
    LeaseKey::Relay {
        destination: name.to_owned(),
        partition: 0,
    }
}

/// A database, the lease of its log's cleaner, and events that a relay may settle.
pub(crate) struct Log {
    pub(crate) database: Database,
    lease: Lease,
}

impl Log {
    pub(crate) async fn new(bench: &dyn Bench) -> Self {
        let database = migrated(bench).await;
        let lease = acquire(&**database.store(), &cleaner("log")).await.lease;
        Self { database, lease }
    }

    fn store(&self) -> &dyn Store {
        &**self.database.store()
    }

    pub(crate) async fn write(&self, events: usize) -> Vec<Message> {
        let events: Vec<_> = (0..events).map(|_| message(Some("k"))).collect();
        enqueue(&self.database, &events).await;
        events
    }

    /// Reads everything for a destination and settles it.
    pub(crate) async fn settle_all(&self, key: &LeaseKey) {
        let acquired = acquire(self.store(), key).await;
        let (_, end) = drain(self.store(), acquired.progress, 100).await;
        let settled = self.store().settle(&acquired.lease, &end, term(), true);
        settled.await.unwrap();
        self.store().release(&acquired.lease).await.unwrap();
    }

    async fn clean(&self, bench: &dyn Bench, keep: Duration) -> Cleaned {
        bench.age_log().await;
        let mut all = Cleaned::default();
        loop {
            let step = self.store().clean_log(&self.lease, keep).await.unwrap();
            all.removed += step.removed;
            all.held = step.held;
            if !step.more {
                return all;
            }
        }
    }

    /// What a relay that takes over would find.
    async fn left(&self, key: &LeaseKey) -> Vec<String> {
        let acquired = acquire(self.store(), key).await;
        let (events, _) = drain(self.store(), acquired.progress, 100).await;
        self.store().release(&acquired.lease).await.unwrap();
        ids(&events).into_iter().map(ToOwned::to_owned).collect()
    }
}

pub(crate) async fn what_is_settled_goes_and_positions_grow_on(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    log.write(5).await;
    log.settle_all(&relay()).await;
    let highest = bench.number("SELECT max(position) FROM {outbox}").await;
    assert!(log.clean(bench, NONE).await.removed > 0);
    assert_eq!(bench.number(LOG).await, 0);
    let next = log.write(2).await;
    assert!(bench.number("SELECT min(position) FROM {outbox}").await > highest);
    assert_eq!(log.left(&relay()).await, ids_of(&next));
}

pub(crate) async fn what_is_young_stays(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    log.write(3).await;
    log.settle_all(&relay()).await;
    assert_eq!(log.clean(bench, HOUR).await.removed, 0);
    assert_eq!(bench.number(LOG).await, 3);
}

pub(crate) async fn what_is_not_settled_stays(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    let events = log.write(5).await;
    log.clean(bench, NONE).await;
    assert_eq!(bench.number(LOG).await, 5, "nothing is settled");
    // In the middle of a slice.
    let acquired = acquire(log.store(), &relay()).await;
    let slice = log.store().read(0, &acquired.progress, 3).await.unwrap();
    let middle = slice.within.at(slice.events[1].position);
    let settled = log.store().settle(&acquired.lease, &middle, term(), true);
    settled.await.unwrap();
    log.store().release(&acquired.lease).await.unwrap();
    log.clean(bench, NONE).await;
    assert_eq!(log.left(&relay()).await, ids_of(&events[2..]));
    log.settle_all(&relay()).await;
    log.clean(bench, NONE).await;
    assert_eq!(bench.number(LOG).await, 0);
}

pub(crate) async fn every_destination_is_waited_for(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    // A new destination starts at the start.
    log.settle_all(&destination("audit")).await;
    let events = log.write(3).await;
    log.settle_all(&relay()).await;
    log.clean(bench, NONE).await;
    assert_eq!(log.left(&destination("audit")).await, ids_of(&events));
    log.settle_all(&destination("audit")).await;
    log.clean(bench, NONE).await;
    assert_eq!(bench.number(LOG).await, 0);
}

pub(crate) async fn nothing_is_settled_for_want_of_a_cursor(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    let events = log.write(3).await;
    log.settle_all(&relay()).await;
    bench.execute("DELETE FROM {cursor}").await;
    log.clean(bench, NONE).await;
    assert_eq!(log.left(&relay()).await, ids_of(&events));
}

pub(crate) async fn one_cleaner_works(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    log.write(3).await;
    log.settle_all(&relay()).await;
    bench.age_log().await;
    let two = bench.database().await;
    let second = two.store().acquire(&cleaner("log"), term()).await.unwrap();
    assert!(second.is_none(), "there is one");
    let other = super::impostor(&log.lease);
    lost(two.store().clean_log(&other, NONE).await);
    lost(two.store().clean_inbox(&other, NONE).await);
    bury(&log.database, 1).await;
    let trim = two.store().trim_dead_letters(&other, Side::Relay, NONE, 0);
    lost(trim.await);
    assert_eq!(bench.number(LOG).await, 3);
    assert_eq!(bench.number(LETTERS).await, 1);
}

/// In the middle of the bounded steps.
pub(crate) async fn a_long_log_goes_step_by_step(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    for _ in 0..3 {
        log.write(400).await;
    }
    log.settle_all(&relay()).await;
    let left = log.write(1).await;
    log.clean(bench, NONE).await;
    assert_eq!(log.left(&relay()).await, ids_of(&left));
    log.settle_all(&relay()).await;
    log.clean(bench, NONE).await;
    assert_eq!(bench.number(LOG).await, 0);
}

async fn bury(database: &Database, letters: usize) -> Vec<Message> {
    let messages: Vec<_> = (0..letters).map(|_| message(None)).collect();
    let lease = acquire(&**database.store(), &relay()).await.lease;
    let all: Vec<_> = messages.iter().map(letter).collect();
    database.store().bury(&lease, &all).await.unwrap();
    database.store().release(&lease).await.unwrap();
    messages
}

pub(crate) async fn dead_letters_go_by_age_and_number(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    let letters = bury(&log.database, 7).await;
    let (store, lease, side) = (log.store(), &log.lease, Side::Relay);
    let trim = async |keep, most| {
        let trims = store.trim_dead_letters(lease, side, keep, most).await;
        trims.unwrap()
    };
    assert!(trim(HOUR, 7).await.is_empty());
    let trims = trim(HOUR, 3).await;
    assert_eq!(trims.len(), 1);
    assert_eq!((trims[0].scope.as_str(), trims[0].removed), ("main", 4));
    assert!(trims[0].too_many && trims[0].uncopied == 0);
    // The oldest went.
    for (n, m) in letters.iter().enumerate() {
        let rows = format!("SELECT count(*) FROM {{dead_letter}} WHERE id = '{}'", m.id);
        assert_eq!(bench.number(&rows).await, i64::from(n >= 4));
    }
    let other = store.trim_dead_letters(lease, Side::Consumer, NONE, 0);
    assert!(other.await.unwrap().is_empty(), "not this side's");
    let trims = trim(NONE, 7).await;
    assert_eq!((trims[0].removed, trims[0].too_many), (3, false));
    assert!(trim(NONE, 0).await.is_empty());
}

/// The task beside a relay, by its own.
pub(crate) async fn a_relay_cleans_beside_its_work(bench: &dyn Bench) {
    let database = migrated(bench).await;
    bury(&database, 3).await;
    let outbox = Outbox::new(&database);
    let relay = Relay::new(&outbox, Arc::new(Memory::new()))
        .accept_unrouted(["shop.order.placed"])
        .retention(RetentionSettings {
            log: NONE,
            dead_letters_max: 1,
            interval: Duration::from_millis(50),
            ..RetentionSettings::default()
        })
        .spawn();
    let begun = std::time::Instant::now();
    for round in 0.. {
        if round < 3 {
            enqueue(&database, &[message(None), message(Some("k"))]).await;
        }
        bench.age_log().await;
        if round > 3 && bench.number(LOG).await == 0 && bench.number(LETTERS).await == 1 {
            break;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "nothing is cleaned"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(relay.health().trouble, None);
    relay.shutdown().await.unwrap();
    // Given back at once.
    acquire(&**database.store(), &cleaner("log")).await;
}

/// Writers, a relay's reads and a cleaner side by side: the log stays small, nothing is missed, and no writer waits 50 ms for
/// a lock.
pub(crate) async fn a_log_under_load_does_not_grow(bench: &dyn Bench) {
    let seconds = if std::env::var_os("PILLARBOX_SOAK").is_some() {
        60
    } else {
        6
    };
    let log = Log::new(bench).await;
    bench.short_slots().await;
    let until = std::time::Instant::now() + Duration::from_secs(seconds);
    let all_written = AtomicBool::new(false);
    let writing = async {
        let mut written = Vec::new();
        while std::time::Instant::now() < until {
            written.push(bench.write_impatiently(100).await);
        }
        all_written.store(true, Ordering::SeqCst);
        written.into_iter().sum::<usize>()
    };
    let reading = async {
        let acquired = acquire(log.store(), &relay()).await;
        let (mut at, mut read, mut rest) = (acquired.progress, 0, 2);
        while rest > 0 {
            let over = all_written.load(Ordering::SeqCst);
            let slice = log.store().read(0, &at, 200).await.unwrap();
            read += slice.events.len();
            match slice.end {
                Some(end) => at = end,
                None if over => rest -= 1,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
            let settled = log.store().settle(&acquired.lease, &at, term(), false);
            settled.await.unwrap();
        }
        read
    };
    let cleaning = async {
        let (mut emptied, mut most, mut size) = (0, 0, 0);
        while std::time::Instant::now() < until {
            let keep = Duration::from_millis(300);
            let step = log.store().clean_log(&log.lease, keep).await.unwrap();
            emptied += step.removed;
            most = most.max(bench.number(LOG).await);
            size = size.max(bench.log_bytes().await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        (emptied, most, size)
    };
    let (written, read, (emptied, most, size)) = tokio::join!(writing, reading, cleaning);
    println!("{written} written in {seconds} s, {most} rows and {size} bytes at most");
    assert_eq!(read, written, "an event was missed");
    assert!(emptied > 0, "nothing was cleaned");
    // A ring of slots of one second, none of which is needed for longer than three.
    let second = i64::try_from(written).unwrap() / i64::try_from(seconds).unwrap();
    assert!(most < 5 * second, "{most} rows of {written}");
    if seconds > 10 {
        assert!(size < 16_000 * second, "{size} bytes for {written} rows");
    }
}
