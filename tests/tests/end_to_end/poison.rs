//! What no consumer can apply: dead-lettered with the exact reason, at once, and nobody waits for it.

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, counts, in_both_worlds, on_servers_alone,
    tables::{dead_letters, deferred},
    until,
    wire::Client,
};
use pillarbox_transport::{Bytes, Message};

in_both_worlds!(payloads_that_do_not_fit_are_dead_letters_with_the_reason);
on_servers_alone!(
    messages_without_a_trustworthy_envelope_are_dead_letters_with_the_reason,
    a_type_without_handler_is_skipped_and_counted,
);

fn tick(key: &str, payload: Option<&'static str>) -> Message {
    let mut message = Tick::new(key, 1).message("test.tick");
    message.payload = payload.map(|p| Bytes::from_static(p.as_bytes()));
    message
}

pub(super) async fn payloads_that_do_not_fit_are_dead_letters_with_the_reason(world: World) {
    let outbox = world.outbox();
    let handler = TickHandler::new();
    // As a JSON Schema would.
    let check = |m: &Message| {
        let zero = m.payload.as_deref() == Some(br#"{"key":"zero","n":0}"#);
        if zero {
            Err("n: 0 is less than the minimum of 1".to_owned())
        } else {
            Ok(())
        }
    };
    let way = world
        .start(&outbox, world.ticks(handler.clone()).check(check))
        .await;
    let not_as_expected = "test.tick: the payload is not as expected:";
    let cases = [
        (
            tick("malformed", Some(r#"{"key":"malformed","n":"#)),
            format!("{not_as_expected} EOF while parsing a value at line 1 column 23"),
        ),
        (
            tick("missing", Some(r#"{"key":"missing"}"#)),
            format!("{not_as_expected} missing field `n` at line 1 column 17"),
        ),
        (
            tick("wrong", Some(r#"{"key":"wrong","n":-1}"#)),
            format!(
                "{not_as_expected} invalid value: integer `-1`, expected u32 at line 1 column 21"
            ),
        ),
        (
            tick("zero", Some(r#"{"key":"zero","n":0}"#)),
            "test.tick: n: 0 is less than the minimum of 1".to_owned(),
        ),
        (
            tick("newer", Some(r#"{"key":"newer","n":1}"#)).with_attribute("dataversion", "2"),
            "unknown version \"2\" of test.tick; this consumer knows 1".to_owned(),
        ),
        (
            tick("odd", Some(r#"{"key":"odd","n":1}"#)).with_attribute("dataversion", "x"),
            "unknown version \"x\" of test.tick; this consumer knows 1".to_owned(),
        ),
        (
            tick("gone", None),
            "test.tick: the payload is missing".to_owned(),
        ),
    ];
    let keys: Vec<String> = cases.iter().filter_map(|(m, _)| m.key.clone()).collect();
    // The bad ones come twice: they are dead once.
    world
        .inject(cases.iter().map(|(m, _)| m.clone()).collect())
        .await;
    world
        .inject(cases.iter().map(|(m, _)| m.clone()).collect())
        .await;
    let good: Vec<Tick> = keys.iter().map(|key| Tick::new(key.as_str(), 2)).collect();
    world.commit(&outbox, &good).await;
    world.until_effects(keys.len()).await;
    until("the broker has its copies", async || {
        dead_letters(&world.consumer).await.iter().all(|d| d.copied)
    })
    .await;
    way.stop().await;

    let dead = dead_letters(&world.consumer).await;
    assert_eq!(dead.len(), cases.len(), "{dead:#?}");
    for ((message, reason), dead) in cases.iter().zip(&dead) {
        assert_eq!((&dead.id, &dead.reason), (&message.id, reason));
        assert_eq!(dead.attempts, 1);
    }
    assert_eq!(deferred(&world.consumer).await, 0);
    assert_eq!(
        handler.calls().len(),
        keys.len(),
        "no handler saw a bad one"
    );
}

async fn messages_without_a_trustworthy_envelope_are_dead_letters_with_the_reason(world: World) {
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let client = Client::connect(world.amqp_url.as_deref().expect("a broker")).await;
    let with = |headers: &[(&str, &str)]| {
        let mut table = FieldTable::default();
        for (name, value) in headers {
            table.insert((*name).into(), AMQPValue::LongString((*value).into()));
        }
        BasicProperties::default().with_headers(table)
    };
    let version = ("cloudEvents_specversion", "1.0");
    let kind = ("cloudEvents_type", "test.tick");
    let id = "no id: neither an attribute id nor the property message_id";
    let cases = [
        (
            with(&[version, kind]),
            format!("{id}; the attribute id is missing"),
        ),
        (
            BasicProperties::default(),
            format!("{id}; no CloudEvents envelope: the attribute specversion is missing"),
        ),
        (
            BasicProperties::default().with_message_id("named".into()),
            "no CloudEvents envelope: the attribute specversion is missing".to_owned(),
        ),
        (
            with(&[
                ("cloudEvents_specversion", "0.3"),
                kind,
                ("cloudEvents_id", "old"),
            ]),
            "specversion \"0.3\"; this reader knows \"1.0\"".to_owned(),
        ),
        (
            with(&[version, ("cloudEvents_id", "untyped")]),
            "the attribute type is missing".to_owned(),
        ),
        (
            with(&[
                version,
                kind,
                ("cloudEvents_id", "when"),
                ("cloudEvents_time", "noon"),
            ]),
            "the attribute time \"noon\" is not RFC 3339".to_owned(),
        ),
    ];
    for (properties, _) in &cases {
        let body = br#"{"key":"x","n":1}"#;
        client
            .publish_raw(TOPIC, "test.tick", properties.clone(), body)
            .await;
    }
    world.commit(&outbox, &[Tick::new("x", 2)]).await;
    world.until_effects(1).await;
    way.stop().await;
    let dead = dead_letters(&world.consumer).await;
    let reasons: Vec<&str> = dead.iter().map(|d| d.reason.as_str()).collect();
    let expected: Vec<&str> = cases.iter().map(|(_, reason)| reason.as_str()).collect();
    assert_eq!(reasons, expected);
    assert!(dead.iter().all(|d| d.attempts == 1));
    assert_eq!(world.effects().await.len(), 1);
}

/// The queue is bound to more types than the group handles: others read those.
async fn a_type_without_handler_is_skipped_and_counted(world: World) {
    counts::start();
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let strange = |n| Tick::new("a", n).message("test.handled.by.others");
    let messages = (1..=3).map(strange).collect();
    world.commit_messages(&outbox, messages).await;
    world.commit(&outbox, &[Tick::new("a", 1)]).await;
    world.until_effects(1).await;
    way.stop().await;
    assert_eq!(counts::consumed(&world.group, "unhandled"), 3);
    assert_eq!(counts::consumed(&world.group, "applied"), 1);
    assert_eq!(dead_letters(&world.consumer).await, []);
    let client = Client::connect(world.amqp_url.as_deref().expect("a broker")).await;
    assert_eq!(
        client.depth(&world.queue()).await,
        0,
        "they were acknowledged"
    );
}
