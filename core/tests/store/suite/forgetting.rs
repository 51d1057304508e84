//! The inbox forgets by the running time of each source, and dead letters of consumers wait for their copy.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use pillarbox_core::{
    Consumer, Context, Database, Delivery, Event, Failure, Handler, RetentionSettings,
    failure::Side,
    lease::Lease,
    transport::{Message, memory::Memory},
};

use super::{
    Bench, GROUP, acquire, group, letter, line_id, message, migrated, pump,
    retention::{HOUR, LETTERS, NONE, cleaner},
    term,
};

const INBOX: &str = "SELECT count(*) FROM {inbox}";

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

#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Placed {}

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
