//! The routes: what arrives becomes a use case, what it answers becomes a status.

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use pillarbox_contracts::{
    ProductId, Quantity,
    http::{
        Availability, EndStatus, NewProduct, ProductStock, Release, ReservationEnd, Reserve,
        Restock,
    },
};
use pillarbox_host::{
    Result, complete,
    http::{Body, Correlation, OptionalBody, Path, Query},
};
use serde::Deserialize;
use uuid::Uuid;

use crate::stock::Stock;

pub(crate) fn routes(stock: Stock) -> Router {
    Router::new()
        .route("/products", post(add_product))
        .route("/products/{id}", get(product))
        .route("/products/{id}/availability", get(availability))
        .route("/products/{id}/restock", post(restock))
        .route("/reservations", post(reserve))
        .route("/reservations/{id}/confirm", post(confirm))
        .route("/reservations/{id}/release", post(release))
        .with_state(stock)
}

async fn add_product(State(stock): State<Stock>, Body(new): Body<NewProduct>) -> Result<Response> {
    let added = complete(async move { stock.add_product(&new).await }).await?;
    Ok((StatusCode::CREATED, Json(added)).into_response())
}

async fn product(
    State(stock): State<Stock>,
    Path(id): Path<ProductId>,
) -> Result<Json<ProductStock>> {
    stock.product(&id).await.map(Json)
}

#[derive(Debug, Deserialize)]
struct Wanted {
    quantity: Quantity,
}

async fn availability(
    State(stock): State<Stock>,
    Path(id): Path<ProductId>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<Availability>> {
    stock.availability(&id, wanted.quantity).await.map(Json)
}

async fn restock(
    State(stock): State<Stock>,
    Path(id): Path<ProductId>,
    correlation: Correlation,
    Body(restock): Body<Restock>,
) -> Result<Json<ProductStock>> {
    let done = async move { stock.restock(&id, restock.quantity, &correlation).await };
    complete(done).await.map(Json)
}

async fn reserve(
    State(stock): State<Stock>,
    correlation: Correlation,
    Body(wanted): Body<Reserve>,
) -> Result<Response> {
    let done = complete(async move { stock.reserve(&wanted, &correlation).await }).await?;
    Ok(match done {
        Ok(reserved) => (StatusCode::CREATED, Json(reserved)).into_response(),
        Err(refused) => (StatusCode::CONFLICT, Json(refused)).into_response(),
    })
}

async fn confirm(
    State(stock): State<Stock>,
    Path(id): Path<Uuid>,
    correlation: Correlation,
) -> Result<Response> {
    let end = complete(async move { stock.confirm(id, &correlation).await }).await?;
    Ok(ended(end, EndStatus::Confirmed))
}

async fn release(
    State(stock): State<Stock>,
    Path(id): Path<Uuid>,
    correlation: Correlation,
    OptionalBody(release): OptionalBody<Release>,
) -> Result<Response> {
    let done = async move { stock.release(id, release.reason, &correlation).await };
    Ok(ended(complete(done).await?, EndStatus::Released))
}

/// 200 if the reservation ended as it was asked to, now or earlier; 409 if it had ended the other way.
fn ended(end: ReservationEnd, wanted: EndStatus) -> Response {
    let status = if end.status == wanted {
        StatusCode::OK
    } else {
        StatusCode::CONFLICT
    };
    (status, Json(end)).into_response()
}
