use std::{collections::BTreeMap, fmt, time::SystemTime};

use bytes::Bytes;

/// The one message type, on both sides of a broker.
///
/// `attributes` are CloudEvents attributes under their plain names (`source`, `correlationid`, …; lower-case letters and digits);
/// `headers` are the application's own. `Debug` shows no payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// Unique for its source; the consumer's inbox remembers it.
    pub id: String,
    /// When the event happened.
    pub time: SystemTime,
    /// The topic: exchange, topic or stream.
    pub topic: String,
    /// The event's type (CloudEvents `type`); the routing key where the broker routes.
    pub kind: String,
    /// Events of one (topic, key) stay in order; none means no order. The empty text is a key.
    pub key: Option<String>,
    /// The body; none is a tombstone.
    pub payload: Option<Bytes>,
    /// CloudEvents attributes other than `id`, `time`, `type`, `partitionkey` and `specversion`.
    pub attributes: BTreeMap<String, String>,
    /// The application's headers.
    pub headers: BTreeMap<String, String>,
}

impl Message {
    /// A message without key, attributes or headers.
    ///
    /// ```
    /// use pillarbox_transport::Message;
    /// let m = Message::new("0198…", "inventory.events", "inventory.stock.depleted", r#"{"productId":"sku-1"}"#)
    ///     .with_key("sku-1")
    ///     .with_attribute("source", "inventory-service");
    /// assert_eq!(m.source(), "inventory-service");
    /// ```
    #[must_use]
    pub fn new(
        id: impl Into<String>,
        topic: impl Into<String>,
        kind: impl Into<String>,
        payload: impl Into<Bytes>,
    ) -> Self {
        Self {
            id: id.into(),
            time: SystemTime::now(),
            topic: topic.into(),
            kind: kind.into(),
            key: None,
            payload: Some(payload.into()),
            attributes: BTreeMap::new(),
            headers: BTreeMap::new(),
        }
    }

    /// Sets the key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sets a CloudEvents attribute.
    #[must_use]
    pub fn with_attribute(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.attributes.insert(name.into(), value.into());
        self
    }

    /// Sets an application header.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// An attribute by its plain name.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    /// The CloudEvents source, `""` when there is none.
    #[must_use]
    pub fn source(&self) -> &str {
        self.attribute("source").unwrap_or_default()
    }

    /// The payload's content type.
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        self.attribute("datacontenttype")
    }

    /// The version of the payload's schema: the attribute `dataversion`, 1 when there is none; none when it is no number.
    #[must_use]
    pub fn version(&self) -> Option<u32> {
        self.attribute("dataversion")
            .map_or(Some(1), |v| v.parse().ok())
    }

    /// Bytes held by the variable parts: what the engine's byte limits count.
    #[must_use]
    pub fn size(&self) -> usize {
        let maps = self.attributes.iter().chain(&self.headers);
        self.payload.as_ref().map_or(0, Bytes::len)
            + self.id.len()
            + self.topic.len()
            + self.kind.len()
            + self.key.as_ref().map_or(0, String::len)
            + maps.map(|(k, v)| k.len() + v.len()).sum::<usize>()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Payloads and headers may hold personal data or secrets; logs get sizes.
        f.debug_struct("Message")
            .field("id", &self.id)
            .field("topic", &self.topic)
            .field("kind", &self.kind)
            .field("key", &self.key)
            .field("payload_bytes", &self.payload.as_ref().map(Bytes::len))
            .field("headers", &self.headers.len())
            .finish_non_exhaustive()
    }
}
