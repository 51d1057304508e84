//! What can go wrong when whole slots are emptied: TRUNCATE heeds no snapshot, and it waits for a lock that nobody may wait
//! for behind it.

use std::time::Duration;

use pillarbox_core::{
    Database, cursor::Progress, lease::Lease, migrate_with, store::Cleaned, store::Store,
};

use super::{Db, impatient, names, number, refused, run, text, until, write};
use crate::suite::{
    Bench, acquire,
    forgetting::{Inbox, from},
    relay,
    retention::{NONE, cleaner},
    term,
};

struct Log {
    db: Db,
    database: Database,
    lease: Lease,
    owner: Lease,
}

impl Log {
    async fn new(partitions: u16) -> Option<Self> {
        let db = Db::new().await?;
        let database = db.database().await;
        migrate_with(&database, partitions).await.unwrap();
        let lease = acquire(&**database.store(), &cleaner("log")).await.lease;
        let owner = acquire(&**database.store(), &relay()).await.lease;
        Some(Self {
            db,
            database,
            lease,
            owner,
        })
    }

    fn store(&self) -> &dyn Store {
        &**self.database.store()
    }

    async fn clean(&self) -> Cleaned {
        let cleaned = self.store().clean_log(&self.lease, NONE).await;
        cleaned.unwrap()
    }

    async fn settle(&self, at: &Progress) {
        let settled = self.store().settle(&self.owner, at, term(), true);
        settled.await.unwrap();
    }

    async fn rows(&self) -> i64 {
        self.db.number("SELECT count(*) FROM {outbox}").await
    }

    /// A slot so many places from the present one; 2 and 3 may be emptied.
    async fn slot(&self, from_now: u8) -> i64 {
        self.db
            .number(&format!(
                "SELECT (extract(epoch FROM clock_timestamp())::bigint / 1800 + {from_now}) % 4"
            ))
            .await
    }
}

/// Cleaners that wait for a table.
const WAITS: &str = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database \
                     WHERE d.datname = current_database() AND NOT l.granted AND l.mode = 'AccessExclusiveLock'";

fn into(slot: i64, name: &str) -> String {
    format!(
        "INSERT INTO {{outbox}} (slot, topic, type, key, payload) VALUES ({slot}, 't', 'a', 'k', '{name}')"
    )
}

fn why(cleaned: &Cleaned) -> Vec<&str> {
    cleaned.held.iter().map(|(_, why)| *why).collect()
}

/// Neither what it has written nor anything beside it goes, and nobody waits meanwhile.
#[tokio::test]
async fn an_open_transaction_holds_the_slot_it_wrote_to() {
    let Some(log) = Log::new(1).await else { return };
    let old = log.slot(2).await;
    let (mut late, mut other) = (log.db.raw().await, impatient(&log.db).await);
    run(&mut late, "BEGIN").await;
    run(&mut late, &into(old, "late")).await;
    run(&mut other, &into(old, "early")).await;
    let (read, at) = names(log.store(), Progress::default(), 10).await;
    assert_eq!(read, ["early"]);
    log.settle(&at).await;
    let store = log.database.store().clone();
    let lease = log.lease.clone();
    let cleaning = tokio::spawn(async move {
        for _ in 0..20 {
            let cleaned = store.clean_log(&lease, NONE).await.unwrap();
            assert_eq!(cleaned.removed, 0);
            assert_eq!(cleaned.held.len(), 1, "{cleaned:?}");
        }
    });
    while !cleaning.is_finished() {
        write(&mut other, "beside").await;
        // Into the very slot, and reading it.
        run(&mut other, "BEGIN").await;
        run(&mut other, &into(old, "undone")).await;
        run(&mut other, "ROLLBACK; SELECT count(*) FROM {outbox}").await;
    }
    cleaning.await.unwrap();
    run(&mut late, "COMMIT").await;
    let cleaned = log.clean().await;
    assert_eq!(cleaned.removed, 0, "{cleaned:?}");
    let (read, at) = names(log.store(), at, 10).await;
    assert!(read.contains(&"late".to_owned()), "{read:?}");
    log.settle(&at).await;
    assert_eq!(log.clean().await.removed, 1);
}

