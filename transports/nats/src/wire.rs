//! How a message becomes a subject and headers, and back: CloudEvents 1.0, binary mode.

use async_nats::{
    HeaderMap,
    header::{HeaderName, HeaderValue, NATS_EXPECTED_STREAM, NATS_MESSAGE_ID},
};
use bytes::Bytes;
use pillarbox_transport::{
    Error, Kind, Limits, Message, Result, cloudevents,
    limits::{ID_BYTES, RESERVED, RESERVED_NAMES},
};

/// What stands before the names of attributes.
const PREFIX: &str = "ce-";
const CONTENT_TYPE: &str = "Content-Type";
/// NATS always has a body; this header tells an empty one from none.
const TOMBSTONE: &str = "pillarbox-tombstone";
/// The most that a server takes in headers.
const HEADER_BYTES: usize = 65_535;
/// Bytes of a header that are neither name nor value, and of all of them together.
const OVERHEAD: (usize, usize) = (4, 12);

/// A message, ready to be sent.
pub(crate) struct Wire {
    pub(crate) subject: String,
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Bytes,
}

/// Where a message goes.
pub(crate) enum To<'a> {
    /// Under its type, into this stream, once for each id.
    Topic(&'a str),
    /// Under this subject, into this stream.
    DeadLetters(&'a str, &'a str),
}

/// # Errors
/// What NATS would refuse, or take as an order: to be rejected, alone.
pub(crate) fn encode(m: &Message, to: &To<'_>, max_payload: usize) -> Result<Wire> {
    let mut headers = Headers::default();
    let (subject, stream) = match to {
        To::Topic(stream) => {
            limits().check(m)?;
            // Two sources may use one id, and the server keeps only the first message of each: the other would be lost.
            headers.put(NATS_MESSAGE_ID, &format!("{}@{}", m.id, m.source()))?;
            (m.kind.clone(), stream)
        }
        // Dead letters may be malformed: that may be why they are dead. They go without an id for the server: it
        // would drop the second death of an event.
        To::DeadLetters(subject, stream) => ((*subject).to_owned(), stream),
    };
    headers.put(NATS_EXPECTED_STREAM, stream)?;
    let strict = matches!(to, To::Topic(_));
    let mut prefixed = PREFIX.to_owned();
    for (name, value) in cloudevents::encode(m) {
        prefixed.truncate(PREFIX.len());
        prefixed.push_str(name);
        headers.insert(&prefixed, &value, strict)?;
    }
    if let Some(content_type) = m.content_type() {
        headers.insert(CONTENT_TYPE, content_type, strict)?;
    }
    for (name, value) in m.headers.iter().filter(|(name, _)| may_travel(name)) {
        headers.insert(name, value, strict)?;
    }
    if m.payload.is_none() {
        headers.insert(TOMBSTONE, "true", strict)?;
    }
    let payload = m.payload.clone().unwrap_or_default();
    if headers.bytes > HEADER_BYTES {
        let what = "headers and attributes together";
        return Err(too_large(what, headers.bytes, HEADER_BYTES));
    }
    let all = headers.bytes + payload.len();
    if all > max_payload {
        return Err(too_large("headers and payload", all, max_payload));
    }
    Ok(Wire {
        subject,
        headers: headers.map,
        payload,
    })
}

/// The contract's, as far as NATS can go.
fn limits() -> Limits {
    Limits {
        payload: usize::MAX,
        key: HEADER_BYTES,
        headers: usize::from(u8::MAX),
        header_name: 255,
        header_bytes: HEADER_BYTES,
    }
}

struct Headers {
    map: HeaderMap,
    bytes: usize,
}

impl Default for Headers {
    fn default() -> Self {
        Self {
            map: HeaderMap::new(),
            bytes: OVERHEAD.1,
        }
    }
}

impl Headers {
    /// By name and value that are checked here: the map's own conversions panic on what they do not like.
    fn insert(&mut self, name: &str, value: &str, strict: bool) -> Result<()> {
        let Ok(known) = name.parse::<HeaderName>() else {
            if strict {
                return Err(invalid(format!(
                    "the header name {name:?} cannot be one of NATS"
                )));
            }
            return Ok(());
        };
        if strict && value.trim() != value {
            // Servers and clients take it off, and the key would be another one.
            return Err(invalid(format!(
                "the value of {name:?} begins or ends with white space, which NATS does not keep"
            )));
        }
        match strict {
            true => self.put(known, value),
            false => self.put(known, &value.replace(['\r', '\n'], " ")),
        }
    }

