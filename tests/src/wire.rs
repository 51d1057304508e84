//! A raw AMQP client that shares no code with the adapter: what arrived, in which order, and what a stranger may send.

use std::{collections::BTreeMap, time::Duration};

use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
    message::Delivery,
    options::{
        BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use pillarbox_transport::{Message, cloudevents};

use crate::TOPIC;

/// A connection of a test's own.
pub struct Client {
    connection: Connection,
    channel: Channel,
}

/// A message as it lies on the wire.
#[derive(Debug)]
pub struct Arrived {
    /// The property `message_id`.
    pub id: String,
    /// The header `cloudEvents_partitionkey`.
    pub key: Option<String>,
    /// `n` of the JSON body; none if there is none.
    pub n: Option<u32>,
    /// All headers that are texts.
    pub headers: BTreeMap<String, String>,
    /// The properties.
    pub properties: BasicProperties,
    /// The routing key.
    pub routing_key: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Client {
    /// A connection with one confirming channel.
    pub async fn connect(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await;
        let connection = connection.expect("a connection");
        let channel = connection.create_channel().await.expect("a channel");
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        confirms.await.expect("confirms");
        Self {
            connection,
            channel,
        }
    }

    /// The raw channel.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Declares the topic's exchange, as the adapter does.
    pub async fn exchange(&self) {
        let options = ExchangeDeclareOptions {
            durable: true,
            ..ExchangeDeclareOptions::default()
        };
        let table = FieldTable::default();
        let declare =
            self.channel
                .exchange_declare(TOPIC.into(), ExchangeKind::Topic, options, table);
        declare.await.expect("an exchange");
    }

    /// A durable queue with these arguments, bound to the topic by `pattern`.
    pub async fn queue(&self, name: &str, pattern: &str, arguments: &[(&str, AMQPValue)]) {
        self.exchange().await;
        let mut table = FieldTable::default();
        for (name, value) in arguments {
            table.insert((*name).into(), value.clone());
        }
        let options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let declare = self.channel.queue_declare(name.into(), options, table);
        declare.await.expect("a queue");
        self.bind(name, pattern).await;
    }

    /// Binds a queue to the topic.
    pub async fn bind(&self, queue: &str, pattern: &str) {
        let bind = self.channel.queue_bind(
            queue.into(),
            TOPIC.into(),
            pattern.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        bind.await.expect("a binding");
    }

    /// A quorum queue that gets all of the topic, to be drained at the end.
    pub async fn tap(&self) -> &'static str {
        let quorum = AMQPValue::LongString("quorum".into());
        self.queue("tap", "#", &[("x-queue-type", quorum)]).await;
        "tap"
    }

    /// Publishes a message as the adapter's documentation says it travels.
    pub async fn publish(&self, m: &Message) {
        let mut headers = FieldTable::default();
        let mut put = |name: &str, value: &str| {
            let name = format!("cloudEvents_{name}");
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        };
        put("specversion", "1.0");
        put("id", &m.id);
        put("type", &m.kind);
        put("time", &cloudevents::rfc3339(m.time));
        if let Some(key) = &m.key {
            put("partitionkey", key);
        }
        for (name, value) in m.attributes.iter().filter(|(n, _)| *n != "datacontenttype") {
            put(name, value);
        }
        if m.payload.is_none() {
            headers.insert(
                "pillarbox-tombstone".into(),
                AMQPValue::LongString("true".into()),
            );
        }
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_message_id(m.id.as_str().into())
            .with_headers(headers);
        let body = m.payload.as_deref().unwrap_or_default();
        self.publish_raw(&m.topic, &m.kind, properties, body).await;
    }

    /// Publishes anything, and waits for the confirm.
    pub async fn publish_raw(
        &self,
        exchange: &str,
        routing_key: &str,
        properties: BasicProperties,
        body: &[u8],
    ) {
        let options = BasicPublishOptions::default();
        let publish = self.channel.basic_publish(
            exchange.into(),
            routing_key.into(),
            options,
            body,
            properties,
        );
        let confirm = publish.await.expect("a publish").await.expect("a confirm");
        assert!(confirm.is_ack(), "the raw client's message was refused");
    }

    /// Messages that are ready in a queue.
    pub async fn depth(&self, queue: &str) -> u32 {
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let table = FieldTable::default();
        let queue = self.channel.queue_declare(queue.into(), passive, table);
        queue.await.expect("a queue").message_count()
    }

    /// Takes what is ready in a queue, one by one: also from one that takes nothing more.
    pub async fn take(&self, queue: &str) -> Vec<Arrived> {
        let options = BasicGetOptions { no_ack: true };
        let mut all = Vec::new();
        let next = async || self.channel.basic_get(queue.into(), options).await;
        while let Some(message) = next().await.expect("an answer") {
            all.push(Arrived::of(message.delivery));
        }
        all
    }

    /// Takes all that lies in a queue, in order, once nothing more comes: what does is lost with the consumer.
    pub async fn drain(&self, queue: &str) -> Vec<Arrived> {
        // Nothing that was there before comes after this.
        let mark = BasicProperties::default().with_message_id("mark".into());
        self.publish_raw("", queue, mark, b"").await;
        let channel = self.connection.create_channel().await.expect("a channel");
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let table = FieldTable::default();
        let consume = channel.basic_consume(queue.into(), "".into(), options, table);
        let mut consumer = consume.await.expect("a consumer");
        let mut all = Vec::new();
        loop {
            let next = tokio::time::timeout(Duration::from_secs(60), consumer.next());
            let delivery = next.await.expect("a delivery within a minute");
            let arrived = Arrived::of(delivery.expect("a delivery").expect("a delivery"));
            if arrived.id == "mark" {
                // An error means that the connection went: what came, came.
                let _ = channel.close(200, "".into()).await;
                return all;
            }
            all.push(arrived);
        }
    }
}

impl Arrived {
    fn of(delivery: Delivery) -> Self {
        let properties = delivery.properties;
        let mut headers = BTreeMap::new();
        for (name, value) in properties.headers().as_ref().into_iter().flatten() {
            if let AMQPValue::LongString(text) = value {
                let text = String::from_utf8_lossy(text.as_bytes()).into_owned();
                headers.insert(name.to_string(), text);
            }
        }
        let body: Option<serde_json::Value> = serde_json::from_slice(&delivery.data).ok();
        let n = body.and_then(|b| b["n"].as_u64());
        Self {
            id: properties
                .message_id()
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            key: headers.get("cloudEvents_partitionkey").cloned(),
            n: n.and_then(|n| u32::try_from(n).ok()),
            headers,
            properties,
            routing_key: delivery.routing_key.to_string(),
            body: delivery.data,
        }
    }

    /// A CloudEvents attribute.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&str> {
        let header = self.headers.get(&format!("cloudEvents_{name}"));
        header.map(String::as_str)
    }
}
