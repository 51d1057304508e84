//! What the broker has after a publish, and what each message is told.

use std::time::UNIX_EPOCH;

use lapin::{
    ExchangeKind,
    options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use pillarbox_testkit::servers::{self, RabbitMq};
use pillarbox_transport::Transport;

use super::*;

/// lapin gives a returned message to whichever confirm comes next, so this is where a wrong one would be blamed. A queue in
/// memory confirms at once, so that the broker puts many into one confirm, returned ones among them.
#[tokio::test]
async fn a_window_of_1000_blames_the_ten_unroutable_and_no_other() {
    let Some(url) = vhost().await else { return };
    let publisher = amqp(&url).publisher().await.unwrap();
    let raw = Raw::connect(&url).await;
    raw.queue_for("fast", FieldTable::default()).await;
    let unroutable: BTreeSet<usize> = (0..10).map(|n| 7 + n * 97).collect();
    for (round, kind) in [KIND, "fast", "fast", "fast", "fast", KIND]
        .into_iter()
        .enumerate()
    {
        let mut messages = events(round * 1_000..(round + 1) * 1_000);
        for (at, message) in messages.iter_mut().enumerate() {
            message.kind = match unroutable.contains(&at) {
                true => "inventory.stock.nobody".into(),
                false => kind.into(),
            };
        }
        let outcomes = soon(publisher.publish(shared(messages))).await;
        for (at, found) in words(&outcomes).into_iter().enumerate() {
            let expected = match unroutable.contains(&at) {
                true => ("retry", Some(Kind::Unrouted)),
                false => ("stored", None),
            };
            assert_eq!(found, expected, "round {round}, message {at}");
        }
    }
    let mut ids = raw.drain(QUEUE).await;
    ids.extend(raw.drain("fast").await);
    let expected: BTreeSet<String> = (0..6_000)
        .filter(|id| !unroutable.contains(&(id % 1_000)))
        .map(|id| id.to_string())
        .collect();
    assert_eq!(ids.len(), expected.len());
    assert_eq!(set(ids), expected);
}

#[tokio::test]
async fn a_raw_client_sees_the_envelope_and_nothing_else() {
    let Some(url) = vhost().await else { return };
    let mut message = event("0198-a")
        .with_key("sku-1")
        .with_attribute("datacontenttype", "application/json")
        .with_attribute("correlationid", "c-1")
        .with_attribute("pillarboxposition", "7")
        .with_header("tenant", "acme");
    message.payload = Some(r#"{"n":1}"#.into());
    message.time = UNIX_EPOCH + Duration::from_millis(1_700_000_000_500);
    let publisher = amqp(&url).publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared([message]))).await,
        "stored",
        None,
    );

    let got = Raw::connect(&url).await.take(QUEUE).await.remove(0);
    assert_eq!(
        (got.exchange.as_str(), got.routing_key.as_str()),
        (TOPIC, KIND)
    );
    assert_eq!(got.data, br#"{"n":1}"#);
    let properties = &got.properties;
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!(properties.message_id().clone(), Some("0198-a".into()));
    assert_eq!(properties.kind().clone(), Some(KIND.into()));
    assert_eq!(
        properties.content_type().clone(),
        Some("application/json".into())
    );
    assert_eq!(*properties.timestamp(), Some(1_700_000_000));
    assert_eq!(
        properties.app_id().clone(),
        Some("inventory-service".into())
    );
    assert_eq!(properties.correlation_id().clone(), Some("c-1".into()));
    assert_eq!(properties.user_id().clone(), None);
    assert_eq!(properties.expiration().clone(), None);
    let headers: Vec<(String, String)> = properties
        .headers()
        .as_ref()
        .unwrap()
        .into_iter()
        .map(|(name, value)| {
            let AMQPValue::LongString(value) = value else {
                panic!("{name} is no text")
            };
            (name.to_string(), value.to_string())
        })
        .collect();
    let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (&**n, &**v)).collect();
    assert_eq!(
        headers,
        [
            ("cloudEvents_correlationid", "c-1"),
            ("cloudEvents_id", "0198-a"),
            ("cloudEvents_partitionkey", "sku-1"),
            ("cloudEvents_pillarboxposition", "7"),
            ("cloudEvents_source", "inventory-service"),
            ("cloudEvents_specversion", "1.0"),
            ("cloudEvents_time", "2023-11-14T22:13:20.5Z"),
            ("cloudEvents_type", KIND),
            ("tenant", "acme"),
        ]
    );
}

