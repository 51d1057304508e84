//! Order, redelivery, acknowledgement, and messages of strangers.

use std::sync::Arc;

use lapin::{
    options::QueueDeleteOptions,
    types::{AMQPValue, FieldTable},
};
use pillarbox_testkit::servers::{self, RabbitMq};
use pillarbox_transport::{Binding, Source, Subscription, Transport};

use super::*;

async fn source(amqp: &Amqp) -> Source {
    let binding = Binding {
        topic: TOPIC.into(),
        group: GROUP.into(),
        kinds: vec![KIND.into()],
    };
    amqp.bind(&binding).await.unwrap().remove(0)
}

async fn publish(amqp: &Amqp, messages: Vec<Message>) {
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(messages))).await,
        "stored",
        None,
    );
}

async fn ids(reader: &mut dyn Subscription, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    while ids.len() < count {
        ids.push(soon(reader.next()).await.unwrap().message.id);
    }
    ids
}

fn texts(ids: std::ops::Range<usize>) -> Vec<String> {
    ids.map(|id| id.to_string()).collect()
}

#[tokio::test]
async fn what_is_published_is_read() {
    let Some(url) = vhost().await else { return };
    let amqp = amqp(&url);
    let mut full = event("1")
        .with_key("")
        .with_attribute("datacontenttype", "application/json")
        .with_attribute("traceparent", "00-1-2-03")
        .with_header("tenant", "ac\u{fc}me");
    full.time = std::time::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    let tombstone = Message {
        payload: None,
        time: full.time,
        ..event("2").with_key("sku")
    };
    let empty = Message {
        payload: Some(Default::default()),
        time: full.time,
        ..event("3")
    };
    let large = Message {
        payload: Some(vec![7; 900_000].into()),
        time: full.time,
        ..event("4")
    };
    let sent = vec![full, tombstone, empty, large];
    publish(&amqp, sent.clone()).await;
    let mut reader = amqp
        .subscribe(&source(&amqp).await, GROUP, None)
        .await
        .unwrap();
    for expected in sent {
        let delivery = soon(reader.next()).await.unwrap();
        assert_eq!((delivery.defect, delivery.position), (None, None));
        assert_eq!(delivery.message, expected);
    }
}

#[tokio::test]
async fn closed_or_dropped_what_is_not_acknowledged_comes_again_in_order() {
    let Some(url) = vhost().await else { return };
    let mut config = config(&url);
    // Fewer than there are: the queue has fresh ones to give when a session ends.
    config.prefetch = 30;
    let amqp = Amqp::new(config).unwrap();
    publish(&amqp, events(0..100)).await;
    let source = source(&amqp).await;
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    // Connected all the time: a cancel would give it the fresh ones first.
    let mut second = amqp.subscribe(&source, GROUP, None).await.unwrap();
    let mut third = amqp.subscribe(&source, GROUP, None).await.unwrap();
    for id in 0..10 {
        let delivery = soon(reader.next()).await.unwrap();
        assert_eq!(delivery.message.id, id.to_string());
        soon(delivery.ack.ack()).await.unwrap();
    }
    assert_eq!(ids(&mut *reader, 30).await, texts(10..40));
    soon(reader.close()).await;
    assert_eq!(ids(&mut *second, 30).await, texts(10..40));
    drop(second);
    for id in 10..100 {
        let delivery = soon(third.next()).await.unwrap();
        assert_eq!(delivery.message.id, id.to_string());
        soon(delivery.ack.ack()).await.unwrap();
    }
}

#[tokio::test]
async fn acknowledging_after_the_session_is_an_error() {
    let Some(url) = vhost().await else { return };
    let amqp = amqp(&url);
    publish(&amqp, events(0..2)).await;
    let source = source(&amqp).await;
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    let first = soon(reader.next()).await.unwrap();
    let second = soon(reader.next()).await.unwrap();
    soon(first.ack.ack()).await.unwrap();
    soon(reader.close()).await;
    let error = soon(second.ack.ack()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Closed, "{error}");
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    assert_eq!(ids(&mut *reader, 1).await, ["1"]);
}

#[tokio::test]
async fn no_more_than_the_prefetch_is_held_without_acknowledgement() {
    let Some(url) = vhost().await else { return };
    let mut config = config(&url);
    config.prefetch = 10;
    let amqp = Amqp::new(config).unwrap();
    publish(&amqp, events(0..25)).await;
    let mut reader = amqp
        .subscribe(&source(&amqp).await, GROUP, None)
        .await
        .unwrap();
    let mut held = Vec::new();
    for id in 0..10 {
        held.push(soon(reader.next()).await.unwrap());
        assert_eq!(held[id].message.id, id.to_string());
    }
    let more = tokio::time::timeout(Duration::from_millis(300), reader.next()).await;
    assert!(more.is_err(), "{:?}", more.map(|d| d.map(|d| d.message.id)));
    // Giving up the wait lost nothing.
    for (at, delivery) in held.into_iter().enumerate() {
        soon(delivery.ack.ack()).await.unwrap();
        assert_eq!(
            soon(reader.next()).await.unwrap().message.id,
            (10 + at).to_string()
        );
    }
}

