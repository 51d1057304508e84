//! Crashes of the server. What was read before one may never have been; what was answered stays.

use pillarbox_core::{
    Database,
    lease::Lease,
    store::{Gate, Store},
};
use pillarbox_testkit::servers::{Postgres, Shutdown};

use super::{Db, alone, names, number, run, write};
use crate::suite::{Bench, GROUP, acquire, deferral, drain, group, lost, message, relay, term};

/// Writers that do not wait for the disk, on a server that does not hurry to write.
const LAZY: &[(&str, &str)] = &[
    ("wal_writer_delay", "10s"),
    ("synchronous_commit", "off"),
    ("autovacuum", "off"),
];

/// After a crash each pooled connection is dead once.
async fn answers(store: &dyn Store) {
    let mut failures = 0;
    while let Err(e) = store.partitions().await {
        assert!(e.is_temporary(), "{e}");
        failures += 1;
        assert!(failures < 50, "{e}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// A lost lease is lost whichever connection says so; a dead connection says nothing.
async fn refuses(database: &Database, relay: &Lease, group: &Lease, gate: &Gate) {
    let store: &dyn Store = &**database.store();
    answers(store).await;
    lost(store.flush(relay, gate).await);
    lost(
        store
            .settle(relay, &Default::default(), term(), false)
            .await,
    );
    lost(store.renew(group, term()).await);
    let unit = store.begin(GROUP, term(), false).await.unwrap();
    lost(unit.commit(group, term()).await);
}

#[tokio::test]
async fn a_crash_voids_every_lease_and_a_clean_restart_none() {
    let Some((mut server, db, database)) = alone(&[]).await else {
        return;
    };
    let store = database.store();
    let boot = "SELECT extract(epoch FROM pg_postmaster_start_time())::bigint";
    let gate = Gate("0/1".to_owned());
    for how in ["kill -9 of one backend", "immediate stop", "clean restart"] {
        let (relay, group) = (
            acquire(&**store, &relay()).await.lease,
            acquire(&**store, &group()).await.lease,
        );
        let before = db.number(boot).await;
        match how {
            "clean restart" => server.restart(Shutdown::Fast).await.unwrap(),
            "immediate stop" => server.restart(Shutdown::Immediate).await.unwrap(),
            _ => {
                server.kill_backend().await.unwrap();
                // The start time says nothing: this is why there is a token.
                assert_eq!(db.number(boot).await, before);
            }
        }
        if how == "clean restart" {
            answers(&**store).await;
            store.flush(&relay, &gate).await.unwrap();
            store
                .settle(&relay, &Default::default(), term(), false)
                .await
                .unwrap();
            store.renew(&group, term()).await.unwrap();
        } else {
            refuses(&database, &relay, &group, &gate).await;
        }
        store.release(&relay).await.unwrap();
        store.release(&group).await.unwrap();
    }
    server.end().await;
}

/// An event that is visible and not on disk: it is read, and a crash removes it. It must not have passed the gate.
#[tokio::test]
async fn nothing_passes_the_gate_that_a_crash_takes_back() {
    let Some((mut server, db, database)) = alone(LAZY).await else {
        return;
    };
    let store = database.store();
    let (mut vanished, mut kept) = (0, 0);
    // Until both was seen; the server may write more than it has to.
    for round in 0..20 {
        if round >= 4 && kept > 0 && vanished > 0 {
            break;
        }
        let acquired = acquire(&**store, &relay()).await;
        let start = drain(&**store, acquired.progress, 100).await.1;
        let mut writer = db.raw().await;
        let name = format!("event {round}");
        write(&mut writer, &name).await;
        let slice = store.read(0, &start, 10).await.unwrap();
        assert_eq!(slice.events.len(), 1, "it is visible");
        let gate = slice.gate.expect("no event is without a gate");
        // Every other round asks; in between the event stays held back.
        let passed = round % 2 == 0;
        if passed {
            store.flush(&acquired.lease, &gate).await.unwrap();
        }
        crash(&mut server).await;
        answers(&**store).await;
        let there = exists(&db, &name).await;
        assert!(there || !passed, "{name} passed the gate and is gone");
        match there {
            true => kept += 1,
            false => vanished += 1,
        }
        lost(store.flush(&acquired.lease, &gate).await);
        store.release(&acquired.lease).await.unwrap();
    }
    assert!(
        kept > 0 && vanished > 0,
        "kept {kept}, vanished {vanished}: nothing was tried"
    );
    server.end().await;
}

async fn crash(server: &mut Postgres) {
    server.restart(Shutdown::Immediate).await.unwrap();
}

async fn exists(db: &Db, name: &str) -> bool {
    let found = format!("SELECT count(*) FROM {{outbox}} WHERE payload = '{name}'");
    db.number(&found).await == 1
}

/// Positions and transaction ids are handed out again after a crash: a reader that kept its place would skip new events.
#[tokio::test]
async fn a_reader_that_starts_anew_skips_nothing() {
    let Some((mut server, db, database)) = alone(LAZY).await else {
        return;
    };
    let store = database.store();
    let mut trapped = false;
    // The server may have written more than it had to; then that round tried nothing.
    for round in 0..10 {
        let acquired = acquire(&**store, &relay()).await;
        let start = drain(&**store, acquired.progress, 100).await.1;
        let mut writer = db.raw().await;
        let seen = number(&mut writer, "SELECT count(*) FROM {outbox}").await;
        for n in 0..3 {
            write(&mut writer, &format!("before {round} {n}")).await;
        }
        // Read ahead, not through the gate, not settled.
        let (read, ahead) = names(&**store, start.clone(), 100).await;
        assert_eq!(read.len(), 3);
        crash(&mut server).await;
        answers(&**store).await;
        let mut writer = db.raw().await;
        let survivors = number(&mut writer, "SELECT count(*) FROM {outbox}").await - seen;
        let after: Vec<_> = (0..5).map(|n| format!("after {round} {n}")).collect();
        for name in &after {
            write(&mut writer, name).await;
        }
        lost(store.settle(&acquired.lease, &ahead, term(), false).await);
        store.release(&acquired.lease).await.unwrap();
        let again = acquire(&**store, &relay()).await;
        let (read, end) = names(&**store, again.progress, 100).await;
        assert!(read.ends_with(&after), "{read:?}");
        assert_eq!(
            names(&**store, start, 100).await.0.len(),
            usize::try_from(survivors).unwrap() + 5
        );
        // From where it had read ahead, it would have skipped some; and shown none without the gate that refuses it.
        let wrong = store.read(0, &ahead, 100).await.unwrap();
        trapped |= wrong.events.len() < 5;
        if !wrong.events.is_empty() {
            lost(store.flush(&acquired.lease, &wrong.gate.unwrap()).await);
        }
        store
            .settle(&again.lease, &end, term(), true)
            .await
            .unwrap();
        store.release(&again.lease).await.unwrap();
        if trapped {
            break;
        }
    }
    assert!(trapped, "nothing was lost: nothing was tried");
    server.end().await;
}

/// What the engine says is durable survives, on a database whose default is not to wait. A crash after each: a later
/// durable commit would carry the ones before it to the disk.
#[tokio::test]
async fn what_is_durable_survives() {
    let Some((mut server, db, database)) = alone(LAZY).await else {
        return;
    };
    let store = database.store();
    db.execute("CREATE TABLE effects (n bigint)").await;
    let first = acquire(&**store, &relay()).await.lease;
    crash(&mut server).await;
    answers(&**store).await;
    store.release(&first).await.unwrap();
    let second = acquire(&**store, &relay()).await.lease;
    assert!(second.epoch > first.epoch, "an epoch was handed out twice");

    store
        .defer(&second, &[deferral(&message(Some("k")))])
        .await
        .unwrap();
    crash(&mut server).await;
    answers(&**store).await;
    assert_eq!(db.number("SELECT count(*) FROM {deferred}").await, 1);

    let group = acquire(&**store, &group()).await.lease;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    let Some(pillarbox_core::Connection::Postgres(c)) = unit.connection() else {
        panic!("this is PostgreSQL");
    };
    run(c, "INSERT INTO effects VALUES (1)").await;
    unit.commit(&group, term()).await.unwrap();
    crash(&mut server).await;
    answers(&**store).await;
    assert_eq!(db.number("SELECT count(*) FROM effects").await, 1);
    server.end().await;
}
