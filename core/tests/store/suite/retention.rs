//! What nobody needs goes; what somebody needs stays.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use pillarbox_core::{
    Backlog, Consumer, Context, Database, Delivery, Event, Failure, Handler, Kind, Outbox, Pool,
    Relay, RetentionSettings,
    failure::Side,
    lease::{Lease, LeaseKey},
    store::{Cleaned, Store},
    transport::{Message, memory::Memory},
};

use super::{
    Bench, GROUP, acquire, drain, enqueue, group, ids, ids_of, letter, line_id, lost, message,
    migrated, pump, relay, term,
};

pub(crate) const NONE: Duration = Duration::ZERO;
const HOUR: Duration = Duration::from_secs(3_600);
const INBOX: &str = "SELECT count(*) FROM {inbox}";
const LOG: &str = "SELECT count(*) FROM {outbox}";
const LETTERS: &str = "SELECT count(*) FROM {dead_letter}";

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
struct Log {
    database: Database,
    lease: Lease,
}

impl Log {
    async fn new(bench: &dyn Bench) -> Self {
        let database = migrated(bench).await;
        let lease = acquire(&**database.store(), &cleaner("log")).await.lease;
        Self { database, lease }
    }

    fn store(&self) -> &dyn Store {
        &**self.database.store()
    }

    async fn write(&self, events: usize) -> Vec<Message> {
        let events: Vec<_> = (0..events).map(|_| message(Some("k"))).collect();
        enqueue(&self.database, &events).await;
        events
    }

    /// Reads everything for a destination and settles it.
    async fn settle_all(&self, key: &LeaseKey) {
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

pub(crate) async fn a_dead_letter_waits_for_its_copy(bench: &dyn Bench) {
    let inbox = Inbox::new(bench).await;
    let letters = [message(None), message(None)];
    let store = inbox.database.store();
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    for m in &letters {
        unit.bury(&letter(m)).await.unwrap();
    }
    unit.commit(&inbox.consumer, term()).await.unwrap();
    let pump = acquire(&**store, &pump()).await.lease;
    let copy = [line_id(&letters[1])];
    store.copied(&pump, &copy).await.unwrap();
    let trim = async |keep, most| {
        let trims = store.trim_dead_letters(&inbox.lease, Side::Consumer, keep, most);
        trims.await.unwrap()
    };
    let trims = trim(NONE, 9).await;
    assert_eq!((trims[0].scope.as_str(), trims[0].removed), (GROUP, 1));
    assert_eq!(store.uncopied(GROUP, 5).await.unwrap().len(), 1);
    assert!(trim(NONE, 9).await.is_empty());
    let trims = trim(HOUR, 0).await;
    assert_eq!((trims[0].removed, trims[0].uncopied), (1, 1));
    assert_eq!(bench.number(LETTERS).await, 0);
}

/// A consumer's database, and the lease of its inbox's cleaner.
pub(crate) struct Inbox<'a> {
    bench: &'a dyn Bench,
    database: Database,
    pub(crate) lease: Lease,
    consumer: Lease,
}

/// How long these inboxes remember.
const REMEMBER: Duration = Duration::from_secs(600);
/// So many looks, a minute apart, are as long.
const LOOKS: usize = 10;

impl<'a> Inbox<'a> {
    pub(crate) async fn new(bench: &'a dyn Bench) -> Self {
        let database = migrated(bench).await;
        let lease = acquire(&**database.store(), &cleaner("inbox")).await.lease;
        let consumer = acquire(&**database.store(), &group()).await.lease;
        Self {
            bench,
            database,
            lease,
            consumer,
        }
    }

    /// Whether an arrival was the first one. It is one from now on.
    pub(crate) async fn arrives(&self, m: &Message) -> bool {
        let store = self.database.store();
        let mut unit = store.begin(GROUP, term(), true).await.unwrap();
        let new = unit.remember(m).await.unwrap();
        unit.commit(&self.consumer, term()).await.unwrap();
        new
    }

    /// The same, without leaving a trace.
    pub(crate) async fn is_known(&self, m: &Message) -> bool {
        let store = self.database.store();
        let mut unit = store.begin(GROUP, term(), true).await.unwrap();
        let new = unit.remember(m).await.unwrap();
        unit.rollback().await.unwrap();
        !new
    }

    pub(crate) async fn clean(&self) {
        loop {
            let store = self.database.store();
            let cleaned = store.clean_inbox(&self.lease, REMEMBER).await.unwrap();
            // Somebody who reads there holds it for a moment.
            if !cleaned.more && cleaned.held.is_empty() {
                return;
            }
        }
    }

