//! One effect for each event: inbox, savepoints and effects in one transaction.

use pillarbox_core::{
    Database, error::Kind, failure::Resolution, lease::Lease, store::Unit, transport::Message,
};

use super::{
    Bench, EFFECT, GROUP, acquire, deferral, effects, group, handle, letter, line_id, message,
    migrated, pump, term,
};

struct Consumer {
    database: Database,
    lease: Lease,
}

impl Consumer {
    async fn new(bench: &dyn Bench) -> Self {
        let database = migrated(bench).await;
        let lease = acquire(&**database.store(), &group()).await.lease;
        Self { database, lease }
    }

    async fn begin(&self) -> Box<dyn Unit> {
        self.begin_as(GROUP).await
    }

    async fn begin_as(&self, group: &str) -> Box<dyn Unit> {
        let store = self.database.store();
        store.begin(group, term(), true).await.unwrap()
    }

    async fn commit(&self, unit: Box<dyn Unit>) {
        unit.commit(&self.lease, term()).await.unwrap();
    }

    /// Whether the inbox lets an event through; without leaving a trace.
    async fn is_new(&self, m: &Message) -> bool {
        let mut unit = self.begin().await;
        let new = unit.remember(m).await.unwrap();
        unit.rollback().await.unwrap();
        // What looks without writing sees the same.
        let standings = self.database.store().standing(GROUP, &[m]).await;
        assert_eq!(standings.unwrap()[0].known, !new);
        new
    }
}

pub(crate) async fn a_second_arrival_is_remembered(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let m = message(Some("k"));
    let mut unit = consumer.begin().await;
    unit.savepoint().await.unwrap();
    assert!(unit.remember(&m).await.unwrap());
    handle(&mut *unit, EFFECT).await.unwrap();
    unit.keep().await.unwrap();
    // Twice in one batch.
    unit.savepoint().await.unwrap();
    assert!(!unit.remember(&m).await.unwrap());
    unit.undo().await.unwrap();
    consumer.commit(unit).await;
    assert!(!consumer.is_new(&m).await);
    assert_eq!(effects(bench).await, 1);
}

pub(crate) async fn an_undone_event_is_forgotten(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let (bad, good) = (message(None), message(None));
    let mut unit = consumer.begin().await;
    unit.savepoint().await.unwrap();
    assert!(unit.remember(&bad).await.unwrap());
    handle(&mut *unit, EFFECT).await.unwrap();
    unit.undo().await.unwrap();
    unit.savepoint().await.unwrap();
    assert!(unit.remember(&good).await.unwrap());
    unit.keep().await.unwrap();
    consumer.commit(unit).await;
    assert!(consumer.is_new(&bad).await);
    assert!(!consumer.is_new(&good).await);
    assert_eq!(effects(bench).await, 0);
}

pub(crate) async fn the_dead_are_remembered(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let (fresh, waiting) = (message(None), message(Some("k")));
    let mut unit = consumer.begin().await;
    unit.defer(&deferral(&waiting)).await.unwrap();
    consumer.commit(unit).await;
    let mut unit = consumer.begin().await;
    // Whether it waited or not.
    for m in [&fresh, &waiting] {
        unit.bury(&letter(m)).await.unwrap();
        unit.bury(&letter(m)).await.unwrap();
    }
    assert_eq!(unit.blocked(&[&waiting]).await.unwrap(), [false]);
    consumer.commit(unit).await;
    assert!(!consumer.is_new(&fresh).await);
    assert!(!consumer.is_new(&waiting).await);
    let dead = "SELECT count(*) FROM {inbox} WHERE dead";
    assert_eq!(bench.number(dead).await, 2);
    assert_eq!(bench.number("SELECT count(*) FROM {deferred}").await, 0);
    assert_eq!(bench.number("SELECT count(*) FROM {dead_letter}").await, 2);
}

