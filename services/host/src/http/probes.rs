use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};

use crate::{Service, Status, metrics_text};

/// A probe must not hang where the database does.
const LIMIT: Duration = Duration::from_secs(2);

#[derive(Clone)]
struct Probed {
    service: Arc<dyn Service>,
    status: Status,
}

/// `GET /health/live`, `GET /health/ready`, `GET /metrics`.
pub(crate) fn probes(service: Arc<dyn Service>, status: Status) -> Router {
    Router::new()
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Probed { service, status })
}

async fn live() -> Json<Value> {
    Json(json!({ "status": "alive" }))
}

/// Red only without database or schema: a shop that goes down with its broker would lose what the outbox is for.
async fn ready(State(probed): State<Probed>) -> Response {
    let database = tokio::time::timeout(LIMIT, probed.service.check()).await;
    let database = match database {
        Ok(Ok(())) => None,
        Ok(Err(e)) => Some(e.to_string()),
        Err(_) => Some(format!("no answer within {LIMIT:?}")),
    };
    let (flows, mut body) = probed.status.report();
    let (code, word) = match (&database, flows) {
        (Some(_), _) => (StatusCode::SERVICE_UNAVAILABLE, "unready"),
        (None, false) => (StatusCode::OK, "degraded"),
        (None, true) => (StatusCode::OK, "ready"),
    };
    body["service"] = json!(probed.service.name());
    body["status"] = json!(word);
    body["database"] = json!(database.as_deref().unwrap_or("ok"));
    (code, Json(body)).into_response()
}

async fn metrics() -> impl IntoResponse {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(CONTENT_TYPE, kind)], metrics_text())
}
