//! A dump restored into another cluster, whose transaction ids begin anew.

use std::{path::Path, sync::Arc, time::Duration};

use pillarbox_core::{
    Admin, Database, Outbox, Relay, Start,
    admin::{Cause, ReplayRequest},
    error::Kind,
    lease::LeaseKey,
    store::Store,
    transport::memory::Memory,
};
use pillarbox_testkit::servers::{self, Postgres};
use tokio::process::Command;

use super::{Db, alone, names, number, run, until, write};
use crate::suite::{Bench as _, acquire, destinations::destination, drain, relay, term};

/// Lets a cluster hand out many transaction ids.
const BURN: &str =
    "DO $$ BEGIN FOR i IN 1..20000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$";

async fn client(program: &str, url: &str, more: &[&str], file: &Path) {
    let path = Postgres::program(program).expect("it comes with the server");
    let done = Command::new(path)
        .arg(format!("--dbname={url}"))
        .args(more)
        .arg(file)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program}: {said}");
}

/// The database's copy in a cluster that was made just now.
async fn restored(db: &Db) -> Option<(Postgres, Db, Database)> {
    let server = servers::required(Postgres::start().await)?;
    let url = server.create_database().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dump");
    client("pg_dump", &db.url, &["--format=custom", "--file"], &file).await;
    client("pg_restore", &url, &["--exit-on-error"], &file).await;
    let db = Db { url };
    let database = db.database().await;
    Some((server, db, database))
}

/// Reads so many events and settles the first of them: in the middle of a slice.
async fn settle(store: &dyn Store, key: &LeaseKey, count: usize) {
    let acquired = acquire(store, key).await;
    let slice = store.read(0, &acquired.progress, 100).await.unwrap();
    let middle = slice.within.at(slice.events[count - 1].position);
    let settled = store.settle(&acquired.lease, &middle, term(), true);
    settled.await.unwrap();
    store.release(&acquired.lease).await.unwrap();
}

async fn settle_all(store: &dyn Store, key: &LeaseKey) {
    let acquired = acquire(store, key).await;
    let (_, end) = drain(store, acquired.progress, 3).await;
    let settled = store.settle(&acquired.lease, &end, term(), true);
    settled.await.unwrap();
    store.release(&acquired.lease).await.unwrap();
}

async fn left(store: &dyn Store, key: &LeaseKey) -> Vec<String> {
    let acquired = acquire(store, key).await;
    let (found, end) = names(store, acquired.progress, 2).await;
    let settled = store.settle(&acquired.lease, &end, term(), true);
    settled.await.unwrap();
    store.release(&acquired.lease).await.unwrap();
    found
}

/// Three destinations with a place each; one event that commits late for two of them; and one written before the relay came.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_destination_keeps_what_it_has_settled() {
    let Some((_server, db, database)) = alone(&[]).await else {
        return;
    };
    let (store, admin) = (&**database.store(), Admin::new(&database, "ada"));
    let (mut raw, mut open) = (db.raw().await, db.raw().await);
    run(&mut raw, BURN).await;
    for name in ["half", "none"] {
        admin.add_destination(name, Start::Earliest).await.unwrap();
    }
    write(&mut raw, "one").await;
    run(&mut open, "BEGIN").await;
    write(&mut open, "late").await;
    write(&mut raw, "two").await;
    write(&mut raw, "three").await;
    settle_all(store, &relay()).await;
    settle(store, &destination("half"), 2).await;
    run(&mut open, "COMMIT").await;
    write(&mut raw, "four").await;

    let Some((_other, db, database)) = restored(&db).await else {
        return;
    };
    let store = &**database.store();
    let mut raw = db.raw().await;
    let next = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
    let ids = "SELECT min(xact_id::text::bigint) FROM pillarbox.outbox";
    assert!(number(&mut raw, next).await < number(&mut raw, ids).await);
    write(&mut raw, "five").await;
    let refused = store.acquire(&relay(), term()).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Moved, "{refused}");

    let anchored = store.anchor().await.unwrap().expect("it has moved");
    assert_eq!(anchored.cause, Cause::Cluster);
    let unsettled = [("half", 4), ("main", 3), ("none", 6)].map(|(d, n)| (d.to_owned(), n));
    assert_eq!(anchored.unsettled, unsettled);
    assert_eq!(store.anchor().await.unwrap(), None);
    write(&mut raw, "six").await;
    assert_eq!(left(store, &relay()).await, ["late", "four", "five", "six"]);
    let half = ["late", "three", "four", "five", "six"];
    assert_eq!(left(store, &destination("half")).await, half);
    let none = ["one", "late", "two", "three", "four", "five", "six"];
    assert_eq!(left(store, &destination("none")).await, none);
    // And on from there.
    let mut open = db.raw().await;
    run(&mut open, "BEGIN").await;
    write(&mut open, "seven").await;
    write(&mut raw, "eight").await;
    for name in ["main", "half", "none"] {
        assert_eq!(left(store, &destination(name)).await, ["eight"]);
    }
    run(&mut open, "COMMIT").await;
    for name in ["main", "half", "none"] {
        assert_eq!(left(store, &destination(name)).await, ["seven"]);
    }
    // Nothing is held back for ever.
    db.age_log().await;
    let cleaner = acquire(store, &crate::suite::retention::cleaner("log")).await;
    let cleaned = store
        .clean_log(&cleaner.lease, Duration::ZERO)
        .await
        .unwrap();
    assert!(
        cleaned.removed > 0 && cleaned.held.is_empty(),
        "{cleaned:?}"
    );
    assert_eq!(number(&mut raw, "SELECT count(*) FROM {outbox}").await, 0);
}

