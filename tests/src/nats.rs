//! A raw NATS client, and the transport for the world with NATS.

use std::time::Duration;

use async_nats::{Client, ConnectOptions, HeaderMap, jetstream};
use pillarbox_nats::{Config, Nats, Stream};
use pillarbox_transport::{Message, cloudevents};

use crate::TOPIC;

/// The transport of the tests' topic, with deadlines that tests can wait for.
pub(crate) fn transport(url: &str) -> Nats {
    let mut config = Config::new(url);
    config.ping_interval = Duration::from_secs(1);
    config.connect_timeout = Duration::from_secs(4);
    config.confirm_timeout = Duration::from_secs(4);
    let stream = Stream::new(TOPIC, ["test.>"]);
    config.streams.insert("test_events".to_owned(), stream);
    Nats::new(config).expect("a valid config")
}

/// The plain client; it takes no credentials from a URL.
async fn connect(url: &str) -> Client {
    let address = url.trim_start_matches("nats://");
    let (login, host) = address.rsplit_once('@').unwrap_or((":", address));
    let (user, password) = login.split_once(':').unwrap_or_default();
    let options = ConnectOptions::with_user_and_password(user.into(), password.into());
    options.connect(host).await.expect("a connection")
}

/// Publishes as a stranger would: the server is told no id, so that what comes twice lies there twice.
pub(crate) async fn publish(url: &str, messages: &[Message]) {
    let client = connect(url).await;
    let context = jetstream::new(client);
    for message in messages {
        let mut headers = HeaderMap::new();
        for (name, value) in cloudevents::encode(message) {
            headers.insert(format!("ce-{name}"), value.as_ref());
        }
        if message.payload.is_none() {
            headers.insert("pillarbox-tombstone", "true");
        }
        let payload = message.payload.clone().unwrap_or_default();
        let sent = context.publish_with_headers(message.kind.clone(), headers, payload);
        sent.await.expect("sent").await.expect("stored");
    }
}

/// How many messages the topic's stream has.
pub async fn stored(url: &str) -> u64 {
    let client = connect(url).await;
    let stream = jetstream::new(client).get_stream("test_events").await;
    stream.expect("the stream").cached_info().state.messages
}
