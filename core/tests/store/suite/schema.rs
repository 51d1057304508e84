//! Making the tables, and refusing to use what does not fit.

use pillarbox_core::{Database, error::Kind, migrate, migrate_with};

use super::{Bench, acquire, drain, enqueue, ids, ids_of, message, migrated, relay};

pub(crate) async fn migrating_again_changes_nothing(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let events = [message(None), message(None)];
    enqueue(&database, &events).await;
    migrate(&database).await.unwrap();
    migrate_with(&database, 1).await.unwrap();
    let store = database.store();
    assert_eq!(store.partitions().await.unwrap(), 1);
    let (read, _) = drain(&**store, acquire(&**store, &relay()).await.progress, 10).await;
    assert_eq!(ids(&read), ids_of(&events));
}

pub(crate) async fn many_migrate_at_once(bench: &dyn Bench) {
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let database = bench.database().await;
        all.spawn(async move { migrate_with(&database, 1).await });
    }
    while let Some(done) = all.join_next().await {
        done.unwrap().unwrap();
    }
    let database = bench.database().await;
    assert_eq!(database.store().partitions().await.unwrap(), 1);
    assert_eq!(
        acquire(&**database.store(), &relay()).await.progress.last,
        0
    );
}

/// Before any relay has run: else nothing would hold back what it has not sent.
pub(crate) async fn main_stands_at_the_start_of_the_log(bench: &dyn Bench) {
    migrated(bench).await;
    let main = "SELECT count(*) FROM {cursor} WHERE destination = 'main' AND last = 0";
    assert_eq!(bench.number(main).await, 1);
}

pub(crate) async fn a_database_without_tables_names_migrate(bench: &dyn Bench) {
    let database = bench.database().await;
    let error = database.store().partitions().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotMigrated, "{error}");
    assert!(error.to_string().contains("pillarbox::migrate"), "{error}");
}

pub(crate) async fn a_schema_that_asks_for_a_newer_program_is_refused(bench: &dyn Bench) {
    let database = migrated(bench).await;
    bench.outdate().await;
    let error = database.store().partitions().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Incompatible, "{error}");
    let error = migrate(&database).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Incompatible, "{error}");
}

pub(crate) async fn a_schema_of_another_name_is_apart(bench: &dyn Bench) {
    let first = migrated(bench).await;
    let second = Database::in_schema(first.pool().unwrap(), "other_box").unwrap();
    let error = second.store().partitions().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotMigrated, "{error}");
    migrate_with(&second, 1).await.unwrap();
    let events = [message(None)];
    enqueue(&second, &events).await;
    for (database, expected) in [(&first, 0), (&second, 1)] {
        let store = database.store();
        let (read, _) = drain(&**store, acquire(&**store, &relay()).await.progress, 10).await;
        assert_eq!(read.len(), expected);
    }
}
