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
    limits::{RESERVED, RESERVED_NAMES},
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
        let mut insert = |name: String, value: String| -> Result<()> {
            bytes += name.len() + value.len() + OVERHEAD.0;
            table.insert(short(&name)?, AMQPValue::LongString(value.into()));
            Ok(())
        };
        for (name, value) in cloudevents::encode(m) {
            insert(format!("{PREFIX}{name}"), value)?;
        }
        for (name, value) in m.headers.iter().filter(|(name, _)| may_travel(name)) {
            insert(name.clone(), value.clone())?;
        }
        if m.payload.is_none() {
            insert(TOMBSTONE.to_owned(), "true".to_owned())?;
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
    let attribute = |name: &str| {
        let mut names = headers.iter().map(|(name, _)| *name);
        names.any(|n| PREFIXES.iter().any(|p| n.strip_prefix(p) == Some(name)))
    };
    let message_id = properties.message_id().as_ref().map(ShortString::as_str);
    let digest = (!attribute("id") && message_id.is_none()).then(|| digest(delivery, &data));
    if let (false, Some(id)) = (attribute("id"), message_id) {
        headers.push(("cloudEvents_id", id.to_owned()));
    }
    let content_type = properties.content_type().as_ref().map(ToString::to_string);
    let payload = (!tombstone).then(|| Bytes::from(data));
    let (mut message, mut defect) =
        cloudevents::decode(topic, PREFIXES, headers, content_type, payload);
    if message.id.is_empty() {
        message.id = digest.unwrap_or_else(|| "sha256:".to_owned());
        let why = defect.map_or_else(String::new, |defect| format!("; {defect}"));
        defect = Some(format!(
            "no id: neither an attribute id nor the property message_id{why}"
        ));
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
