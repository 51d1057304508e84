//! How a message becomes AMQP properties and headers, and back: CloudEvents 1.0, binary mode.

use std::time::UNIX_EPOCH;

use bytes::Bytes;
use lapin::{
    BasicProperties,
    message::Delivery,
    types::{AMQPValue, FieldTable, ShortString},
};
use pillarbox_transport::{
    Error, Kind, Limits, Message, Result, cloudevents,
    limits::{ID_BYTES, RESERVED, RESERVED_NAMES},
};
use sha2::{Digest, Sha256};

use crate::{config::SHORT_STRING, publisher::Target, topology::short};

/// What is written before the names of attributes.
const PREFIX: &str = "cloudEvents_";
/// What is read.
const PREFIXES: &[&str] = &[PREFIX, "cloudEvents:"];
/// AMQP always has a body; this header tells an empty one from none.
const TOMBSTONE: &str = "pillarbox-tombstone";
/// Bytes of a frame of headers that are neither names nor values, at most for each of them, and in all.
const OVERHEAD: (usize, usize) = (6, 2_048);

/// A message, ready for `basic.publish`.
pub(crate) struct Wire {
    pub(crate) exchange: ShortString,
    pub(crate) key: ShortString,
    pub(crate) properties: BasicProperties,
}

/// Writes the messages of one session.
pub(crate) struct Encoder {
    target: Target,
    limits: Limits,
}

impl Encoder {
    /// Headers must fit in one frame of `frame_max` bytes: the broker closes the connection over a larger one.
    pub(crate) fn new(target: Target, frame_max: usize) -> Self {
        let header_bytes = frame_max.saturating_sub(OVERHEAD.1);
        let limits = Limits {
            payload: usize::MAX,
            key: header_bytes,
            headers: usize::from(u8::MAX),
            header_name: SHORT_STRING - PREFIX.len(),
            header_bytes,
        };
        Self { target, limits }
    }

    /// # Errors
    /// What AMQP or the broker would refuse, or take as an order: to be rejected, alone.
    pub(crate) fn encode(&self, m: &Message, max_payload: usize) -> Result<Wire> {
        let (exchange, key) = match &self.target {
            Target::Topics => {
                self.limits.check(m)?;
                (short(&m.topic)?, short(&m.kind)?)
            }
            // Dead letters may be malformed: that may be why they are dead.
            Target::DeadLetters(queue) => (ShortString::default(), short(&queue.dead_letter)?),
        };
        let payload = m.payload.as_ref().map_or(0, Bytes::len);
        if payload > max_payload {
            return Err(too_large("the payload", payload, max_payload));
        }
        let headers = self.headers(m)?;
        let seconds = m.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_message_id(short(&m.id)?)
            .with_type(short(&m.kind)?)
            .with_timestamp(seconds.as_secs())
            .with_headers(headers);
        if let Some(content_type) = m.content_type() {
            properties = properties.with_content_type(short(content_type)?);
        }
        // Copies for people and for foreign consumers; the whole is in the headers.
        if let Ok(source) = short(m.source())
            && !m.source().is_empty()
        {
            properties = properties.with_app_id(source);
        }
        if let Some(Ok(id)) = m.attribute("correlationid").map(short) {
            properties = properties.with_correlation_id(id);
        }
        Ok(Wire {
            exchange,
            key,
            properties,
        })
    }

    fn headers(&self, m: &Message) -> Result<FieldTable> {
        let mut table = FieldTable::default();
        let mut bytes = 0;
        let mut insert = |name: &str, value: &str| -> Result<()> {
            bytes += name.len() + value.len() + OVERHEAD.0;
            table.insert(short(name)?, AMQPValue::LongString(value.as_bytes().into()));
            Ok(())
        };
        let mut prefixed = PREFIX.to_owned();
        for (name, value) in cloudevents::encode(m) {
            prefixed.truncate(PREFIX.len());
            prefixed.push_str(name);
            insert(&prefixed, &value)?;
        }
        for (name, value) in m.headers.iter().filter(|(name, _)| may_travel(name)) {
            insert(name, value)?;
        }
        if m.payload.is_none() {
            insert(TOMBSTONE, "true")?;
        }
        if bytes > self.limits.header_bytes {
            let what = "headers and attributes together";
            return Err(too_large(what, bytes, self.limits.header_bytes));
        }
        Ok(table)
    }
}

