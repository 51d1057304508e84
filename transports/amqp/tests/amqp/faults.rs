//! Lost connections, silence, restarts: what is told then, and that the next session works.

use std::{error::Error as _, time::Instant};

use pillarbox_testkit::{
    proxy::{Direction, Proxy},
    servers::{self, RabbitMq},
};
use pillarbox_transport::{Binding, Transport};
use tokio::{io::AsyncReadExt, net::TcpListener};

use super::*;

/// A body that makes a thousand events take about a megabyte on the wire.
fn large_events(ids: std::ops::Range<usize>) -> Vec<Message> {
    let body = "x".repeat(1_000);
    let large = |id| Message {
        payload: Some(body.clone().into()),
        ..event(id)
    };
    ids.map(large).collect()
}

#[tokio::test]
async fn a_connection_cut_in_mid_window_leaves_the_unconfirmed_unknown() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let amqp = amqp(&through);
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "stored",
        None,
    );

    // No confirm comes any more, and the broker has half of the window.
    proxy.hold(Direction::ToClient);
    let sent = proxy.counters().to_server;
    let window = publisher.publish(shared(large_events(10..1_010)));
    soon(proxy.wait_for(|c| c.to_server > sent + 500_000)).await;
    proxy.cut();
    assert_all(&soon(window).await, "unknown", Some(Kind::Unreachable));
    proxy.release();

    // The session is over, at once and for good.
    let before = Instant::now();
    assert_all(
        &publisher.publish(shared(events(0..1))).await,
        "unknown",
        Some(Kind::Unreachable),
    );
    assert!(before.elapsed() < Duration::from_secs(1));

    let again = soon(amqp.publisher()).await.unwrap();
    assert_all(
        &soon(again.publish(shared(large_events(10..1_010)))).await,
        "stored",
        None,
    );
    let ids = Raw::connect(&url).await.drain(QUEUE).await;
    assert_eq!(set(ids), set(0..1_010));
}

#[tokio::test]
async fn confirms_that_came_before_the_cut_count() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let mut config = config(&through);
    config.channels = 1;
    let publisher = Amqp::new(config).unwrap().publisher().await.unwrap();
    // In the middle of the confirms of one of the next batches.
    proxy.cut_after_bytes(Direction::ToClient, 2_000);
    let mut told = Vec::new();
    while told.iter().all(Outcome::is_stored) {
        let next = told.len()..told.len() + 200;
        told.extend(soon(publisher.publish(shared(events(next)))).await);
    }
    let unknown = words(&told).iter().filter(|w| w.0 == "unknown").count();
    let stored = told.iter().filter(|o| o.is_stored()).count();
    assert_eq!(stored + unknown, told.len());
    // Nothing that is told to be stored is missing.
    let there = set(Raw::connect(&url).await.drain(QUEUE).await);
    for (id, _) in told.iter().enumerate().filter(|(_, o)| o.is_stored()) {
        assert!(
            there.contains(&id.to_string()),
            "{id} was confirmed and is not there"
        );
    }
}

#[tokio::test]
async fn a_broker_that_falls_silent_is_given_up_by_the_deadline() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let mut config = config(&through);
    config.confirm_timeout = Duration::from_secs(1);
    let amqp = Amqp::new(config).unwrap();
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(200..210)))).await,
        "stored",
        None,
    );
    proxy.black_hole(true);
    // More than the buffers between here and there hold: some never left lapin's queue.
    let body = "x".repeat(1_000_000);
    let large = |id| Message {
        payload: Some(body.clone().into()),
        ..event(id)
    };
    let outcomes = soon(publisher.publish(shared((0..30).map(large)))).await;
    assert_all(&outcomes, "unknown", Some(Kind::Timeout));
    // So the connection is ended, and what was queued does not follow when the network is back.
    proxy.black_hole(false);
    soon(proxy.wait_until_closed()).await;
    let again = soon(amqp.publisher()).await.unwrap();
    assert_all(
        &soon(again.publish(shared(events(100..110)))).await,
        "stored",
        None,
    );
    let ids = Raw::connect(&url).await.drain(QUEUE).await;
    assert!(
        ids.len() < 50,
        "all {} arrived in spite of the deadline",
        ids.len()
    );
}

