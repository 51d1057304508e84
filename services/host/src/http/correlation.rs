use std::convert::Infallible;

use axum::{
    extract::{FromRequestParts, Request},
    http::{HeaderName, HeaderValue, request::Parts},
    middleware::Next,
    response::Response,
};
use pillarbox::Outbox;
use tracing::Instrument as _;
use uuid::Uuid;

/// Carries the id in both directions.
pub const HEADER: HeaderName = HeaderName::from_static("x-correlation-id");

/// The longest id that is taken over.
const LONGEST: usize = 128;

/// What ties together everything that one request sets off: log lines, calls to other services, events, and the events
/// that their handlers raise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Correlation(String);

impl Correlation {
    /// A new one.
    #[must_use]
    pub fn fresh() -> Self {
        Self(Uuid::now_v7().to_string())
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The outbox whose events carry it.
    #[must_use]
    pub fn on(&self, outbox: &Outbox) -> Outbox {
        outbox.with_attribute("correlationid", &self.0)
    }

    /// The caller's, if it can be taken over: an id that is too long or odd would spoil logs and headers.
    fn of(request: &Request) -> Self {
        request
            .headers()
            .get(HEADER)
            .and_then(|value| value.to_str().ok())
            .filter(|id| (1..=LONGEST).contains(&id.len()))
            .filter(|id| id.bytes().all(|b| b.is_ascii_graphic()))
            .map_or_else(Self::fresh, |id| Self(id.to_owned()))
    }
}

impl<S: Sync> FromRequestParts<S> for Correlation {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get().cloned().unwrap_or_else(Self::fresh))
    }
}

/// Takes the id over or makes one, puts it on the span, and gives it back with the answer.
pub(super) async fn carry(mut request: Request, next: Next) -> Response {
    let correlation = Correlation::of(&request);
    let span = tracing::info_span!(
        "request",
        method = %request.method(),
        path = request.uri().path(),
        correlation_id = correlation.as_str(),
    );
    request.extensions_mut().insert(correlation.clone());
    async move {
        let mut response = next.run(request).await;
        tracing::debug!(status = response.status().as_u16(), "answered");
        if let Ok(value) = HeaderValue::from_str(correlation.as_str()) {
            response.headers_mut().insert(HEADER, value);
        }
        response
    }
    .instrument(span)
    .await
}