/// A dead letter from a foreign publisher may have headers that the broker acts on.
fn may_travel(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let reserved = RESERVED_NAMES.contains(&name.as_str())
        || RESERVED.iter().any(|prefix| name.starts_with(prefix));
    !reserved || name.starts_with("pillarbox-")
}

fn too_large(what: &str, found: usize, most: usize) -> Error {
    let text = format!("{what} take {found} bytes; at most {most} are allowed");
    Error::new(Kind::TooLarge, "check", text)
}

/// A message and why it cannot be trusted, if so. Its id is stable over redeliveries in any case.
pub(crate) fn decode(topic: &str, delivery: &mut Delivery) -> (Message, Option<String>) {
    let data = std::mem::take(&mut delivery.data);
    let properties = &delivery.properties;
    let table = properties.headers().as_ref();
    let mut tombstone = false;
    let mut headers = Vec::new();
    for (name, value) in table.into_iter().flatten() {
        match name.as_str() {
            TOMBSTONE => tombstone = true,
            name => headers.push((name, text(value))),
        }
    }
    let is_id = |name: &str| PREFIXES.iter().any(|p| name.strip_prefix(p) == Some("id"));
    headers.retain(|(name, id)| !is_id(name) || !id.is_empty());
    let mut nameless = None;
    if !headers.iter().any(|(name, _)| is_id(name)) {
        let property = properties.message_id().as_ref().map(ToString::to_string);
        match property.filter(|id| !id.is_empty()) {
            Some(id) => headers.push(("cloudEvents_id", id)),
            None => nameless = Some(digest(delivery, &data)),
        }
    }
    let content_type = properties.content_type().as_ref().map(ToString::to_string);
    let payload = (!tombstone || !data.is_empty()).then(|| Bytes::from(data));
    let (mut message, mut defect) =
        cloudevents::decode(topic, PREFIXES, headers, content_type, payload);
    if let Some(id) = nameless {
        message.id = id;
        let why = "no id: neither an attribute id nor the property message_id";
        defect = Some(defect.map_or_else(|| why.to_owned(), |other| format!("{why}; {other}")));
    } else if message.id.len() > ID_BYTES || message.id.chars().any(char::is_control) {
        defect = Some(format!(
            "the id has {} bytes or a control character, expected {ID_BYTES} printable characters at most",
            message.id.len()
        ));
        message.id = hex(Sha256::new().chain_update(&message.id));
    }
    if message.kind.is_empty() {
        let kind = properties.kind().as_ref().unwrap_or(&delivery.routing_key);
        message.kind = kind.to_string();
    }
    (message, defect)
}

