//! What is declared, by whom, and what happens when the broker has something else.

use lapin::{
    options::QueueDeclareOptions,
    types::{AMQPValue, FieldTable},
};
use pillarbox_testkit::servers;
use pillarbox_transport::{Binding, Transport};

use super::*;

fn binding(topic: &str, group: &str, kinds: &[&str]) -> Binding {
    Binding {
        topic: topic.into(),
        group: group.into(),
        kinds: kinds.iter().map(|k| (*k).into()).collect(),
    }
}

/// What SERVICES' queue must be: declaring it again with other arguments would fail.
async fn assert_is_quorum(raw: &Raw, queue: &str, single_active_consumer: bool) {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    arguments.insert("x-delivery-limit".into(), 2_147_483_647.into());
    if single_active_consumer {
        arguments.insert("x-single-active-consumer".into(), true.into());
    }
    let durable = QueueDeclareOptions {
        durable: true,
        ..Default::default()
    };
    let channel = raw.connection.create_channel().await.unwrap();
    channel
        .queue_declare(queue.into(), durable, arguments)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_publisher_declares_the_consumers_queues_before_its_first_event() {
    let Some(url) = vhost().await else { return };
    let publisher = amqp(&url).publisher().await.unwrap();
    let raw = Raw::connect(&url).await;
    assert_is_quorum(&raw, QUEUE, true).await;
    assert_is_quorum(&raw, DLQ, false).await;
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "stored",
        None,
    );
    assert_eq!(raw.drain(QUEUE).await.len(), 10);
}

#[tokio::test]
async fn a_relay_without_queues_declares_the_exchange_of_its_topic() {
    let Some(url) = vhost().await else { return };
    let publisher = Amqp::new(Config::new(&url))
        .unwrap()
        .publisher()
        .await
        .unwrap();
    let outcomes = soon(publisher.publish(shared(events(0..10)))).await;
    assert_all(&outcomes, "retry", Some(Kind::Unrouted));
}

#[tokio::test]
async fn a_group_without_a_queue_gets_one_bound_to_its_types() {
    let Some(url) = vhost().await else { return };
    let amqp = Amqp::new(Config::new(&url)).unwrap();
    let sources = amqp.bind(&binding(TOPIC, "audit", &[KIND])).await.unwrap();
    let [source] = &sources[..] else {
        panic!("{sources:?}")
    };
    assert_eq!(source.name, "inventory.events.audit");
    assert_eq!(
        (source.transport, source.partition, source.replayable),
        ("amqp", 0, false)
    );
    let host = url.split('@').nth(1).unwrap();
    assert_eq!(source.cluster, host, "host:port/vhost without credentials");
    assert_eq!(
        amqp.bind(&binding(TOPIC, "audit", &[KIND])).await.unwrap(),
        sources,
        "stable"
    );

    let raw = Raw::connect(&url).await;
    assert_is_quorum(&raw, "inventory.events.audit", true).await;
    assert_is_quorum(&raw, "inventory.events.audit.dlq", false).await;
    let publisher = amqp.publisher().await.unwrap();
    let other = Message {
        kind: "inventory.stock.other".into(),
        ..event("other")
    };
    let outcomes = soon(publisher.publish(shared([event("1"), other]))).await;
    assert_eq!(
        words(&outcomes),
        [("stored", None), ("retry", Some(Kind::Unrouted))]
    );
}

#[tokio::test]
async fn a_consumer_whose_handlers_are_not_all_bound_does_not_start() {
    let Some(url) = vhost().await else { return };
    let kinds = [KIND, "inventory.stock.depleted"];
    let error = amqp(&url)
        .bind(&binding(TOPIC, GROUP, &kinds))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Configuration);
    let text = error.to_string();
    assert!(
        text.contains("inventory.stock.depleted") && !text.contains(&format!("[{KIND:?}")),
        "{text}"
    );
}

