//! How far the relays are behind, and an outbox that was told to refuse events beyond it.

use std::time::Duration;

use pillarbox_core::{Backlog, Kind, Outbox, Pool};

use super::{
    Bench,
    forgetting::Placed,
    message, relay,
    retention::{HOUR, Log},
};

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