/// The look before the lock saw nothing of it; the look under the lock does.
#[tokio::test]
async fn what_commits_while_the_lock_is_waited_for_stays() {
    let Some(log) = Log::new(1).await else { return };
    let old = log.slot(2).await;
    run(
        &mut log.db.raw().await,
        "ALTER FUNCTION pillarbox.clean_log SET lock_timeout = '20s'",
    )
    .await;
    let (mut late, mut eye) = (log.db.raw().await, log.db.raw().await);
    run(&mut eye, &into(old, "early")).await;
    run(&mut late, "BEGIN").await;
    run(&mut late, &into(old, "late")).await;
    let (_, at) = names(log.store(), Progress::default(), 10).await;
    log.settle(&at).await;
    let mut cleaner = log.db.raw().await;
    let cleaning = tokio::spawn(async move {
        text(
            &mut cleaner,
            &format!("SELECT pillarbox.clean_log({old}, '0')"),
        )
        .await
    });
    until("the cleaner waits", async || {
        number(&mut eye, WAITS).await == 1
    })
    .await;
    run(&mut late, "COMMIT").await;
    assert_eq!(cleaning.await.unwrap(), "unsettled");
    assert_eq!(names(log.store(), at, 10).await.0, ["late"]);
}

/// A row below the cursor that ran at its cut: in no slot of its neighbours, and seen by nobody yet.
#[tokio::test]
async fn what_ran_at_the_cut_holds_its_slot() {
    for mid_slice in [false, true] {
        let Some(log) = Log::new(1).await else { return };
        let (old, older) = (log.slot(2).await, log.slot(3).await);
        let (mut late, mut other) = (log.db.raw().await, log.db.raw().await);
        run(&mut late, "BEGIN").await;
        run(&mut late, &into(old, "late")).await;
        for name in ["a", "b"] {
            run(&mut other, &into(older, name)).await;
        }
        let slice = log.store().read(0, &Progress::default(), 9).await.unwrap();
        let last = slice.events.last().unwrap().position;
        let at = match mid_slice {
            true => slice.within.at(last),
            false => slice.end.unwrap(),
        };
        assert_eq!(at.upto.is_some(), mid_slice);
        log.settle(&at).await;
        run(&mut late, "COMMIT").await;
        // Its slot has nothing above the cursor.
        let cleaned = log.clean().await;
        assert_eq!(cleaned.removed, 1, "the others' slot: {cleaned:?}");
        assert_eq!(names(log.store(), at, 10).await.0, ["late"]);
    }
}

/// Of a day's backlog, which is one slice.
#[tokio::test]
async fn an_open_slice_frees_its_slots() {
    let Some(log) = Log::new(1).await else { return };
    let (old, older) = (log.slot(2).await, log.slot(3).await);
    let mut writer = log.db.raw().await;
    for (slot, name) in [(older, "a"), (older, "b"), (old, "c"), (old, "d")] {
        run(&mut writer, &into(slot, name)).await;
    }
    let slice = log.store().read(0, &Progress::default(), 2).await.unwrap();
    let middle = slice.end.unwrap();
    assert!(middle.upto.is_some(), "the slice goes on");
    log.settle(&middle).await;
    assert_eq!(log.clean().await.removed, 1);
    assert_eq!(names(log.store(), middle, 10).await.0, ["c", "d"]);
}

/// In the slot where the partition occurs, and there alone.
#[tokio::test]
async fn a_partition_without_a_cursor_holds_its_slots() {
    let Some(log) = Log::new(2).await else { return };
    let (old, older) = (log.slot(2).await, log.slot(3).await);
    let mut writer = log.db.raw().await;
    let mut n = 0;
    for (slot, partition) in [(older, 0), (old, 1)] {
        while number(
            &mut writer,
            &format!("SELECT count(*) FROM {{outbox}} WHERE slot = {slot}"),
        )
        .await
            == 0
        {
            n += 1;
            let one = format!(
                "INSERT INTO {{outbox}} (slot, topic, type, key) VALUES ({slot}, 't', 'a', 'k{n}'); \
                 DELETE FROM {{outbox}} WHERE slot = {slot} AND partition <> {partition}"
            );
            run(&mut writer, &one).await;
        }
    }
    // All of it settled, as far as there are cursors.
    let cut = text(&mut writer, "SELECT pillarbox.cut()::text").await;
    let settled = format!(
        "UPDATE {{cursor}} SET base = 1000000, seen = '{cut}'; DELETE FROM {{cursor}} WHERE partition = 1"
    );
    run(&mut writer, &settled).await;
    let cleaned = log.clean().await;
    assert_eq!((cleaned.removed, cleaned.held.len()), (1, 1), "{cleaned:?}");
    assert_eq!(log.rows().await, 1);
}

