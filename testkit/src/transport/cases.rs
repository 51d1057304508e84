//! Publishing without faults, and what is told of bad events.

use std::time::{Duration, UNIX_EPOCH};

use pillarbox_transport::{Bytes, Kind, Message, Outcome};

use super::{Corner, GROUP, assert_all, send, set, soon, take, word};

pub(super) async fn confirmed(mut corner: Box<dyn Corner>) {
    let (_transport, publisher) = corner.open().await;
    let outcomes = soon(send(&*publisher, corner.events(0..300))).await;
    assert_eq!(outcomes.len(), 300);
    assert_all(&outcomes, "stored");
    // One id of two sources is two events: no broker's own memory of ids may take them for one.
    let twin = |source: &str| corner.event(300).with_attribute("source", source);
    let twins = soon(send(&*publisher, vec![twin("one"), twin("two")])).await;
    assert_all(&twins, "stored");
    let mut expected = corner.ids(0..301);
    expected.push(corner.id(300));
    assert_eq!(corner.stored_ids().await, expected);
}

pub(super) async fn outcomes(mut corner: Box<dyn Corner>) {
    let (_transport, publisher) = corner.open().await;
    assert!(soon(send(&*publisher, Vec::new())).await.is_empty());
    // Several batches, open at the same time, with one message in each that has no place anywhere.
    let mut open = Vec::new();
    let mut expected = Vec::new();
    for (batch, size) in [1, 40, 7, 100].into_iter().enumerate() {
        let bad = size / 2;
        let mut messages: Vec<Message> = Vec::new();
        for at in 0..size {
            let id = format!("{batch}-{at}");
            if at == bad {
                messages.push(corner.event_of("nobody", id));
            } else {
                expected.push(corner.id(&id));
                messages.push(corner.event(id));
            }
        }
        open.push((size, bad, send(&*publisher, messages)));
    }
    for (size, bad, batch) in open {
        let outcomes = soon(batch).await;
        assert_eq!(outcomes.len(), size);
        for (at, outcome) in outcomes.iter().enumerate() {
            assert_eq!(
                outcome.is_stored(),
                at != bad,
                "message {at} of {size}: {outcome:?}"
            );
        }
    }
    let stored = corner.stored_ids().await;
    assert_eq!(stored.len(), expected.len(), "each once");
    assert_eq!(set(stored), set(expected));
}

/// Parts of a message that a broker or its client would choke on, or take as an order.
fn bad(corner: &dyn Corner) -> Vec<(Message, Kind)> {
    let event = |id: &str| corner.event(id);
    vec![
        (event("line").with_header("x", "1\r\ny: 2"), Kind::Invalid),
        (event("name").with_header("a\r\nb", "1"), Kind::Invalid),
        (event("ascii").with_header("naïve", "1"), Kind::Invalid),
        (event("empty").with_header("", "1"), Kind::Invalid),
        (event("nul").with_header("nul", "a\0b"), Kind::Invalid),
        (event("cc").with_header("CC", "other"), Kind::Invalid),
        (
            event("roll").with_header("Nats-Rollup", "all"),
            Kind::Invalid,
        ),
        (event("ce").with_header("ce-id", "forged"), Kind::Invalid),
        (
            Message {
                kind: "k".repeat(300),
                ..event("long")
            },
            Kind::Invalid,
        ),
        (
            Message {
                kind: format!("{}.a b", corner.word()),
                ..event("space")
            },
            Kind::Invalid,
        ),
        (
            Message {
                kind: format!("{}.>", corner.word()),
                ..event("wild")
            },
            Kind::Invalid,
        ),
        (
            Message {
                id: String::new(),
                ..event("id")
            },
            Kind::Invalid,
        ),
        (
            Message {
                payload: Some(vec![0; corner.too_large()].into()),
                ..event("large")
            },
            Kind::TooLarge,
        ),
        (
            event("headers").with_header("long", "x".repeat(200_000)),
            Kind::TooLarge,
        ),
    ]
}

