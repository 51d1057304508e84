//! The bodies of the services' HTTP calls.

use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, serde::rfc3339};
use uuid::Uuid;

use crate::{ProductId, Quantity, Refusal, ReleaseReason, values::words};

/// What every call answers that does not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What was wrong, in a sentence.
    pub error: String,
}

/// `POST /products`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewProduct {
    /// Its name.
    pub product_id: ProductId,
    /// What there is of it at first; may be 0.
    pub quantity: u64,
}

/// `GET /products/{id}`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProductStock {
    /// Its name.
    pub product_id: ProductId,
    /// What is in the house, held or not.
    pub quantity: u64,
    /// What of it is held for reservations.
    pub held: u64,
    /// What can be reserved.
    pub available: u64,
}

/// `GET /products/{id}/availability?quantity=`: advice, no promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Availability {
    /// Its name.
    pub product_id: ProductId,
    /// How much was asked about.
    pub quantity: Quantity,
    /// What can be reserved now.
    pub available: u64,
    /// Whether that is enough.
    pub sufficient: bool,
}

/// `POST /products/{id}/restock`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Restock {
    /// How much arrived.
    pub quantity: Quantity,
}

/// `POST /reservations`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Reserve {
    /// For which order.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// Which product.
    pub product_id: ProductId,
    /// How much of it.
    pub quantity: Quantity,
}

/// `POST /reservations` answered 201.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reserved {
    /// The reservation.
    pub reservation_id: Uuid,
    /// Until when it is held.
    #[serde(with = "rfc3339")]
    pub expires_at: OffsetDateTime,
}

/// A reservation was refused: answered 409.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    /// Why.
    pub reason: Refusal,
    /// What could have been reserved.
    pub available: u64,
}

/// `POST /reservations/{id}/release`; the body may be absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Release {
    /// Why. Defaults to `manual_release`.
    #[serde(default)]
    pub reason: ReleaseReason,
}

/// The end of a reservation: 200 if it is the one that was asked for, now or earlier; 409 if it is the other one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReservationEnd {
    /// The reservation.
    pub reservation_id: Uuid,
    /// How it ended.
    pub status: EndStatus,
}

words! {
    /// How a reservation ended. Whichever came first stands.
    pub enum EndStatus {
        /// Its stock has left.
        Confirmed = "confirmed",
        /// Its stock was given back.
        Released = "released",
    }
}

/// `POST /orders`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewOrder {
    /// Whose order it is.
    pub user_id: Uuid,
    /// Which product.
    pub product_id: ProductId,
    /// How much of it.
    pub quantity: Quantity,
}

/// `POST /orders` answered 201; `POST /orders/{id}/confirm` and `/cancel` answered 200 or, where the answer of the
/// inventory service is still to come, 202.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OrderStatus {
    /// The order.
    pub order_id: Uuid,
    /// Where it stands.
    pub status: Status,
}

words! {
    /// Where an order stands.
    pub enum Status {
        /// Placed; inventory has not said anything yet.
        Pending = "pending",
        /// Its stock is held.
        Reserved = "reserved",
        /// It is to be confirmed; inventory has not answered yet.
        Confirming = "confirming",
        /// It is to be cancelled; inventory has not answered yet.
        Cancelling = "cancelling",
        /// Its stock has left. An end.
        Confirmed = "confirmed",
        /// It could not be reserved, or not be kept. An end.
        Failed = "failed",
        /// It was cancelled. An end.
        Cancelled = "cancelled",
    }
}

/// `GET /orders/{id}`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OrderView {
    /// The order.
    pub order_id: Uuid,
    /// Whose order it is.
    pub user_id: Uuid,
    /// Which product.
    pub product_id: ProductId,
    /// How much of it.
    pub quantity: Quantity,
    /// Where it stands.
    pub status: Status,
    /// Why it failed or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its reservation, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation_id: Option<Uuid>,
    /// When it was placed.
    #[serde(with = "rfc3339")]
    pub created_at: OffsetDateTime,
    /// What happened to it, oldest first.
    pub history: Vec<HistoryEntry>,
}

/// One line of an order's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// When.
    #[serde(with = "rfc3339")]
    pub at: OffsetDateTime,
    /// What.
    pub what: String,
    /// The event that told it, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_id: Option<String>,
    /// The event's type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_type: Option<String>,
}

/// One line of `GET /procurements`: more of a product was asked for, because it ran out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Procurement {
    /// The request.
    pub procurement_id: Uuid,
    /// The product.
    pub product_id: ProductId,
    /// When it was opened.
    #[serde(with = "rfc3339")]
    pub opened_at: OffsetDateTime,
    /// When a restock closed it.
    #[serde(
        default,
        with = "rfc3339::option",
        skip_serializing_if = "Option::is_none"
    )]
    pub closed_at: Option<OffsetDateTime>,
}
