//! The adapter against a real NATS server: streams, refusals, credentials. What every transport shows is in the suite.

// The lint's exception for tests does not see the functions that they share.
#![allow(clippy::unwrap_used)]

#[cfg(feature = "tls-ring")]
#[path = "nats/encryption.rs"]
mod encryption;
#[path = "nats/identity.rs"]
mod identity;
#[path = "nats/streams.rs"]
mod streams;

use std::{sync::Arc, time::Duration};

use async_nats::{Client, ConnectOptions, jetstream};
use pillarbox_nats::{Config, Nats, Stream};
use pillarbox_testkit::servers;
use pillarbox_transport::{Binding, Kind, Message, Outcome, Publisher, Transport};

const TOPIC: &str = "inventory.events";
const STREAM: &str = "inventory_events";
const KIND: &str = "inventory.stock.reserved";
const GROUP: &str = "orders";

/// An account of the test's own on the server that all tests share.
async fn account() -> Option<String> {
    let server = servers::required(servers::nats().await)?;
    Some(server.create_account().unwrap())
}

fn config(url: &str) -> Config {
    let mut config = Config::new(url);
    config.connect_timeout = Duration::from_secs(10);
    config.confirm_timeout = Duration::from_secs(10);
    let stream = Stream::new(TOPIC, ["inventory.>"]);
    config.streams.insert(STREAM.into(), stream);
    config
}

fn nats(url: &str) -> Nats {
    Nats::new(config(url)).unwrap()
}

fn event(id: impl ToString) -> Message {
    Message::new(id.to_string(), TOPIC, KIND, "{}").with_attribute("source", "inventory-service")
}

fn events(ids: std::ops::Range<usize>) -> Vec<Message> {
    ids.map(event).collect()
}

fn binding(kinds: &[&str]) -> Binding {
    Binding {
        topic: TOPIC.into(),
        group: GROUP.into(),
        kinds: kinds.iter().map(|k| (*k).to_owned()).collect(),
    }
}

/// No wait of a test lasts for ever.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, work)
        .await
        .expect("nothing happened for a minute")
}

async fn publish(nats: &Nats, messages: Vec<Message>) -> Vec<Outcome> {
    let publisher = soon(nats.publisher()).await.unwrap();
    soon(send(&*publisher, messages)).await
}

fn send(publisher: &dyn Publisher, messages: Vec<Message>) -> impl Future<Output = Vec<Outcome>> {
    publisher.publish(messages.into_iter().map(Arc::new).collect())
}

#[track_caller]
fn assert_stored(outcomes: &[Outcome]) {
    assert!(outcomes.iter().all(Outcome::is_stored), "{outcomes:?}");
}

#[track_caller]
fn assert_unavailable(outcome: &Outcome, kind: Kind) {
    assert!(
        matches!(outcome, Outcome::Unavailable(e) if e.kind() == kind),
        "{outcome:?}"
    );
}

/// A client that is not the adapter; it takes no credentials from a URL.
async fn connect(url: &str) -> Client {
    let address = url.trim_start_matches("nats://");
    let (login, host) = address.rsplit_once('@').unwrap_or((":", address));
    let (user, password) = login.split_once(':').unwrap();
    let options = ConnectOptions::with_user_and_password(user.into(), password.into());
    options.connect(host).await.unwrap()
}

async fn raw(url: &str) -> jetstream::Context {
    jetstream::new(connect(url).await)
}

/// What NATS has under a name.
async fn declared(url: &str, name: &str) -> jetstream::stream::Info {
    let stream = raw(url).await.get_stream(name).await.unwrap();
    stream.cached_info().clone()
}