#[tokio::test]
async fn a_full_queue_makes_its_messages_unavailable_and_leaves_the_others() {
    let Some(url) = vhost().await else { return };
    let publisher = amqp(&url).publisher().await.unwrap();
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), 3.into());
    let reject = AMQPValue::LongString("reject-publish".into());
    arguments.insert("x-overflow".into(), reject);
    Raw::connect(&url).await.queue_for("small", arguments).await;

    let mut messages = events(0..40);
    for message in messages.iter_mut().step_by(2) {
        message.kind = "small".into();
    }
    let outcomes = soon(publisher.publish(shared(messages))).await;
    let small: Vec<_> = words(&outcomes).into_iter().step_by(2).collect();
    assert_eq!(small[..3], [("stored", None); 3]);
    assert_eq!(small[3..], [("unavailable", Some(Kind::Full)); 17]);
    assert!(outcomes.iter().skip(1).step_by(2).all(Outcome::is_stored));
    // The session goes on.
    assert_all(
        &soon(publisher.publish(shared(events(40..50)))).await,
        "stored",
        None,
    );
}

#[tokio::test]
async fn what_the_broker_would_refuse_is_rejected_alone() {
    let Some(url) = vhost().await else { return };
    let mut config = config(&url);
    config.max_payload = 1_000;
    let publisher = Amqp::new(config).unwrap().publisher().await.unwrap();
    let bad: Vec<(Message, Kind)> = vec![
        (event("a").with_header("x", "1\r\ny: 2"), Kind::Invalid),
        (event("b").with_header("CC", "other"), Kind::Invalid),
        (event("c").with_header("naïve", "1"), Kind::Invalid),
        (event("d").with_header("nul", "a\0b"), Kind::Invalid),
        (
            Message {
                kind: "k".repeat(300),
                ..event("e")
            },
            Kind::Invalid,
        ),
        (
            Message {
                kind: "a b".into(),
                ..event("f")
            },
            Kind::Invalid,
        ),
        (
            Message {
                topic: "t".repeat(300),
                ..event("g")
            },
            Kind::Invalid,
        ),
        (
            Message {
                id: "i".repeat(300),
                ..event("h")
            },
            Kind::Invalid,
        ),
        (
            Message {
                payload: Some(vec![0; 1_001].into()),
                ..event("i")
            },
            Kind::TooLarge,
        ),
        (
            event("j").with_header("long", "x".repeat(200_000)),
            Kind::TooLarge,
        ),
        (
            event("k").with_attribute("datacontenttype", "x".repeat(300)),
            Kind::Invalid,
        ),
        (event("l").with_key("k".repeat(200_000)), Kind::TooLarge),
    ];
    let mut messages = Vec::new();
    for (at, (message, _)) in bad.iter().enumerate() {
        messages.push(event(format!("before-{at}")));
        messages.push(message.clone());
    }
    let outcomes = soon(publisher.publish(shared(messages))).await;
    for (at, (pair, (message, kind))) in words(&outcomes).chunks(2).zip(&bad).enumerate() {
        assert_eq!(pair[0], ("stored", None), "the neighbour of {at}");
        assert_eq!(pair[1], ("rejected", Some(*kind)), "{}", message.id);
    }
    // The whole header frame at its limit still travels.
    let wide = event("wide").with_header("long", "x".repeat(100_000));
    assert_all(
        &soon(publisher.publish(shared([wide]))).await,
        "stored",
        None,
    );
}

#[tokio::test]
async fn a_body_that_only_this_broker_finds_too_large_is_rejected_and_remembered() {
    let small = [("max_message_size", "65536")];
    let Some(server) = servers::required(RabbitMq::start_with(&small).await) else {
        return;
    };
    let amqp = amqp(server.url());
    let large = || Message {
        payload: Some(vec![0; 70_000].into()),
        ..event("large")
    };
    let mut messages = events(0..20);
    messages.insert(10, large());
    let first = soon(
        amqp.publisher()
            .await
            .unwrap()
            .publish(shared(messages.clone())),
    )
    .await;
    let found = words(&first);
    assert_eq!(found[10], ("rejected", Some(Kind::TooLarge)));
    // The channel died with it: what had no confirm is unknown, and nothing else is blamed.
    for (at, (word, _)) in found.iter().enumerate().filter(|(at, _)| *at != 10) {
        assert!(["stored", "unknown"].contains(word), "message {at}: {word}");
    }
    let second = soon(amqp.publisher().await.unwrap().publish(shared(messages))).await;
    assert_eq!(words(&second)[10], ("rejected", Some(Kind::TooLarge)));
    assert_eq!(second.iter().filter(|o| o.is_stored()).count(), 20);
    server.end().await;
}