/// Transactions that are open while the log is anchored commit behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_meanwhile_is_not_lost() {
    let Some((_server, db, database)) = alone(&[]).await else {
        return;
    };
    let mut raw = db.raw().await;
    run(&mut raw, BURN).await;
    write(&mut raw, "sent").await;
    settle_all(&**database.store(), &relay()).await;
    let Some((_other, db, database)) = restored(&db).await else {
        return;
    };
    let store = &**database.store();
    let (mut raw, mut open) = (db.raw().await, db.raw().await);
    run(&mut open, "BEGIN").await;
    write(&mut open, "open").await;
    write(&mut raw, "new").await;
    // Many at once: one does it.
    let anchored = tokio::join!(store.anchor(), store.anchor(), store.anchor());
    let anchored = [anchored.0, anchored.1, anchored.2];
    let done = anchored.iter().filter(|a| matches!(a, Ok(Some(_)))).count();
    assert_eq!(done, 1, "{anchored:?}");
    assert_eq!(left(store, &relay()).await, ["new"]);
    run(&mut open, "COMMIT").await;
    assert_eq!(left(store, &relay()).await, ["open"]);
}

/// As after a repair that set the cluster's transaction ids back: the identifier is the same, and the ids are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_from_the_future_are_noticed() {
    let Some((_server, db, database)) = alone(&[]).await else {
        return;
    };
    let mut raw = db.raw().await;
    run(&mut raw, BURN).await;
    write(&mut raw, "sent").await;
    settle_all(&**database.store(), &relay()).await;
    write(&mut raw, "unsent").await;
    let Some((_other, db, database)) = restored(&db).await else {
        return;
    };
    let home = "UPDATE pillarbox.installation SET system_identifier = (SELECT system_identifier FROM pg_control_system())";
    db.execute(home).await;
    let store = &**database.store();
    let anchored = store.anchor().await.unwrap().expect("it has moved");
    assert_eq!(anchored.unsettled, [("main".to_owned(), 1)]);
    assert_eq!(left(store, &relay()).await, ["unsent"]);
}

/// A relay does it by itself, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_anchors_and_tells() {
    let Some((_server, db, database)) = alone(&[]).await else {
        return;
    };
    let mut raw = db.raw().await;
    run(&mut raw, BURN).await;
    write(&mut raw, "one").await;
    settle_all(&**database.store(), &relay()).await;
    write(&mut raw, "two").await;
    let admin = Admin::new(&database, "ada");
    let request = ReplayRequest::new("r", "main");
    admin.start_replay(&request, "test").await.unwrap();
    let Some((_other, db, database)) = restored(&db).await else {
        return;
    };
    write(&mut db.raw().await, "three").await;
    let outbox = Outbox::new(&database);
    let running = Relay::new(&outbox, Arc::new(Memory::new()))
        .topics(["none"])
        .spawn();
    let mut health = running.watch();
    let told = health.wait_for(|h| h.held == h.of && h.of > 0);
    let told = tokio::time::timeout(Duration::from_secs(60), told).await;
    let told = told.unwrap().unwrap().reanchored.clone().unwrap();
    assert_eq!(told.cause, Cause::Cluster);
    let admin = Admin::new(&database, "ada");
    until("all is settled", async || {
        let all = admin.destinations().await.unwrap();
        all.iter().any(|d| d.name == "main" && d.behind == 0)
    })
    .await;
    running.shutdown().await.unwrap();
    // The replay has its end still, and what it has not sent.
    let store = &**database.store();
    let acquired = acquire(store, &destination("replay:r")).await;
    assert!(acquired.progress.upto.is_some());
    let slice = store.read(0, &acquired.progress, 10).await.unwrap();
    assert_eq!(slice.events.len(), 3);
}
