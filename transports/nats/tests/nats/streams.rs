//! Streams: what is declared, what is refused, what a full, forbidden, missing or new one answers.

use async_nats::jetstream::stream::{
    Config as Declared, DiscardPolicy, RetentionPolicy, StorageType,
};
use pillarbox_testkit::servers::{self, Nats as Server};

use super::*;

#[tokio::test]
async fn streams_are_declared_for_events_that_must_not_be_lost() {
    let Some(url) = account().await else { return };
    let mut config = config(&url);
    config.duplicate_window = Duration::from_secs(300);
    let nats = Nats::new(config).unwrap();
    let source = soon(nats.bind(&binding(&[KIND]))).await.unwrap().remove(0);
    assert_eq!((source.name.as_str(), source.partition), (STREAM, 0));
    assert!(source.replayable);

    let info = declared(&url, STREAM).await;
    let found = &info.config;
    assert_eq!(found.subjects, ["inventory.>"]);
    assert_eq!(found.storage, StorageType::File);
    assert_eq!(found.retention, RetentionPolicy::Limits);
    assert_eq!(found.discard, DiscardPolicy::New);
    assert_eq!(found.duplicate_window, Duration::from_secs(300));
    assert_eq!((found.max_bytes, found.max_messages), (-1, -1));
    let letters = declared(&url, "inventory_events_dlq").await;
    assert_eq!(letters.config.subjects, ["inventory_events_dlq.>"]);
    let created = info.created.unix_timestamp_nanos().to_string();
    assert_eq!(source.identity, created);
}

#[tokio::test]
async fn a_topic_without_a_stream_gets_one_and_it_takes_more_as_more_is_used() {
    let Some(url) = account().await else { return };
    let other = |id: &str, kind: &str| Message {
        topic: "shop.events".into(),
        kind: kind.into(),
        ..event(id)
    };
    let nats = Nats::new(Config::new(&url)).unwrap();
    assert_stored(&publish(&nats, vec![other("1", "shop.a"), other("2", "alone")]).await);
    // Another process, which knows nothing of the first.
    let second = Nats::new(Config::new(&url)).unwrap();
    assert_stored(&publish(&second, vec![other("3", "mail.sent.late")]).await);
    let mut subjects = declared(&url, "shop_events").await.config.subjects;
    subjects.sort();
    assert_eq!(subjects, ["alone", "mail.>", "shop.>"]);
    assert_stored(&publish(&nats, vec![other("4", "shop.b")]).await);
    assert_eq!(declared(&url, "shop_events").await.state.messages, 4);
}

