//! A broker that stops reading from publishers: memory and disk alarms.

use pillarbox_testkit::{proxy::Proxy, servers};
use pillarbox_transport::{Binding, Transport};

use super::*;

const CONFIRM: Duration = Duration::from_millis(500);

#[tokio::test]
async fn a_blocked_connection_is_waited_for_without_deadline_rebuild_or_repeat() {
    let Some(server) = servers::required(servers::RabbitMq::start().await) else {
        return;
    };
    let (proxy, through) = Proxy::before(server.url()).await.unwrap();
    let mut config = config(&through);
    config.confirm_timeout = CONFIRM;
    config.connect_timeout = Duration::from_secs(5);
    // lapin sends no heartbeats meanwhile: the broker must not mind.
    config.heartbeat = Duration::from_secs(2);
    let amqp = Amqp::new(config).unwrap();
    let binding = Binding {
        topic: TOPIC.into(),
        group: GROUP.into(),
        kinds: vec![KIND.into()],
    };
    let source = amqp.bind(&binding).await.unwrap().remove(0);
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "stored",
        None,
    );
    let connections = proxy.counters().connections;

    server
        .ctl(&["set_vm_memory_high_watermark", "absolute", "1"])
        .await
        .unwrap();
    let mut first = publisher.publish(shared(events(10..110)));
    let mut second = publisher.publish(shared(events(110..210)));
    // Many times the deadline, and nobody gives up.
    let wait = tokio::time::timeout(CONFIRM * 10, &mut first).await;
    assert!(wait.is_err(), "{:?}", words(&wait.unwrap_or_default()));
    let wait = tokio::time::timeout(CONFIRM, &mut second).await;
    assert!(wait.is_err(), "{:?}", words(&wait.unwrap_or_default()));

    // A session that cannot be opened now says why, in time.
    let error = soon(amqp.publisher()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Full, "{error}");
    // Reading goes on: it has a connection of its own.
    for id in 0..10 {
        let delivery = soon(reader.next()).await.unwrap();
        assert_eq!(delivery.message.id, id.to_string());
        soon(delivery.ack.ack()).await.unwrap();
    }

    server
        .ctl(&["set_vm_memory_high_watermark", "0.9"])
        .await
        .unwrap();
    assert_all(&soon(first).await, "stored", None);
    assert_all(&soon(second).await, "stored", None);
    assert_eq!(
        proxy.counters().connections,
        connections,
        "the connection was rebuilt"
    );
    let mut ids = Vec::new();
    while ids.len() < 200 {
        let delivery = soon(reader.next()).await.unwrap();
        ids.push(delivery.message.id.clone());
        soon(delivery.ack.ack()).await.unwrap();
    }
    let unique = set(&ids);
    assert_eq!(unique, set(10..210), "each came once");
    server.end().await;
}

#[tokio::test]
async fn a_blocked_connection_that_is_lost_leaves_its_messages_unknown() {
    let Some(server) = servers::required(servers::RabbitMq::start().await) else {
        return;
    };
    let (proxy, through) = Proxy::before(server.url()).await.unwrap();
    let mut config = config(&through);
    config.confirm_timeout = CONFIRM;
    config.channels = 1;
    let amqp = Amqp::new(config).unwrap();
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "stored",
        None,
    );
    server
        .ctl(&["set_vm_memory_high_watermark", "absolute", "1"])
        .await
        .unwrap();
    let mut under_way = publisher.publish(shared(events(10..20)));
    let waiting = publisher.publish(shared(events(20..30)));
    let wait = tokio::time::timeout(CONFIRM * 3, &mut under_way).await;
    assert!(wait.is_err());
    proxy.cut();
    assert_all(&soon(under_way).await, "unknown", Some(Kind::Unreachable));
    assert_all(&soon(waiting).await, "unknown", Some(Kind::Unreachable));
    server
        .ctl(&["set_vm_memory_high_watermark", "0.9"])
        .await
        .unwrap();
    let again = soon(amqp.publisher()).await.unwrap();
    assert_all(
        &soon(again.publish(shared(events(10..30)))).await,
        "stored",
        None,
    );
    server.end().await;
}

#[tokio::test]
async fn dropping_a_session_ends_its_wait_for_a_blocked_connection() {
    let Some(server) = servers::required(servers::RabbitMq::start().await) else {
        return;
    };
    let mut config = config(server.url());
    config.channels = 1;
    let publisher = Amqp::new(config).unwrap().publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "stored",
        None,
    );
    server
        .ctl(&["set_vm_memory_high_watermark", "absolute", "1"])
        .await
        .unwrap();
    let mut under_way = publisher.publish(shared(events(10..20)));
    let waiting = publisher.publish(shared(events(20..30)));
    assert!(tokio::time::timeout(CONFIRM, &mut under_way).await.is_err());
    drop(publisher);
    // Those that were written wait on; one channel, so the others were not.
    server
        .ctl(&["set_vm_memory_high_watermark", "0.9"])
        .await
        .unwrap();
    assert_all(&soon(under_way).await, "stored", None);
    assert_all(&soon(waiting).await, "unknown", Some(Kind::Closed));
    let ids = Raw::connect(server.url()).await.drain(QUEUE).await;
    assert_eq!(set(ids), set(0..20));
    server.end().await;
}
