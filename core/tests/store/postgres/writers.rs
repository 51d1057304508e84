//! Who writes to the log, in any language, and with which rights; and the schema they find.

use std::sync::Arc;

use pillarbox_core::{
    Database, Kind, Pool, cursor::Progress, failure::Side, migrate, migrate_with, store::Store,
    transport::Message,
};
use sqlx::{ConnectOptions as _, PgConnection};

use super::{Db, names, number, pool, refused, run, text};
use crate::suite::{
    Bench, GROUP, acquire, deferral, drain, enqueue, group, ids, line_id, message, pump, relay,
    retention::{NONE, cleaner},
    term,
};

async fn read_all(database: &Database) -> Vec<Message> {
    let store: &dyn Store = &**database.store();
    let (events, _) = drain(store, Progress::default(), 100).await;
    assert!(events.iter().all(|e| e.defect.is_none()), "{events:?}");
    events
        .into_iter()
        .map(|e| Arc::unwrap_or_clone(e.message))
        .collect()
}

#[tokio::test]
async fn any_language_enqueues_by_a_function() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let mut raw = db.raw().await;
    let id = text(
        &mut raw,
        "SELECT pillarbox.enqueue(topic => 'inventory.events', type => 'inventory.stock.depleted', key => 'sku-1', \
         payload => '{\"b\": 1, \"a\": 2}', headers => '{\"h\": \"1\"}', attributes => '{\"source\": \"sql\"}', version => 3)::text",
    )
    .await;
    run(
        &mut raw,
        "SELECT pillarbox.enqueue(topic => 't', type => 'a', payload => NULL); \
         SELECT pillarbox.enqueue_bytes(topic => 't', type => 'a', payload => '\\x0001'::bytea, content_type => 'x/y', key => '')",
    )
    .await;
    let given = "018f0000-0000-7000-8000-000000000000";
    let answered = text(
        &mut raw,
        &format!("SELECT pillarbox.enqueue_bytes('t', 'a', NULL, id => '{given}')::text"),
    )
    .await;
    assert_eq!(answered, given);

    let read = read_all(&database).await;
    let [json, tombstone, bytes, last] = &read[..] else {
        panic!("{read:?}")
    };
    assert_eq!(json.id, id);
    assert_eq!(
        json.payload.as_deref(),
        Some(&b"{\"a\": 2, \"b\": 1}"[..]),
        "jsonb's own order"
    );
    assert_eq!(json.content_type(), Some("application/json"));
    assert_eq!((json.version(), json.source()), (Some(3), "sql"));
    assert_eq!(json.headers["h"], "1");
    assert_eq!(
        (tombstone.payload.as_ref(), tombstone.key.as_ref()),
        (None, None)
    );
    assert_eq!(bytes.payload.as_deref(), Some(&[0, 1][..]));
    assert_eq!(
        (bytes.key.as_deref(), bytes.content_type()),
        (Some(""), Some("x/y"))
    );
    assert_eq!(last.id, given);
}

#[tokio::test]
async fn any_time_of_delivery_can_be_read() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let mut raw = db.raw().await;
    for statement in [
        "INSERT INTO {outbox} (topic, type, payload, deliver_at) VALUES ('t', 'a', '', '-infinity')",
        "INSERT INTO {outbox} (topic, type, payload, deliver_at) VALUES ('t', 'a', '', 'infinity')",
        "SELECT pillarbox.enqueue('t', 'a', '{}', deliver_at => '2100-01-01 00:00:00Z')",
    ] {
        run(&mut raw, statement).await;
    }
    let (events, _) = drain(&**database.store(), Progress::default(), 10).await;
    let times: Vec<_> = events.iter().map(|e| e.deliver_at.unwrap()).collect();
    assert!(times[0] < times[2] && times[2] < times[1], "{times:?}");
    let since = times[2].duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(since.as_secs(), 4_102_444_800);
    assert!(events.iter().all(|e| e.defect.is_none()));
    // And let wait, and cancelled or not.
    let store = database.store();
    let lease = acquire(&**store, &crate::suite::relay()).await.lease;
    let rows: Vec<_> = events
        .iter()
        .map(|e| pillarbox_core::failure::Deferral {
            hold: pillarbox_core::failure::Hold::Scheduled(e.deliver_at.unwrap()),
            ..crate::suite::deferral(&e.message)
        })
        .collect();
    store.defer(&lease, &rows).await.unwrap();
    let due = store.fall_due(&lease, 9, 10).await.unwrap();
    assert_eq!(due.lines.len(), 1);
    assert_eq!(due.lines[0].head.1, events[0].message.id);
    assert_eq!(due.next, Some(std::time::Duration::from_secs(86_400)));
}

