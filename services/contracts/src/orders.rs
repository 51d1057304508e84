//! The events of the orders service. Their key is the order.

use std::borrow::Cow;

use pillarbox::Event;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, serde::rfc3339};
use uuid::Uuid;

use crate::{ProductId, Quantity, schema::timestamp};

/// The topic of all orders events.
pub const ORDERS_TOPIC: &str = "orders.events";

/// What all four events say of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub struct OrderFacts {
    /// The order.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// The product.
    pub product_id: ProductId,
    /// How much of it.
    pub quantity: Quantity,
    /// Why, where there is something to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(max = 200))]
    pub reason: Option<String>,
    /// When.
    #[serde(with = "rfc3339")]
    #[schemars(schema_with = "timestamp")]
    pub at: OffsetDateTime,
}

macro_rules! order_event {
    ($(#[$doc:meta])* $event:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(transparent)]
        pub struct $event(pub OrderFacts);

        impl Event for $event {
            const TYPE: &'static str = $kind;
            const TOPIC: &'static str = ORDERS_TOPIC;

            fn key(&self) -> Option<Cow<'_, str>> {
                Some(self.0.order_id.to_string().into())
            }
        }
    };
}

order_event!(
    /// An order was placed.
    OrderCreated,
    "orders.order.created"
);
order_event!(
    /// An order was confirmed: its stock has left.
    OrderConfirmed,
    "orders.order.confirmed"
);
order_event!(
    /// An order failed: it could not be reserved, or not be kept. Whatever it holds is to be given back.
    OrderFailed,
    "orders.order.failed"
);
order_event!(
    /// An order was cancelled. Whatever it holds is to be given back.
    OrderCancelled,
    "orders.order.cancelled"
);
