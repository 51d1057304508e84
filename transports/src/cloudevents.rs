//! CloudEvents 1.0, binary mode: how the envelope travels in a broker's headers.
//!
//! The prefix differs for each broker (`cloudEvents_`, `ce_`, `ce-`); the names behind it do not. `datacontenttype` is
//! the broker's own content-type field and is not among the headers, as the specification asks.

use std::{borrow::Cow, time::SystemTime};

use bytes::Bytes;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::Message;

/// The version that is written and read.
pub const SPECVERSION: &str = "1.0";

/// The envelope as (name without prefix, value).
#[must_use]
pub fn encode(m: &Message) -> Vec<(&str, Cow<'_, str>)> {
    let mut out = Vec::with_capacity(m.attributes.len() + 5);
    out.push(("specversion", SPECVERSION.into()));
    out.push(("id", m.id.as_str().into()));
    out.push(("type", m.kind.as_str().into()));
    out.push(("time", rfc3339(m.time).into()));
    if let Some(key) = &m.key {
        out.push(("partitionkey", key.as_str().into()));
    }
    let rest = m
        .attributes
        .iter()
        .filter(|(name, _)| *name != "datacontenttype");
    out.extend(rest.map(|(name, value)| (name.as_str(), value.as_str().into())));
    out
}

/// Reads a message out of a broker's headers. Headers that start with one of `prefixes` are the envelope, the rest are
/// the application's. Unknown attributes are kept.
///
/// Returns the message and, when the envelope cannot be trusted, why: no id, no type, another specversion, a time that
/// is none. Such a message holds as much as could be read; an id that is missing is left empty.
#[must_use]
pub fn decode<'a>(
    topic: &str,
    prefixes: &[&str],
    headers: impl IntoIterator<Item = (&'a str, String)>,
    content_type: Option<String>,
    payload: Option<Bytes>,
) -> (Message, Option<String>) {
    let mut m = Message::new("", topic, "", Bytes::new());
    m.payload = payload;
    m.time = SystemTime::UNIX_EPOCH;
    if let Some(content_type) = content_type {
        m.attributes.insert("datacontenttype".into(), content_type);
    }
    let mut defect = None;
    let mut specversion = None;
    for (name, value) in headers {
        let Some(attribute) = prefixes.iter().find_map(|p| name.strip_prefix(p)) else {
            m.headers.insert(name.to_owned(), value);
            continue;
        };
        match attribute {
            "id" => m.id = value,
            "type" => m.kind = value,
            "partitionkey" => m.key = Some(value),
            "specversion" => specversion = Some(value),
            "time" => match OffsetDateTime::parse(&value, &Rfc3339) {
                Ok(time) => m.time = time.into(),
                Err(_) => defect = Some(format!("the attribute time {value:?} is not RFC 3339")),
            },
            other => drop(m.attributes.insert(other.to_owned(), value)),
        }
    }
    let defect = match specversion.as_deref() {
        None => Some("no CloudEvents envelope: the attribute specversion is missing".to_owned()),
        Some(SPECVERSION) if m.id.is_empty() => Some("the attribute id is missing".to_owned()),
        Some(SPECVERSION) if m.kind.is_empty() => Some("the attribute type is missing".to_owned()),
        Some(SPECVERSION) => defect,
        Some(other) => Some(format!(
            "specversion {other:?}; this reader knows {SPECVERSION:?}"
        )),
    };
    (m, defect)
}

/// A time as CloudEvents writes it. Times that RFC 3339 cannot hold (year 10000) become the Unix epoch.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .format(&Rfc3339)
        .unwrap_or_else(|_| "1970-01-01T00:00:00Z".to_owned())
}

/// A time as RFC 3339 writes it; none if the text is none.
#[must_use]
pub fn time(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339)
        .ok()
        .map(SystemTime::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut m = Message::new("1", "t", "a.b", "{}")
            .with_key("")
            .with_attribute("source", "s")
            .with_attribute("datacontenttype", "application/json")
            .with_attribute("later", "kept")
            .with_header("mine", "x");
        m.time = SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(1_700_000_000_123_456);
        let wire: Vec<(String, String)> = encode(&m)
            .into_iter()
            .map(|(n, v)| (format!("ce_{n}"), v.into_owned()))
            .chain([("mine".to_owned(), "x".to_owned())])
            .collect();
        let wire = wire.iter().map(|(n, v)| (n.as_str(), v.clone()));
        let (back, defect) = decode(
            "t",
            &["ce_"],
            wire,
            Some("application/json".into()),
            m.payload.clone(),
        );
        assert_eq!(defect, None);
        assert_eq!(back, m);
    }

    #[test]
    fn an_envelope_that_cannot_be_trusted_says_why() {
        let read = |pairs: &[(&'static str, &str)]| {
            let pairs: Vec<_> = pairs.iter().map(|(n, v)| (*n, (*v).to_owned())).collect();
            decode("t", &["ce_"], pairs, None, None)
                .1
                .unwrap_or_default()
        };
        assert!(read(&[("other", "x")]).contains("no CloudEvents envelope"));
        assert!(read(&[("ce_specversion", "1.0"), ("ce_type", "a")]).contains("id is missing"));
        assert!(read(&[("ce_specversion", "1.0"), ("ce_id", "a")]).contains("type is missing"));
        assert!(read(&[("ce_specversion", "2.0"), ("ce_id", "a")]).contains("\"2.0\""));
        assert!(
            read(&[
                ("ce_specversion", "1.0"),
                ("ce_id", "a"),
                ("ce_type", "b"),
                ("ce_time", "now")
            ])
            .contains("RFC 3339")
        );
    }
}
