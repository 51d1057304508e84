//! A consumer whose handler writes to PostgreSQL: once for each event, in order for each key, however often RabbitMQ
//! delivers it. `embed` sends what this one receives.
//!
//! ```text
//! DATABASE_URL=postgres://… AMQP_URL=amqp://… cargo run --example consume
//! ```

#![allow(clippy::print_stdout)]

use std::sync::Arc;

use pillarbox::{Connection, Consumer, Context, Delivery, Event, Failure, Handler, amqp};
use sqlx::PgPool;

#[derive(serde::Deserialize)]
struct OrderPlaced {
    order: i64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "shop.order.placed";
    const TOPIC: &'static str = "shop.events";
}

struct Bill;

impl Handler<OrderPlaced> for Bill {
    async fn handle(
        &self,
        delivery: Delivery<OrderPlaced>,
        cx: &mut Context<'_>,
    ) -> Result<(), Failure> {
        let order = delivery.event.order;
        if order < 0 {
            return Err(Failure::reject("an order's number is not below 0"));
        }
        // Refutable only where both databases are compiled in.
        #[allow(irrefutable_let_patterns)]
        let Connection::Postgres(tx) = cx.tx() else {
            return Err(Failure::reject("this program is on PostgreSQL"));
        };
        // Commits together with the note that this event was applied; an error is tried again by the schedule.
        sqlx::query("INSERT INTO bills (for_order) VALUES ($1)")
            .bind(order)
            .execute(tx)
            .await?;
        println!("billed order {order}");
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
    pillarbox::migrate(&pool).await?;
    sqlx::raw_sql("CREATE TABLE IF NOT EXISTS bills (for_order bigint)")
        .execute(&pool)
        .await?;

    let rabbitmq = amqp::Amqp::new(amqp::Config::new(std::env::var("AMQP_URL")?))?;
    Consumer::new(&pool, Arc::new(rabbitmq), "billing")
        .on::<OrderPlaced>(Bill)
        .run_until(async { drop(tokio::signal::ctrl_c().await) })
        .await?;
    Ok(())
}