/// An id for a message that has none, made of what does not change when it is delivered again.
fn digest(delivery: &Delivery, data: &[u8]) -> String {
    let properties = &delivery.properties;
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    part(delivery.exchange.as_str().as_bytes());
    part(delivery.routing_key.as_str().as_bytes());
    part(&properties.timestamp().unwrap_or_default().to_be_bytes());
    // Headers with x- are the broker's and count deliveries.
    for (name, value) in properties.headers().as_ref().into_iter().flatten() {
        if !name.as_str().starts_with("x-") {
            part(name.as_str().as_bytes());
            part(text(value).as_bytes());
        }
    }
    part(data);
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// A header's value as text; bytes that are no UTF-8 are replaced.
fn text(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(v) => String::from_utf8_lossy(v.as_bytes()).into_owned(),
        AMQPValue::ShortString(v) => v.to_string(),
        AMQPValue::ByteArray(v) => String::from_utf8_lossy(v.as_slice()).into_owned(),
        AMQPValue::Boolean(v) => v.to_string(),
        AMQPValue::ShortShortInt(v) => v.to_string(),
        AMQPValue::ShortShortUInt(v) => v.to_string(),
        AMQPValue::ShortInt(v) => v.to_string(),
        AMQPValue::ShortUInt(v) => v.to_string(),
        AMQPValue::LongInt(v) => v.to_string(),
        AMQPValue::LongUInt(v) => v.to_string(),
        AMQPValue::LongLongInt(v) => v.to_string(),
        AMQPValue::Timestamp(v) => v.to_string(),
        AMQPValue::Float(v) => v.to_string(),
        AMQPValue::Double(v) => v.to_string(),
        AMQPValue::DecimalValue(v) => decimal(v.scale, v.value),
        AMQPValue::Void => String::new(),
        AMQPValue::FieldArray(v) => {
            let all: Vec<String> = v.as_slice().iter().map(text).collect();
            format!("[{}]", all.join(", "))
        }
        AMQPValue::FieldTable(v) => {
            let pair =
                |(name, value): (&ShortString, &AMQPValue)| format!("{name}: {}", text(value));
            let all: Vec<String> = v.into_iter().map(pair).collect();
            format!("{{{}}}", all.join(", "))
        }
    }
}

