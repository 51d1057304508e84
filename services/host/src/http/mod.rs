//! The HTTP shell around a service's routes: correlation, time-outs, body limits, errors as JSON, health and metrics.

mod correlation;
mod extract;
mod probes;
mod server;

use std::{net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    http::StatusCode,
    middleware::{Next, from_fn, from_fn_with_state},
    response::Response,
};
use serde::Deserialize;

pub use correlation::{Correlation, HEADER as CORRELATION_HEADER};
pub use extract::{Body, OptionalBody, Path, Query};
pub(crate) use probes::probes;
pub(crate) use server::serve;

use crate::error::problem;

/// `[SERVICE.http]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpSettings {
    /// The address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// How long a request may take. Defaults to 10 s.
    #[serde(default = "ten_seconds", with = "humantime_serde")]
    pub timeout: Duration,
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

/// The largest body; the services' own are far smaller.
const BODY_BYTES: usize = 16 * 1024;

/// Puts the shell around a service's routes and probes.
pub(crate) fn shell(routes: Router, settings: &HttpSettings) -> Router {
    routes
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "there is nothing here") })
        .method_not_allowed_fallback(|| async {
            let text = "this address answers to other methods";
            problem(StatusCode::METHOD_NOT_ALLOWED, text)
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .layer(from_fn_with_state(settings.timeout, in_time))
        .layer(from_fn(measured))
        .layer(from_fn(correlation::carry))
}

/// Answers in time. What the request has begun runs to its end: see [`crate::complete`].
async fn in_time(State(limit): State<Duration>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => problem(
            StatusCode::SERVICE_UNAVAILABLE,
            "no answer in time; the request may still be carried out",
        ),
    }
}

async fn measured(request: Request, next: Next) -> Response {
    let method = request.method().clone();
    // The route, not the path: ids would make a series each.
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("none", MatchedPath::as_str)
        .to_owned();
    let start = std::time::Instant::now();
    let response = next.run(request).await;
    let labels = [
        ("method", method.to_string()),
        ("route", route),
        ("status", response.status().as_str().to_owned()),
    ];
    metrics::counter!("http_requests_total", &labels).increment(1);
    metrics::histogram!("http_request_seconds", &labels).record(start.elapsed());
    response
}
