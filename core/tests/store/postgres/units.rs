//! A consumer's transaction as handlers may treat it.

use std::time::Duration;

use pillarbox_core::{Connection, Kind, lease::LeaseTerm, store::Unit};
use sqlx::{Connection as _, PgConnection};

use super::{Db, number, refused, run, short, text, until};
use crate::suite::{
    Bench, EFFECT, GROUP, acquire, deferral, effects, group, letter, message, term,
};

async fn ready() -> Option<(Db, pillarbox_core::Database)> {
    let (db, database) = Db::migrated().await?;
    db.execute("CREATE TABLE effects (n bigint)").await;
    Some((db, database))
}

fn connection(unit: &mut dyn Unit) -> &mut PgConnection {
    match unit.connection() {
        Some(Connection::Postgres(connection)) => connection,
        _ => panic!("this is PostgreSQL"),
    }
}

/// COMMIT, and something in its place: the savepoint's name alone would not show it.
#[tokio::test]
async fn a_handler_that_begins_anew_is_found_out() {
    let Some((db, database)) = ready().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    unit.savepoint().await.unwrap();
    run(
        connection(&mut *unit),
        "COMMIT; BEGIN; SAVEPOINT pillarbox_event; INSERT INTO effects VALUES (1)",
    )
    .await;
    unit.keep().await.unwrap();
    let error = unit.commit(&lease, term()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    assert!(
        error.to_string().contains("ended the transaction itself"),
        "{error}"
    );
    assert_eq!(effects(&db).await, 0);
}

#[tokio::test]
async fn a_handler_that_swallows_an_error_is_found_out() {
    let Some((db, database)) = ready().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    unit.savepoint().await.unwrap();
    assert!(
        refused(connection(&mut *unit), "SELECT 1 / 0")
            .await
            .starts_with("22012")
    );
    let error = unit.keep().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    unit.undo().await.unwrap();
    // Its neighbours are spared.
    unit.savepoint().await.unwrap();
    run(connection(&mut *unit), EFFECT).await;
    unit.keep().await.unwrap();
    unit.commit(&lease, term()).await.unwrap();
    assert_eq!(effects(&db).await, 1);
}

/// The savepoint that one event's end has set for the next must not take along what was written in between.
#[tokio::test]
async fn an_undone_event_takes_nothing_else_along() {
    let Some((db, database)) = ready().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    let (waiting, dead, skipped, last) = (
        message(Some("w")),
        message(Some("d")),
        message(None),
        message(None),
    );
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    for between in 0..5 {
        unit.savepoint().await.unwrap();
        run(connection(&mut *unit), EFFECT).await;
        if between % 2 == 0 {
            unit.keep().await.unwrap();
        } else {
            unit.undo().await.unwrap();
        }
        match between {
            0 => unit.defer(&deferral(&waiting)).await.unwrap(),
            1 => unit.bury(&letter(&dead)).await.unwrap(),
            2 => assert!(unit.remember(&skipped).await.unwrap()),
            3 => run(connection(&mut *unit), EFFECT).await,
            _ => {}
        }
        unit.savepoint().await.unwrap();
        assert!(
            unit.remember(&last).await.unwrap(),
            "it is undone each time"
        );
        unit.undo().await.unwrap();
    }
    unit.commit(&lease, term()).await.unwrap();
    // Events 0, 2 and 4, and what was written after the third.
    assert_eq!(effects(&db).await, 4);
    assert_eq!(db.number("SELECT count(*) FROM {deferred}").await, 1);
    assert_eq!(db.number("SELECT count(*) FROM {dead_letter}").await, 1);
    assert_eq!(db.number("SELECT count(*) FROM {inbox}").await, 2);
}

/// A handler may use the driver's own transactions: they are savepoints in the engine's.
#[tokio::test]
async fn a_handlers_own_transactions_are_savepoints() {
    let Some((db, database)) = ready().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    // Twice over the same connection: what the driver counts stays right.
    for _ in 0..2 {
        let mut unit = store.begin(GROUP, term(), true).await.unwrap();
        unit.savepoint().await.unwrap();
        assert!(connection(&mut *unit).is_in_transaction());
        for end in ["commit", "roll back", "drop"] {
            let mut tx = connection(&mut *unit).begin().await.unwrap();
            run(&mut tx, EFFECT).await;
            match end {
                "commit" => tx.commit().await.unwrap(),
                "roll back" => tx.rollback().await.unwrap(),
                _ => drop(tx),
            }
        }
        unit.keep().await.unwrap();
        unit.commit(&lease, term()).await.unwrap();
    }
    assert_eq!(effects(&db).await, 2);
}

/// The engine's settings are its own: a handler's plans and durability are the host's.
#[tokio::test]
async fn handlers_have_the_hosts_settings() {
    let Some((db, _)) = ready().await else { return };
    let options = db.options().options([
        ("default_transaction_isolation", "serializable"),
        ("synchronous_commit", "local"),
        ("work_mem", "7MB"),
    ]);
    let database = super::over(options);
    let store = database.store();
    for (durable, expected) in [(false, "local"), (true, "on")] {
        let mut unit = store.begin(GROUP, term(), durable).await.unwrap();
        let c = connection(&mut *unit);
        for (setting, expected) in [
            ("enable_seqscan", "on"),
            ("jit", "on"),
            ("work_mem", "7MB"),
            ("synchronous_commit", expected),
            ("transaction_isolation", "read committed"),
            ("statement_timeout", "36s"),
            ("idle_in_transaction_session_timeout", "36s"),
        ] {
            assert_eq!(
                text(c, &format!("SHOW {setting}")).await,
                expected,
                "{setting}"
            );
        }
        unit.rollback().await.unwrap();
    }
}

/// What the host does to each of its connections is done to the engine's, in which its handlers write.
#[tokio::test]
async fn handlers_have_the_hosts_connections() {
    let Some((db, _)) = ready().await else { return };
    db.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (n int)")
        .await;
    let pool = sqlx::postgres::PgPoolOptions::new().after_connect(|connection, _| {
        Box::pin(async move {
            run(connection, "SET search_path = shop").await;
            Ok(())
        })
    });
    let database = pillarbox_core::Database::from(&pool.connect_lazy_with(db.options()));
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    run(connection(&mut *unit), "INSERT INTO orders VALUES (1)").await;
    assert!(connection(&mut *unit).is_in_transaction());
    unit.commit(&lease, term()).await.unwrap();
    assert_eq!(db.number("SELECT count(*) FROM shop.orders").await, 1);
}

/// Slow handlers take no connection that a renewal needs.
#[tokio::test]
async fn handlers_leave_connections_for_renewals() {
    let Some((_db, database)) = ready().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    let mut units = Vec::new();
    let busy = loop {
        match store.begin(GROUP, short(), false).await {
            Ok(unit) => units.push(unit),
            Err(e) => break e,
        }
    };
    assert_eq!(busy.kind(), Kind::Unavailable, "{busy}");
    assert!(busy.to_string().contains("in use"), "{busy}");
    assert!(units.len() >= 2);
    store.renew(&lease, term()).await.unwrap();
    store.read(0, &Default::default(), 10).await.unwrap();
    // One ends, one may begin.
    units.pop().unwrap().rollback().await.unwrap();
    store.begin(GROUP, term(), false).await.unwrap();
}

/// A process that is stopped in the middle of a transaction holds its locks no longer than its lease lasts.
#[tokio::test]
async fn an_idle_unit_is_ended_before_its_lease() {
    let Some((db, database)) = ready().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    let mut unit = store.begin(GROUP, short(), true).await.unwrap();
    run(
        connection(&mut *unit),
        "LOCK TABLE effects IN ACCESS EXCLUSIVE MODE",
    )
    .await;
    let mut raw = db.raw().await;
    let locks = "SELECT count(*) FROM pg_locks WHERE relation = 'effects'::regclass AND granted AND pid <> pg_backend_pid()";
    assert_eq!(number(&mut raw, locks).await, 1);
    until("the server ends the idle session", async || {
        number(&mut raw, locks).await == 0
    })
    .await;
    let error = unit.commit(&lease, short()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    // The connection is not used again.
    for _ in 0..10 {
        store.renew(&lease, term()).await.unwrap();
    }
}

#[tokio::test]
async fn a_slow_statement_is_ended_before_its_lease() {
    let Some((_db, database)) = ready().await else {
        return;
    };
    let store = database.store();
    let mut unit = store.begin(GROUP, short(), true).await.unwrap();
    unit.savepoint().await.unwrap();
    let slow = refused(connection(&mut *unit), "SELECT pg_sleep(60)").await;
    assert!(slow.starts_with("57014"), "{slow}");
    unit.undo().await.unwrap();
    unit.rollback().await.unwrap();
}

/// Two owners' workers on one lease, and its renewals, at once: each waits for the others, none fails.
#[tokio::test]
async fn units_and_renewals_of_one_lease_go_side_by_side() {
    let Some((db, database)) = ready().await else {
        return;
    };
    let store = database.store().clone();
    let lease = acquire(&*store, &group()).await.lease;
    // So close to its end that each commit would rather renew it.
    let term = LeaseTerm::new(Duration::from_secs(300));
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (store, lease) = (store.clone(), lease.clone());
        all.spawn(async move {
            for n in 0..25 {
                let mut unit = store.begin(GROUP, term, false).await.unwrap();
                run(connection(&mut *unit), EFFECT).await;
                unit.commit(&lease, term).await.unwrap();
                if n % 5 == 0 {
                    store.renew(&lease, LeaseTerm::default()).await.unwrap();
                }
            }
        });
    }
    while let Some(done) = all.join_next().await {
        done.unwrap();
    }
    assert_eq!(effects(&db).await, 100);
}

/// Between a unit's fence and its COMMIT nobody takes the lease over: else two owners' effects interleave.
#[tokio::test]
async fn a_fenced_commit_holds_off_the_next_owner() {
    let Some((db, database)) = ready().await else {
        return;
    };
    let store = database.store().clone();
    let lease = acquire(&*store, &group()).await.lease;
    let mut keeper = db.raw().await;
    // COMMIT itself is slow: a deferred trigger waits for a lock.
    run(
        &mut keeper,
        "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
           PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$; \
         CREATE CONSTRAINT TRIGGER pause AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED \
           FOR EACH ROW EXECUTE FUNCTION pause(); \
         SELECT pg_advisory_lock(1)",
    )
    .await;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    run(connection(&mut *unit), EFFECT).await;
    // Free for others, as after a clock was set back, and not worth a renewal.
    db.expire(&group(), 400).await;
    let (committing, held) = (lease.clone(), store.clone());
    let commit = tokio::spawn(async move { unit.commit(&committing, term()).await });
    until("the commit waits", async || {
        number(
            &mut keeper,
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = \
             (SELECT oid FROM pg_database WHERE datname = current_database())",
        )
        .await
            == 1
    })
    .await;
    let error = held.acquire(&group(), short()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(error.is_temporary());
    run(&mut keeper, "SELECT pg_advisory_unlock(1)").await;
    commit.await.unwrap().unwrap();
    assert_eq!(effects(&db).await, 1);
    let next = acquire(&*store, &group()).await.lease;
    assert_eq!(next.epoch, lease.epoch + 1);
}

#[tokio::test]
async fn events_without_time_have_an_inbox_of_their_own() {
    let Some((db, database)) = ready().await else {
        return;
    };
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    let mut timeless = message(None);
    timeless.time = std::time::UNIX_EPOCH;
    let mut ancient = message(None);
    ancient.time = std::time::UNIX_EPOCH - Duration::from_secs(86_400 * 365 * 100);
    let mut far = message(None);
    far.time = std::time::UNIX_EPOCH + Duration::from_secs(250_000_000_000);
    for expected in [true, false] {
        let mut unit = store.begin(GROUP, term(), true).await.unwrap();
        for m in [&timeless, &ancient, &far] {
            assert_eq!(unit.remember(m).await.unwrap(), expected);
        }
        unit.commit(&lease, term()).await.unwrap();
    }
    assert_eq!(
        db.number("SELECT count(*) FROM pillarbox.inbox_timeless")
            .await,
        1
    );
    assert_eq!(db.number("SELECT count(*) FROM {inbox}").await, 2);
}