#[tokio::test]
async fn a_deadline_ends_the_session_and_keeps_a_connection_that_wrote_all() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let mut config = config(&through);
    config.confirm_timeout = Duration::from_secs(1);
    let amqp = Amqp::new(config).unwrap();
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "stored",
        None,
    );
    let connections = proxy.counters().connections;
    proxy.hold(Direction::ToClient);
    let outcomes = soon(publisher.publish(shared(events(10..20)))).await;
    assert_all(&outcomes, "unknown", Some(Kind::Timeout));
    proxy.release();
    // The confirms arrive now, too late for anybody; the session stays what it was told to be.
    assert_all(
        &soon(publisher.publish(shared(events(20..30)))).await,
        "unknown",
        Some(Kind::Timeout),
    );
    drop(publisher);
    let again = soon(amqp.publisher()).await.unwrap();
    assert_all(
        &soon(again.publish(shared(events(10..30)))).await,
        "stored",
        None,
    );
    assert_eq!(proxy.counters().connections, connections);
    let ids = Raw::connect(&url).await.drain(QUEUE).await;
    assert_eq!((ids.len(), set(ids)), (40, set(0..30)));
}

#[tokio::test]
async fn a_queue_that_never_confirms_takes_nothing_from_the_others() {
    let Some(server) = servers::required(servers::rabbitmq().await) else {
        return;
    };
    let url = server.create_vhost().await.unwrap();
    let mut config = config(&url);
    config.confirm_timeout = Duration::from_secs(2);
    let amqp = Amqp::new(config).unwrap();
    let publisher = amqp.publisher().await.unwrap();
    Raw::connect(&url)
        .await
        .queue_for("stuck", Default::default())
        .await;
    let vhost = url.rsplit('/').next().unwrap();
    let process = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{vhost}\">>, queue, <<\"stuck\">>)), sys:suspend(amqqueue:get_pid(Q))."
    );
    server.ctl(&["eval", &process]).await.unwrap();
    let mut messages = events(0..300);
    for (at, message) in messages.iter_mut().enumerate() {
        match at % 3 {
            0 => message.kind = "stuck".into(),
            1 => message.kind = "inventory.stock.nobody".into(),
            _ => {}
        }
    }
    let outcomes = soon(publisher.publish(shared(messages))).await;
    for (at, found) in words(&outcomes).into_iter().enumerate() {
        let expected = match at % 3 {
            0 => ("unknown", Some(Kind::Timeout)),
            1 => ("retry", Some(Kind::Unrouted)),
            _ => ("stored", None),
        };
        assert_eq!(found, expected, "message {at}");
    }
    let process = process.replace("suspend", "resume");
    server.ctl(&["eval", &process]).await.unwrap();
}

#[tokio::test]
async fn a_broker_that_falls_silent_is_given_up_by_the_heartbeat() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let mut config = config(&through);
    config.heartbeat = Duration::from_secs(1);
    config.confirm_timeout = Duration::from_secs(600);
    let publisher = Amqp::new(config).unwrap().publisher().await.unwrap();
    proxy.black_hole(true);
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "unknown",
        Some(Kind::Unreachable),
    );
}

#[tokio::test]
async fn a_connection_that_is_taken_and_never_answered_ends_by_the_deadline() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://u:p@{}/v", silent.local_addr().unwrap());
    let mut config = config(&url);
    config.connect_timeout = Duration::from_millis(500);
    let amqp = Amqp::new(config).unwrap();
    let (error, taken) = tokio::join!(soon(amqp.publisher()), soon(silent.accept()));
    let error = error.err().unwrap();
    assert_eq!(error.kind(), Kind::Timeout, "{error}");
    // lapin's thread would hold the socket for ever.
    let mut seen = Vec::new();
    soon(taken.unwrap().0.read_to_end(&mut seen)).await.unwrap();
    assert_eq!(seen, b"AMQP\0\0\x09\x01");
}

#[tokio::test]
async fn giving_up_the_wait_for_a_connection_ends_it() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let amqp = amqp(&format!("amqp://u:p@{}/v", silent.local_addr().unwrap()));
    let mut connecting = Box::pin(amqp.publisher());
    let (mut taken, _) = tokio::select! {
        taken = soon(silent.accept()) => taken.unwrap(),
        _ = &mut connecting => panic!("nobody answered"),
    };
    drop(connecting);
    soon(taken.read_to_end(&mut Vec::new())).await.unwrap();
}

