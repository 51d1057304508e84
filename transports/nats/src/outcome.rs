//! What the server's answers mean: errors by kind, and what became of each message. Pure.

use std::{borrow::Cow, fmt};

use async_nats::{
    ConnectError, ConnectErrorKind, StatusCode,
    jetstream::context::{RequestError, RequestErrorKind},
};
use pillarbox_transport::{Error, Kind, Outcome};
use serde::Deserialize;

/// The error of `STREAM.INFO` for a stream that is not there.
pub(crate) const STREAM_NOT_FOUND: u64 = 10_059;
/// A stream of that name with other settings: somebody was faster.
pub(crate) const STREAM_NAME_IN_USE: u64 = 10_058;
/// A subject belongs to another stream.
pub(crate) const SUBJECT_OVERLAPS: u64 = 10_065;

/// What a server answers to a publish.
#[derive(Debug, Default, Deserialize)]
struct Answer {
    #[serde(default)]
    stream: String,
    #[serde(default)]
    seq: u64,
    error: Option<Refusal>,
}

/// An error of the JetStream API.
#[derive(Debug, Deserialize)]
pub(crate) struct Refusal {
    #[serde(default)]
    pub(crate) code: u16,
    #[serde(default)]
    pub(crate) err_code: u64,
    #[serde(default)]
    pub(crate) description: String,
}

/// What became of a message, by the answer to its publish. Only an answer with this very stream and a place in it is
/// [`Outcome::Stored`].
pub(crate) fn of_answer(status: Option<StatusCode>, payload: &[u8], stream: &str) -> Outcome {
    if status == Some(StatusCode::NO_RESPONDERS) {
        // Also between two leaders of the stream.
        let text =
            format!("no stream takes it; expected {stream:?} to be there and to have a leader");
        return Outcome::Unavailable(error(Kind::Missing, text));
    }
    let Ok(answer) = serde_json::from_slice::<Answer>(payload) else {
        let text = format!(
            "{stream:?}: found an answer of {} bytes that is none",
            payload.len()
        );
        return Outcome::Unknown(error(Kind::Unreachable, text));
    };
    match answer.error {
        Some(refusal) => refused(&refusal, stream),
        None if answer.stream == stream && answer.seq > 0 => Outcome::Stored,
        None => {
            let text = format!(
                "found it in the stream {:?}, expected {stream:?}: the subjects of both overlap",
                answer.stream
            );
            Outcome::Unavailable(error(Kind::Configuration, text))
        }
    }
}

/// Only a refusal that names the message is a rejection: everything else waits, uncounted.
fn refused(refusal: &Refusal, stream: &str) -> Outcome {
    let text = format!(
        "{stream:?}: {} (error {})",
        refusal.description, refusal.err_code
    );
    match kind_of_refusal(refusal) {
        Kind::TooLarge => Outcome::Rejected(error(Kind::TooLarge, text)),
        kind => Outcome::Unavailable(error(kind, text)),
    }
}

/// The server's error codes by meaning (its `errors.json`); what is not known is taken for something that passes.
pub(crate) fn kind_of_refusal(refusal: &Refusal) -> Kind {
    match (refusal.err_code, refusal.code) {
        // Message or headers larger than the stream or the server takes.
        (10_054 | 10_097, _) => Kind::TooLarge,
        // The expected stream is another; subjects overlap; sealed; mirror; name in use; more replicas than servers;
        // limits of the account or of the request.
        (10_060 | SUBJECT_OVERLAPS | 10_109 | 10_034 | 10_052 | STREAM_NAME_IN_USE | 10_074, _) => {
            Kind::Configuration
        }
        (STREAM_NOT_FOUND | 10_014, _) | (_, 404) => Kind::Missing,
        // JetStream not enabled, for the server or for the account.
        (10_076 | 10_039 | 10_035, _) => Kind::Configuration,
        (_, 401 | 403) => Kind::Refused,
        // Insufficient resources, store failed (a full stream), a duplicate still on its way, no quorum.
        _ => Kind::Full,
    }
}

/// An error of the JetStream API with its context.
pub(crate) fn classify_refusal(
    refusal: &Refusal,
    operation: &'static str,
    context: impl fmt::Display,
) -> Error {
    let text = format!(
        "{context}: {} (error {})",
        refusal.description, refusal.err_code
    );
    Error::new(kind_of_refusal(refusal), operation, text)
}

