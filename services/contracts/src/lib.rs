//! What the inventory and orders services say to each other: their events, with JSON Schemas, and the bodies of their
//! HTTP calls.
//!
//! Holds no behaviour of either service. A change here is a change of the wire: the published schemas in
//! `docs/reference/schemas` are held equal to these types by a test.

pub mod http;
mod inventory;
mod orders;
mod schema;
mod values;

pub use inventory::{
    INVENTORY_TOPIC, Refusal, ReleaseReason, StockConfirmed, StockDepleted, StockFailed,
    StockReleased, StockReplenished, StockReserved,
};
pub use orders::{
    ORDERS_TOPIC, OrderCancelled, OrderConfirmed, OrderCreated, OrderFacts, OrderFailed,
};
pub use schema::{Published, check, published};
pub use values::{MAX_STOCK, ProductId, Quantity};
