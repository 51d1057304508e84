//! Enqueue through SeaORM, in the transaction that it has open.
//!
//! ```text
//! DATABASE_URL=postgres://… cargo run -p pillarbox-drivers --bin sea_orm
//! ```

#![allow(clippy::print_stdout)]

use pillarbox::{Insert, Outbox, Param, transport::Message};
use sea_orm::{
    ConnectionTrait, Database, DbBackend, DbErr, Statement, TransactionTrait as _, Value,
};
use uuid::Uuid;

/// Runs the outbox's statement on anything that takes statements: inside a transaction, that.
async fn enqueue(tx: &impl ConnectionTrait, insert: Insert<'_>) -> Result<(), DbErr> {
    let values = insert.params.into_iter().map(|param| match param {
        Param::Text(text) => Value::from(text),
        Param::Bigint(number) => Value::from(number),
        Param::Bytea(bytes) => Value::from(bytes),
    });
    let statement = Statement::from_sql_and_values(DbBackend::Postgres, insert.sql, values);
    tx.execute_raw(statement).await.map(drop)
}

/// An event with a fresh id.
fn placed(order: i64) -> Message {
    let payload = format!(r#"{{"order":{order}}}"#);
    Message::new(
        Uuid::now_v7().to_string(),
        "shop.events",
        "shop.order.placed",
        payload,
    )
    .with_key(order.to_string())
    .with_attribute("source", "shop")
    .with_attribute("datacontenttype", "application/json")
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let database = Database::connect(std::env::var("DATABASE_URL")?).await?;
    // SeaORM's own pool is one of sqlx.
    let pool = database.get_postgres_connection_pool();
    pillarbox::migrate(pool).await?;
    let outbox = Outbox::new(pool);
    database
        .execute_unprepared("CREATE TABLE IF NOT EXISTS placed (id bigint PRIMARY KEY)")
        .await?;

    // Rolled back: neither the order nor its event.
    let tx = database.begin().await?;
    tx.execute_unprepared("INSERT INTO placed VALUES (1)")
        .await?;
    enqueue(&tx, outbox.insert(&placed(1))?).await?;
    tx.rollback().await?;

    // Committed: both.
    let message = placed(2);
    let tx = database.begin().await?;
    tx.execute_unprepared("INSERT INTO placed VALUES (2)")
        .await?;
    enqueue(&tx, outbox.insert(&message)?).await?;
    tx.commit().await?;
    println!("committed event {}", message.id);
    Ok(())
}
