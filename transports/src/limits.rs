//! What a message must satisfy before any broker sees it; checked at enqueue and again at the relay, because a plain
//! SQL INSERT does not pass through enqueue.

use crate::{Error, Kind, Message, Result};

/// Header names and prefixes that brokers act on or that carry the envelope. An application that could set them could
/// route, expire, roll up or forge messages.
pub const RESERVED: &[&str] = &[
    "ce_",
    "ce-",
    "cloudevents_",
    "cloudevents:",
    "nats-",
    "x-death",
    "x-first-death-",
    "x-last-death-",
    "x-delivery-",
    "x-opt-",
    "x-stream-",
    "pillarbox-",
];
/// Reserved as whole names.
pub const RESERVED_NAMES: &[&str] = &["cc", "bcc", "content-type"];

/// The longest topic and type, in bytes: routing keys end at 255, Kafka topics at 249, and suffixes need room.
pub const NAME_BYTES: usize = 200;
/// The longest id, in bytes.
pub const ID_BYTES: usize = 128;

/// Sizes in bytes. The defaults fit all supported brokers as they come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The largest payload. Defaults to 1 MiB minus 64 KiB of room for headers (NATS takes 1 MiB in all).
    pub payload: usize,
    /// The longest key. Defaults to 1,024.
    pub key: usize,
    /// Most headers, and most attributes. Defaults to 64.
    pub headers: usize,
    /// The longest name of a header. Defaults to 128.
    pub header_name: usize,
    /// All names and values of headers and attributes together. Defaults to 16 KiB.
    pub header_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            payload: 983_040,
            key: 1_024,
            headers: 64,
            header_name: 128,
            header_bytes: 16 * 1_024,
        }
    }
}

impl Limits {
    /// Checks every part of a message.
    ///
    /// # Errors
    /// [`Kind::TooLarge`] or [`Kind::Invalid`]; the text names the part, what was found and what was expected, and
    /// never shows the value of a header or a payload.
    pub fn check(&self, m: &Message) -> Result<()> {
        name("topic", &m.topic)?;
        name("type", &m.kind)?;
        if m.id.is_empty() || m.id.len() > ID_BYTES || !m.id.bytes().all(|b| b.is_ascii_graphic()) {
            return invalid(format!(
                "the id must be 1 to {ID_BYTES} printable ASCII characters without spaces; it has {} bytes",
                m.id.len()
            ));
        }
        if let Some(key) = &m.key {
            at_most("the key", key.len(), self.key)?;
            if has_control(key) {
                return invalid(format!("the key {key:?} has a control character"));
            }
        }
        let payload = m.payload.as_ref().map_or(0, bytes::Bytes::len);
        at_most("the payload", payload, self.payload)?;
        self.check_headers(m)
    }

    fn check_headers(&self, m: &Message) -> Result<()> {
        for (what, map) in [("headers", &m.headers), ("attributes", &m.attributes)] {
            if map.len() > self.headers {
                return Err(Error::new(
                    Kind::TooLarge,
                    "check",
                    format!("{} {what}; at most {} are allowed", map.len(), self.headers),
                ));
            }
        }
        let pairs = m.headers.iter().chain(&m.attributes);
        let total: usize = pairs.map(|(k, v)| k.len() + v.len()).sum();
        at_most("headers and attributes together", total, self.header_bytes)?;
        for (name, value) in &m.headers {
            header_name(name, self.header_name)?;
            header_value(name, value)?;
        }
        for (name, value) in &m.attributes {
            let good = (1..=64).contains(&name.len())
                && name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            if !good {
                return invalid(format!(
                    "the attribute name {name:?} must be 1 to 64 lower-case letters and digits"
                ));
            }
            if ["id", "time", "type", "specversion", "partitionkey", "data"]
                .contains(&name.as_str())
            {
                return invalid(format!("the attribute {name:?} is set from its own field"));
            }
            header_value(name, value)?;
        }
        Ok(())
    }
}

