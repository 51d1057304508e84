//! The routes: what arrives becomes a use case, what it answers becomes a status.

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use pillarbox_contracts::{
    ProductId,
    http::{NewOrder, OrderStatus, OrderView, Procurement},
};
use pillarbox_host::{
    Result, complete,
    http::{Body, Correlation, Path, Query},
};
use serde::Deserialize;
use uuid::Uuid;

use crate::{
    repository::Order,
    use_cases::{Orders, Wish},
};

pub(crate) fn routes(orders: Orders) -> Router {
    Router::new()
        .route("/orders", post(place))
        .route("/orders/{id}", get(view))
        .route("/orders/{id}/confirm", post(confirm))
        .route("/orders/{id}/cancel", post(cancel))
        .route("/procurements", get(procurements))
        .with_state(orders)
}

async fn place(
    State(orders): State<Orders>,
    correlation: Correlation,
    Body(new): Body<NewOrder>,
) -> Result<Response> {
    let order = complete(async move { orders.place(&new, &correlation).await }).await?;
    Ok((StatusCode::CREATED, Json(status(&order))).into_response())
}

async fn view(State(orders): State<Orders>, Path(id): Path<Uuid>) -> Result<Json<OrderView>> {
    orders.view(id).await.map(Json)
}

async fn confirm(
    State(orders): State<Orders>,
    Path(id): Path<Uuid>,
    correlation: Correlation,
) -> Result<Response> {
    wish(orders, id, Wish::Confirm, correlation).await
}

async fn cancel(
    State(orders): State<Orders>,
    Path(id): Path<Uuid>,
    correlation: Correlation,
) -> Result<Response> {
    wish(orders, id, Wish::Cancel, correlation).await
}

/// 200 at the end, 202 on the way to it.
async fn wish(orders: Orders, id: Uuid, wish: Wish, correlation: Correlation) -> Result<Response> {
    let order = complete(async move { orders.wish(id, wish, &correlation).await }).await?;
    let code = if order.status == wish.end() {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok((code, Json(status(&order))).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Of {
    product_id: Option<ProductId>,
}

async fn procurements(
    State(orders): State<Orders>,
    Query(of): Query<Of>,
) -> Result<Json<Vec<Procurement>>> {
    orders.procurements(of.product_id.as_ref()).await.map(Json)
}

fn status(order: &Order) -> OrderStatus {
    OrderStatus {
        order_id: order.id,
        status: order.status,
    }
}