#[tokio::test]
async fn messages_of_strangers_are_read_as_far_as_they_go() {
    let Some(url) = vhost().await else { return };
    let amqp = amqp(&url);
    let source = source(&amqp).await;
    let raw = Raw::connect(&url).await;
    let mut headers = FieldTable::default();
    headers.insert("n".into(), AMQPValue::LongLongInt(-7));
    headers.insert("yes".into(), AMQPValue::Boolean(true));
    headers.insert(
        "list".into(),
        AMQPValue::FieldArray(vec![1.into(), 2.into()].into()),
    );
    let plain = BasicProperties::default().with_headers(headers.clone());
    // No id at all, twice the same and once another.
    raw.publish(KIND, plain.clone(), b"one").await;
    raw.publish(KIND, plain.clone(), b"two").await;
    // The property alone.
    raw.publish(KIND, plain.with_message_id("m-1".into()), b"three")
        .await;
    // A whole envelope under the other prefix, its id in the property.
    let mut envelope = FieldTable::default();
    for (name, value) in [
        ("specversion", "1.0"),
        ("type", KIND),
        ("source", "s"),
        ("partitionkey", "k"),
    ] {
        envelope.insert(
            format!("cloudEvents:{name}").into(),
            AMQPValue::LongString(value.into()),
        );
    }
    let properties = BasicProperties::default()
        .with_headers(envelope)
        .with_message_id("m-2".into());
    raw.publish(KIND, properties, b"four").await;

    let mut seen = Vec::new();
    for _ in 0..2 {
        let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
        let mut all = Vec::new();
        for _ in 0..4 {
            let delivery = soon(reader.next()).await.unwrap();
            all.push((delivery.message, delivery.defect));
        }
        soon(reader.close()).await;
        seen.push(all);
    }
    // The second time they come as redeliveries, which must not change an id.
    let ids: Vec<Vec<&str>> = seen
        .iter()
        .map(|all| all.iter().map(|(m, _)| m.id.as_str()).collect())
        .collect();
    assert_eq!(ids[0], ids[1]);
    let all = &seen[0];
    assert!(
        all[0].0.id.starts_with("sha256:") && all[0].0.id.len() == 71,
        "{}",
        all[0].0.id
    );
    assert_ne!(all[0].0.id, all[1].0.id);
    assert!(
        all[0].1.as_ref().unwrap().contains("no id"),
        "{:?}",
        all[0].1
    );
    assert_eq!(all[0].0.kind, KIND, "the routing key");
    let headers: Vec<_> = all[0]
        .0
        .headers
        .iter()
        .map(|(n, v)| (n.as_str(), v.as_str()))
        .collect();
    assert_eq!(headers, [("list", "[1, 2]"), ("n", "-7"), ("yes", "true")]);
    assert_eq!(all[2].0.id, "m-1");
    assert!(
        all[2]
            .1
            .as_ref()
            .unwrap()
            .contains("no CloudEvents envelope"),
        "{:?}",
        all[2].1
    );
    assert_eq!((all[3].0.id.as_str(), &all[3].1), ("m-2", &None));
    assert_eq!(all[3].0.key.as_deref(), Some("k"));
}

#[tokio::test]
async fn a_queue_deleted_under_way_ends_the_session_and_is_made_anew_by_the_next() {
    let Some(url) = vhost().await else { return };
    let amqp = amqp(&url);
    let source = source(&amqp).await;
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    let raw = Raw::connect(&url).await;
    raw.channel
        .queue_delete(QUEUE.into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    let error = soon(reader.next()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Missing, "{error}");
    soon(reader.close()).await;
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    publish(&amqp, events(0..1)).await;
    assert_eq!(ids(&mut *reader, 1).await, ["0"]);
}

#[tokio::test]
async fn what_is_acknowledged_too_late_ends_the_session_and_comes_again_in_order() {
    let Some(server) = servers::required(RabbitMq::start().await) else {
        return;
    };
    let hurry = "application:set_env(rabbit, channel_tick_interval, 500), application:set_env(rabbit, consumer_timeout, 500).";
    server.ctl(&["eval", hurry]).await.unwrap();
    let amqp = amqp(server.url());
    publish(&amqp, events(0..20)).await;
    let source = source(&amqp).await;
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    let first = soon(reader.next()).await.unwrap();
    let end = async {
        loop {
            if let Err(e) = reader.next().await {
                return e;
            }
        }
    };
    let error = soon(end).await;
    assert!(error.is_temporary(), "{error}");
    assert!(soon(first.ack.ack()).await.is_err());
    soon(reader.close()).await;
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    assert_eq!(ids(&mut *reader, 20).await, texts(0..20));
    server.end().await;
}

#[tokio::test]
async fn a_waiting_reader_takes_over_when_the_transport_is_closed() {
    let Some(url) = vhost().await else { return };
    let (one, two) = (amqp(&url), amqp(&url));
    publish(&one, events(0..5)).await;
    let source = source(&one).await;
    let mut first = one.subscribe(&source, GROUP, None).await.unwrap();
    let mut second = two.subscribe(&source, GROUP, None).await.unwrap();
    assert_eq!(ids(&mut *first, 3).await, texts(0..3));
    soon(one.close()).await;
    assert_eq!(ids(&mut *second, 5).await, texts(0..5));
    let end = async {
        loop {
            if let Err(e) = first.next().await {
                return e;
            }
        }
    };
    assert!(soon(end).await.is_temporary());
    // Its sessions work again when asked.
    publish(&one, events(5..6)).await;
    assert_eq!(ids(&mut *second, 1).await, ["5"]);
}

#[tokio::test]
async fn the_transport_is_shared_as_a_trait_object() {
    let Some(url) = vhost().await else { return };
    let transport: Arc<dyn Transport> = Arc::new(amqp(&url));
    assert_eq!(transport.kind(), "amqp");
    let error = transport
        .subscribe(
            &Source {
                name: "other".into(),
                ..source(&amqp(&url)).await
            },
            GROUP,
            None,
        )
        .await
        .err()
        .unwrap();
    assert_eq!(error.kind(), Kind::Configuration, "{error}");
}