#[tokio::test]
async fn an_exchange_deleted_under_way_is_unavailable_and_made_anew_with_its_bindings() {
    let Some(url) = vhost().await else { return };
    let publisher = amqp(&url).publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "stored",
        None,
    );
    let raw = Raw::connect(&url).await;
    let delete = raw
        .channel
        .exchange_delete(TOPIC.into(), ExchangeDeleteOptions::default());
    delete.await.unwrap();
    let outcomes = soon(publisher.publish(shared(events(10..20)))).await;
    assert_all(&outcomes, "unavailable", Some(Kind::Missing));
    assert!(outcomes[0].error().unwrap().to_string().contains(TOPIC));
    // The same session, and nothing is unroutable for lack of a binding.
    for n in 2..10 {
        let outcomes = soon(publisher.publish(shared(events(n * 10..n * 10 + 10)))).await;
        assert_all(&outcomes, "stored", None);
    }
}

#[tokio::test]
async fn a_missing_exchange_names_only_its_own_topic() {
    let Some(url) = vhost().await else { return };
    let mut config = config(&url);
    config.channels = 1;
    let publisher = Amqp::new(config).unwrap().publisher().await.unwrap();
    let other = |id: &str| Message {
        topic: "other".into(),
        kind: "other.x".into(),
        ..event(id)
    };
    let outcomes = soon(publisher.publish(shared([other("a")]))).await;
    assert_all(&outcomes, "retry", Some(Kind::Unrouted));
    let raw = Raw::connect(&url).await;
    raw.channel
        .exchange_delete("other".into(), Default::default())
        .await
        .unwrap();
    let outcomes = soon(publisher.publish(shared([event("1"), other("b"), event("2")]))).await;
    let found = words(&outcomes);
    assert_eq!(found[1], ("unavailable", Some(Kind::Missing)));
    // Before it: confirmed or not; after it: the broker had stopped listening.
    assert!(["stored", "unknown"].contains(&found[0].0), "{found:?}");
    assert_eq!(found[2].0, "unknown");
}

#[tokio::test]
async fn without_the_right_to_write_messages_are_unavailable() {
    let Some(server) = servers::required(servers::rabbitmq().await) else {
        return;
    };
    let url = server.create_vhost().await.unwrap();
    amqp(&url).publisher().await.unwrap();
    let name = url.rsplit('/').next().unwrap();
    let user = format!("reader-{name}");
    server.ctl(&["add_user", &user, "secret"]).await.unwrap();
    let rights = [
        "set_permissions",
        "-p",
        name,
        &user,
        ".*",
        "^inventory\\.events\\.queue$",
        ".*",
    ];
    server.ctl(&rights).await.unwrap();
    let host = url.split('@').nth(1).unwrap();
    let publisher = amqp(&format!("amqp://{user}:secret@{host}"))
        .publisher()
        .await
        .unwrap();
    let outcomes = soon(publisher.publish(shared(events(0..10)))).await;
    assert_all(&outcomes, "unavailable", Some(Kind::Refused));
}

