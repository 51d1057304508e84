//! What the use cases ask of a database. It is implemented on the connections themselves, so that the same statements
//! serve a request's transaction and a handler's.

mod postgres;
mod sqlite;

use async_trait::async_trait;
use pillarbox::Connection;
use pillarbox_contracts::{ProductId, Quantity, http::ProductStock};
use pillarbox_host::Migrations;
use time::OffsetDateTime;
use uuid::Uuid;

/// The service's own tables.
pub const MIGRATIONS: Migrations = Migrations {
    service: "inventory",
    postgres: &[include_str!("../../migrations/1_postgres.sql")],
    sqlite: &[include_str!("../../migrations/1_sqlite.sql")],
};

/// The stock of a product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// Its name.
    pub id: ProductId,
    /// What is in the house, held or not.
    pub quantity: u64,
    /// What of it is held for reservations.
    pub held: u64,
}

impl Product {
    /// What can be reserved.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.quantity.saturating_sub(self.held)
    }
}

impl From<Product> for ProductStock {
    fn from(product: Product) -> Self {
        Self {
            available: product.available(),
            product_id: product.id,
            quantity: product.quantity,
            held: product.held,
        }
    }
}

/// A reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// Its name.
    pub id: Uuid,
    /// For which order.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// Of which product.
    pub product_id: ProductId,
    /// How much of it.
    pub quantity: Quantity,
    /// Whether it still holds its stock.
    pub state: State,
    /// Until when it does.
    pub expires_at: OffsetDateTime,
}

/// What became of a reservation. It leaves `Held` once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its stock is held.
    Held,
    /// Its stock has left.
    Confirmed,
    /// Its stock was given back.
    Released,
}

impl State {
    const ALL: [Self; 3] = [Self::Held, Self::Confirmed, Self::Released];

    fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Confirmed => "confirmed",
            Self::Released => "released",
        }
    }

    fn read(word: &str) -> sqlx::Result<Self> {
        let state = Self::ALL.into_iter().find(|state| state.as_str() == word);
        state.ok_or_else(|| unreadable(format!("the reservation state {word:?}")))
    }
}

/// An event that was applied.
#[derive(Debug)]
pub struct Effect<'a> {
    /// The event.
    pub event_id: &'a str,
    /// Its type.
    pub event_type: &'a str,
    /// The order that it ended.
    pub order_id: Uuid,
    /// How much stock was given back.
    pub released: u64,
    /// When.
    pub applied_at: OffsetDateTime,
}

/// The statements. `lock_…` holds the row until the transaction ends.
#[async_trait]
pub trait Repository: Send {
    /// Adds a product; false if there is one of that name.
    async fn add_product(&mut self, id: &ProductId, quantity: u64) -> sqlx::Result<bool>;

    /// Looks at a product.
    async fn product(&mut self, id: &ProductId) -> sqlx::Result<Option<Product>>;

    /// Locks a product. Every change of its stock does so first: then the events of the product come in commit order.
    async fn lock_product(&mut self, id: &ProductId) -> sqlx::Result<Option<Product>>;

    /// Compare-and-set of a product's stock; false if it is not what it was.
    async fn change_stock(&mut self, was: &Product, now: &Product) -> sqlx::Result<bool>;

    /// Locks an order, making its row where it has none. True if it has ended.
    async fn lock_order(&mut self, id: Uuid) -> sqlx::Result<bool>;

    /// Remembers that an order has ended, and by which event type first.
    async fn end_order(&mut self, id: Uuid, by: &str) -> sqlx::Result<()>;

    /// The order's reservation of a product that is held or confirmed.
    async fn live_reservation(
        &mut self,
        order: Uuid,
        product: &ProductId,
    ) -> sqlx::Result<Option<Reservation>>;

    /// Looks at a reservation.
    async fn reservation(&mut self, id: Uuid) -> sqlx::Result<Option<Reservation>>;

    /// Adds a reservation.
    async fn add_reservation(&mut self, reservation: &Reservation) -> sqlx::Result<()>;

    /// Compare-and-set from held to an end; false if it has ended already.
    async fn end_reservation(
        &mut self,
        id: Uuid,
        to: State,
        at: OffsetDateTime,
    ) -> sqlx::Result<bool>;

    /// Notes that a restock has arrived.
    async fn add_restock(
        &mut self,
        product: &ProductId,
        quantity: Quantity,
        at: OffsetDateTime,
    ) -> sqlx::Result<()>;

    /// Notes that an event was applied.
    async fn add_effect(&mut self, effect: &Effect<'_>) -> sqlx::Result<()>;
}

/// The repository on a connection of either database.
pub fn repository(connection: Connection<'_>) -> &mut dyn Repository {
    match connection {
        Connection::Postgres(connection) => connection,
        Connection::Sqlite(connection) => connection,
    }
}

fn stored(number: u64) -> sqlx::Result<i64> {
    i64::try_from(number).map_err(|e| sqlx::Error::Encode(e.into()))
}

fn number(stored: i64) -> sqlx::Result<u64> {
    u64::try_from(stored).map_err(|_| unreadable(format!("the amount {stored}")))
}

fn quantity(stored: i64) -> sqlx::Result<Quantity> {
    let quantity = u32::try_from(stored).ok().and_then(Quantity::new);
    quantity.ok_or_else(|| unreadable(format!("the quantity {stored}")))
}

fn product_id(stored: String) -> sqlx::Result<ProductId> {
    stored.try_into().map_err(unreadable)
}

fn unreadable(what: String) -> sqlx::Error {
    sqlx::Error::Decode(what.into())
}
