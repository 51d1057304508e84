//! The examples as processes: what their driver rolls back is never sent, what it commits is.
// The bodies stand outside the test functions, where clippy does not know them for tests.
#![allow(clippy::unwrap_used)]

use std::{process::Command, sync::Arc};

use pillarbox::{Outbox, Relay};
use pillarbox_amqp::{Amqp, Config, Queue};
use pillarbox_tests::{World, tables, until, wire::Client};

#[tokio::test]
async fn tokio_postgres_enqueues_in_its_transaction() {
    enqueues(env!("CARGO_BIN_EXE_tokio_postgres")).await;
}

#[tokio::test]
async fn sea_orm_enqueues_in_its_transaction() {
    enqueues(env!("CARGO_BIN_EXE_sea_orm")).await;
}

async fn enqueues(program: &str) {
    let Some(world) = World::servers().await else {
        return;
    };
    let amqp = world.amqp_url.as_deref().unwrap();
    let mut config = Config::new(amqp);
    let queue = Queue::new("shop.events", "tap", ["shop.order.placed"]);
    config.queues.insert("tap".to_owned(), queue);
    let outbox = Outbox::new(&world.producer);
    let relay = Relay::new(&outbox, Arc::new(Amqp::new(config).unwrap())).spawn();

    let mut example = Command::new(program);
    example.env("DATABASE_URL", &world.urls.0);
    let ran = tokio::task::spawn_blocking(move || example.output())
        .await
        .unwrap()
        .unwrap();
    assert!(ran.status.success(), "{ran:?}");
    let out = String::from_utf8(ran.stdout).unwrap();
    let id = out.trim().strip_prefix("committed event ").unwrap();

    until("the cursor has passed", async || {
        outbox.backlog().await.unwrap().events == 0
    })
    .await;
    relay.shutdown().await.unwrap();
    let arrived = Client::connect(amqp).await.drain("tap").await;
    let [event] = &arrived[..] else {
        panic!("{arrived:?}")
    };
    assert_eq!(event.id, id);
    assert_eq!(event.body, br#"{"order":2}"#);
    assert_eq!(event.key.as_deref(), Some("2"));
    assert_eq!(event.attribute("source"), Some("shop"));
    assert_eq!(event.attribute("dataversion"), Some("1"));
    let orders = tables::query(&world.producer, "SELECT CAST(id AS TEXT) FROM placed").await;
    assert_eq!(orders, [[Some("2".to_owned())]]);
}
