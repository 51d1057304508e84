//! Enqueue refuses before it writes: the caller's transaction goes on.

use std::borrow::Cow;

use pillarbox_core::{Connection, Event, Kind, Outbox, Pool};
use pillarbox_tests::{
    TOPIC, Tick, World, connect, in_both_worlds,
    tables::{self, count},
};
use pillarbox_transport::{Limits, Message};
use serde::Serialize;

in_both_worlds!(
    a_refused_event_leaves_the_transaction_usable,
    many_are_written_all_or_none,
    a_connection_without_a_transaction_is_refused,
    a_schema_that_is_not_there_names_migrate,
);

#[derive(Serialize)]
struct Large {
    text: String,
}

impl Event for Large {
    const TYPE: &'static str = "test.tick";
    const TOPIC: &'static str = TOPIC;
}

#[derive(Serialize)]
struct BadTopic;

impl Event for BadTopic {
    const TYPE: &'static str = "test.tick";
    const TOPIC: &'static str = "no topic";
}

#[derive(Serialize)]
struct BadKey;

impl Event for BadKey {
    const TYPE: &'static str = "test.tick";
    const TOPIC: &'static str = TOPIC;
    fn key(&self) -> Option<Cow<'_, str>> {
        Some("a\0b".into())
    }
}

struct Unwritable;

impl Serialize for Unwritable {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("no"))
    }
}

impl Event for Unwritable {
    const TYPE: &'static str = "test.tick";
    const TOPIC: &'static str = TOPIC;
}

async fn outbox_rows(world: &World) -> usize {
    count(&world.producer, "{t}outbox").await
}

async fn a_refused_event_leaves_the_transaction_usable(world: World) {
    let outbox = world.outbox();
    tables::query(&world.producer, "CREATE TABLE own (x int)").await;
    let message = |change: fn(&mut Message)| {
        let mut m = Tick::new("a", 1).message("test.tick");
        change(&mut m);
        m
    };
    let cases: Vec<(Message, Kind, &str)> = vec![
        (message(|m| m.topic = "a b".into()), Kind::Invalid, "topic"),
        (message(|m| m.kind = "a..b".into()), Kind::Invalid, "type"),
        (
            message(|m| m.key = Some("a\nb".into())),
            Kind::Invalid,
            "key",
        ),
        (
            message(|m| m.key = Some("k".repeat(1_025))),
            Kind::TooLarge,
            "1025 bytes",
        ),
        (
            message(|m| m.id = "not-a-uuid".into()),
            Kind::Invalid,
            "UUID",
        ),
        (message(|m| m.id = String::new()), Kind::Invalid, "id"),
        (
            message(|m| m.payload = Some(vec![b'x'; 983_041].into())),
            Kind::TooLarge,
            "983041 bytes; at most 983040",
        ),
        (
            message(|m| drop(m.headers.insert("BCC".into(), "x".into()))),
            Kind::Invalid,
            "reserved",
        ),
        (
            message(|m| drop(m.headers.insert("a b".into(), "x".into()))),
            Kind::Invalid,
            "header",
        ),
        (
            message(|m| drop(m.headers.insert("a".into(), "\r".into()))),
            Kind::Invalid,
            "\"a\"",
        ),
        (
            message(|m| drop(m.attributes.insert("Id".into(), "x".into()))),
            Kind::Invalid,
            "Id",
        ),
        (
            message(|m| drop(m.attributes.insert("dataversion".into(), "-1".into()))),
            Kind::Invalid,
            "dataversion",
        ),
    ];
    world
        .transact(&outbox, true, async |mut c| {
            own(c.reborrow()).await;
            for (message, kind, text) in cases {
                let refused = outbox.enqueue_message(c.reborrow(), message).await;
                let error = refused.expect_err(text);
                assert_eq!(error.kind(), kind, "{error}");
                assert!(error.to_string().contains(text), "{text:?} in {error}");
                assert!(!error.is_temporary());
                assert!(!error.to_string().contains("xxx"), "no payload in an error");
            }
            let large = Large {
                text: "x".repeat(1_000_000),
            };
            let refused = outbox.enqueue(c.reborrow(), &large).await.map(drop);
            assert_eq!(refused.expect_err("large").kind(), Kind::TooLarge);
            let refused = outbox.enqueue(c.reborrow(), &BadTopic).await.map(drop);
            assert_eq!(refused.expect_err("topic").kind(), Kind::Invalid);
            let refused = outbox.enqueue(c.reborrow(), &BadKey).await.map(drop);
            assert_eq!(refused.expect_err("key").kind(), Kind::Invalid);
            let refused = outbox.enqueue(c.reborrow(), &Unwritable).await.map(drop);
            assert_eq!(refused.expect_err("JSON").kind(), Kind::Invalid);
            let id = outbox
                .enqueue(c.reborrow(), &Tick::new("a", 1))
                .await
                .expect("a good one");
            assert_eq!(id.get_version_num(), 7);
            own(c).await;
        })
        .await;
    assert_eq!(outbox_rows(&world).await, 1);
    assert_eq!(count(&world.producer, "own").await, 2);
    // Smaller limits are the caller's to set.
    let strict = outbox.clone().with_limits(Limits {
        payload: 8,
        ..Limits::default()
    });
    world
        .transact(&strict, true, async |c| {
            let refused = strict.enqueue(c, &Tick::new("a", 1)).await.map(drop);
            assert_eq!(refused.expect_err("large").kind(), Kind::TooLarge);
        })
        .await;
}

