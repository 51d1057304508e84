//! An effect outside of the database: a mail for each order. No transaction is open while it runs, so it happens at least
//! once; the event's id, as idempotency key, lets the mail server see a repeat. `embed` sends what this one receives.
//!
//! ```text
//! DATABASE_URL=postgres://… AMQP_URL=amqp://… cargo run --example effect
//! ```

#![allow(clippy::print_stdout)]

use std::{sync::Arc, time::Duration};

use pillarbox::{Consumer, ConsumerSettings, Delivery, Effect, Event, Failure, amqp};
use sqlx::PgPool;

#[derive(serde::Deserialize)]
struct OrderPlaced {
    order: i64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "shop.order.placed";
    const TOPIC: &'static str = "shop.events";
}

/// A client of a mail server, which knows the keys of the last days.
struct Mailer;

impl Mailer {
    async fn send(&self, idempotency_key: &str, text: String) -> std::io::Result<()> {
        println!("{idempotency_key}: {text}");
        Ok(())
    }
}

impl Effect<OrderPlaced> for Mailer {
    async fn run(&self, delivery: &Delivery<OrderPlaced>) -> Result<(), Failure> {
        let order = delivery.event.order;
        if order < 0 {
            return Err(Failure::reject("an order's number is not below 0"));
        }
        let sent = self.send(&delivery.message.id, format!("thank you for order {order}"));
        match sent.await {
            // Nobody's fault: it waits, and no attempt is counted.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                Err(Failure::unavailable(e))
            }
            // Anything else is tried again by the schedule, and then a dead letter.
            sent => Ok(sent?),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
    pillarbox::migrate(&pool).await?;
    let rabbitmq = amqp::Amqp::new(amqp::Config::new(std::env::var("AMQP_URL")?))?;
    Consumer::new(&pool, Arc::new(rabbitmq), "mail")
        .on_effect::<OrderPlaced>(Mailer)
        // Mail servers are slow: eight mails at a time, of eight different keys.
        .settings(ConsumerSettings {
            workers: 8,
            effect_timeout: Duration::from_secs(10),
            ..ConsumerSettings::default()
        })
        .run_until(async { drop(tokio::signal::ctrl_c().await) })
        .await?;
    Ok(())
}