    fn put(&mut self, name: HeaderName, value: &str) -> Result<()> {
        let shown: &str = name.as_ref();
        let Ok(value) = value.parse::<HeaderValue>() else {
            return Err(invalid(format!("the value of {shown:?} has a line break")));
        };
        self.bytes += shown.len() + value.as_str().len() + OVERHEAD.0;
        self.map.insert(name, value);
        Ok(())
    }
}

/// A dead letter from a foreign publisher may have headers that the server acts on.
fn may_travel(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let reserved = RESERVED_NAMES.contains(&name.as_str())
        || RESERVED.iter().any(|prefix| name.starts_with(prefix));
    !reserved || (name.starts_with("pillarbox-") && name != TOMBSTONE)
}

fn too_large(what: &str, found: usize, most: usize) -> Error {
    let text = format!("{what} take {found} bytes; at most {most} are allowed");
    Error::new(Kind::TooLarge, "check", text)
}

fn invalid(text: String) -> Error {
    Error::new(Kind::Invalid, "check", text)
}

/// What a stream gave.
pub(crate) struct Arrived<'a> {
    pub(crate) topic: &'a str,
    pub(crate) stream: &'a str,
    pub(crate) sequence: u64,
    pub(crate) subject: &'a str,
    pub(crate) headers: Option<&'a HeaderMap>,
    pub(crate) payload: Bytes,
}

