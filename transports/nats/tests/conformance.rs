//! The suite that every transport runs, on NATS. What arrived is checked by a plain client that shares no code with the
//! adapter.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_nats::jetstream;
use async_trait::async_trait;
use pillarbox_nats::{Config, Nats, Stream};
use pillarbox_testkit::{
    proxy::Proxy,
    servers::{self, Nats as Server},
    transport::{CONFIRM_TIMEOUT, Corner, GROUP, Harness, Stored, assert_documented, exercise},
};
use pillarbox_transport::Transport;

/// More than a message of the suite needs.
const MAX_PAYLOAD: usize = 1_500_000;

struct OnNats;

struct Account {
    word: String,
    url: String,
    through: String,
    proxy: Proxy,
    own: Option<Server>,
    largest: usize,
}

#[async_trait(?Send)]
impl Harness for OnNats {
    fn name(&self) -> &'static str {
        "nats"
    }

    async fn corner(&self, own_server: bool) -> Option<Box<dyn Corner>> {
        let own = match own_server {
            true => Some(servers::required(Server::start().await)?),
            false => None,
        };
        let url = match &own {
            Some(own) => own.create_account(),
            None => servers::required(servers::nats().await)?.create_account(),
        };
        let url = url.unwrap();
        let (proxy, through) = Proxy::before(&url).await.unwrap();
        let server = connect(&url).await.max_payload();
        Some(Box::new(Account {
            word: format!("suite{}", nuid::next()),
            // A server as it comes takes 1 MiB with the headers.
            largest: 1_048_576.min(server - 65_536),
            url,
            through,
            proxy,
            own,
        }))
    }
}

/// The plain client; it takes no credentials from a URL.
async fn connect(url: &str) -> async_nats::Client {
    let (login, host) = url.trim_start_matches("nats://").rsplit_once('@').unwrap();
    let (user, password) = login.split_once(':').unwrap();
    async_nats::ConnectOptions::with_user_and_password(user.into(), password.into())
        .connect(host)
        .await
        .unwrap()
}

impl Account {
    fn config(&self, url: &str) -> Config {
        let mut config = Config::new(url);
        config.ping_interval = Duration::from_secs(1);
        config.connect_timeout = CONFIRM_TIMEOUT;
        config.confirm_timeout = CONFIRM_TIMEOUT;
        config.max_payload = MAX_PAYLOAD;
        let stream = Stream::new(self.topic(), self.binding(GROUP).kinds);
        config.streams.insert(self.stream(), stream);
        config
    }

    fn stream(&self) -> String {
        format!("{}_events", self.word)
    }

    async fn read(&self, stream: &str, subject: Option<String>) -> Vec<Stored> {
        let client = connect(&self.url).await;
        let stream = jetstream::new(client).get_stream(stream).await.unwrap();
        let last = stream.cached_info().state.last_sequence;
        let mut all = Vec::new();
        for sequence in 1..=last {
            let message = stream.get_raw_message(sequence).await.unwrap();
            if subject.as_ref().is_some_and(|s| *s != *message.subject) {
                continue;
            }
            let text =
                |(name, values): (&async_nats::HeaderName, &Vec<async_nats::HeaderValue>)| {
                    (name.to_string(), values[0].to_string())
                };
            let headers: BTreeMap<String, String> = message.headers.iter().map(text).collect();
            all.push(Stored {
                id: headers["ce-id"].clone(),
                key: headers.get("ce-partitionkey").cloned(),
                payload: message.payload.clone(),
                headers,
            });
        }
        all
    }
}

#[async_trait(?Send)]
impl Corner for Account {
    fn word(&self) -> &str {
        &self.word
    }

    fn transport(&self) -> Arc<dyn Transport> {
        Arc::new(Nats::new(self.config(&self.through)).unwrap())
    }

    fn stranger(&self) -> Option<Arc<dyn Transport>> {
        let url = format!("nats://somebody:canary@{}", self.proxy.addr());
        Some(Arc::new(Nats::new(self.config(&url)).unwrap()))
    }

    fn proxy(&self) -> Option<&Proxy> {
        Some(&self.proxy)
    }

    async fn stored(&mut self) -> Vec<Stored> {
        self.read(&self.stream(), None).await
    }

    async fn dead_letters(&mut self) -> Vec<Stored> {
        let stream = format!("{}_dlq", self.stream());
        self.read(&stream, Some(format!("{stream}.{GROUP}"))).await
    }

    async fn crash(&mut self) {
        let own = self.own.as_mut().unwrap();
        own.kill().await.unwrap();
        own.start_again().await.unwrap();
    }

    fn largest(&self) -> usize {
        self.largest
    }

    fn too_large(&self) -> usize {
        MAX_PAYLOAD + 1
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_promise_of_a_transport() {
    exercise(&OnNats).await;
}

#[test]
fn the_table_says_so() {
    let page = include_str!("../../../docs/reference/transports.md");
    assert_documented(&OnNats, page);
}