/// It has read the log in an older snapshot, and reads on in it.
#[tokio::test]
async fn a_reader_with_an_older_snapshot_misses_nothing() {
    let Some(log) = Log::new(1).await else { return };
    let old = log.slot(2).await;
    let (mut reader, mut other) = (log.db.raw().await, impatient(&log.db).await);
    run(&mut other, &into(old, "a")).await;
    let (_, at) = names(log.store(), Progress::default(), 10).await;
    log.settle(&at).await;
    run(
        &mut reader,
        "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM {outbox} LIMIT 0",
    )
    .await;
    for n in 0..5 {
        let cleaned = log.clean().await;
        assert_eq!(cleaned.removed, 0);
        let locked = why(&cleaned).iter().any(|w| w.contains("still open"));
        assert!(locked, "{cleaned:?}");
        // Neither the present slot nor the very one keeps a writer waiting.
        write(&mut other, &format!("b{n}")).await;
        run(&mut other, &into(log.slot(3).await, "c")).await;
        let rows = number(&mut reader, "SELECT count(*) FROM {outbox}").await;
        assert_eq!(rows, 1);
    }
    run(&mut reader, "COMMIT").await;
    assert_eq!(log.clean().await.removed, 1);
}

/// Whose looks would both be older than what they must see.
#[tokio::test]
async fn a_cleaner_with_an_older_snapshot_is_refused() {
    let Some(log) = Log::new(1).await else { return };
    let mut raw = log.db.raw().await;
    run(&mut raw, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let error = refused(&mut raw, "SELECT pillarbox.clean_log(0, '0')").await;
    assert!(error.starts_with("25001"), "{error}");
    run(&mut raw, "ROLLBACK; BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let error = refused(&mut raw, "SELECT pillarbox.clean_inbox(0, '0', NULL)").await;
    assert!(error.starts_with("25001"), "{error}");
    run(&mut raw, "ROLLBACK").await;
    // The engine's own transactions do not take over the host's default.
    let name = text(&mut raw, "SELECT current_database()::text").await;
    run(
        &mut raw,
        &format!("ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'"),
    )
    .await;
    let database = log.db.database().await;
    let cleaned = database.store().clean_log(&log.lease, NONE).await.unwrap();
    assert!(cleaned.held.is_empty(), "{cleaned:?}");
}

#[tokio::test]
async fn a_full_ring_takes_more() {
    let Some(log) = Log::new(1).await else { return };
    let mut writer = impatient(&log.db).await;
    // The broker is away for turns of the ring.
    for turn in 0..3 {
        for slot in 0..4 {
            run(&mut writer, &into(slot, &format!("{turn}/{slot}"))).await;
            let cleaned = log.clean().await;
            assert_eq!(cleaned.removed, 0);
        }
    }
    write(&mut writer, "last").await;
    let (read, at) = names(log.store(), Progress::default(), 100).await;
    assert_eq!(read.len(), 13);
    log.settle(&at).await;
    // All but the slots of the present and of the next minute.
    assert!((2..=3).contains(&log.clean().await.removed));
}

#[tokio::test]
async fn the_slots_of_the_present_and_the_next_are_left_alone() {
    let Some(log) = Log::new(1).await else { return };
    log.db
        .execute("UPDATE pillarbox.installation SET slot_seconds = 40")
        .await;
    let slot = "SELECT (extract(epoch FROM clock_timestamp())::bigint / 40) % 4";
    for _ in 0..2 {
        let now = log.db.number(slot).await;
        run(&mut log.db.raw().await, &into(now, "a")).await;
        let (_, at) = names(log.store(), Progress::default(), 10).await;
        log.settle(&at).await;
        assert_eq!(log.clean().await.removed, 0);
        let rolled = format!("UPDATE {{outbox}} SET slot = {}", (now + 2) % 4);
        log.db.execute(&rolled).await;
        assert_eq!(log.clean().await.removed, 1);
    }
}

/// Aborted transactions leave pages behind that no row keeps.
#[tokio::test]
async fn a_slot_of_rolled_back_events_is_emptied() {
    let Some(log) = Log::new(1).await else { return };
    let old = log.slot(2).await;
    let mut writer = log.db.raw().await;
    run(&mut writer, "BEGIN").await;
    run(&mut writer, &into(old, "a")).await;
    run(&mut writer, "ROLLBACK").await;
    let size = format!("SELECT pg_relation_size('pillarbox.outbox_{old}')");
    assert!(number(&mut writer, &size).await > 0);
    assert_eq!(log.clean().await.removed, 1);
    assert_eq!(number(&mut writer, &size).await, 0);
}

#[tokio::test]
async fn slots_are_as_long_as_the_retention_needs() {
    let Some(log) = Log::new(1).await else { return };
    let mut raw = log.db.raw().await;
    let day = Duration::from_secs(86_400);
    let seconds = "SELECT slot_seconds::bigint FROM pillarbox.installation";
    for (keep, expected) in [(day / 48, 1_800), (day / 24, 1_800), (day, 43_200)] {
        let cleaned = log.store().clean_log(&log.lease, keep).await.unwrap();
        assert!(cleaned.held.is_empty(), "{cleaned:?}");
        assert_eq!(number(&mut raw, seconds).await, expected);
    }
    write(&mut raw, "a").await;
    let fits = "SELECT count(*) FROM {outbox} WHERE slot = (extract(epoch FROM clock_timestamp())::bigint / 43200) % 4";
    assert_eq!(number(&mut raw, fits).await, 1);
    // Who has no right to, says so and cleans all the same.
    let role = format!("cleaner_{}", uuid::Uuid::now_v7().simple());
    log.db
        .execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'w'; GRANT USAGE ON SCHEMA pillarbox TO {role}; \
             GRANT SELECT, UPDATE, INSERT, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA pillarbox TO {role}"
        ))
        .await;
    let theirs = super::over(log.db.options().username(&role).password("w"));
    let cleaned = theirs.store().clean_log(&log.lease, day * 9).await.unwrap();
    assert!(why(&cleaned)[0].contains("owner"), "{cleaned:?}");
    assert_eq!(number(&mut raw, seconds).await, 43_200);
}