pub(super) async fn blame(mut corner: Box<dyn Corner>) {
    let (_transport, publisher) = corner.open().await;
    let bad = bad(&*corner);
    let mut messages = Vec::new();
    for (at, (message, _)) in bad.iter().enumerate() {
        messages.push(corner.event(format!("before-{at}")));
        messages.push(message.clone());
    }
    let outcomes = soon(send(&*publisher, messages)).await;
    for (at, (pair, (message, kind))) in outcomes.chunks(2).zip(&bad).enumerate() {
        assert!(
            pair[0].is_stored(),
            "the neighbour of {}: {:?}",
            message.id,
            pair[0]
        );
        assert!(
            matches!(&pair[1], Outcome::Rejected(e) if e.kind() == *kind && !e.is_temporary()),
            "{at}, {}: {:?}",
            message.id,
            pair[1]
        );
    }
    // The session goes on.
    assert_all(
        &soon(send(&*publisher, corner.events(0..5))).await,
        "stored",
    );
    let mut expected = corner.ids(0..5);
    expected.extend((0..bad.len()).map(|at| corner.id(format!("before-{at}"))));
    let stored = corner.stored_ids().await;
    assert_eq!(stored.len(), expected.len());
    assert_eq!(set(stored), set(expected));
}

pub(super) async fn unrouted(mut corner: Box<dyn Corner>) {
    let (_transport, publisher) = corner.open().await;
    let messages = vec![
        corner.event(0),
        Message {
            kind: "elsewhere.thing".into(),
            ..corner.event("nowhere")
        },
        corner.event(1),
    ];
    let outcomes = soon(send(&*publisher, messages)).await;
    assert!(
        outcomes[0].is_stored() && outcomes[2].is_stored(),
        "{outcomes:?}"
    );
    match &outcomes[1] {
        Outcome::Retry(e) | Outcome::Rejected(e) => assert_eq!(e.kind(), Kind::Unrouted, "{e}"),
        other => panic!("{}: {other:?}", word(other)),
    }
    let stored = corner.stored_ids().await;
    assert_eq!(stored, corner.ids(0..2));
}

pub(super) async fn content(mut corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    let mut full = corner
        .event("full")
        .with_key("ключ 🗝 \"quoted\" = a,b")
        .with_attribute("datacontenttype", "application/json; charset=utf-8")
        .with_attribute("correlationid", "c-1")
        .with_attribute("pillarboxposition", "7")
        .with_attribute("later", "an attribute of tomorrow: ✓")
        .with_header("tenant", "Zürich — 東京")
        .with_header("X-Mixed-Case", "kept");
    full.payload = Some("{\"unicode\":\"\u{1F980} ё\"}".into());
    full.time = UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    let with = |id: &str, payload: Option<Bytes>| Message {
        payload,
        ..corner.event(id)
    };
    let bytes: Vec<u8> = (0..=255).cycle().take(corner.largest()).collect();
    let messages = vec![
        full,
        with("empty", Some(Bytes::new())),
        with("none", None),
        with("bytes", Some(vec![0, 0xff, b'\r', b'\n', 0x80].into())),
        with("large", Some(bytes.into())),
        corner.event("empty key").with_key(""),
        corner.event("no key"),
    ];
    let messages: Vec<Message> = messages
        .into_iter()
        .map(|m| Message {
            id: m.id.replace(' ', "_"),
            ..m
        })
        .collect();
    let source = corner.bind(&*transport, "reader").await;
    let mut reader = soon(transport.subscribe(&source, "reader", None))
        .await
        .expect("a reader");
    // Where nothing is stored, the publish ends with the last acknowledgement.
    let publishing = tokio::spawn(send(&*publisher, messages.clone()));
    for sent in &messages {
        let got = take(&mut reader, 1).await.remove(0);
        assert_eq!(got.defect, None, "{}", sent.id);
        assert_eq!(got.message.payload, sent.payload, "{}", sent.id);
        assert_eq!(got.message.headers, sent.headers, "{}", sent.id);
        assert_eq!(got.message.attributes, sent.attributes, "{}", sent.id);
        // The store's times end at microseconds.
        let (got_time, sent_time) = (got.message.time, sent.time);
        let apart = got_time
            .duration_since(sent_time)
            .unwrap_or_else(|e| e.duration());
        assert!(apart < Duration::from_micros(1), "{}", sent.id);
        let head = |m: &Message| (m.id.clone(), m.topic.clone(), m.kind.clone(), m.key.clone());
        assert_eq!(head(&got.message), head(sent));
        soon(got.ack.ack()).await.expect("acknowledge");
    }
    assert_all(&soon(publishing).await.expect("no panic"), "stored");
    soon(reader.close()).await;
    let stored = corner.stored().await;
    assert_eq!(stored.len(), messages.len());
    for (stored, sent) in stored.iter().zip(&messages) {
        assert_eq!((&stored.id, &stored.key), (&sent.id, &sent.key));
        assert_eq!(
            stored.payload,
            sent.payload.clone().unwrap_or_default(),
            "{}",
            sent.id
        );
        for (name, value) in &sent.headers {
            assert_eq!(stored.headers.get(name), Some(value), "{}", sent.id);
        }
    }
}