#[tokio::test]
async fn a_broker_that_is_away_and_a_wrong_password_are_told_apart_without_the_password() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    proxy.refuse(true);
    let away = soon(amqp(&through).publisher()).await.err().unwrap();
    assert_eq!(away.kind(), Kind::Unreachable, "{away}");

    let (scheme, rest) = url.split_once("://").unwrap();
    let host = rest.split_once('@').unwrap().1;
    let amqp = amqp(&format!("{scheme}://pillarbox:wr0ng-canary@{host}"));
    let refused = soon(amqp.publisher()).await.err().unwrap();
    assert_eq!(refused.kind(), Kind::Refused, "{refused}");
    assert!(!refused.is_temporary());
    let source = refused
        .source()
        .map(|s| format!("{s} {s:?}"))
        .unwrap_or_default();
    let shown = format!("{refused} {refused:?} {amqp:?} {source}");
    assert!(!shown.contains("canary"), "{shown}");

    let nowhere = format!("{}/no-such-vhost", url.rsplit_once('/').unwrap().0);
    let missing = soon(super::amqp(&nowhere).publisher()).await.err().unwrap();
    assert_eq!(missing.kind(), Kind::Missing, "{missing}");
}

#[tokio::test]
async fn sessions_that_are_over_leave_no_channels_and_no_tasks_behind() {
    let Some(server) = servers::required(servers::rabbitmq().await) else {
        return;
    };
    let url = server.create_vhost().await.unwrap();
    let vhost = url.rsplit('/').next().unwrap();
    let amqp = amqp(&url);
    let binding = Binding {
        topic: TOPIC.into(),
        group: GROUP.into(),
        kinds: vec![KIND.into()],
    };
    let source = amqp.bind(&binding).await.unwrap().remove(0);
    drop(amqp.publisher().await.unwrap());
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let before = tasks();
    for n in 0..50 {
        let publisher = amqp.publisher().await.unwrap();
        let open = publisher.publish(shared(events(n * 10..n * 10 + 10)));
        let reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
        if n % 2 == 0 {
            assert_all(&soon(open).await, "stored", None);
            soon(reader.close()).await;
        }
    }
    let settled = async {
        while tasks() > before {
            tokio::task::yield_now().await;
        }
        // Both connections stay, and each takes the place of no channel.
        loop {
            let list = server
                .ctl(&["list_connections", "vhost", "channels"])
                .await
                .unwrap();
            let ours = list.lines().filter(|line| line.starts_with(vhost));
            let channels: Vec<_> = ours.map(|line| line.split('\t').nth(1)).collect();
            if channels == [Some("0"); 2] {
                break;
            }
        }
    };
    soon(settled).await;
}

/// In an outage the engine tries for days.
#[tokio::test]
async fn failed_connections_leave_no_tasks_behind() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let before = tasks();
    proxy.refuse(true);
    let away = amqp(&through);
    for _ in 0..20 {
        assert!(away.publisher().await.is_err());
    }
    let refused = amqp(&format!(
        "amqp://nobody:x@{}",
        url.split_once('@').unwrap().1
    ));
    for _ in 0..3 {
        assert!(refused.publisher().await.is_err());
    }
    // lapin's tasks end by themselves, soon after.
    let settled = async {
        while tasks() > before {
            tokio::task::yield_now().await;
        }
    };
    soon(settled).await;
}

