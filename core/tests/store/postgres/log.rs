//! What the log shows while other transactions come and go.

use pillarbox_core::{cursor::Progress, lease::LeaseKey, store::Store};

use super::{Db, names, number, run, start, text, write};
use crate::suite::{Bench, acquire, relay, term};

#[tokio::test]
async fn a_late_commit_is_read_in_a_later_slice() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let mut late = db.raw().await;
    run(&mut late, "BEGIN").await;
    write(&mut late, "late").await;
    let mut other = db.raw().await;
    let mut at = start(&**store).await;
    // Whole slices go by before it commits.
    for name in ["a", "b", "c"] {
        write(&mut other, name).await;
        let (read, end) = names(&**store, at, 1).await;
        assert_eq!(read, [name]);
        at = end;
    }
    run(&mut late, "COMMIT").await;
    write(&mut other, "d").await;
    assert_eq!(names(&**store, at, 1).await.0, ["late", "d"]);
}

#[tokio::test]
async fn what_commits_in_mid_slice_waits_for_the_next() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let (mut late, mut other) = (db.raw().await, db.raw().await);
    write(&mut other, "a").await;
    run(&mut late, "BEGIN").await;
    write(&mut late, "late").await;
    for name in ["b", "c", "d"] {
        write(&mut other, name).await;
    }
    let first = store.read(0, &start(&**store).await, 2).await.unwrap();
    let middle = first.end.unwrap();
    assert!(middle.upto.is_some(), "the slice goes on");
    run(&mut late, "COMMIT").await;
    write(&mut other, "e").await;
    // A cut made up in between would show "late" after "b", of the same key.
    let rest = store.read(0, &middle, 10).await.unwrap();
    assert_eq!(rest.events.len(), 2);
    let (read, _) = names(&**store, middle, 1).await;
    assert_eq!(read, ["c", "d", "late", "e"]);
}

#[tokio::test]
async fn a_long_transaction_elsewhere_stops_nothing() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let mut report = db.raw().await;
    run(
        &mut report,
        "BEGIN ISOLATION LEVEL REPEATABLE READ; CREATE TABLE report (n int); SELECT count(*) FROM {outbox}",
    )
    .await;
    let (mut writer, mut at) = (db.raw().await, start(&**store).await);
    let lease = acquire(&**store, &destination("audit")).await.lease;
    for name in ["a", "b", "c"] {
        write(&mut writer, name).await;
        let (read, end) = names(&**store, at, 10).await;
        assert_eq!(read, [name]);
        store.settle(&lease, &end, term(), false).await.unwrap();
        at = end;
    }
    run(&mut report, "COMMIT").await;
}

fn destination(name: &str) -> LeaseKey {
    LeaseKey::Relay {
        destination: name.to_owned(),
        partition: 0,
    }
}

/// Rows carry the top transaction's xid; with a subtransaction's own they would be visible to nobody or lost.
#[tokio::test]
async fn events_of_subtransactions_are_read_with_their_transaction() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let (mut nested, mut other) = (db.raw().await, db.raw().await);
    run(&mut nested, "BEGIN").await;
    write(&mut nested, "top").await;
    run(&mut nested, "SAVEPOINT a").await;
    write(&mut nested, "kept").await;
    run(&mut nested, "SAVEPOINT b").await;
    write(&mut nested, "undone").await;
    run(&mut nested, "ROLLBACK TO b").await;
    write(&mut nested, "after").await;
    write(&mut other, "other").await;
    let (read, end) = names(&**store, start(&**store).await, 10).await;
    assert_eq!(read, ["other"]);
    run(&mut nested, "COMMIT").await;
    assert_eq!(names(&**store, end, 10).await.0, ["top", "kept", "after"]);
    let xids = number(&mut other, "SELECT count(DISTINCT xact_id) FROM {outbox}").await;
    assert_eq!(xids, 2);
}

#[tokio::test]
async fn a_prepared_transaction_is_read_once_it_is_committed() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let (mut prepared, mut other) = (db.raw().await, db.raw().await);
    let name = db.options().get_database().unwrap_or_default().to_owned();
    run(&mut prepared, "BEGIN").await;
    write(&mut prepared, "prepared").await;
    run(&mut prepared, &format!("PREPARE TRANSACTION '{name}'")).await;
    write(&mut other, "other").await;
    let (read, end) = names(&**store, start(&**store).await, 10).await;
    assert_eq!(read, ["other"]);
    run(&mut other, &format!("COMMIT PREPARED '{name}'")).await;
    assert_eq!(names(&**store, end, 10).await.0, ["prepared"]);
}

/// A cursor that was settled exactly at the end of its slice, by a program that did not know that it was the end.
#[tokio::test]
async fn an_exhausted_slice_is_left_behind() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let mut raw = db.raw().await;
    for name in ["a", "b"] {
        write(&mut raw, name).await;
    }
    let slice = store.read(0, &start(&**store).await, 10).await.unwrap();
    let exhausted = slice.within.at(slice.events[1].position);
    let empty = store.read(0, &exhausted, 10).await.unwrap();
    assert!(empty.events.is_empty());
    assert_eq!(
        empty.end, slice.end,
        "closed, so that its slots of the log fall free"
    );
    write(&mut raw, "c").await;
    assert_eq!(names(&**store, exhausted, 10).await.0, ["c"]);
}