    /// A source runs for so many minutes.
    pub(crate) async fn run(&self, source: &str, minutes: usize) {
        for _ in 0..minutes {
            self.bench.pass(60).await;
            assert!(self.arrives(&from(source, 0)).await);
            self.clean().await;
        }
    }
}

/// An event that happened so many hours ago.
pub(crate) fn from(source: &str, hours: u64) -> Message {
    let mut m = message(None).with_attribute("source", source);
    m.time = SystemTime::now() - Duration::from_secs(hours * 3_600);
    m
}

pub(crate) async fn a_source_is_remembered_for_its_running_time(bench: &dyn Bench) {
    let inbox = Inbox::new(bench).await;
    let first = from("a", 24);
    assert!(inbox.arrives(&first).await);
    inbox.clean().await;
    inbox.run("a", LOOKS - 1).await;
    assert!(inbox.is_known(&first).await, "a minute is missing");
    inbox.run("a", 2).await;
    assert!(!inbox.is_known(&first).await, "for ever is too long");
}

pub(crate) async fn a_stop_of_days_forgets_nothing(bench: &dyn Bench) {
    let inbox = Inbox::new(bench).await;
    let events: Vec<_> = (0..8).map(|n| from("a", n * 6)).collect();
    for m in &events {
        assert!(inbox.arrives(m).await);
    }
    inbox.clean().await;
    for _ in 0..5 {
        bench.pass(3 * 86_400).await;
        inbox.clean().await;
    }
    // Not either when the first event comes again.
    for m in &events {
        assert!(!inbox.arrives(m).await);
    }
    inbox.run("a", 1).await;
    for m in &events {
        assert!(inbox.is_known(m).await);
    }
}

/// In PostgreSQL's ring: where the slot comes round, the silent source's events move out of its way.
pub(crate) async fn a_silent_source_outlasts_those_that_run(bench: &dyn Bench) {
    let inbox = Inbox::new(bench).await;
    // One part of the ring, the next to come round, and two slots of it.
    let (silent, running) = (from("silent", 42), from("running", 42 + 48));
    let dead = from("silent", 42);
    assert!(inbox.arrives(&silent).await);
    assert!(inbox.arrives(&running).await);
    let store = inbox.database.store();
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    unit.bury(&letter(&dead)).await.unwrap();
    unit.commit(&inbox.consumer, term()).await.unwrap();
    inbox.clean().await;
    inbox.run("running", LOOKS + 2).await;
    assert!(!inbox.is_known(&running).await);
    assert!(inbox.is_known(&silent).await);
    assert!(inbox.is_known(&dead).await);
    // Moved or not: a dead letter that is put back is applied once.
    bench.execute("DELETE FROM {dead_letter}").await;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    unit.defer(&super::deferral(&dead)).await.unwrap();
    unit.commit(&inbox.consumer, term()).await.unwrap();
    assert!(inbox.arrives(&dead).await);
    assert!(!inbox.arrives(&dead).await);
    // And then it runs, and is forgotten.
    inbox.run("silent", LOOKS + 2).await;
    assert!(!inbox.is_known(&silent).await);
}

pub(crate) async fn an_event_without_time_is_forgotten_too(bench: &dyn Bench) {
    let inbox = Inbox::new(bench).await;
    let timeless = Message {
        time: SystemTime::UNIX_EPOCH,
        ..from("a", 0)
    };
    assert!(inbox.arrives(&timeless).await);
    inbox.clean().await;
    inbox.run("a", LOOKS - 1).await;
    assert!(inbox.is_known(&timeless).await);
    inbox.run("a", 2).await;
    assert!(!inbox.is_known(&timeless).await);
}

pub(crate) async fn a_clock_set_back_forgets_nothing(bench: &dyn Bench) {
    let inbox = Inbox::new(bench).await;
    // For an hour the database's clock was a week ahead.
    inbox.arrives(&from("a", 24)).await;
    inbox.clean().await;
    inbox.run("a", LOOKS * 2).await;
    bench.pass(-7 * 86_400).await;
    let fresh = from("a", 24);
    assert!(inbox.arrives(&fresh).await);
    for _ in 0..3 {
        inbox.clean().await;
    }
    assert!(inbox.is_known(&fresh).await);
}

/// Slot after slot, the inbox holds what it has to remember, and a little more.
pub(crate) async fn an_inbox_does_not_grow(bench: &dyn Bench) {
    const MINUTES: usize = 4;
    let rounds = if std::env::var_os("PILLARBOX_SOAK").is_some() {
        200
    } else {
        12
    };
    let inbox = Inbox::new(bench).await;
    let mut most = 0;
    for round in 0..rounds {
        // Each part of the ring but the present one, in turn.
        let hours = 42 - 6 * (round % 7);
        for _ in 0..MINUTES {
            bench.pass(60).await;
            for _ in 0..5 {
                assert!(inbox.arrives(&from("a", hours)).await);
            }
            inbox.clean().await;
        }
        most = most.max(bench.number(INBOX).await);
    }
    // Ten minutes, what lies between two points of the clock, and the rest of a slot: seven slots at most.
    assert!(most <= 7 * 5 * 4, "{most}");
    let known = bench.number("SELECT count(*) FROM {inbox_clock}").await;
    assert!(known < 40, "{known} points of one clock");
}

/// The tasks beside a relay and a consumer, by their own.
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

#[derive(serde::Serialize, serde::Deserialize)]
struct Placed {}

impl Event for Placed {
    const TYPE: &'static str = "shop.order.placed";
    const TOPIC: &'static str = "shop.events";
}

struct Ignore;

impl Handler<Placed> for Ignore {
    async fn handle(&self, _: Delivery<Placed>, _: &mut Context<'_>) -> Result<(), Failure> {
        Ok(())
    }
}

pub(crate) async fn a_consumer_cleans_beside_its_work(bench: &dyn Bench) {
    let inbox = Inbox::new(bench).await;
    let store = inbox.database.store();
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    unit.bury(&letter(&message(None))).await.unwrap();
    unit.commit(&inbox.consumer, term()).await.unwrap();
    store.release(&inbox.lease).await.unwrap();
    let consumer = Consumer::new(&inbox.database, Arc::new(Memory::new()), GROUP)
        .on::<Placed>(Ignore)
        .retention(RetentionSettings {
            dead_letters_max: 0,
            interval: Duration::from_millis(50),
            ..RetentionSettings::default()
        })
        .spawn();
    let begun = std::time::Instant::now();
    while bench.number(LETTERS).await > 0
        || bench.number("SELECT count(*) FROM {inbox_clock}").await == 0
    {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "nothing is cleaned"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    consumer.shutdown().await.unwrap();
    acquire(&**store, &cleaner("inbox")).await;
}

pub(crate) async fn the_backlog_is_what_is_not_settled(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    let outbox = Outbox::new(&log.database);
    assert_eq!(outbox.backlog().await.unwrap(), Backlog::default());
    log.write(7).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let backlog = outbox.backlog().await.unwrap();
    assert_eq!(backlog.events, 7);
    assert!(backlog.age >= Duration::from_millis(10), "{backlog:?}");
    log.settle_all(&relay()).await;
    assert_eq!(outbox.backlog().await.unwrap(), Backlog::default());
}

pub(crate) async fn an_outbox_refuses_beyond_what_it_was_told(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    let most = Backlog {
        events: 5,
        age: HOUR,
    };
    let outbox = Outbox::new(&log.database).refuse_beyond(most);
    log.write(6).await;
    let enqueued = async || match log.database.pool().expect("a real database") {
        #[cfg(feature = "postgres")]
        Pool::Postgres(pool) => {
            let mut tx = pool.begin().await.unwrap();
            let one = outbox.enqueue(&mut tx, &Placed {}).await;
            // Refused before the statement: the transaction is as good as before.
            outbox.insert(&message(None)).unwrap();
            sqlx::raw_sql("SELECT 1").execute(&mut *tx).await.unwrap();
            tx.rollback().await.unwrap();
            one
        }
        #[cfg(feature = "sqlite")]
        Pool::Sqlite(pool) => {
            let mut tx = pool.begin().await.unwrap();
            let one = outbox.enqueue(&mut tx, &Placed {}).await;
            sqlx::raw_sql("SELECT 1").execute(&mut *tx).await.unwrap();
            tx.rollback().await.unwrap();
            one
        }
    };
    let until = async |refused: bool| {
        let begun = std::time::Instant::now();
        loop {
            match enqueued().await {
                Err(e) if refused => {
                    assert_eq!(e.kind(), Kind::Backlogged, "{e}");
                    assert!(e.is_temporary());
                    return;
                }
                Ok(_) if !refused => return,
                _ => {}
            }
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "never: {refused}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    until(true).await;
    log.settle_all(&relay()).await;
    until(false).await;
    // Others take what they are given.
    log.write(6).await;
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
