//! The log is read in order, whole, and never ahead of what is committed.

use pillarbox_core::{Outbox, Pool, lease::LeaseKey, transport::Message};

use super::{Bench, acquire, drain, enqueue, ids, ids_of, lost, message, migrated, relay, term};

fn some(n: usize) -> Vec<Message> {
    (0..n)
        .map(|i| message(Some(&format!("k{}", i % 3))))
        .collect()
}

pub(crate) async fn events_are_read_in_order(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let start = acquire(&**store, &relay()).await.progress;
    assert!(store.read(0, &start, 10).await.unwrap().end.is_none());
    let events = some(23);
    for part in events.chunks(4) {
        enqueue(&database, part).await;
    }
    for limit in [1, 5, 23, 100] {
        let (read, _) = drain(&**store, start.clone(), limit).await;
        assert_eq!(ids(&read), ids_of(&events), "limit {limit}");
        assert!(read.is_sorted_by(|a, b| a.position < b.position));
        assert!(read.iter().all(|e| e.defect.is_none()));
    }
}

pub(crate) async fn reading_goes_on_in_the_middle_of_a_slice(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let start = acquire(&**store, &relay()).await.progress;
    let events = some(10);
    enqueue(&database, &events).await;
    let slice = store.read(0, &start, 8).await.unwrap();
    let third = slice.within.at(slice.events[2].position);
    // What comes meanwhile lies behind, not in between.
    let later = some(2);
    enqueue(&database, &later).await;
    let (rest, _) = drain(&**store, third, 4).await;
    let expected = [ids_of(&events[3..]), ids_of(&later)].concat();
    assert_eq!(ids(&rest), expected);
    let (rest, end) = drain(&**store, slice.end.unwrap(), 4).await;
    assert_eq!(ids(&rest), expected[5..]);
    assert!(store.read(0, &end, 4).await.unwrap().events.is_empty());
}

pub(crate) async fn a_rolled_back_event_is_never_read(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let mut at = acquire(&**store, &relay()).await.progress;
    for _ in 0..5 {
        let open = begin_with(&database, &message(None)).await;
        open.end(false).await;
        let events = some(2);
        enqueue(&database, &events).await;
        let (read, end) = drain(&**store, at, 10).await;
        assert_eq!(ids(&read), ids_of(&events));
        at = end;
    }
}

pub(crate) async fn an_open_transaction_is_not_read(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let before = some(1);
    enqueue(&database, &before).await;
    // Before it: SQLite has one writer, and the open transaction will be it.
    let start = acquire(&**store, &relay()).await.progress;
    let hidden = message(None);
    let open = begin_with(&database, &hidden).await;
    let (read, end) = drain(&**store, start, 10).await;
    assert_eq!(ids(&read), ids_of(&before));
    open.end(true).await;
    let (read, _) = drain(&**store, end, 10).await;
    assert_eq!(ids(&read), [hidden.id.as_str()]);
}

pub(crate) async fn a_new_owner_goes_on_where_the_last_settled(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    let events = some(10);
    enqueue(&one, &events).await;
    let first = acquire(&**one.store(), &relay()).await;
    let slice = one.store().read(0, &first.progress, 6).await.unwrap();
    let middle = slice.within.at(slice.events[3].position);
    one.store()
        .settle(&first.lease, &middle, term(), false)
        .await
        .unwrap();
    one.store().release(&first.lease).await.unwrap();
    let second = acquire(&**two.store(), &relay()).await;
    let (rest, end) = drain(&**two.store(), second.progress, 3).await;
    assert_eq!(ids(&rest), ids_of(&events[4..]));
    two.store()
        .settle(&second.lease, &end, term(), true)
        .await
        .unwrap();
    two.store().release(&second.lease).await.unwrap();
    let third = acquire(&**one.store(), &relay()).await;
    assert!(drain(&**one.store(), third.progress, 3).await.0.is_empty());
}

pub(crate) async fn a_new_destination_starts_at_the_start(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let events = some(3);
    enqueue(&database, &events).await;
    let main = acquire(&**store, &relay()).await;
    let (_, end) = drain(&**store, main.progress, 10).await;
    store.settle(&main.lease, &end, term(), true).await.unwrap();
    let audit = LeaseKey::Relay {
        destination: "audit".to_owned(),
        partition: 0,
    };
    let audit = acquire(&**store, &audit).await;
    let (read, _) = drain(&**store, audit.progress, 10).await;
    assert_eq!(ids(&read), ids_of(&events));
}

pub(crate) async fn flushing_needs_the_lease(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    enqueue(&one, &some(1)).await;
    let first = acquire(&**one.store(), &relay()).await;
    let slice = one.store().read(0, &first.progress, 6).await.unwrap();
    if let Some(gate) = &slice.gate {
        one.store().flush(&first.lease, gate).await.unwrap();
        bench.expire(&relay(), -1).await;
        let second = acquire(&**two.store(), &relay()).await;
        lost(one.store().flush(&first.lease, gate).await);
        two.store().flush(&second.lease, gate).await.unwrap();
    }
}