/// Whoever was open when a silent source's events were moved could show one that was not.
#[tokio::test]
async fn an_open_consumer_keeps_its_part_of_the_inbox() {
    let Some(db) = Db::new().await else { return };
    let inbox = Inbox::new(&db).await;
    let (silent, running) = (from("silent", 42), from("running", 42 + 48));
    assert!(inbox.arrives(&silent).await);
    assert!(inbox.arrives(&running).await);
    let ring = db
        .number("SELECT ring::bigint FROM {inbox} ORDER BY arrived LIMIT 1")
        .await;
    // However long it waits for the lock in the end.
    db.execute("ALTER FUNCTION pillarbox.clean_inbox SET lock_timeout = '5s'")
        .await;
    let (mut open, mut eye) = (db.raw().await, db.raw().await);
    run(&mut open, "BEGIN").await;
    let late = format!(
        "INSERT INTO {{inbox}} (slot, ring, grp, source, id, arrived) \
         SELECT slot, ring, grp, 'silent', 'late', arrived FROM {{inbox}} WHERE ring = {ring} ORDER BY arrived LIMIT 1"
    );
    run(&mut open, &late).await;
    let (database, lease) = (db.database().await, inbox.lease.clone());
    let cleaning = tokio::spawn(async move {
        let remember = Duration::from_secs(600);
        database
            .store()
            .clean_inbox(&lease, remember)
            .await
            .unwrap()
    });
    until("the cleaner waits, or gives up", async || {
        cleaning.is_finished() || number(&mut eye, WAITS).await == 1
    })
    .await;
    run(&mut open, "COMMIT").await;
    cleaning.await.unwrap();
    inbox.clean().await;
    // It was moved out of the ring with its source, or is still in it.
    let kept = "SELECT (SELECT count(*) FROM {inbox} WHERE id = 'late') + \
                (SELECT count(*) FROM pillarbox.inbox_timeless WHERE id = 'late')";
    assert_eq!(db.number(kept).await, 1);
    assert!(inbox.is_known(&silent).await);
    assert!(inbox.is_known(&running).await);
}