async fn own(connection: Connection<'_>) {
    let sql = "INSERT INTO own VALUES (1)";
    match connection {
        Connection::Postgres(c) => drop(sqlx::query(sql).execute(c).await.expect("own")),
        Connection::Sqlite(c) => drop(sqlx::query(sql).execute(c).await.expect("own")),
    }
}

async fn many_are_written_all_or_none(world: World) {
    let outbox = world.outbox();
    let large = |bytes: usize| Large {
        text: "x".repeat(bytes),
    };
    world
        .transact(&outbox, true, async |mut c| {
            let events = [large(1), large(1_000_000), large(1)];
            let refused = outbox.enqueue_all(c.reborrow(), &events).await;
            assert_eq!(
                refused.expect_err("one is too large").kind(),
                Kind::TooLarge
            );
            let nothing: [Large; 0] = [];
            let none = outbox.enqueue_all(c.reborrow(), &nothing).await;
            assert!(none.expect("none").is_empty());
            let ids = outbox
                .enqueue_all(c, &[large(1), large(2)])
                .await
                .expect("two");
            assert!(ids[0] < ids[1], "in their order");
        })
        .await;
    assert_eq!(outbox_rows(&world).await, 2);
}

async fn a_connection_without_a_transaction_is_refused(world: World) {
    let outbox = world.outbox();
    macro_rules! bare {
        ($pool:expr) => {{
            let mut connection = $pool.acquire().await.expect("a connection");
            for begin in ["SELECT 1", "BEGIN"] {
                // A transaction that was begun by hand is not seen: nobody could tell that it is one.
                sqlx::raw_sql(begin).execute(&mut *connection).await.expect(begin);
                let refused = outbox.enqueue(&mut *connection, &Tick::new("a", 1)).await;
                let error = refused.expect_err("no transaction");
                assert_eq!(error.kind(), Kind::Invalid);
                assert!(error.to_string().contains("no transaction is open"), "{error}");
            }
            sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await.expect("usable");
            let mut tx = sqlx::Connection::begin(&mut *connection).await.expect("begin");
            outbox.enqueue(&mut *tx, &Tick::new("a", 1)).await.expect("inside one");
            tx.commit().await.expect("commit");
        }};
    }
    match world.producer.pool().expect("a pool") {
        Pool::Postgres(pool) => bare!(pool),
        Pool::Sqlite(pool) => bare!(pool),
    }
    assert_eq!(outbox_rows(&world).await, 1);
}

async fn a_schema_that_is_not_there_names_migrate(world: World) {
    let pool = world.producer.pool().expect("a pool");
    let other = pillarbox_core::Database::in_schema(pool, "elsewhere").expect("a name");
    let outbox = Outbox::new(&other);
    world
        .transact(&outbox, false, async |c| {
            let refused = outbox.enqueue(c, &Tick::new("a", 1)).await;
            let error = refused.expect_err("no table");
            assert_eq!(error.kind(), Kind::NotMigrated, "{error}");
            assert!(error.to_string().contains("pillarbox::migrate"), "{error}");
        })
        .await;
    let relay = world.relay(&outbox).run_until(std::future::pending()).await;
    let error = relay.expect_err("no schema");
    assert_eq!(error.kind(), Kind::NotMigrated);
    assert!(error.to_string().contains("pillarbox::migrate"), "{error}");
    let consumer = || {
        let transport = world.transport.clone();
        pillarbox_core::Consumer::new(&other, transport, "g")
            .on::<Tick>(pillarbox_tests::TickHandler::new())
    };
    let error = consumer().bind().await.expect_err("no schema");
    assert!(error.to_string().contains("pillarbox::migrate"), "{error}");
    let error = consumer()
        .run_until(std::future::pending())
        .await
        .expect_err("no schema");
    assert_eq!(error.kind(), Kind::NotMigrated);
    // A database that was never migrated at all.
    let folder = tempfile::TempDir::new().expect("a folder");
    let empty = connect(&format!(
        "sqlite://{}",
        folder.path().join("empty").display()
    ));
    let relay = world
        .relay(&Outbox::new(&empty))
        .run_until(std::future::pending())
        .await;
    assert_eq!(relay.expect_err("no schema").kind(), Kind::NotMigrated);
}
