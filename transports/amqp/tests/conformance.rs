//! The suite that every transport runs, on RabbitMQ. What arrived is checked by a raw client that shares no code with the
//! adapter.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Connection, ConnectionProperties,
    options::{BasicConsumeOptions, BasicPublishOptions},
    types::AMQPValue,
};
use pillarbox_amqp::{Amqp, Config, Queue};
use pillarbox_testkit::{
    proxy::Proxy,
    servers::{self, RabbitMq},
    transport::{CONFIRM_TIMEOUT, Corner, GROUP, Harness, Stored, assert_documented, exercise},
};
use pillarbox_transport::Transport;

/// More than a message of the suite needs.
const MAX_PAYLOAD: usize = 1_500_000;

struct OnRabbitMq;

struct Vhost {
    word: String,
    url: String,
    through: String,
    proxy: Proxy,
    own: Option<RabbitMq>,
}

#[async_trait(?Send)]
impl Harness for OnRabbitMq {
    fn name(&self) -> &'static str {
        "amqp"
    }

    async fn corner(&self, own_server: bool) -> Option<Box<dyn Corner>> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let own = match own_server {
            true => Some(servers::required(RabbitMq::start().await)?),
            false => None,
        };
        let url = match &own {
            Some(own) => own.create_vhost().await,
            None => {
                let shared = servers::required(servers::rabbitmq().await)?;
                shared.create_vhost().await
            }
        };
        let url = url.unwrap();
        let (proxy, through) = Proxy::before(&url).await.unwrap();
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Relaxed));
        Some(Box::new(Vhost {
            word: format!("suite{process}x{count}"),
            url,
            through,
            proxy,
            own,
        }))
    }
}

impl Vhost {
    fn config(&self, url: &str) -> Config {
        let mut config = Config::new(url);
        config.heartbeat = Duration::from_secs(2);
        config.connect_timeout = CONFIRM_TIMEOUT;
        config.confirm_timeout = CONFIRM_TIMEOUT;
        config.max_payload = MAX_PAYLOAD;
        let queue = Queue::new(self.topic(), GROUP, self.binding(GROUP).kinds);
        config.queues.insert(self.queue(), queue);
        config
    }

    fn queue(&self) -> String {
        format!("{}.{GROUP}", self.topic())
    }

    /// All that lies in a queue, in order.
    async fn read(&self, queue: &str) -> Vec<Stored> {
        let connection = Connection::connect(&self.url, ConnectionProperties::default());
        let channel = connection.await.unwrap().create_channel().await.unwrap();
        // Nothing that was there before comes after this.
        let mark = BasicProperties::default().with_message_id("mark".into());
        let options = BasicPublishOptions::default();
        let publish = channel.basic_publish("".into(), queue.into(), options, b"", mark);
        publish.await.unwrap();
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let consume = channel.basic_consume(queue.into(), "".into(), options, Default::default());
        let mut consumer = consume.await.unwrap();
        let mut all = Vec::new();
        loop {
            let delivery = consumer.next().await.unwrap().unwrap();
            let id = delivery
                .properties
                .message_id()
                .clone()
                .unwrap()
                .to_string();
            if id == "mark" {
                return all;
            }
            let table = delivery.properties.headers().clone().unwrap_or_default();
            let text = |(name, value): (&lapin::types::ShortString, &AMQPValue)| match value {
                AMQPValue::LongString(value) => (name.to_string(), value.to_string()),
                other => (name.to_string(), format!("{other:?}")),
            };
            let headers: BTreeMap<String, String> = table.into_iter().map(text).collect();
            all.push(Stored {
                id,
                key: headers.get("cloudEvents_partitionkey").cloned(),
                payload: delivery.data.into(),
                headers,
            });
        }
    }
}

#[async_trait(?Send)]
impl Corner for Vhost {
    fn word(&self) -> &str {
        &self.word
    }

    fn transport(&self) -> Arc<dyn Transport> {
        Arc::new(Amqp::new(self.config(&self.through)).unwrap())
    }

    fn stranger(&self) -> Option<Arc<dyn Transport>> {
        let vhost = self.url.rsplit('/').next().unwrap();
        let url = format!("amqp://somebody:canary@{}/{vhost}", self.proxy.addr());
        Some(Arc::new(Amqp::new(self.config(&url)).unwrap()))
    }

    fn proxy(&self) -> Option<&Proxy> {
        Some(&self.proxy)
    }

    async fn stored(&mut self) -> Vec<Stored> {
        self.read(&self.queue()).await
    }

    async fn dead_letters(&mut self) -> Vec<Stored> {
        self.read(&format!("{}.dlq", self.queue())).await
    }

    async fn crash(&mut self) {
        let own = self.own.as_mut().unwrap();
        own.kill().await.unwrap();
        own.start_again().await.unwrap();
    }

    fn too_large(&self) -> usize {
        MAX_PAYLOAD + 1
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_promise_of_a_transport() {
    exercise(&OnRabbitMq).await;
}

#[test]
fn the_table_says_so() {
    let page = include_str!("../../../docs/reference/transports.md");
    assert_documented(&OnRabbitMq, page);
}