/// base may be too low (after the log is anchored anew it is 0): what is visible in seen is settled all the same.
#[tokio::test]
async fn a_base_that_is_too_low_repeats_nothing() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let (mut late, mut other) = (db.raw().await, db.raw().await);
    write(&mut other, "a").await;
    run(&mut late, "BEGIN").await;
    write(&mut late, "late").await;
    write(&mut other, "b").await;
    let (_, end) = names(&**store, start(&**store).await, 10).await;
    let low = Progress { base: 0, ..end };
    assert!(names(&**store, low.clone(), 10).await.0.is_empty());
    write(&mut other, "c").await;
    run(&mut late, "COMMIT").await;
    assert_eq!(names(&**store, low, 1).await.0, ["late", "c"]);
}

/// Also of what is on disk: only behind the gate is it known that the reader's place is still one.
#[tokio::test]
async fn every_slice_has_a_gate() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let mut raw = db.raw().await;
    let acquired = acquire(&**store, &relay()).await;
    for name in ["a", "b", "c"] {
        write(&mut raw, name).await;
    }
    let first = store.read(0, &acquired.progress, 2).await.unwrap();
    let second = store.read(0, &first.end.unwrap(), 2).await.unwrap();
    let none = store.read(0, &second.end.unwrap(), 2).await.unwrap();
    assert_eq!(none.gate, None);
    for gate in [first.gate.unwrap(), second.gate.unwrap()] {
        store.flush(&acquired.lease, &gate).await.unwrap();
    }
}

/// Rows are read while those before them stay below 32 MiB, however many are asked for.
#[tokio::test]
async fn a_read_is_bounded_in_bytes() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    db.execute(
        "INSERT INTO {outbox} (topic, type, payload) \
         SELECT 't', 'a', convert_to(repeat('x', 12 * 1024 * 1024), 'UTF8') FROM generate_series(1, 5)",
    )
    .await;
    let (mut at, mut sizes) = (start(&**store).await, Vec::new());
    for _ in 0..2 {
        let slice = store.read(0, &at, 100).await.unwrap();
        sizes.push(slice.events.len());
        at = slice.end.unwrap();
    }
    assert_eq!(sizes, [3, 2]);
    assert_eq!(at.upto, None, "the slice ended");
}

/// Text in a database that does not check its encoding.
#[tokio::test]
async fn bytes_that_are_no_text_are_a_defect_of_their_row() {
    let Some(shared) = Db::new().await else {
        return;
    };
    let name = format!("ascii_{}", uuid::Uuid::now_v7().simple());
    shared
        .execute(&format!(
            "CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
        ))
        .await;
    let database = super::over(shared.options().database(&name));
    pillarbox_core::migrate_with(&database, 1).await.unwrap();
    let mut raw = super::pool(&database).acquire().await.unwrap();
    let bad = "INSERT INTO {outbox} (topic, type, key, payload) VALUES ('t', 'a', convert_from('\\xff41'::bytea, 'SQL_ASCII'), 'bad')";
    run(&mut raw, bad).await;
    write(&mut raw, "good").await;
    let store = database.store();
    let slice = store.read(0, &start(&**store).await, 10).await.unwrap();
    let defects: Vec<_> = slice.events.iter().map(|e| e.defect.as_deref()).collect();
    assert_eq!(defects, [Some("the key is not UTF-8"), None]);
}

#[tokio::test]
async fn partitions_divide_the_log_by_key() {
    let Some(db) = Db::new().await else { return };
    let database = db.database().await;
    pillarbox_core::migrate_with(&database, 8).await.unwrap();
    let store: &dyn Store = &**database.store();
    assert_eq!(store.partitions().await.unwrap(), 8);
    db.execute(
        "INSERT INTO {outbox} (topic, type, key, payload) \
         SELECT 't' || i % 3, 'a', 'k' || i % 40, 'x' FROM generate_series(1, 400) i",
    )
    .await;
    db.execute("INSERT INTO {outbox} (topic, type, payload) SELECT 't', 'a', 'x' FROM generate_series(1, 400)")
        .await;
    let mut seen = std::collections::HashMap::new();
    let mut total = 0;
    for partition in 0..8 {
        let slice = store
            .read(partition, &Progress::default(), 1_000)
            .await
            .unwrap();
        assert!(!slice.events.is_empty(), "keyless events are spread");
        total += slice.events.len();
        for e in slice.events {
            if let Some(key) = &e.message.key {
                assert_eq!(
                    *seen
                        .entry((e.message.topic.clone(), key.clone()))
                        .or_insert(partition),
                    partition
                );
            }
        }
    }
    assert_eq!((total, seen.len()), (800, 120));
    let beyond = LeaseKey::Relay {
        destination: "main".to_owned(),
        partition: 8,
    };
    let error = store.acquire(&beyond, term()).await.unwrap_err();
    assert!(error.to_string().contains("no partition 8"), "{error}");
    // A destination gets a row for every partition at once: a slot of the log is settled only when each has one.
    acquire(store, &destination("audit")).await;
    let rows = db
        .number("SELECT count(*) FROM pillarbox.cursor WHERE destination = 'audit'")
        .await;
    assert_eq!(rows, 8);
    acquire(store, &relay()).await;
}

#[tokio::test]
async fn the_gate_is_open_once_the_log_is_on_disk() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let acquired = acquire(&**store, &relay()).await;
    let mut raw = db.raw().await;
    run(&mut raw, "SET synchronous_commit = off").await;
    write(&mut raw, "a").await;
    let slice = store.read(0, &acquired.progress, 10).await.unwrap();
    let gate = slice.gate.unwrap();
    store.flush(&acquired.lease, &gate).await.unwrap();
    let passed = format!("SELECT (pg_current_wal_flush_lsn() >= '{}')::text", gate.0);
    assert_eq!(text(&mut raw, &passed).await, "true");
}
