//! Events that come from outside the library, and events that handlers make of events.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, PoisonError},
};

use pillarbox_core::{
    Connection, Context, Delivery, Event, Failure, Handler, Outbox, Param, Relay,
};
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, in_both_worlds, on_servers_alone,
    tables::{self, count},
    until,
};
use pillarbox_transport::Message;
use serde::{Deserialize, Serialize};

use crate::retry;

in_both_worlds!(
    what_a_handler_enqueues_commits_with_its_effect,
    a_statement_for_another_driver_is_an_enqueue,
    a_plain_insert_is_an_enqueue,
);
on_servers_alone!(the_schemas_functions_enqueue_for_any_language);

/// The answer to a tick.
#[derive(Debug, Serialize, Deserialize)]
struct Tock {
    key: String,
    n: u32,
}

impl Event for Tock {
    const TYPE: &'static str = "test.tock";
    const TOPIC: &'static str = "test.answers";
    fn key(&self) -> Option<Cow<'_, str>> {
        Some(self.key.as_str().into())
    }
}

/// Answers each tick, and fails once after that.
struct Answer;

impl Handler<Tick> for Answer {
    async fn handle(&self, d: Delivery<Tick>, cx: &mut Context<'_>) -> Result<(), Failure> {
        let key = d.event.key.clone().unwrap_or_default();
        cx.enqueue(&Tock { key, n: d.event.n }).await?;
        if d.event.n == 2 && d.attempts == 0 {
            return Err(std::io::Error::other("after it was enqueued").into());
        }
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Message>>>);

impl Seen {
    fn all(&self) -> Vec<Message> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Handler<Tock> for Seen {
    async fn handle(&self, d: Delivery<Tock>, _: &mut Context<'_>) -> Result<(), Failure> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(d.message);
        Ok(())
    }
}

async fn what_a_handler_enqueues_commits_with_its_effect(world: World) {
    let outbox = world.outbox().with_attribute("correlationid", "the-order");
    let answers = Outbox::new(&world.consumer);
    let consumer = world
        .group_of(&world.group)
        .on::<Tick>(Answer)
        .retry(retry(&[50]));
    let way = world.start(&outbox, consumer.outbox(&answers)).await;
    let seen = Seen::default();
    let mut reader = world.group_of("answers").on::<Tock>(seen.clone());
    reader.bind().await.expect("bind");
    let reader = reader.spawn();
    let back = Relay::new(&answers, world.transport.clone())
        .source("consumer")
        .settings(World::relay_settings())
        .spawn();
    let ticks: Vec<Tick> = (1..=5).map(|n| Tick::new("a", n)).collect();
    world.commit(&outbox, &ticks).await;
    until("five answers", async || seen.all().len() >= 5).await;
    way.stop().await;
    back.shutdown().await.expect("relay");
    reader.shutdown().await.expect("consumer");

    assert_eq!(
        count(&world.consumer, "{t}outbox").await,
        5,
        "one was undone with its handler"
    );
    let log = tables::log(&world.producer).await;
    let seen = seen.all();
    assert_eq!(seen.len(), 5);
    for (message, tick) in seen.iter().zip(&log) {
        let body: Tock = serde_json::from_slice(message.payload.as_deref().unwrap_or_default())
            .expect("an answer");
        assert_eq!(Some(body.n), tick.n, "in order");
        assert_eq!(message.attribute("causationid"), Some(tick.id.as_str()));
        assert_eq!(message.attribute("correlationid"), Some("the-order"));
        assert_eq!(message.source(), "consumer");
        assert_eq!(message.key.as_deref(), Some("a"));
    }
}

async fn a_statement_for_another_driver_is_an_enqueue(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let message = Tick::new("a", 1)
        .message("test.tick")
        .with_header("mine", "x");
    let insert = outbox.insert(&message).expect("a statement");
    macro_rules! run {
        ($connection:expr) => {{
            let mut query = sqlx::query(sqlx::AssertSqlSafe(insert.sql));
            for param in insert.params {
                query = match param {
                    Param::Text(text) => query.bind(text),
                    Param::Bigint(number) => query.bind(number),
                    Param::Bytea(bytes) => query.bind(bytes),
                };
            }
            query.execute($connection).await.expect("an insert");
        }};
    }
    world
        .transact(&outbox, true, async |c| match c {
            Connection::Postgres(c) => run!(c),
            Connection::Sqlite(c) => run!(c),
        })
        .await;
    world.until_effects(1).await;
    way.stop().await;
    assert_eq!(world.effects().await[0].id, message.id);
    let bad = Tick::new("a", 1).message("no type");
    assert!(outbox.insert(&bad).is_err(), "the same checks");
}

/// The least that a writer gives; the rest has defaults.
async fn a_plain_insert_is_an_enqueue(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    for n in 1..=2 {
        let text = format!("'{{\"key\":null,\"n\":{n}}}'");
        let payload = if tables::is_postgres(&world.producer) {
            format!("convert_to({text}, 'UTF8')")
        } else {
            format!("CAST({text} AS BLOB)")
        };
        let sql = format!(
            "INSERT INTO {{t}}outbox (topic, type, payload) VALUES ('{TOPIC}', 'test.tick', {payload})"
        );
        tables::query(&world.producer, &sql).await;
    }
    world.until_effects(2).await;
    way.stop().await;
    let effects = world.effects().await;
    for effect in &effects {
        uuid::Uuid::parse_str(&effect.id).expect("an id of the database's");
    }
    assert_ne!(effects[0].id, effects[1].id);
}

async fn the_schemas_functions_enqueue_for_any_language(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let calls = [
        format!(
            "SELECT CAST({{t}}enqueue(topic => '{TOPIC}', type => 'test.tick', key => 'sku-1', \
             payload => '{{\"key\": \"sku-1\", \"n\": 1}}'::jsonb, headers => '{{\"mine\": \"x\"}}'::jsonb) AS text)"
        ),
        format!(
            "SELECT CAST({{t}}enqueue_bytes(topic => '{TOPIC}', type => 'test.tick', key => 'sku-1', \
             payload => convert_to('{{\"key\": \"sku-1\", \"n\": 2}}', 'UTF8'), \
             content_type => 'application/json') AS text)"
        ),
    ];
    let mut ids = Vec::new();
    for call in calls {
        let rows = tables::query(&world.producer, &call).await;
        ids.extend(rows[0][0].clone());
    }
    world.until_effects(2).await;
    way.stop().await;
    let effects = world.effects().await;
    assert_eq!(
        effects.iter().map(|e| e.id.clone()).collect::<Vec<_>>(),
        ids
    );
    assert_eq!(effects.iter().map(|e| e.n).collect::<Vec<_>>(), [1, 2]);
}