#[tokio::test]
async fn what_was_stored_survives_the_brokers_restarts() {
    let Some(mut server) = servers::required(RabbitMq::start().await) else {
        return;
    };
    let amqp = amqp(server.url());
    let mut stored = Vec::new();
    let mut sent = 0;
    for kill in [false, true] {
        let publisher = soon(amqp.publisher()).await.unwrap();
        assert_all(
            &soon(publisher.publish(shared(events(sent..sent + 100)))).await,
            "stored",
            None,
        );
        stored.extend(sent..sent + 100);
        sent += 100;
        let end = async {
            match kill {
                true => server.kill().await.unwrap(),
                false => server.stop().await.unwrap(),
            }
        };
        let publish = async {
            loop {
                let outcomes = soon(publisher.publish(shared(events(sent..sent + 100)))).await;
                let taken = outcomes.iter().zip(sent..).filter(|(o, _)| o.is_stored());
                stored.extend(taken.map(|(_, id)| id));
                sent += 100;
                // A broker that is about to go refuses first; then the connection goes.
                if words(&outcomes).iter().any(|w| w.0 == "unknown") {
                    break;
                }
            }
        };
        tokio::join!(end, publish);
        let outcomes = publisher.publish(shared(events(0..1))).await;
        assert_eq!(words(&outcomes)[0].0, "unknown");
        let error = soon(amqp.publisher()).await.err().unwrap();
        assert!(error.is_temporary(), "{error}");
        server.start_again().await.unwrap();
    }
    let publisher = soon(amqp.publisher()).await.unwrap();
    assert_all(
        &soon(publisher.publish(shared([event("last")]))).await,
        "stored",
        None,
    );
    let there = set(Raw::connect(server.url()).await.drain(QUEUE).await);
    let lost: Vec<_> = stored
        .iter()
        .filter(|id| !there.contains(&id.to_string()))
        .collect();
    assert!(lost.is_empty(), "confirmed and lost: {lost:?}");
    server.end().await;
}

#[tokio::test]
async fn reading_starts_again_after_the_connection_was_cut() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let direct = amqp(&url);
    let publisher = direct.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..20)))).await,
        "stored",
        None,
    );
    let amqp = amqp(&through);
    let binding = Binding {
        topic: TOPIC.into(),
        group: GROUP.into(),
        kinds: vec![KIND.into()],
    };
    let source = amqp.bind(&binding).await.unwrap().remove(0);
    let mut reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    let first = soon(reader.next()).await.unwrap();
    assert_eq!(first.message.id, "0");
    proxy.reset();
    let end = async {
        loop {
            if let Err(e) = reader.next().await {
                return e;
            }
        }
    };
    assert_eq!(soon(end).await.kind(), Kind::Unreachable);
    assert_eq!(
        soon(first.ack.ack()).await.unwrap_err().kind(),
        Kind::Closed
    );
    soon(reader.close()).await;
    let mut reader = soon(amqp.subscribe(&source, GROUP, None)).await.unwrap();
    for id in 0..20 {
        assert_eq!(
            soon(reader.next()).await.unwrap().message.id,
            id.to_string()
        );
    }
}

#[tokio::test]
async fn closing_a_session_whose_broker_is_silent_returns_and_ends_the_connection() {
    let Some(url) = vhost().await else { return };
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let amqp = amqp(&through);
    let binding = Binding {
        topic: TOPIC.into(),
        group: GROUP.into(),
        kinds: vec![KIND.into()],
    };
    let source = amqp.bind(&binding).await.unwrap().remove(0);
    let reader = amqp.subscribe(&source, GROUP, None).await.unwrap();
    proxy.black_hole(true);
    soon(reader.close()).await;
    proxy.black_hole(false);
    soon(proxy.wait_until_closed()).await;
    soon(amqp.subscribe(&source, GROUP, None)).await.unwrap();
}

/// A window larger than lapin's buffer meets a missing exchange: what is queued behind the close must not break the next.
#[tokio::test]
async fn a_large_window_to_a_missing_exchange_is_survived() {
    let Some(url) = vhost().await else { return };
    let mut config = config(&url);
    config.channels = 1;
    let amqp = Amqp::new(config).unwrap();
    let publisher = amqp.publisher().await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..10)))).await,
        "stored",
        None,
    );
    let raw = Raw::connect(&url).await;
    raw.channel
        .exchange_delete(TOPIC.into(), Default::default())
        .await
        .unwrap();
    let body = "x".repeat(200_000);
    let large = |id| Message {
        payload: Some(body.clone().into()),
        ..event(id)
    };
    let outcomes = soon(publisher.publish(shared((10..60).map(large)))).await;
    for (word, kind) in words(&outcomes) {
        assert!(
            word == "unknown" || (word, kind) == ("unavailable", Some(Kind::Missing)),
            "{word}"
        );
    }
    let again = soon(amqp.publisher()).await.unwrap();
    assert_all(
        &soon(again.publish(shared(events(60..70)))).await,
        "stored",
        None,
    );
    let ids = raw.drain(QUEUE).await;
    let late = ids
        .iter()
        .filter(|id| (10..60).contains(&id.parse().unwrap()))
        .count();
    assert_eq!(late, 0, "frames of the dead window arrived");
}