pub(crate) async fn a_plain_insert_is_read(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let before = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    bench
        .execute("INSERT INTO {outbox} (topic, type, payload) VALUES ('t', 'a.b', 'hello')")
        .await;
    bench
        .execute(
            "INSERT INTO {outbox} (topic, type, key, payload, content_type, headers, version, attributes) \
             VALUES ('t', 'a.b', '', NULL, 'text/plain', '{\"h\":\"1\",\"n\":2,\"b\":true,\"no\":null}', 3, '{\"source\":\"sql\"}')",
        )
        .await;
    let store = database.store();
    let start = acquire(&**store, &relay()).await.progress;
    let (read, _) = drain(&**store, start, 10).await;
    let [a, b] = &read[..] else {
        panic!("{read:?}")
    };
    assert_eq!(a.message.payload.as_deref(), Some(&b"hello"[..]));
    assert_eq!(a.message.key, None);
    assert_eq!(a.message.version(), Some(1));
    assert_eq!(a.message.content_type(), None);
    uuid::Uuid::try_parse(&a.message.id).unwrap();
    assert_ne!(a.message.id, b.message.id);
    assert!(a.message.time > before);
    assert!(a.message.time < std::time::SystemTime::now() + std::time::Duration::from_secs(60));
    assert_eq!(b.message.payload, None);
    assert_eq!(b.message.key.as_deref(), Some(""));
    assert_eq!(b.message.version(), Some(3));
    assert_eq!(b.message.content_type(), Some("text/plain"));
    assert_eq!(b.message.source(), "sql");
    let headers: Vec<_> = b.message.headers.iter().collect();
    let headers: Vec<_> = headers.iter().map(|(k, v)| [k.as_str(), v]).collect();
    assert_eq!(headers, [["b", "true"], ["h", "1"], ["n", "2"]]);
    assert_eq!((&a.defect, &b.defect), (&None, &None));
}

pub(crate) async fn a_wrong_row_is_a_defect_and_stops_nobody(bench: &dyn Bench) {
    let database = migrated(bench).await;
    for wrong in [r#"["a"]"#, r#"{"a":["b"]}"#, r#"{"a":{"b":"c"}}"#, r#""a""#] {
        for column in ["headers", "attributes"] {
            bench
                .execute(&format!(
                    "INSERT INTO {{outbox}} (topic, type, payload, {column}) VALUES ('t', 'a', 'x', '{wrong}')"
                ))
                .await;
        }
    }
    let good = some(1);
    enqueue(&database, &good).await;
    let store = database.store();
    let start = acquire(&**store, &relay()).await.progress;
    let (read, _) = drain(&**store, start, 100).await;
    assert_eq!(read.len(), 9);
    for e in &read[..8] {
        let defect = e.defect.as_deref().expect("a defect");
        assert!(defect.contains("headers") || defect.contains("attributes"));
    }
    assert_eq!(ids(&read[8..]), ids_of(&good));
    assert_eq!(read[8].defect, None);
}

enum Open {
    #[cfg(feature = "postgres")]
    Postgres(sqlx::Transaction<'static, sqlx::Postgres>),
    #[cfg(feature = "sqlite")]
    Sqlite(sqlx::Transaction<'static, sqlx::Sqlite>),
}

impl Open {
    async fn end(self, commit: bool) {
        match (self, commit) {
            #[cfg(feature = "postgres")]
            (Self::Postgres(tx), true) => tx.commit().await.unwrap(),
            #[cfg(feature = "postgres")]
            (Self::Postgres(tx), false) => tx.rollback().await.unwrap(),
            #[cfg(feature = "sqlite")]
            (Self::Sqlite(tx), true) => tx.commit().await.unwrap(),
            #[cfg(feature = "sqlite")]
            (Self::Sqlite(tx), false) => tx.rollback().await.unwrap(),
        }
    }
}

/// A transaction that has enqueued a message and stays open.
async fn begin_with(database: &pillarbox_core::Database, m: &Message) -> Open {
    let outbox = Outbox::new(database);
    match database.pool().expect("a real database") {
        #[cfg(feature = "postgres")]
        Pool::Postgres(pool) => {
            let mut tx = pool.begin().await.unwrap();
            outbox.enqueue_message(&mut tx, m.clone()).await.unwrap();
            Open::Postgres(tx)
        }
        #[cfg(feature = "sqlite")]
        Pool::Sqlite(pool) => {
            let mut tx = pool.begin().await.unwrap();
            outbox.enqueue_message(&mut tx, m.clone()).await.unwrap();
            Open::Sqlite(tx)
        }
    }
}
