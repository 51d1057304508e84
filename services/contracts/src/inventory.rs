//! The events of the inventory service. Their key is the product: what happens to one product's stock stays in order.

use std::borrow::Cow;

use pillarbox::Event;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, serde::rfc3339};
use uuid::Uuid;

use crate::{ProductId, Quantity, schema::timestamp, values::words};

/// The topic of all inventory events.
pub const INVENTORY_TOPIC: &str = "inventory.events";

/// A reservation was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StockReserved {
    /// The reservation.
    pub reservation_id: Uuid,
    /// The order it was made for.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// The product.
    pub product_id: ProductId,
    /// How much is held.
    pub quantity: Quantity,
    /// Until when it is held.
    #[serde(with = "rfc3339")]
    #[schemars(schema_with = "timestamp")]
    pub expires_at: OffsetDateTime,
}

/// A reservation was confirmed: its stock has left for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StockConfirmed {
    /// The reservation.
    pub reservation_id: Uuid,
    /// The order it was made for.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// The product.
    pub product_id: ProductId,
    /// How much has left.
    pub quantity: Quantity,
    /// When.
    #[serde(with = "rfc3339")]
    #[schemars(schema_with = "timestamp")]
    pub confirmed_at: OffsetDateTime,
}

/// A reservation was given back: its stock can be reserved again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StockReleased {
    /// The reservation.
    pub reservation_id: Uuid,
    /// The order it was made for.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// The product.
    pub product_id: ProductId,
    /// How much was given back.
    pub quantity: Quantity,
    /// When.
    #[serde(with = "rfc3339")]
    #[schemars(schema_with = "timestamp")]
    pub released_at: OffsetDateTime,
    /// Why.
    pub reason: ReleaseReason,
}

words! {
    /// Why a reservation was given back.
    #[derive(Default)]
    pub enum ReleaseReason {
        /// Somebody asked the inventory service.
        #[default]
        ManualRelease = "manual_release",
        /// It was not confirmed in time.
        Expired = "expired",
        /// Its order ended without it.
        OrderCancelled = "order_cancelled",
    }
}

/// A reservation was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StockFailed {
    /// The order it was asked for.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// The product, which may be unknown.
    pub product_id: ProductId,
    /// How much was asked for.
    pub requested: Quantity,
    /// How much could have been reserved.
    #[schemars(range(max = crate::MAX_STOCK))]
    pub available: u64,
    /// Why.
    pub reason: Refusal,
}

words! {
    /// Why a reservation was refused.
    pub enum Refusal {
        /// Less is available than was asked for.
        InsufficientStock = "insufficient_stock",
        /// There is no such product.
        UnknownProduct = "unknown_product",
        /// The order has ended: the request came late.
        OrderEnded = "order_ended",
        /// The order has a live reservation of another quantity of this product.
        AlreadyReserved = "already_reserved",
    }
}

/// A product ran out: nothing is available after a reservation, or nothing is left after a confirmation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StockDepleted {
    /// The product.
    pub product_id: ProductId,
    /// The order that took the last of it.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// When.
    #[serde(with = "rfc3339")]
    #[schemars(schema_with = "timestamp")]
    pub depleted_at: OffsetDateTime,
    /// How much there was before.
    pub last_quantity: Quantity,
}

/// A restock arrived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StockReplenished {
    /// The product.
    pub product_id: ProductId,
    /// How much arrived.
    pub quantity: Quantity,
    /// How much can be reserved now.
    #[schemars(range(max = crate::MAX_STOCK))]
    pub available: u64,
}

macro_rules! stock_event {
    ($event:ty, $kind:literal) => {
        impl Event for $event {
            const TYPE: &'static str = $kind;
            const TOPIC: &'static str = INVENTORY_TOPIC;

            fn key(&self) -> Option<Cow<'_, str>> {
                Some(self.product_id.as_str().into())
            }
        }
    };
}

stock_event!(StockReserved, "inventory.stock.reserved");
stock_event!(StockConfirmed, "inventory.stock.confirmed");
stock_event!(StockReleased, "inventory.stock.released");
stock_event!(StockFailed, "inventory.stock.failed");
stock_event!(StockDepleted, "inventory.stock.depleted");
stock_event!(StockReplenished, "inventory.stock.replenished");