/// Rights on the contract's columns are enough, and nothing more is open.
#[tokio::test]
async fn a_writer_needs_no_more_than_insert_on_the_contracts_columns() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let role = format!("writer_{}", uuid::Uuid::now_v7().simple());
    db.execute(&format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'w'; GRANT USAGE ON SCHEMA pillarbox TO {role}; \
         GRANT INSERT (topic, type, key, payload, content_type, headers, deliver_at, id, version, attributes) ON {{outbox}} TO {role}"
    ))
    .await;
    let options = db.options().username(&role).password("w");
    let mut writer: PgConnection = options.connect().await.unwrap();
    super::write(&mut writer, "plain").await;
    run(
        &mut writer,
        "SELECT pillarbox.enqueue('t', 'a', '{}', key => 'k')",
    )
    .await;
    let theirs = super::over(options);
    enqueue(&theirs, &[message(Some("k")), message(None)]).await;
    assert_eq!(read_all(&database).await.len(), 4);

    for statement in [
        "SELECT count(*) FROM {outbox}",
        "UPDATE {outbox} SET payload = NULL",
        "DELETE FROM {outbox}",
        "TRUNCATE {outbox}",
        "INSERT INTO {outbox} (topic, type, payload, xact_id) VALUES ('t', 'a', '', '1')",
        "INSERT INTO {outbox} (topic, type, payload, slot) VALUES ('t', 'a', '', 0)",
        "INSERT INTO {outbox} (topic, type, payload, created_at) VALUES ('t', 'a', '', now())",
        "INSERT INTO {outbox} (topic, type, payload, position) OVERRIDING SYSTEM VALUE VALUES ('t', 'a', '', 1)",
        "SELECT count(*) FROM pillarbox.cursor",
        "UPDATE pillarbox.installation SET version = 2",
        "SELECT count(*) FROM {dead_letter}",
    ] {
        let error = refused(&mut writer, statement).await;
        assert!(error.starts_with("42501"), "{statement}: {error}");
    }
}

/// The least rights of a relay and a consumer: nothing is created, and the log is neither changed nor emptied.
#[tokio::test]
async fn the_engine_owns_nothing() {
    let Some(db) = Db::new().await else { return };
    migrate_with(&db.database().await, 2).await.unwrap();
    let role = format!("engine_{}", uuid::Uuid::now_v7().simple());
    // Emptying a slot is all that a cleaner may do to the log.
    let children = (0..4).map(|n| format!("pillarbox.outbox_{n}"));
    let children = children.chain((0..8).map(|n| format!("pillarbox.inbox_{n}")));
    let children = children.collect::<Vec<_>>().join(", ");
    db.execute(&format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'w'; GRANT USAGE ON SCHEMA pillarbox TO {role}; \
         GRANT SELECT ON ALL TABLES IN SCHEMA pillarbox TO {role}; GRANT INSERT ON {{outbox}} TO {role}; \
         GRANT INSERT, UPDATE ON pillarbox.cursor, pillarbox.source_cursor, pillarbox.lease, \
           {{inbox}}, pillarbox.inbox_timeless TO {role}; \
         GRANT INSERT, UPDATE, DELETE ON pillarbox.token, {{deferred}}, {{dead_letter}}, {{inbox_clock}}, \
           pillarbox.inbox_timeless TO {role}; \
         GRANT TRUNCATE ON {children} TO {role}"
    ))
    .await;
    let theirs = super::over(db.options().username(&role).password("w"));
    every_statement(&theirs).await;
}

/// A service that starts on a complete schema has no right to change it, and needs none.
#[tokio::test]
async fn migrating_a_complete_schema_needs_no_rights_to_create() {
    let Some((db, _)) = Db::migrated().await else {
        return;
    };
    let role = format!("service_{}", uuid::Uuid::now_v7().simple());
    db.execute(&format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'w'; GRANT USAGE ON SCHEMA pillarbox TO {role}; \
         GRANT SELECT ON pillarbox.installation TO {role}"
    ))
    .await;
    let options = db.options().username(&role).password("w");
    let theirs = super::over(options);
    migrate(&theirs).await.unwrap();
    assert_eq!(theirs.store().partitions().await.unwrap(), 1);
    let other = Database::in_schema(Pool::Postgres(pool(&theirs)), "elsewhere").unwrap();
    let error = migrate(&other).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Database, "{error}");
    assert!(error.to_string().contains("permission denied"), "{error}");
}