/// A message and why it cannot be trusted, if so. Its id is the same whenever it is read.
pub(crate) fn decode(arrived: Arrived<'_>) -> (Message, Option<String>) {
    let Arrived { topic, stream, .. } = arrived;
    let (mut tombstone, mut content_type, mut server_id) = (false, None, None);
    let mut headers = Vec::new();
    for (name, values) in arrived.headers.into_iter().flat_map(HeaderMap::iter) {
        let name: &str = name.as_ref();
        let value = values
            .first()
            .map(|v| v.as_str().to_owned())
            .unwrap_or_default();
        let lower = name.to_ascii_lowercase();
        match lower.as_str() {
            TOMBSTONE => tombstone = true,
            "content-type" => content_type = Some(value),
            "nats-msg-id" => server_id = Some(value),
            // The server's own.
            other if other.starts_with("nats-") => {}
            // Names of attributes are in lower case.
            other if other.starts_with(PREFIX) => headers.push((lower, value)),
            _ => headers.push((name.to_owned(), value)),
        }
    }
    let is_id = |(name, value): &(String, String)| name == "ce-id" && !value.is_empty();
    if !headers.iter().any(is_id) {
        headers.retain(|(name, _)| name != "ce-id");
        // Else its place, which no other message has.
        let place = || format!("{stream}:{}", arrived.sequence);
        let id = server_id.filter(|id| !id.is_empty()).unwrap_or_else(place);
        headers.push(("ce-id".to_owned(), id));
    }
    let payload = (!tombstone || !arrived.payload.is_empty()).then_some(arrived.payload);
    let pairs = headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.clone()));
    let (mut message, mut defect) =
        cloudevents::decode(topic, &[PREFIX], pairs, content_type, payload);
    if message.id.len() > ID_BYTES || message.id.chars().any(char::is_control) {
        defect = Some(format!(
            "the id has {} bytes or a control character, expected {ID_BYTES} printable characters at most",
            message.id.len()
        ));
        message.id = format!("{stream}:{}", arrived.sequence);
    }
    if message.kind.is_empty() {
        message.kind = arrived.subject.to_owned();
    }
    (message, defect)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn event() -> Message {
        Message::new("1", "t", "t.a", "{}").with_attribute("source", "s")
    }

    fn sent(m: &Message) -> Result<Wire> {
        encode(m, &To::Topic("t"), 10_000)
    }

    fn arrived<'a>(headers: Option<&'a HeaderMap>, payload: &Bytes) -> Arrived<'a> {
        Arrived {
            topic: "t",
            stream: "t",
            sequence: 7,
            subject: "t.b",
            headers,
            payload: payload.clone(),
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut m = event()
            .with_key("")
            .with_attribute("datacontenttype", "application/json")
            .with_header("mine", "ü — 漢");
        m.time = UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
        for payload in [Some("{}".into()), Some(Bytes::new()), None] {
            m.payload = payload;
            let wire = sent(&m).unwrap();
            assert_eq!(wire.subject, "t.a");
            let back = decode(arrived(Some(&wire.headers), &wire.payload));
            assert_eq!(back, (m.clone(), None));
        }
    }

    #[test]
    fn the_server_is_told_id_and_stream_and_nothing_that_an_application_wrote() {
        let wire = sent(&event()).unwrap();
        let header = |name: &str| wire.headers.get(name).map(|v| v.as_str().to_owned());
        assert_eq!(header("Nats-Msg-Id").as_deref(), Some("1@s"));
        assert_eq!(header("Nats-Expected-Stream").as_deref(), Some("t"));
        for name in [
            "Nats-Rollup",
            "nats-ttl",
            "ce-id",
            "content-type",
            TOMBSTONE,
        ] {
            assert!(sent(&event().with_header(name, "all")).is_err(), "{name}");
            // A dead letter of a foreigner travels without it.
            let letter = event().with_header(name, "all");
            let to = To::DeadLetters("d.g", "d");
            let wire = encode(&letter, &to, 10_000).unwrap();
            let other = |v: &HeaderValue| v.as_str() != "all";
            assert!(wire.headers.get(name).is_none_or(other), "{name}");
            assert!(wire.headers.get("Nats-Msg-Id").is_none());
        }
    }

    #[test]
    fn nothing_makes_the_client_panic() {
        for (name, value) in [
            ("a", "1\r\nb: 2"),
            ("naïve", "1"),
            ("a\nb", "1"),
            ("", "1"),
            ("a:b", "1"),
            ("a b", "1"),
            ("a", " edge"),
        ] {
            let m = event().with_header(name, value);
            assert_eq!(
                sent(&m).err().map(|e| e.kind()),
                Some(Kind::Invalid),
                "{name:?}"
            );
            assert!(encode(&m, &To::DeadLetters("d.g", "d"), 10_000).is_ok());
        }
    }

    #[test]
    fn limits_are_those_of_the_wire() {
        let kind = |m: &Message, most| encode(m, &To::Topic("t"), most).err().map(|e| e.kind());
        let m = event();
        let bytes = sent(&m).unwrap();
        let exact = bytes.payload.len()
            + 12
            + bytes
                .headers
                .iter()
                .map(|(n, v)| {
                    let n: &str = n.as_ref();
                    n.len() + v[0].as_str().len() + 4
                })
                .sum::<usize>();
        assert_eq!(kind(&m, exact), None);
        assert_eq!(kind(&m, exact - 1), Some(Kind::TooLarge));
        let long = |n: usize| event().with_header("h", "x".repeat(n));
        assert_eq!(kind(&long(60_000), 1_000_000), None);
        assert_eq!(kind(&long(66_000), 1_000_000), Some(Kind::TooLarge));
    }

    #[test]
    fn a_message_without_an_id_has_its_place_for_one() {
        let body = Bytes::from_static(b"body");
        let (m, defect) = decode(arrived(None, &body));
        assert_eq!((m.id.as_str(), m.kind.as_str()), ("t:7", "t.b"));
        assert!(defect.unwrap().contains("no CloudEvents envelope"));
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", "n");
        headers.insert("ce-specversion", "1.0");
        headers.insert("ce-type", "t.a");
        headers.insert("Nats-Expected-Stream", "t");
        let (m, defect) = decode(arrived(Some(&headers), &body));
        assert_eq!((m.id.as_str(), defect), ("n", None));
        assert!(m.headers.is_empty(), "{:?}", m.headers);
        headers.insert("CE-Id", "x".repeat(129).as_str());
        let (m, defect) = decode(arrived(Some(&headers), &body));
        assert_eq!(m.id, "t:7");
        assert!(defect.unwrap().contains("expected 128"));
    }
}
