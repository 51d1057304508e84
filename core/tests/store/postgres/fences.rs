//! What a lease stands on in PostgreSQL: the token, the isolation level, the cluster.

use pillarbox_core::{
    Database, Kind,
    cursor::Progress,
    lease::{Lease, LeaseTerm},
    store::{Gate, Store},
};

use super::{Db, run};
use crate::suite::{
    Bench, GROUP, acquire, deferral, group, impostor, letter, line_id, lost, message, pump, relay,
    term,
};

fn gate(at: &str) -> Gate {
    Gate(at.to_owned())
}

/// Everything that a lease fences, with a lease that its row still names.
async fn every_fence_refuses(database: &Database, relay: &Lease, group: &Lease) {
    let store: &dyn Store = &**database.store();
    let progress = Progress::default();
    lost(store.renew(relay, term()).await);
    lost(store.settle(relay, &progress, term(), false).await);
    lost(store.settle(relay, &progress, term(), true).await);
    lost(store.flush(relay, &gate("FFFFFFFF/0")).await);
    lost(store.defer(relay, &[deferral(&message(None))]).await);
    lost(store.bury(relay, &[letter(&message(None))]).await);
    lost(store.lines(relay, 1).await);
    lost(store.line(relay, None, &line_id(&message(None)), 1).await);
    lost(store.settle_source(group, 1, term()).await);
    let unit = store.begin(GROUP, term(), true).await.unwrap();
    lost(unit.commit(group, term()).await);
}

#[tokio::test]
async fn without_its_token_a_lease_is_void() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let relay = acquire(&**store, &relay()).await.lease;
    let group = acquire(&**store, &group()).await.lease;
    // As a crash leaves it.
    db.execute("TRUNCATE pillarbox.token").await;
    every_fence_refuses(&database, &relay, &group).await;
    // A gate that was passed long ago: by another log.
    lost(store.flush(&relay, &gate("0/1")).await);
    // Its owner may give it back and take it anew at once.
    for lease in [relay, group] {
        store.release(&lease).await.unwrap();
        let again = acquire(&**store, &lease.key).await.lease;
        assert_eq!(again.epoch, lease.epoch + 1);
        store.renew(&again, term()).await.unwrap();
    }
}

/// Owner and epoch fence each by itself, whatever the token says. After a failover that lost an acquisition one epoch has two
/// owners.
#[tokio::test]
async fn owner_and_epoch_fence_alone() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let relay = acquire(&**store, &relay()).await.lease;
    let group = acquire(&**store, &group()).await.lease;
    let [other, next] = [impostor, |lease: &Lease| Lease {
        epoch: lease.epoch + 1,
        ..lease.clone()
    }];
    for lease in [other(&relay), other(&group)] {
        db.execute(&format!(
            "INSERT INTO pillarbox.token VALUES ('{}', 'pillarbox.token'::regclass, 'forged')",
            lease.owner
        ))
        .await;
        if lease.key == relay.key {
            every_fence_refuses(&database, &lease, &next(&group)).await;
        } else {
            every_fence_refuses(&database, &next(&relay), &lease).await;
        }
    }
    store.renew(&relay, term()).await.unwrap();
    store.renew(&group, term()).await.unwrap();
}

/// A dump keeps unlogged rows; in the restored table they mean nothing.
#[tokio::test]
async fn a_restored_token_is_void() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let relay = acquire(&**store, &relay()).await.lease;
    let group = acquire(&**store, &group()).await.lease;
    db.execute(
        "CREATE UNLOGGED TABLE pillarbox.restored (LIKE pillarbox.token INCLUDING ALL); \
         INSERT INTO pillarbox.restored SELECT * FROM pillarbox.token; \
         DROP TABLE pillarbox.token; ALTER TABLE pillarbox.restored RENAME TO token",
    )
    .await;
    every_fence_refuses(&database, &relay, &group).await;
}

#[tokio::test]
async fn a_lease_leaves_one_token() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    for _ in 0..3 {
        for key in [relay(), group(), pump()] {
            acquire(&**store, &key).await;
        }
        assert_eq!(db.number("SELECT count(*) FROM pillarbox.token").await, 3);
        for table in ["cursor", "source_cursor", "lease"] {
            let expired = format!("UPDATE pillarbox.{table} SET expires_at = '-infinity'");
            db.execute(&expired).await;
        }
    }
    let last = acquire(&**store, &pump()).await.lease;
    store.release(&last).await.unwrap();
    assert_eq!(db.number("SELECT count(*) FROM pillarbox.token").await, 2);
}