#[tokio::test]
async fn a_classic_queue_of_that_name_is_named_with_the_way_out_and_kept() {
    let Some(url) = vhost().await else { return };
    let raw = Raw::connect(&url).await;
    let durable = QueueDeclareOptions {
        durable: true,
        ..Default::default()
    };
    raw.channel
        .queue_declare(QUEUE.into(), durable, Default::default())
        .await
        .unwrap();
    let options = BasicPublishOptions::default();
    let publish =
        raw.channel
            .basic_publish("".into(), QUEUE.into(), options, b"x", Default::default());
    publish.await.unwrap();

    let amqp = amqp(&url);
    for error in [
        amqp.publisher().await.err().unwrap(),
        amqp.bind(&binding(TOPIC, GROUP, &[KIND]))
            .await
            .unwrap_err(),
        amqp.dead_letters(TOPIC, GROUP).await.err().unwrap(),
    ] {
        assert_eq!(error.kind(), Kind::Configuration);
        let text = error.to_string();
        for part in [
            QUEUE,
            "x-queue-type = quorum",
            "x-single-active-consumer = true",
            "queue_type = \"classic\"",
            "empty and delete it",
            "another name",
            "inequivalent arg",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }
    assert_eq!(
        raw.drain(QUEUE).await.len(),
        1,
        "the queue and what lies in it are kept"
    );

    // The connection is not hurt by the refusals, and the way out works.
    let mut config = Config::new(&url);
    config.queue_type = pillarbox_amqp::QueueType::Classic;
    config
        .queues
        .insert("orders.classic".into(), Queue::new(TOPIC, GROUP, [KIND]));
    let publisher = Amqp::new(config).unwrap().publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..5)))).await,
        "stored",
        None,
    );
    assert_eq!(raw.drain("orders.classic").await.len(), 5);
}

#[tokio::test]
async fn a_user_without_the_right_to_declare_finds_what_others_declared() {
    let Some(server) = servers::required(servers::rabbitmq().await) else {
        return;
    };
    let url = server.create_vhost().await.unwrap();
    let name = url.rsplit('/').next().unwrap();
    let user = format!("poor-{name}");
    server.ctl(&["add_user", &user, "secret"]).await.unwrap();
    server
        .ctl(&["set_permissions", "-p", name, &user, "^$", ".*", ".*"])
        .await
        .unwrap();
    let host = url.split('@').nth(1).unwrap();
    let mut config = config(&format!("amqp://{user}:secret@{host}"));
    let refused = Amqp::new(config.clone())
        .unwrap()
        .publisher()
        .await
        .err()
        .unwrap();
    assert_eq!(refused.kind(), Kind::Refused, "{refused}");
    config.declare = false;
    let amqp = Amqp::new(config).unwrap();
    let missing = amqp.publisher().await.err().unwrap();
    assert_eq!(missing.kind(), Kind::Missing, "{missing}");

    super::amqp(&url).publisher().await.unwrap();
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..5)))).await,
        "stored",
        None,
    );
    amqp.bind(&binding(TOPIC, GROUP, &[KIND])).await.unwrap();
}

#[tokio::test]
async fn the_url_is_read_from_its_file_at_each_connect() {
    let Some(url) = vhost().await else { return };
    let file = std::env::temp_dir().join(format!("pillarbox-amqp-url-{}", std::process::id()));
    std::fs::write(&file, "amqp://nobody:wrong@127.0.0.1:1/x").unwrap();
    let config = Config {
        url: None,
        url_file: Some(file.clone()),
        ..config(&url)
    };
    let amqp = Amqp::new(config).unwrap();
    let error = amqp.publisher().await.err().unwrap();
    assert_eq!(error.kind(), Kind::Unreachable, "{error}");
    std::fs::write(&file, format!("{url}\n")).unwrap();
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..5)))).await,
        "stored",
        None,
    );
    std::fs::remove_file(&file).unwrap();
}
