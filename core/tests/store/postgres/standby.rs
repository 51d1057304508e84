//! A standby, and its promotion.

use std::time::Duration;

use pillarbox_core::{Error, Kind, admin::Cause, store::Gate};
use pillarbox_testkit::servers::Shutdown;

use super::{alone, names, refused, run, until, write};
use crate::suite::{Bench, GROUP, acquire, deferral, group, lost, message, pump, relay, term};

#[track_caller]
fn away<T: std::fmt::Debug>(answer: pillarbox_core::Result<T>) -> Error {
    let error = answer.expect_err("a standby refuses");
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    error
}

/// A standby's snapshots list no running transactions: read there, each of them would be taken for visible and be skipped. It
/// must refuse, and so must leases; and after a promotion nothing that was held is valid.
#[tokio::test]
async fn a_standby_refuses_and_its_promotion_voids_all_leases() {
    let Some((mut server, db, database)) = alone(&[]).await else {
        return;
    };
    let store = database.store();
    let acquired = acquire(&**store, &relay()).await;
    let group = acquire(&**store, &group()).await.lease;
    let mut raw = db.raw().await;
    write(&mut raw, "one").await;
    drop(raw);
    server.stop(Shutdown::Fast).await.unwrap();
    let signal = server.data_folder().unwrap().join("standby.signal");
    std::fs::write(signal, "").unwrap();

    // It counts as started only once it is promoted.
    let started = server.start_again();
    let watched = async {
        until("the standby answers", async || {
            let answer = store.partitions().await;
            answer.is_ok()
        })
        .await;
        let mut raw = db.raw().await;
        let cut = refused(&mut raw, "SELECT pillarbox.cut()").await;
        assert!(cut.starts_with("25006"), "{cut}");
        let start = acquired.progress.clone();
        let read = away(store.read(0, &start, 10).await);
        assert!(read.to_string().contains("read-only"), "{read}");
        away(store.acquire(&pump(), term()).await);
        away(store.renew(&acquired.lease, term()).await);
        away(store.settle(&acquired.lease, &start, term(), false).await);
        away(store.flush(&acquired.lease, &Gate("0/1".to_owned())).await);
        away(
            store
                .defer(&acquired.lease, &[deferral(&message(None))])
                .await,
        );
        away(store.lines(&acquired.lease, 1).await);
        let unit = store.begin(GROUP, term(), false).await.unwrap();
        away(unit.commit(&group, term()).await);
        away(store.release(&group).await);
        // No connection that was refused is kept: the next one may lead to the server that writes.
        until("the connections are closed", async || {
            db.number(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
                 AND application_name LIKE '%(engine)'",
            )
            .await
                == 0
        })
        .await;
        run(&mut raw, "SELECT pg_promote(true, 30)").await;
    };
    let both = async { tokio::join!(started, watched).0 };
    tokio::time::timeout(Duration::from_secs(50), both)
        .await
        .unwrap()
        .unwrap();

    lost(store.renew(&acquired.lease, term()).await);
    lost(store.renew(&group, term()).await);
    store.release(&acquired.lease).await.unwrap();
    // Another timeline: cursor and log went together, and stay.
    let moved = store.acquire(&relay(), term()).await.unwrap_err();
    assert_eq!(moved.kind(), Kind::Moved, "{moved}");
    let told = store.anchor().await.unwrap().expect("a failover");
    assert_eq!((told.cause, told.unsettled), (Cause::Failover, Vec::new()));
    let again = acquire(&**store, &relay()).await;
    assert_eq!(names(&**store, again.progress, 10).await.0, ["one"]);
    server.end().await;
}