#[tokio::test]
async fn batches_leave_in_call_order_before_anybody_waits_for_them() {
    let Some(url) = vhost().await else { return };
    let mut config = config(&url);
    config.channels = 1;
    let publisher = Amqp::new(config).unwrap().publisher().await.unwrap();
    let batches: Vec<_> = (0..50)
        .map(|n| publisher.publish(shared(events(n * 7..n * 7 + 7))))
        .collect();
    // The last first: a future that is not polled holds nothing up.
    for batch in batches.into_iter().rev() {
        assert_all(&soon(batch).await, "stored", None);
    }
    let ids = Raw::connect(&url).await.drain(QUEUE).await;
    let expected: Vec<String> = (0..350).map(|id| id.to_string()).collect();
    assert_eq!(ids, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_channels_keep_each_batch_in_order() {
    let Some(url) = vhost().await else { return };
    let publisher = amqp(&url).publisher().await.unwrap();
    let batches: Vec<_> = (0..40)
        .map(|n| publisher.publish(shared(events(n * 50..n * 50 + 50))))
        .collect();
    for batch in batches {
        assert_all(&soon(batch).await, "stored", None);
    }
    let ids = Raw::connect(&url).await.drain(QUEUE).await;
    let mut next = [0; 40];
    for id in ids.iter().map(|id| id.parse::<usize>().unwrap()) {
        assert_eq!(id % 50, next[id / 50], "batch {}", id / 50);
        next[id / 50] += 1;
    }
    assert_eq!(next, [50; 40]);
}

#[tokio::test]
async fn dead_letters_go_to_the_groups_queue_whatever_is_wrong_with_them() {
    let Some(url) = vhost().await else { return };
    let amqp = amqp(&url);
    let dead = amqp.dead_letters(TOPIC, GROUP).await.unwrap();
    let nameless = Message {
        kind: String::new(),
        ..event("sha256:1")
    };
    let spoofed = event("2")
        .with_header("CC", "other")
        .with_header("x-death", "1");
    let outcomes = soon(dead.publish(shared([nameless, spoofed]))).await;
    assert_all(&outcomes, "stored", None);
    let raw = Raw::connect(&url).await;
    let letters = raw.take(DLQ).await;
    assert_eq!(
        letters[0].properties.message_id().clone(),
        Some("sha256:1".into())
    );
    let headers = letters[1].properties.headers().clone().unwrap();
    assert!(!headers.contains_key("CC") && !headers.contains_key("x-death"));

    // A queue that is gone is made anew for the next batch.
    raw.channel
        .queue_delete(DLQ.into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    let outcomes = soon(dead.publish(shared([event("3")]))).await;
    assert_all(&outcomes, "unavailable", Some(Kind::Missing));
    assert_all(
        &soon(dead.publish(shared([event("3")]))).await,
        "stored",
        None,
    );
    // A group that has no queue has dead letters all the same.
    let other = amqp.dead_letters("orders.events", "audit").await.unwrap();
    assert_all(
        &soon(other.publish(shared([event("4")]))).await,
        "stored",
        None,
    );
    assert_eq!(raw.drain("orders.events.audit.dlq").await, ["4"]);
}

#[tokio::test]
async fn a_dropped_session_sends_nothing_more() {
    let Some(url) = vhost().await else { return };
    let mut config = config(&url);
    config.channels = 1;
    let publisher = Amqp::new(config).unwrap().publisher().await.unwrap();
    // One thread runs the test and the session's task, which has had no turn before the drop.
    let batches: Vec<_> = (0..20)
        .map(|n| publisher.publish(shared(events(n * 10..n * 10 + 10))))
        .collect();
    drop(publisher);
    for batch in batches {
        assert_all(&soon(batch).await, "unknown", Some(Kind::Closed));
    }
    assert_eq!(Raw::connect(&url).await.depth(QUEUE).await, 0);
}

#[tokio::test]
async fn an_exchange_of_another_kind_is_a_configuration_error_for_its_topic() {
    let Some(url) = vhost().await else { return };
    let raw = Raw::connect(&url).await;
    let options = ExchangeDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let declare = raw.channel.exchange_declare(
        "odd".into(),
        ExchangeKind::Fanout,
        options,
        Default::default(),
    );
    declare.await.unwrap();
    let publisher = amqp(&url).publisher().await.unwrap();
    let odd = Message {
        topic: "odd".into(),
        ..event("odd")
    };
    let outcomes = soon(publisher.publish(shared([event("1"), odd, event("2")]))).await;
    assert_eq!(
        words(&outcomes),
        [
            ("stored", None),
            ("unavailable", Some(Kind::Configuration)),
            ("stored", None)
        ]
    );
    let text = outcomes[1].error().unwrap().to_string();
    assert!(
        text.contains("\"odd\"") && text.contains("topic exchange"),
        "{text}"
    );
}

/// Bodies and headers of returned messages may hold personal data; the client library below would log them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn returned_messages_are_not_logged() {
    let Some(url) = vhost().await else { return };
    let log = Log::default();
    let copy = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || copy.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let publisher = amqp(&url).publisher().await.unwrap();
    let mut secret = event("1").with_header("canary", "a-canary-in-a-header");
    secret.kind = "inventory.nobody".into();
    secret.payload = Some("a-canary-in-a-body".into());
    let outcomes = soon(publisher.publish(shared([secret]))).await;
    assert_all(&outcomes, "retry", Some(Kind::Unrouted));
    let text = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    assert!(text.contains("connected to RabbitMQ"));
    assert!(!text.contains("a-canary"), "in text");
    // As Debug shows bytes: "a-c…".
    assert!(
        !text.contains("97, 45, 99, 97, 110, 97, 114, 121"),
        "as numbers"
    );
    let password = url.split([':', '@']).nth(2).unwrap();
    assert!(!text.contains(password), "the password");
}

#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn nothing_to_publish_is_nothing() {
    let Some(url) = vhost().await else { return };
    let publisher = amqp(&url).publisher().await.unwrap();
    assert!(soon(publisher.publish(Vec::new())).await.is_empty());
}