fn decimal(scale: u8, value: u32) -> String {
    let scale = usize::from(scale);
    let digits = format!("{value:0>width$}", width = scale + 1);
    let (whole, part) = digits.split_at(digits.len() - scale);
    if part.is_empty() {
        whole.to_owned()
    } else {
        format!("{whole}.{part}")
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;

    fn event() -> Message {
        Message::new("1", "t", "t.a", "{}").with_attribute("source", "s")
    }

    fn encoder() -> Encoder {
        Encoder::new(Target::Topics, 131_072)
    }

    fn headers(properties: &BasicProperties) -> BTreeMap<String, String> {
        let table = properties.headers().as_ref().unwrap();
        table
            .into_iter()
            .map(|(n, v)| (n.to_string(), text(v)))
            .collect()
    }

    /// As it would arrive.
    fn delivered(wire: Wire, body: &[u8]) -> Delivery {
        let mut delivery = Delivery::mock(1, wire.exchange, wire.key, false, body.to_vec());
        delivery.properties = wire.properties;
        delivery
    }

    fn foreign(properties: BasicProperties) -> Delivery {
        let mut delivery = Delivery::mock(1, "t".into(), "t.b".into(), false, b"body".to_vec());
        delivery.properties = properties;
        delivery
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut m = event()
            .with_key("")
            .with_attribute("datacontenttype", "application/json")
            .with_header("mine", "ü");
        m.time = UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
        for payload in [Some("{}".into()), Some(Bytes::new()), None] {
            m.payload = payload;
            let wire = encoder().encode(&m, 1_000).unwrap();
            let body = m.payload.clone().unwrap_or_default();
            let (back, defect) = decode("t", &mut delivered(wire, &body));
            assert_eq!((back, defect), (m.clone(), None));
        }
    }

    #[test]
    fn only_a_missing_payload_has_the_tombstones_mark() {
        let mut m = event();
        let wire = encoder().encode(&m, 1_000).unwrap();
        assert!(!headers(&wire.properties).contains_key(TOMBSTONE));
        m.payload = None;
        let wire = encoder().encode(&m, 1_000).unwrap();
        assert_eq!(headers(&wire.properties)[TOMBSTONE], "true");
        // An application cannot set it.
        assert!(
            encoder()
                .encode(&event().with_header(TOMBSTONE, "true"), 1_000)
                .is_err()
        );
    }

    #[test]
    fn limits_are_those_of_the_wire() {
        let kind = |m: &Message, payload| encoder().encode(m, payload).err().map(|e| e.kind());
        assert_eq!(kind(&event(), 2), None);
        assert_eq!(kind(&event(), 1), Some(Kind::TooLarge));
        let long = |n: usize| event().with_header("h", "x".repeat(n));
        assert_eq!(kind(&long(120_000), 2), None);
        assert_eq!(kind(&long(131_072), 2), Some(Kind::TooLarge));
        // A broker may negotiate small frames.
        let small = Encoder::new(Target::Topics, 4_096);
        assert!(small.encode(&long(1_000), 2).is_ok());
        assert!(small.encode(&long(4_000), 2).is_err());
    }

    #[test]
    fn long_sources_and_correlations_travel_in_headers_alone() {
        let m = event()
            .with_attribute("source", "s".repeat(300))
            .with_attribute("correlationid", "c".repeat(300));
        let wire = encoder().encode(&m, 1_000).unwrap();
        assert_eq!(wire.properties.app_id(), &None);
        assert_eq!(wire.properties.correlation_id(), &None);
        assert_eq!(headers(&wire.properties)["cloudEvents_source"].len(), 300);
    }

    #[test]
    fn a_message_without_an_id_gets_a_stable_one() {
        let count = |n: i64| {
            let mut table = FieldTable::default();
            table.insert("x-delivery-count".into(), AMQPValue::LongLongInt(n));
            BasicProperties::default().with_headers(table)
        };
        let (first, defect) = decode("t", &mut foreign(count(1)));
        assert!(defect.unwrap().starts_with("no id: "));
        assert_eq!(first.id.len(), "sha256:".len() + 64);
        assert_eq!(first.kind, "t.b");
        assert_eq!(first.payload.as_deref(), Some(&b"body"[..]));
        let (again, _) = decode("t", &mut foreign(count(2)));
        assert_eq!(first.id, again.id);
        let (other, _) = decode("t", &mut foreign(count(1).with_timestamp(1)));
        assert_ne!(first.id, other.id);
    }

    #[test]
    fn an_empty_id_is_none() {
        let mut table = FieldTable::default();
        for (name, value) in [("id", ""), ("specversion", "1.0"), ("type", "t.a")] {
            let value = AMQPValue::LongString(value.into());
            table.insert(format!("{PREFIX}{name}").into(), value);
        }
        let empty = BasicProperties::default().with_headers(table.clone());
        let (m, defect) = decode("t", &mut foreign(empty));
        assert!(m.id.starts_with("sha256:") && m.id.len() > 70, "{}", m.id);
        assert!(defect.unwrap().contains("no id"));
        let named = BasicProperties::default()
            .with_headers(table)
            .with_message_id("m".into());
        let (m, _) = decode("t", &mut foreign(named));
        assert_eq!(m.id, "m");
    }

    #[test]
    fn an_id_that_no_store_holds_is_replaced_by_a_stable_one() {
        for id in ["x".repeat(129), "a\0b".to_owned()] {
            let named = BasicProperties::default().with_message_id(short(&id).unwrap());
            let (m, defect) = decode("t", &mut foreign(named.clone()));
            assert!(m.id.starts_with("sha256:") && m.id.len() == 71, "{}", m.id);
            assert!(defect.unwrap().contains("expected 128"));
            assert_eq!(decode("t", &mut foreign(named)).0.id, m.id);
        }
    }

    #[test]
    fn values_of_every_type_become_text() {
        let mut table = FieldTable::default();
        table.insert("k".into(), AMQPValue::Void);
        let decimal = |scale, value| lapin::types::DecimalValue { scale, value };
        for (value, expected) in [
            (AMQPValue::LongString(vec![b'a', 0xff].into()), "a\u{fffd}"),
            (AMQPValue::ByteArray(b"ab".to_vec().into()), "ab"),
            (AMQPValue::Double(1.5), "1.5"),
            (AMQPValue::Timestamp(7), "7"),
            (AMQPValue::DecimalValue(decimal(2, 5)), "0.05"),
            (AMQPValue::DecimalValue(decimal(0, 5)), "5"),
            (
                AMQPValue::DecimalValue(decimal(255, 1)),
                &format!("0.{}1", "0".repeat(254)),
            ),
            (AMQPValue::Void, ""),
            (AMQPValue::FieldTable(table), "{k: }"),
        ] {
            assert_eq!(text(&value), expected);
        }
    }
}
