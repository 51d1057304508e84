//! Enqueue through tokio-postgres, in the transaction that it has open.
//!
//! ```text
//! DATABASE_URL=postgres://… cargo run -p pillarbox-drivers --bin tokio_postgres
//! ```

#![allow(clippy::print_stdout)]

use pillarbox::{Insert, Outbox, Param, transport::Message};
use tokio_postgres::{
    NoTls, Transaction,
    types::{ToSql, Type},
};
use uuid::Uuid;

/// Runs the outbox's statement. The parameters say their types, so that the server need not be asked for them.
async fn enqueue(tx: &Transaction<'_>, insert: Insert<'_>) -> Result<(), tokio_postgres::Error> {
    let params: Vec<(&(dyn ToSql + Sync), Type)> = insert
        .params
        .iter()
        .map(|param| match param {
            Param::Text(text) => (text as &(dyn ToSql + Sync), Type::TEXT),
            Param::Bigint(number) => (number as _, Type::INT8),
            Param::Bytea(bytes) => (bytes as _, Type::BYTEA),
        })
        .collect();
    tx.query_typed(insert.sql, &params).await.map(drop)
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
    let url = std::env::var("DATABASE_URL")?;
    // The outbox needs a pool for nothing but its name and dialect: a lazy one never connects. Who migrates elsewhere
    // (`pillarbox migrate`) can do without the two lines that do.
    let pool = sqlx::PgPool::connect_lazy(&url)?;
    pillarbox::migrate(&pool).await?;
    let outbox = Outbox::new(&pool);

    let (mut client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    let connection = tokio::spawn(connection);
    client
        .batch_execute("CREATE TABLE IF NOT EXISTS placed (id bigint PRIMARY KEY)")
        .await?;

    // Rolled back: neither the order nor its event.
    let tx = client.transaction().await?;
    tx.execute("INSERT INTO placed VALUES (1)", &[]).await?;
    enqueue(&tx, outbox.insert(&placed(1))?).await?;
    tx.rollback().await?;

    // Committed: both.
    let message = placed(2);
    let tx = client.transaction().await?;
    tx.execute("INSERT INTO placed VALUES (2)", &[]).await?;
    enqueue(&tx, outbox.insert(&message)?).await?;
    tx.commit().await?;
    println!("committed event {}", message.id);

    drop(client);
    connection.await??;
    Ok(())
}