pub(super) async fn drain(mut corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    let all: Vec<_> = (0..5)
        .map(|n| send(&*publisher, corner.events(n * 40..(n + 1) * 40)))
        .collect();
    for open in all {
        assert_all(&soon(open).await, "stored");
    }
    // An owner whose lease is gone drops the session in mid-work: each message is still answered, and truly.
    let open: Vec<_> = (5..10)
        .map(|n| send(&*publisher, corner.events(n * 40..(n + 1) * 40)))
        .collect();
    drop(publisher);
    let mut told = Vec::new();
    for batch in open {
        told.extend(soon(batch).await);
    }
    assert_eq!(told.len(), 200);
    let again = corner.publisher_again(&*transport).await;
    assert_all(
        &soon(send(&*again, corner.events(400..401))).await,
        "stored",
    );
    let stored = set(corner.stored_ids().await);
    assert!(corner.ids(0..200).iter().all(|id| stored.contains(id)));
    for (at, outcome) in told.iter().enumerate() {
        assert!(matches!(word(outcome), "stored" | "unknown"), "{outcome:?}");
        let id = corner.id(200 + at);
        assert!(
            !outcome.is_stored() || stored.contains(&id),
            "{id} was told to be stored"
        );
    }
}

pub(super) async fn dead_letters(mut corner: Box<dyn Corner>) {
    let (transport, _publisher) = corner.open().await;
    let letters = soon(transport.dead_letters(&corner.topic(), GROUP))
        .await
        .expect("a publisher of dead letters");
    let reason = |m: Message| m.with_header("pillarbox-reason", "it was refused: ✗");
    let mut malformed = reason(corner.event("malformed")).with_header("CC", "other");
    malformed.kind = "no type at all >".into();
    malformed.attributes.clear();
    let twice = || reason(corner.event("twice")).with_key("k");
    let messages = vec![reason(corner.event("plain")), malformed, twice()];
    assert_all(&soon(send(&*letters, messages)).await, "stored");
    // An event that is tried again can die again.
    assert_all(&soon(send(&*letters, vec![twice()])).await, "stored");
    let found = corner.dead_letters().await;
    let ids: Vec<String> = found.iter().map(|f| f.id.clone()).collect();
    let expected: Vec<String> = ["plain", "malformed", "twice", "twice"]
        .map(|id| corner.id(id))
        .to_vec();
    assert_eq!(ids, expected);
    for letter in &found {
        let reason = letter.headers.get("pillarbox-reason").map(String::as_str);
        assert_eq!(reason, Some("it was refused: ✗"));
        // On a wire it would be an order to the broker.
        let obeyed = |name: &String| name.eq_ignore_ascii_case("cc");
        assert!(corner.proxy().is_none() || !letter.headers.keys().any(obeyed));
    }
}