pub(crate) async fn a_dead_head_is_remembered(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let (dead, done) = (message(Some("k")), message(Some("k")));
    let mut unit = consumer.begin().await;
    unit.defer(&deferral(&dead)).await.unwrap();
    unit.defer(&deferral(&done)).await.unwrap();
    consumer.commit(unit).await;
    assert!(consumer.is_new(&dead).await, "who waits is not applied yet");

    let store = consumer.database.store();
    let lease = acquire(&**store, &pump()).await.lease;
    let mut unit = consumer.begin().await;
    let end = Resolution::Dead {
        attempts: 4,
        reason: "never".to_owned(),
    };
    unit.resolve(&line_id(&dead), &end).await.unwrap();
    assert!(unit.remember(&done).await.unwrap());
    let done_id = line_id(&done);
    unit.resolve(&done_id, &Resolution::Done).await.unwrap();
    unit.commit(&lease, term()).await.unwrap();
    for m in [&dead, &done] {
        assert!(!consumer.is_new(m).await);
    }
    let state = "SELECT count(*) FROM {inbox} WHERE dead";
    assert_eq!(bench.number(state).await, 1);
    assert_eq!(bench.number("SELECT count(*) FROM {deferred}").await, 0);
    let letters = store.uncopied(GROUP, 5).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].message.id, dead.id);
}

pub(crate) async fn a_dead_letter_put_back_is_applied_once(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let m = message(Some("k"));
    let mut unit = consumer.begin().await;
    unit.bury(&letter(&m)).await.unwrap();
    consumer.commit(unit).await;
    // As an operator's retry does: out of the dead letters, into the line.
    bench.execute("DELETE FROM {dead_letter}").await;
    let mut unit = consumer.begin().await;
    unit.defer(&deferral(&m)).await.unwrap();
    consumer.commit(unit).await;
    assert!(consumer.is_new(&m).await, "it is to be applied");
    for first in [true, false] {
        let mut unit = consumer.begin().await;
        unit.savepoint().await.unwrap();
        assert_eq!(unit.remember(&m).await.unwrap(), first);
        unit.keep().await.unwrap();
        consumer.commit(unit).await;
    }
    let mut unit = consumer.begin().await;
    let done = Resolution::Done;
    unit.resolve(&line_id(&m), &done).await.unwrap();
    consumer.commit(unit).await;
    assert!(!consumer.is_new(&m).await);
}

pub(crate) async fn an_event_without_time_is_remembered(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let timeless = Message {
        time: std::time::SystemTime::UNIX_EPOCH,
        ..message(None)
    };
    assert!(consumer.is_new(&timeless).await);
    let mut unit = consumer.begin().await;
    assert!(unit.remember(&timeless).await.unwrap());
    consumer.commit(unit).await;
    assert!(!consumer.is_new(&timeless).await);
}

pub(crate) async fn groups_and_sources_are_apart(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let m = message(None);
    let elsewhere = m.clone().with_attribute("source", "other");
    for group in [GROUP, "billing"] {
        let mut unit = consumer.begin_as(group).await;
        assert!(unit.remember(&m).await.unwrap());
        assert!(unit.remember(&elsewhere).await.unwrap());
        assert!(!unit.remember(&m).await.unwrap());
        consumer.commit(unit).await;
    }
}

