//! Enqueue through a driver that Pillarbox does not know: the outbox makes the statement and its parameters, the driver
//! runs it in the transaction that it has open.
//!
//! ```text
//! DATABASE_URL=postgres://… cargo run --example any_driver
//! ```

#![allow(clippy::print_stdout)]

use pillarbox::{Insert, Outbox, Param, transport::Message};

/// Stands for `execute` of the other driver.
async fn execute(connection: &mut sqlx::PgConnection, insert: Insert<'_>) -> sqlx::Result<()> {
    let mut query = sqlx::query(sqlx::AssertSqlSafe(insert.sql.to_owned()));
    for param in insert.params {
        query = match param {
            Param::Text(text) => query.bind(text),
            Param::Bigint(number) => query.bind(number),
            Param::Bytea(bytes) => query.bind(bytes),
        };
    }
    query.execute(connection).await.map(drop)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = sqlx::PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
    pillarbox::migrate(&pool).await?;
    let outbox = Outbox::new(&pool);

    // The id must be a UUID, fresh for each event.
    let id: String = sqlx::query_scalar("SELECT gen_random_uuid()::text")
        .fetch_one(&pool)
        .await?;
    let message = Message::new(
        id.as_str(),
        "shop.events",
        "shop.order.placed",
        r#"{"order":7}"#,
    )
    .with_key("7")
    .with_attribute("source", "shop")
    .with_attribute("datacontenttype", "application/json");

    let mut tx = pool.begin().await?;
    execute(&mut tx, outbox.insert(&message)?).await?;
    tx.commit().await?;
    println!("committed event {id}");
    Ok(())
}
