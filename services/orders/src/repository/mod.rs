//! What the use cases and handlers ask of a database. It is implemented on the connections themselves, so that the same
//! statements serve a request's transaction and a handler's.

mod postgres;
mod sqlite;

use async_trait::async_trait;
use pillarbox::Connection;
use pillarbox_contracts::{
    ProductId, Quantity,
    http::{HistoryEntry, Procurement, Status},
};
use pillarbox_host::Migrations;
use time::OffsetDateTime;
use uuid::Uuid;

/// The service's own tables.
pub const MIGRATIONS: Migrations = Migrations {
    service: "orders",
    postgres: &[include_str!("../../migrations/1_postgres.sql")],
    sqlite: &[include_str!("../../migrations/1_sqlite.sql")],
};

/// The most procurement requests that one look shows.
pub(crate) const PROCUREMENTS: i64 = 100;

/// An order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its name.
    pub id: Uuid,
    /// Whose it is.
    pub user_id: Uuid,
    /// Which product.
    pub product_id: ProductId,
    /// How much of it.
    pub quantity: Quantity,
    /// Where it stands.
    pub status: Status,
    /// Why it failed or was cancelled.
    pub reason: Option<String>,
    /// Its reservation, once there is one.
    pub reservation_id: Option<Uuid>,
    /// When it was placed.
    pub created_at: OffsetDateTime,
}

/// A line of the history of an order or a product.
#[derive(Debug)]
pub struct History<'a> {
    /// Of which order; none for what concerns the product alone.
    pub order_id: Option<Uuid>,
    /// Of which product.
    pub product_id: &'a ProductId,
    /// The event that told it: its id and type. None for a request.
    pub event: Option<(&'a str, &'static str)>,
    /// What happened.
    pub what: &'a str,
    /// When.
    pub at: OffsetDateTime,
}

/// The statements. `lock_…` holds the row until the transaction ends.
#[async_trait]
pub trait Repository: Send {
    /// Adds an order.
    async fn add_order(&mut self, order: &Order) -> sqlx::Result<()>;

    /// Looks at an order.
    async fn order(&mut self, id: Uuid) -> sqlx::Result<Option<Order>>;

    /// Locks an order: then its events come in commit order.
    async fn lock_order(&mut self, id: Uuid) -> sqlx::Result<Option<Order>>;

    /// Compare-and-set of an order's status, with reason and reservation; false if the order is not what it was.
    async fn move_order(
        &mut self,
        was: &Order,
        now: &Order,
        at: OffsetDateTime,
    ) -> sqlx::Result<bool>;

    /// Adds a line of history.
    async fn add_history(&mut self, line: &History<'_>) -> sqlx::Result<()>;

    /// An order's history, oldest first.
    async fn history(&mut self, order: Uuid) -> sqlx::Result<Vec<HistoryEntry>>;

    /// Opens a procurement request; false if one is open for the product.
    async fn open_procurement(
        &mut self,
        product: &ProductId,
        event: &str,
        at: OffsetDateTime,
    ) -> sqlx::Result<bool>;

    /// Closes the product's procurement request; false if none is open.
    async fn close_procurement(
        &mut self,
        product: &ProductId,
        event: &str,
        at: OffsetDateTime,
    ) -> sqlx::Result<bool>;

    /// Procurement requests, newest first: of one product, or of all.
    async fn procurements(&mut self, product: Option<&ProductId>)
    -> sqlx::Result<Vec<Procurement>>;
}

/// The repository on a connection of either database.
pub fn repository(connection: Connection<'_>) -> &mut dyn Repository {
    match connection {
        Connection::Postgres(connection) => connection,
        Connection::Sqlite(connection) => connection,
    }
}

fn quantity(stored: i64) -> sqlx::Result<Quantity> {
    let quantity = u32::try_from(stored).ok().and_then(Quantity::new);
    quantity.ok_or_else(|| unreadable(format!("the quantity {stored}")))
}

fn product_id(stored: String) -> sqlx::Result<ProductId> {
    stored.try_into().map_err(unreadable)
}

fn status(stored: &str) -> sqlx::Result<Status> {
    stored.parse().map_err(unreadable)
}

fn unreadable(what: String) -> sqlx::Error {
    sqlx::Error::Decode(what.into())
}