#[tokio::test]
async fn a_stream_that_cannot_keep_promises_is_refused_with_what_was_found() {
    let plain = || Declared {
        name: STREAM.into(),
        subjects: vec!["inventory.>".into()],
        ..Declared::default()
    };
    for (found, expected) in [
        (
            Declared {
                retention: RetentionPolicy::WorkQueue,
                ..plain()
            },
            "retention WorkQueue, expected limits",
        ),
        (
            Declared {
                no_ack: true,
                ..plain()
            },
            "found no_ack",
        ),
        (
            Declared {
                name: "other".into(),
                ..plain()
            },
            "another stream takes some of the types",
        ),
        (
            Declared {
                metadata: [("pillarbox-topic".to_owned(), "inventory_events".to_owned())].into(),
                ..plain()
            },
            "with the events of topic \"inventory_events\"",
        ),
    ] {
        let Some(url) = account().await else { return };
        raw(&url).await.create_stream(found).await.unwrap();
        let error = soon(nats(&url).publisher()).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Configuration, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn without_the_right_to_declare_streams_are_only_looked_up() {
    let Some(url) = account().await else { return };
    let mut config = config(&url);
    config.declare = false;
    let nats = Nats::new(config).unwrap();
    let error = soon(nats.publisher()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Missing, "{error}");
    for name in [STREAM, "inventory_events_dlq"] {
        let subject = match name {
            STREAM => "inventory.>".to_owned(),
            other => format!("{other}.>"),
        };
        let stream = Declared {
            name: name.into(),
            subjects: vec![subject],
            ..Declared::default()
        };
        raw(&url).await.create_stream(stream).await.unwrap();
    }
    assert_stored(&publish(&nats, events(0..3)).await);
}

#[tokio::test]
async fn a_full_stream_makes_its_topic_unavailable_and_keeps_what_it_has() {
    let Some(url) = account().await else { return };
    let mut config = config(&url);
    if let Some(stream) = config.streams.get_mut(STREAM) {
        stream.max_bytes = Some(5_000);
    }
    let nats = Nats::new(config).unwrap();
    let outcomes = publish(&nats, events(0..100)).await;
    let stored = outcomes.iter().take_while(|o| o.is_stored()).count();
    assert!((3..100).contains(&stored), "{stored}");
    for outcome in &outcomes[stored..] {
        assert_unavailable(outcome, Kind::Full);
    }
    let state = declared(&url, STREAM).await.state;
    assert_eq!((state.first_sequence, state.messages), (1, stored as u64));
}

#[tokio::test]
async fn what_is_sent_again_is_stored_once() {
    let Some(url) = account().await else { return };
    let nats = nats(&url);
    assert_stored(&publish(&nats, events(0..20)).await);
    assert_stored(&publish(&nats, events(0..30)).await);
    assert_eq!(declared(&url, STREAM).await.state.messages, 30);
}

#[tokio::test]
async fn a_stream_that_is_deleted_under_a_session_is_made_anew() {
    let Some(url) = account().await else { return };
    let nats = nats(&url);
    let source = soon(nats.bind(&binding(&[KIND]))).await.unwrap().remove(0);
    let publisher = soon(nats.publisher()).await.unwrap();
    assert_stored(&soon(send(&*publisher, events(0..5))).await);
    let mut reader = soon(nats.subscribe(&source, GROUP, None)).await.unwrap();
    for _ in 0..5 {
        soon(reader.next()).await.unwrap();
    }
    raw(&url).await.delete_stream(STREAM).await.unwrap();
    assert_unavailable(
        &soon(send(&*publisher, events(5..6))).await[0],
        Kind::Missing,
    );
    assert_stored(&soon(send(&*publisher, events(5..6))).await);
    // The cursor belongs to the other stream: reading from it would skip, also where it lies within the new one.
    let error = soon(reader.next()).await.unwrap_err();
    assert!(error.is_temporary(), "{error}");
    let error = soon(nats.subscribe(&source, GROUP, Some(2))).await.err();
    let error = error.unwrap();
    assert_eq!(error.kind(), Kind::Configuration, "{error}");
    assert!(error.to_string().contains("made anew"), "{error}");
    let again = soon(nats.bind(&binding(&[KIND]))).await.unwrap().remove(0);
    assert_ne!(again.identity, source.identity);
    let mut reader = soon(nats.subscribe(&again, GROUP, None)).await.unwrap();
    let delivery = soon(reader.next()).await.unwrap();
    assert_eq!(
        (delivery.message.id.as_str(), delivery.position),
        ("5", Some(1))
    );
}

#[tokio::test]
async fn a_cursor_beyond_the_streams_end_is_refused() {
    let Some(url) = account().await else { return };
    let nats = nats(&url);
    let source = soon(nats.bind(&binding(&[KIND]))).await.unwrap().remove(0);
    assert_stored(&publish(&nats, events(0..5)).await);
    assert!(soon(nats.subscribe(&source, GROUP, Some(6))).await.is_ok());
    let error = soon(nats.subscribe(&source, GROUP, Some(7))).await.err();
    let error = error.unwrap();
    assert_eq!(error.kind(), Kind::Configuration, "{error}");
    assert!(
        error
            .to_string()
            .contains("ends at 5, before the group's cursor 6")
    );
}

#[tokio::test]
async fn a_group_gets_the_types_that_it_has_handlers_for() {
    let Some(url) = account().await else { return };
    let nats = nats(&url);
    let source = soon(nats.bind(&binding(&[KIND]))).await.unwrap().remove(0);
    let kind = |id: usize| Message {
        kind: if id.is_multiple_of(3) {
            KIND.into()
        } else {
            "inventory.stock.other".into()
        },
        ..event(id)
    };
    assert_stored(&publish(&nats, (0..9).map(kind).collect()).await);
    let mut reader = soon(nats.subscribe(&source, GROUP, Some(2))).await.unwrap();
    let mut places = Vec::new();
    for _ in 0..2 {
        let delivery = soon(reader.next()).await.unwrap();
        assert_eq!(delivery.message.kind, KIND);
        places.extend(delivery.position);
    }
    assert_eq!(places, [4, 7], "the stream's own numbers");
    soon(reader.close()).await;
    let state = declared(&url, STREAM).await.state;
    assert_eq!(state.consumer_count, 0, "a closed session leaves nothing");
}

#[tokio::test]
async fn what_a_user_may_not_publish_waits_and_is_told_at_once() {
    let settings = r#"accounts { A { jetstream: enabled, users: [
        { user: a, password: p, permissions: { publish: { deny: "inventory.stock.secret" } } }
    ] } }"#;
    let Some(server) = servers::required(Server::start_with(settings).await) else {
        return;
    };
    let url = server.url().replace("nats://", "nats://a:p@");
    let mut config = config(&url);
    config.confirm_timeout = Duration::from_secs(50);
    let nats = Nats::new(config).unwrap();
    let mut messages = events(0..6);
    for message in messages.iter_mut().step_by(2) {
        message.kind = "inventory.stock.secret".into();
    }
    let before = std::time::Instant::now();
    let outcomes = publish(&nats, messages).await;
    assert!(before.elapsed() < Duration::from_secs(40));
    for (at, outcome) in outcomes.iter().enumerate() {
        match at % 2 {
            0 => assert_unavailable(outcome, Kind::Refused),
            _ => assert!(outcome.is_stored(), "{outcome:?}"),
        }
    }
}

#[tokio::test]
async fn a_message_that_only_this_server_finds_too_large_is_rejected_alone() {
    let settings = "max_payload: 65536";
    let Some(server) = servers::required(Server::start_with(settings).await) else {
        return;
    };
    let mut messages = events(0..20);
    messages[10].payload = Some(vec![0; 65_500].into());
    let outcomes = publish(&nats(server.url()), messages).await;
    for (at, outcome) in outcomes.iter().enumerate() {
        match at {
            10 => assert!(
                matches!(outcome, Outcome::Rejected(e) if e.kind() == Kind::TooLarge),
                "{outcome:?}"
            ),
            _ => assert!(outcome.is_stored(), "{outcome:?}"),
        }
    }
}

#[tokio::test]
async fn without_jetstream_it_is_said() {
    let Some(mut server) = servers::required(
        Server::start_with("accounts { A { users: [{ user: a, password: p }] } }").await,
    ) else {
        return;
    };
    let url = server.url().replace("nats://", "nats://a:p@");
    let error = soon(nats(&url).publisher()).await.err().unwrap();
    assert!(
        matches!(error.kind(), Kind::Configuration | Kind::Missing),
        "{error}"
    );
    assert!(
        error.to_string().to_lowercase().contains("jetstream"),
        "{error}"
    );
    server.stop().await.unwrap();
}