/// Under the host's REPEATABLE READ each renewal that meets another fails with 40001.
#[tokio::test]
async fn the_hosts_isolation_level_breaks_no_renewal() {
    let Some((db, _)) = Db::migrated().await else {
        return;
    };
    let options = db.options().options([
        ("default_transaction_isolation", "repeatable read"),
        ("default_transaction_deferrable", "on"),
    ]);
    let database = super::over(options);
    let store = database.store().clone();
    let lease = acquire(&*store, &relay()).await.lease;
    let mut all = tokio::task::JoinSet::new();
    for n in 0..6 {
        let (store, lease) = (store.clone(), lease.clone());
        all.spawn(async move {
            for _ in 0..25 {
                match n % 3 {
                    0 => store.renew(&lease, term()).await.unwrap(),
                    1 => {
                        let progress = Progress::default();
                        store
                            .settle(&lease, &progress, term(), false)
                            .await
                            .unwrap();
                    }
                    _ => {
                        let event = [deferral(&message(Some("k")))];
                        store.defer(&lease, &event).await.unwrap();
                    }
                }
            }
        });
    }
    while let Some(done) = all.join_next().await {
        done.unwrap();
    }
}

/// Neither a wait for a lock nor a network that swallows packets holds the engine for longer than its lease.
#[tokio::test]
async fn a_locked_row_is_waited_for_less_than_a_lease() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let term = LeaseTerm::new(std::time::Duration::ZERO);
    let lease = store.acquire(&relay(), term).await.unwrap().unwrap().lease;
    let mut other = db.raw().await;
    run(&mut other, "BEGIN; UPDATE pillarbox.cursor SET base = base").await;
    let started = std::time::Instant::now();
    for error in [
        store.renew(&lease, term).await.unwrap_err(),
        store
            .defer(&lease, &[deferral(&message(None))])
            .await
            .unwrap_err(),
        store.lines(&lease, 1).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    }
    assert!(
        started.elapsed() < term.term() * 3,
        "{:?}",
        started.elapsed()
    );
    run(&mut other, "ROLLBACK").await;
    store.renew(&lease, term).await.unwrap();
}

#[tokio::test]
async fn another_cluster_is_refused_until_the_log_is_anchored_there() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    db.execute("UPDATE pillarbox.installation SET system_identifier = 1")
        .await;
    let error = store.acquire(&relay(), term()).await.unwrap_err();
    assert_eq!(error.kind(), pillarbox_core::Kind::Moved, "{error}");
    assert_eq!(db.number("SELECT count(*) FROM pillarbox.token").await, 0);
    // Consumers' cursors hold no transaction ids.
    acquire(&**store, &group()).await;
    assert!(store.anchor().await.unwrap().is_some());
    acquire(&**store, &relay()).await;
}

/// Sessions that somebody ends while they are idle are replaced, and nobody notices.
#[tokio::test]
async fn ended_sessions_are_replaced() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    for _ in 0..3 {
        let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                     WHERE datname = current_database() AND pid <> pg_backend_pid()";
        assert!(db.number(ended).await >= 1);
        store.renew(&lease, term()).await.unwrap();
        store.read(0, &Progress::default(), 1).await.unwrap();
        let unit = store.begin(GROUP, term(), false).await.unwrap();
        unit.rollback().await.unwrap();
    }
}

/// A server that was set read-only, as before a switch-over, is obeyed; and a session that leads to it is given up, because the
/// next one may lead to the server that writes.
#[tokio::test]
async fn a_read_only_server_is_obeyed_and_left() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let name = db.options().get_database().unwrap_or_default().to_owned();
    db.execute(&format!(
        "ALTER DATABASE {name} SET default_transaction_read_only = on"
    ))
    .await;
    let engine = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                  WHERE datname = current_database() AND pid <> pg_backend_pid()";
    let read_only = super::until("it is read-only", async || {
        db.number(engine).await;
        let answer = store.renew(&lease, term()).await;
        answer.is_err_and(|e| e.to_string().contains("read-only"))
    });
    read_only.await;
    let error = store
        .settle(&lease, &Progress::default(), term(), true)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(error.to_string().contains("read-only"), "{error}");
    let mut raw = db.raw().await;
    run(&mut raw, "SET default_transaction_read_only = off").await;
    let reset = format!("ALTER DATABASE {name} RESET default_transaction_read_only");
    run(&mut raw, &reset).await;
    store.renew(&lease, term()).await.unwrap();
}