fn name(what: &str, value: &str) -> Result<()> {
    let good = !value.is_empty()
        && value.len() <= NAME_BYTES
        && value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !value.split('.').any(str::is_empty);
    if good {
        return Ok(());
    }
    let shown: String = value.chars().take(64).collect();
    invalid(format!(
        "the {what} {shown:?} must be 1 to {NAME_BYTES} letters, digits, '_', '-', in parts joined by '.'"
    ))
}

fn header_name(name: &str, most: usize) -> Result<()> {
    at_most("a header's name", name.len(), most)?;
    let token = !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if !token {
        let shown: String = name.chars().take(64).collect();
        return invalid(format!(
            "the header name {shown:?} must be letters, digits, '.', '_' or '-'"
        ));
    }
    let lower = name.to_ascii_lowercase();
    if RESERVED_NAMES.contains(&lower.as_str()) || RESERVED.iter().any(|p| lower.starts_with(p)) {
        return invalid(format!(
            "the header {name:?} is reserved for brokers and the envelope"
        ));
    }
    Ok(())
}

fn header_value(name: &str, value: &str) -> Result<()> {
    if has_control(value) {
        return invalid(format!("the value of {name:?} has a control character"));
    }
    Ok(())
}

/// Nearly all text is ASCII and good: bytes first, for this runs twice for each event.
fn has_control(text: &str) -> bool {
    text.bytes().any(|b| b.is_ascii_control())
        || !text.is_ascii() && text.chars().any(char::is_control)
}

fn at_most(what: &str, found: usize, most: usize) -> Result<()> {
    if found <= most {
        return Ok(());
    }
    Err(Error::new(
        Kind::TooLarge,
        "check",
        format!("{what} has {found} bytes; at most {most} are allowed"),
    ))
}

fn invalid(text: String) -> Result<()> {
    Err(Error::new(Kind::Invalid, "check", text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Message {
        Message::new("1", "inventory.events", "inventory.stock.reserved", "{}").with_key("")
    }

    #[test]
    fn a_plain_message_passes() {
        Limits::default().check(&message()).unwrap();
    }

    #[test]
    fn each_bad_part_is_refused_and_named() {
        let limits = Limits {
            payload: 10,
            ..Limits::default()
        };
        let cases: Vec<(Message, &str)> = vec![
            (
                Message {
                    topic: "a b".into(),
                    ..message()
                },
                "topic",
            ),
            (
                Message {
                    topic: String::new(),
                    ..message()
                },
                "topic",
            ),
            (
                Message {
                    topic: "a..b".into(),
                    ..message()
                },
                "topic",
            ),
            (
                Message {
                    kind: "x".repeat(300),
                    ..message()
                },
                "type",
            ),
            (
                Message {
                    kind: "é".into(),
                    ..message()
                },
                "type",
            ),
            (
                Message {
                    id: String::new(),
                    ..message()
                },
                "id",
            ),
            (
                Message {
                    id: "a\nb".into(),
                    ..message()
                },
                "id",
            ),
            (message().with_key("a\0b"), "key"),
            (message().with_key("a\u{9b}b"), "key"),
            (message().with_key("\u{7f}"), "key"),
            (
                message().with_key("k".repeat(1_025)),
                "key has 1025 bytes; at most 1024",
            ),
            (
                Message {
                    payload: Some("0123456789a".into()),
                    ..message()
                },
                "payload has 11 bytes; at most 10",
            ),
            (message().with_header("CC", "other"), "reserved"),
            (message().with_header("Nats-Rollup", "all"), "reserved"),
            (message().with_header("ce_id", "1"), "reserved"),
            (message().with_header("cloudEvents:id", "1"), "header name"),
            (message().with_header("X-Death", "1"), "reserved"),
            (message().with_header("naïve", "1"), "header name"),
            (message().with_header("a", "1\r\nb: 2"), "value of \"a\""),
            (message().with_header("a", "x".repeat(17_000)), "together"),
            (message().with_attribute("Bad", "1"), "attribute name"),
            (message().with_attribute("id", "1"), "own field"),
        ];
        for (m, expected) in cases {
            let text = limits.check(&m).unwrap_err().to_string();
            assert!(text.contains(expected), "{text:?} should name {expected:?}");
        }
    }
}