/// Any legal name, whatever it means in SQL, and every statement under it.
#[tokio::test]
async fn the_schema_may_have_any_legal_name() {
    let Some(db) = Db::new().await else { return };
    let longest = "x".repeat(63);
    for name in ["select", "_", "user", "p9_", "outbox", longest.as_str()] {
        let pool = Pool::Postgres(pool(&db.database().await));
        let database = Database::in_schema(pool, name).unwrap();
        migrate_with(&database, 2).await.unwrap();
        migrate_with(&database, 2).await.unwrap();
        every_statement(&database).await;
        let mut raw = db.raw().await;
        run(
            &mut raw,
            &format!("SELECT \"{name}\".enqueue('t', 'a', '{{}}', key => 'k')"),
        )
        .await;
        let rows = format!("SELECT count(*) FROM \"{name}\".outbox");
        assert_eq!(number(&mut raw, &rows).await, 2);
    }
    for name in ["", "Select", "a-b", "a\"b", "é", "9a", &"x".repeat(64)] {
        let pool = Pool::Postgres(pool(&db.database().await));
        let error = Database::in_schema(pool, name).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
    }
}

async fn every_statement(database: &Database) {
    let store: &dyn Store = &**database.store();
    let event = message(Some("k"));
    enqueue(database, std::slice::from_ref(&event)).await;
    let acquired = acquire(store, &relay()).await;
    let mut read = Vec::new();
    for partition in 0..2 {
        let slice = store
            .read(partition, &Progress::default(), 10)
            .await
            .unwrap();
        if let Some(gate) = &slice.gate {
            store.flush(&acquired.lease, gate).await.unwrap();
        }
        read.extend(slice.events);
    }
    assert_eq!(ids(&read), [event.id.as_str()]);
    let never = pillarbox_core::store::Gate("FFFFFF/0".to_owned());
    store.flush(&acquired.lease, &never).await.unwrap();
    store
        .settle(&acquired.lease, &Progress::default(), term(), true)
        .await
        .unwrap();
    store
        .defer(&acquired.lease, &[deferral(&event)])
        .await
        .unwrap();
    let lines = store.lines(&acquired.lease, 5).await.unwrap();
    let line = store
        .line(&acquired.lease, lines[0].key.as_ref(), &lines[0].head, 5)
        .await
        .unwrap();
    assert_eq!(line[0].line_id(), line_id(&event));
    let dead = pillarbox_core::failure::Resolution::Dead {
        attempts: 4,
        reason: "no".to_owned(),
    };
    store
        .resolve(&acquired.lease, &line_id(&event), &dead)
        .await
        .unwrap();
    store.release(&acquired.lease).await.unwrap();

    let lease = acquire(store, &group()).await.lease;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    assert_eq!(unit.blocked(&[&event]).await.unwrap(), [false]);
    assert!(unit.remember(&event).await.unwrap());
    unit.commit(&lease, term()).await.unwrap();
    store.settle_source(&lease, 7, term()).await.unwrap();
    let lease = acquire(store, &pump()).await.lease;
    store
        .bury(&lease, &[crate::suite::letter(&event)])
        .await
        .unwrap();
    assert_eq!(store.uncopied(GROUP, 5).await.unwrap().len(), 1);
    store.copied(&lease, &[line_id(&event)]).await.unwrap();
    assert_eq!(store.uncopied(GROUP, 5).await.unwrap().len(), 0);

    let lease = acquire(store, &cleaner("log")).await.lease;
    store.clean_log(&lease, NONE).await.unwrap();
    let lease = acquire(store, &cleaner("inbox")).await.lease;
    store.clean_inbox(&lease, NONE).await.unwrap();
    let trims = store.trim_dead_letters(&lease, Side::Consumer, NONE, 0);
    assert_eq!(trims.await.unwrap().len(), 1);
}

/// Eight programs start at once, each with an opinion of its own; one wins and all agree.
#[tokio::test]
async fn concurrent_migrations_make_one_schema() {
    let Some(db) = Db::new().await else { return };
    let mut all = tokio::task::JoinSet::new();
    for n in 0..8_u32 {
        let database = db.database().await;
        all.spawn(async move {
            migrate_with(&database, 1 << (n % 4)).await.unwrap();
            database.store().partitions().await.unwrap()
        });
    }
    let answers = all.join_all().await;
    assert!(answers.windows(2).all(|w| w[0] == w[1]), "{answers:?}");
    let cursors = db.number("SELECT count(*) FROM pillarbox.cursor").await;
    assert_eq!(cursors, i64::from(answers[0]));
}

#[tokio::test]
async fn an_older_schema_asks_for_migration() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    // As a newer program left it that can live with this one.
    db.execute("UPDATE pillarbox.installation SET version = 99")
        .await;
    assert_eq!(database.store().partitions().await.unwrap(), 1);
    migrate(&database).await.unwrap();
    db.execute("UPDATE pillarbox.installation SET version = 0")
        .await;
    let error = database.store().partitions().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotMigrated, "{error}");
    // Half a schema is none, and every call says so.
    db.execute("DROP TABLE pillarbox.token").await;
    let error = database
        .store()
        .acquire(&relay(), term())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::NotMigrated, "{error}");
    let _ = names(&**database.store(), Progress::default(), 1).await;
}