/// A request that got no answer of the API.
pub(crate) fn classify_request(
    e: RequestError,
    operation: &'static str,
    context: impl fmt::Display,
) -> Error {
    let (kind, text) = match e.kind() {
        RequestErrorKind::TimedOut => (Kind::Timeout, format!("{context}: no answer in time")),
        RequestErrorKind::NoResponders => (
            Kind::Missing,
            format!(
                "{context}: nobody answers; JetStream is off for this account, or has no leader now"
            ),
        ),
        _ => (Kind::Unreachable, format!("{context}")),
    };
    Error::new(kind, operation, text).caused_by(e)
}

/// A connection that did not come about.
pub(crate) fn classify_connect(e: ConnectError, server: impl Into<Cow<'static, str>>) -> Error {
    let said = e.to_string().to_lowercase();
    let kind = match e.kind() {
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            Kind::Refused
        }
        ConnectErrorKind::TimedOut => Kind::Timeout,
        ConnectErrorKind::ServerParse | ConnectErrorKind::Tls => Kind::Configuration,
        _ if is_certificate(&e) => Kind::Refused,
        _ if said.contains("authentication") || said.contains("authorization") => Kind::Refused,
        _ => Kind::Unreachable,
    };
    Error::new(kind, "connect", server).caused_by(e)
}

/// A certificate that does not satisfy, on either side.
fn is_certificate(e: &ConnectError) -> bool {
    let mut source = std::error::Error::source(e);
    while let Some(inner) = source {
        let io = inner.downcast_ref::<std::io::Error>();
        let within = io.and_then(std::io::Error::get_ref);
        if inner.is::<rustls::Error>() || within.is_some_and(|e| e.is::<rustls::Error>()) {
            return true;
        }
        source = inner.source();
    }
    false
}

fn error(kind: Kind, text: String) -> Error {
    Error::new(kind, "publish", text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(outcome: &Outcome) -> (&'static str, Option<Kind>) {
        let kind = outcome.error().map(Error::kind);
        match outcome {
            Outcome::Stored => ("stored", kind),
            Outcome::Unknown(_) => ("unknown", kind),
            Outcome::Unavailable(_) => ("unavailable", kind),
            Outcome::Retry(_) => ("retry", kind),
            Outcome::Rejected(_) => ("rejected", kind),
        }
    }

    #[test]
    fn only_a_place_in_the_right_stream_is_stored() {
        for (payload, expected) in [
            (r#"{"stream":"s","seq":7}"#, ("stored", None)),
            (
                r#"{"stream":"s","seq":7,"duplicate":true}"#,
                ("stored", None),
            ),
            (
                r#"{"stream":"other","seq":7}"#,
                ("unavailable", Some(Kind::Configuration)),
            ),
            (
                r#"{"stream":"s"}"#,
                ("unavailable", Some(Kind::Configuration)),
            ),
            ("", ("unknown", Some(Kind::Unreachable))),
            ("+OK", ("unknown", Some(Kind::Unreachable))),
        ] {
            let outcome = of_answer(None, payload.as_bytes(), "s");
            assert_eq!(word(&outcome), expected, "{payload}");
        }
        let nobody = of_answer(Some(StatusCode::NO_RESPONDERS), b"", "s");
        assert_eq!(word(&nobody), ("unavailable", Some(Kind::Missing)));
    }

    #[test]
    fn only_a_refusal_that_names_the_message_is_a_rejection() {
        for (code, err_code, expected) in [
            (400, 10_054, ("rejected", Kind::TooLarge)),
            (400, 10_097, ("rejected", Kind::TooLarge)),
            (503, 10_077, ("unavailable", Kind::Full)),
            (503, 10_008, ("unavailable", Kind::Full)),
            (400, 10_158, ("unavailable", Kind::Full)),
            (400, 10_060, ("unavailable", Kind::Configuration)),
            (400, 10_109, ("unavailable", Kind::Configuration)),
            (404, 10_059, ("unavailable", Kind::Missing)),
            (500, 99_999, ("unavailable", Kind::Full)),
        ] {
            let payload = format!(
                r#"{{"error":{{"code":{code},"err_code":{err_code},"description":"d"}},"stream":"s","seq":0}}"#
            );
            let outcome = of_answer(None, payload.as_bytes(), "s");
            assert_eq!(word(&outcome), (expected.0, Some(expected.1)), "{err_code}");
        }
    }
}
