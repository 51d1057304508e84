//! The adapter against a real RabbitMQ. What arrived is checked by a raw client that shares no code with it.

// The lint's exception for tests does not see the functions that they share.
#![allow(clippy::unwrap_used)]

#[path = "amqp/blocked.rs"]
mod blocked;
#[cfg(feature = "tls-ring")]
#[path = "amqp/encryption.rs"]
mod encryption;
#[path = "amqp/faults.rs"]
mod faults;
#[path = "amqp/publishing.rs"]
mod publishing;
#[path = "amqp/reading.rs"]
mod reading;
#[path = "amqp/topology.rs"]
mod topology;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    message::Delivery,
    options::{BasicConsumeOptions, BasicPublishOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use pillarbox_amqp::{Amqp, Config, Queue};
use pillarbox_testkit::servers;
use pillarbox_transport::{Kind, Message, Outcome};

const TOPIC: &str = "inventory.events";
const QUEUE: &str = "inventory.events.queue";
const DLQ: &str = "inventory.events.dlq";
const GROUP: &str = "orders";
const KIND: &str = "inventory.stock.reserved";

/// A vhost of the test's own on the broker that all tests share.
async fn vhost() -> Option<String> {
    let server = servers::required(servers::rabbitmq().await)?;
    Some(server.create_vhost().await.unwrap())
}

/// The services' topology.
fn config(url: &str) -> Config {
    let mut config = Config::new(url);
    let queue = Queue {
        dead_letter: Some(DLQ.into()),
        ..Queue::new(TOPIC, GROUP, [KIND, "inventory.stock.released"])
    };
    config.queues.insert(QUEUE.into(), queue);
    config
}

fn amqp(url: &str) -> Amqp {
    Amqp::new(config(url)).unwrap()
}

fn event(id: impl ToString) -> Message {
    Message::new(id.to_string(), TOPIC, KIND, "{}").with_attribute("source", "inventory-service")
}

fn events(ids: std::ops::Range<usize>) -> Vec<Message> {
    ids.map(event).collect()
}

/// As a publisher takes them.
fn shared(messages: impl IntoIterator<Item = Message>) -> Vec<Arc<Message>> {
    messages.into_iter().map(Arc::new).collect()
}

/// No wait of a test lasts for ever.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, work)
        .await
        .expect("nothing happened for a minute")
}

/// What became of each message, in one word, with the error's kind.
fn words(outcomes: &[Outcome]) -> Vec<(&'static str, Option<Kind>)> {
    let word = |outcome: &Outcome| match outcome {
        Outcome::Stored => "stored",
        Outcome::Unknown(_) => "unknown",
        Outcome::Unavailable(_) => "unavailable",
        Outcome::Retry(_) => "retry",
        Outcome::Rejected(_) => "rejected",
    };
    let all = outcomes.iter();
    all.map(|o| (word(o), o.error().map(|e| e.kind())))
        .collect()
}

#[track_caller]
fn assert_all(outcomes: &[Outcome], word: &'static str, kind: Option<Kind>) {
    for (at, found) in words(outcomes).into_iter().enumerate() {
        assert_eq!(found, (word, kind), "message {at}: {:?}", outcomes[at]);
    }
}

/// A client that is not the adapter.
struct Raw {
    connection: Connection,
    channel: Channel,
}

impl Raw {
    async fn connect(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default())
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        Self {
            connection,
            channel,
        }
    }

    async fn depth(&self, queue: &str) -> u32 {
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let queue = self
            .channel
            .queue_declare(queue.into(), passive, Default::default());
        queue.await.unwrap().message_count()
    }

    /// A classic queue in memory, bound to the type of its name.
    async fn queue_for(&self, kind: &str, arguments: FieldTable) {
        let declare = self
            .channel
            .queue_declare(kind.into(), Default::default(), arguments);
        declare.await.unwrap();
        let (options, none) = (QueueBindOptions::default(), FieldTable::default());
        let bind = self
            .channel
            .queue_bind(kind.into(), TOPIC.into(), kind.into(), options, none);
        bind.await.unwrap();
    }

    /// All that lies in a queue, in order.
    async fn take(&self, queue: &str) -> Vec<Delivery> {
        // Nothing that was there before comes after this.
        let mark = BasicProperties::default().with_message_id("mark".into());
        let options = BasicPublishOptions::default();
        let publish = self
            .channel
            .basic_publish("".into(), queue.into(), options, b"", mark);
        publish.await.unwrap();
        let channel = self.connection.create_channel().await.unwrap();
        let options = BasicConsumeOptions {
            no_ack: true,
            ..Default::default()
        };
        let consume = channel.basic_consume(queue.into(), "".into(), options, Default::default());
        let mut consumer = consume.await.unwrap();
        let mut all = Vec::new();
        loop {
            let delivery = soon(consumer.next()).await.unwrap().unwrap();
            if *delivery.properties.message_id() == Some("mark".into()) {
                channel.close(200, "".into()).await.unwrap();
                return all;
            }
            all.push(delivery);
        }
    }

    /// The ids of all that lies in a queue, in order.
    async fn drain(&self, queue: &str) -> Vec<String> {
        let all = self.take(queue).await;
        let ids = all.iter().map(|d| d.properties.message_id().clone());
        ids.map(|id| id.map(String::from).unwrap_or_default())
            .collect()
    }

    async fn publish(&self, key: &str, properties: BasicProperties, body: &[u8]) {
        let options = BasicPublishOptions::default();
        let publish =
            self.channel
                .basic_publish(TOPIC.into(), key.into(), options, body, properties);
        publish.await.unwrap();
    }
}

fn set<T: ToString>(ids: impl IntoIterator<Item = T>) -> BTreeSet<String> {
    ids.into_iter().map(|id| id.to_string()).collect()
}
