use std::fmt;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use pillarbox::Kind;
use serde_json::json;

/// A use case's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request was not carried out. As a response it is `{"error": "…"}`; what is nobody's business stays in the log.
#[derive(Debug)]
pub enum Error {
    /// The request itself is wrong.
    Invalid(String),
    /// There is no such thing.
    NotFound(String),
    /// The state of things forbids it.
    Conflict(String),
    /// The database or the engine.
    Engine(pillarbox::Error),
}

impl From<pillarbox::Error> for Error {
    fn from(e: pillarbox::Error) -> Self {
        match e.kind() {
            // A check of the engine's own that the service had not made before: still the caller's fault.
            Kind::Invalid | Kind::TooLarge => Self::Invalid(e.to_string()),
            _ => Self::Engine(e),
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(e: sqlx::Error) -> Self {
        Self::Engine(pillarbox::Error::database("use case", e))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(text) | Self::NotFound(text) | Self::Conflict(text) => f.write_str(text),
            Self::Engine(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Engine(e) => Some(e),
            _ => None,
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let (status, text) = match self {
            Self::Invalid(text) => (StatusCode::UNPROCESSABLE_ENTITY, text),
            Self::NotFound(text) => (StatusCode::NOT_FOUND, text),
            Self::Conflict(text) => (StatusCode::CONFLICT, text),
            Self::Engine(e) if e.is_temporary() => {
                tracing::warn!(error = %e, "a request waits for the database");
                let text = "the database is away or busy; try again";
                (StatusCode::SERVICE_UNAVAILABLE, text.to_owned())
            }
            Self::Engine(e) => {
                tracing::error!(error = %e, "a request failed");
                let text = "internal error; the log has it under this correlation id";
                (StatusCode::INTERNAL_SERVER_ERROR, text.to_owned())
            }
        };
        problem(status, &text)
    }
}

/// The one shape of every answer that is no success.
pub(crate) fn problem(status: StatusCode, text: &str) -> Response {
    let mut response = (status, Json(json!({ "error": text }))).into_response();
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}