pub(crate) async fn a_line_blocks_its_key(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let (head, keyless) = (message(Some("k")), message(None));
    let empty = message(Some(""));
    let mut unit = consumer.begin().await;
    for m in [&head, &keyless, &empty] {
        unit.defer(&deferral(m)).await.unwrap();
    }
    consumer.commit(unit).await;
    let next = message(Some("k"));
    let other_topic = Message {
        topic: "other.events".to_owned(),
        ..message(Some("k"))
    };
    let quoted = message(Some(r#"k" OR '1'='1"#));
    let probe = [
        (&head, true),
        (&next, true),
        (&other_topic, false),
        (&message(Some("K")), false),
        (&message(None), false),
        (&keyless, true),
        (&message(Some("")), true),
        (&quoted, false),
    ];
    let messages: Vec<_> = probe.iter().map(|(m, _)| *m).collect();
    let expected: Vec<_> = probe.iter().map(|(_, blocked)| *blocked).collect();
    let mut unit = consumer.begin().await;
    assert_eq!(unit.blocked(&messages).await.unwrap(), expected);
    let standings = consumer.database.store().standing(GROUP, &messages);
    let waits: Vec<_> = standings.await.unwrap().iter().map(|s| s.waits).collect();
    assert_eq!(waits, expected);
    assert!(unit.blocked(&[]).await.unwrap().is_empty());
    unit.rollback().await.unwrap();
    let mut unit = consumer.begin_as("billing").await;
    assert_eq!(unit.blocked(&[&next]).await.unwrap(), [false]);
    unit.rollback().await.unwrap();
}

pub(crate) async fn the_probe_sees_the_units_own_writes(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let (a, b) = (message(Some("k")), message(Some("k")));
    let mut unit = consumer.begin().await;
    assert_eq!(unit.blocked(&[&a, &b]).await.unwrap(), [false, false]);
    unit.savepoint().await.unwrap();
    unit.defer(&deferral(&a)).await.unwrap();
    assert_eq!(unit.blocked(&[&b]).await.unwrap(), [true]);
    unit.undo().await.unwrap();
    assert_eq!(unit.blocked(&[&b]).await.unwrap(), [false]);
    unit.rollback().await.unwrap();
}

pub(crate) async fn a_unit_rolls_back_whole(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let m = message(None);
    let mut unit = consumer.begin().await;
    write_everything(&mut *unit, &m).await;
    unit.rollback().await.unwrap();
    assert!(consumer.is_new(&m).await);
    assert_eq!(everything(bench).await, 0);
    // A commit whose answer is lost is run again: the inbox knows.
    let mut unit = consumer.begin().await;
    write_everything(&mut *unit, &m).await;
    consumer.commit(unit).await;
    assert!(!consumer.is_new(&m).await);
}

pub(crate) async fn a_unit_that_is_dropped_rolls_back(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    for _ in 0..5 {
        let m = message(None);
        let mut unit = consumer.begin().await;
        write_everything(&mut *unit, &m).await;
        drop(unit);
        assert!(consumer.is_new(&m).await);
        assert_eq!(everything(bench).await, 0);
    }
}

pub(crate) async fn a_failing_statement_spares_its_neighbours(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    let mut unit = consumer.begin().await;
    unit.savepoint().await.unwrap();
    handle(&mut *unit, EFFECT).await.unwrap();
    unit.keep().await.unwrap();
    unit.savepoint().await.unwrap();
    handle(&mut *unit, EFFECT).await.unwrap();
    handle(&mut *unit, "INSERT INTO nowhere VALUES (1)")
        .await
        .unwrap_err();
    unit.undo().await.unwrap();
    consumer.commit(unit).await;
    assert_eq!(effects(bench).await, 1);
}

pub(crate) async fn a_handler_that_commits_is_found_out(bench: &dyn Bench) {
    let consumer = Consumer::new(bench).await;
    for end in ["COMMIT", "ROLLBACK"] {
        let mut unit = consumer.begin().await;
        unit.savepoint().await.unwrap();
        handle(&mut *unit, end).await.unwrap();
        let error = unit.keep().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
        let _ = unit.rollback().await;
        // The connection is as good as new.
        let mut unit = consumer.begin().await;
        handle(&mut *unit, EFFECT).await.unwrap();
        consumer.commit(unit).await;
    }
    assert_eq!(effects(bench).await, 2);
}

async fn write_everything(unit: &mut dyn Unit, m: &Message) {
    unit.savepoint().await.unwrap();
    assert!(unit.remember(m).await.unwrap());
    handle(unit, EFFECT).await.unwrap();
    unit.keep().await.unwrap();
    unit.defer(&deferral(&message(Some("a")))).await.unwrap();
    unit.bury(&letter(&message(Some("b")))).await.unwrap();
}

async fn everything(bench: &dyn Bench) -> i64 {
    let mut rows = effects(bench).await;
    for table in ["{inbox}", "{deferred}", "{dead_letter}"] {
        rows += bench.number(&format!("SELECT count(*) FROM {table}")).await;
    }
    rows
}
