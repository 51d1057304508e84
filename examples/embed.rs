//! An outbox in a program with a PostgreSQL pool of its own, and a relay to RabbitMQ.
//!
//! ```text
//! DATABASE_URL=postgres://… AMQP_URL=amqp://… cargo run --example embed
//! ```

#![allow(clippy::print_stdout)]

use std::sync::Arc;

use pillarbox::{Event, Outbox, Relay, amqp};
use sqlx::PgPool;

#[derive(serde::Serialize)]
struct OrderPlaced {
    order: i64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "shop.order.placed";
    const TOPIC: &'static str = "shop.events";

    // Events with equal keys stay in order.
    fn key(&self) -> Option<std::borrow::Cow<'_, str>> {
        Some(self.order.to_string().into())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
    pillarbox::migrate(&pool).await?;
    let outbox = Outbox::new(&pool);

    let mut config = amqp::Config::new(std::env::var("AMQP_URL")?);
    // Without a queue that wants the type, the event would have nowhere to go.
    let queue = amqp::Queue::new("shop.events", "billing", [OrderPlaced::TYPE]);
    config.queues.insert("shop.events.billing".into(), queue);
    let rabbitmq = Arc::new(amqp::Amqp::new(config)?);
    let relay = Relay::new(&outbox, rabbitmq).source("shop").spawn();

    let mut tx = pool.begin().await?;
    // … the program's own writes, in the same transaction …
    let id = outbox.enqueue(&mut tx, &OrderPlaced { order: 7 }).await?;
    tx.commit().await?;
    outbox.wake();
    println!("committed event {id}; Ctrl-C ends the relay, after what is under way is confirmed");

    tokio::signal::ctrl_c().await?;
    Ok(relay.shutdown().await?)
}
