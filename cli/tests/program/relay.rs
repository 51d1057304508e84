//! The relay as a process of its own: signals, waiting, and rows that other languages wrote.

use std::{process::Stdio, sync::Arc};

use lapin::types::AMQPValue;
use pillarbox_testkit::{
    proxy::{Direction, Proxy},
    servers,
};
use pillarbox_tests::{World, tables, until, wire::Client};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Child,
    sync::watch,
};

use crate::program::{Config, PATIENCE, ended, psql};

/// A relay that runs, and what it has said on stderr.
pub(crate) struct Relay {
    child: Child,
    said: watch::Receiver<String>,
}

impl Relay {
    pub(crate) fn start(config: &Config, more: &[&str]) -> Self {
        let mut command = config.command(&[&["relay", "--json"][..], more].concat());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (say, said) = watch::channel(String::new());
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                say.send_modify(|all| {
                    all.push_str(&line);
                    all.push('\n');
                });
            }
        });
        Self { child, said }
    }

    pub(crate) async fn says(&mut self, what: &str) {
        let heard = tokio::time::timeout(PATIENCE, self.said.wait_for(|said| said.contains(what)));
        let heard = heard.await.is_ok_and(|h| h.is_ok());
        assert!(heard, "no {what:?} in {}", *self.said.borrow());
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok());
        kill_process(id.and_then(Pid::from_raw).unwrap(), signal).unwrap();
    }

    /// Its exit code and answer.
    pub(crate) async fn ended(self) -> (i32, String) {
        let ran = ended(self.child).await;
        (ran.code, ran.out)
    }
}

/// The producer's database and the broker. What no queue is bound for is given up at once.
pub(crate) fn config(url: &str, amqp: &str) -> Config {
    Config::new(&format!(
        "[store]\nurl = '{url}'\n\
         [transport]\nkind = 'amqp'\n\
         [transport.amqp]\nurl = '{amqp}'\n\
         [outbox]\nsource = 'shop'\npayload_limit = 1000\n\
         [relay]\nlease = '3s'\n\
         [retry]\ndelays = []\n"
    ))
}

/// A client whose queue gets what is known.
pub(crate) async fn tap(amqp: &str) -> Client {
    let client = Client::connect(amqp).await;
    let quorum = ("x-queue-type", AMQPValue::LongString("quorum".into()));
    client.queue("tap", "test.known.#", &[quorum]).await;
    client
}

async fn arrived(client: &Client, count: usize) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    until("the events have arrived", async || {
        all.extend(
            client
                .take("tap")
                .await
                .into_iter()
                .map(|a| (a.routing_key, a.body)),
        );
        all.len() >= count
    })
    .await;
    all
}

#[tokio::test]
async fn what_psql_commits_arrives_and_sigterm_hands_over() {
    let Some(world) = World::servers().await else {
        return;
    };
    let amqp = world.amqp_url.as_deref().unwrap();
    let config = config(&world.urls.0, amqp);
    let client = tap(amqp).await;
    for signal in [Signal::TERM, Signal::INT] {
        let mut relay = Relay::start(&config, &[]);
        relay.says("relay owns a partition").await;
        let ran = psql(
            &world.urls.0,
            "BEGIN; SELECT pillarbox.enqueue('test.events', 'test.known.undone', '{}'); ROLLBACK; \
             SELECT pillarbox.enqueue(topic => 'test.events', type => 'test.known.a', key => 'k', payload => '{\"n\": 1}'); \
             SELECT pillarbox.enqueue_bytes('test.events', 'test.known.b', '\\x00ff', 'image/x', key => 'k'); \
             INSERT INTO pillarbox.outbox (topic, type, key, payload) VALUES ('test.events', 'test.known.c', 'k', 'raw');",
        )
        .await;
        assert_eq!(ran.code, 0, "{ran:?}");
        assert_eq!(
            arrived(&client, 3).await,
            [
                ("test.known.a".to_owned(), b"{\"n\": 1}".to_vec()),
                ("test.known.b".to_owned(), vec![0, 255]),
                ("test.known.c".to_owned(), b"raw".to_vec()),
            ]
        );
        relay.signal(signal);
        let (code, out) = relay.ended().await;
        let answer: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((code, answer), (0, json!({ "ended": "stopped" })));
        let owned = "SELECT CAST(count(owner) AS TEXT) FROM {t}cursor";
        assert_eq!(
            tables::number(&world.producer, owned).await,
            0,
            "handed over"
        );
        let status = config
            .run(&["status", "--json", "--max-lag", "1ms"])
            .await
            .json(0);
        assert_eq!(status["destinations"][0]["lag_seconds"], 0.0);
    }
}

/// A drain that cannot end, for the confirm never comes.
#[tokio::test]
async fn a_second_signal_stops_at_once() {
    let Some(world) = World::servers().await else {
        return;
    };
    let (proxy, amqp) = Proxy::before(world.amqp_url.as_deref().unwrap())
        .await
        .unwrap();
    let proxy = Arc::new(proxy);
    let config = config(&world.urls.0, &amqp);
    let client = tap(world.amqp_url.as_deref().unwrap()).await;
    let mut relay = Relay::start(&config, &[]);
    // Confirmed and settled, so that the next event of the key meets an open channel and is sent at once.
    let enqueue = "SELECT pillarbox.enqueue('test.events', 'test.known.a', '{}', key => 'k')";
    assert_eq!(psql(&world.urls.0, enqueue).await.code, 0);
    arrived(&client, 1).await;
    let outbox = world.outbox();
    until("it is settled", async || {
        outbox.backlog().await.unwrap().events == 0
    })
    .await;
    proxy.hold(Direction::ToClient);
    assert_eq!(psql(&world.urls.0, enqueue).await.code, 0);
    arrived(&client, 1).await;
    relay.signal(Signal::TERM);
    relay.says("a second signal stops at once").await;
    relay.signal(Signal::TERM);
    let (code, out) = relay.ended().await;
    assert_eq!((code, out.as_str()), (1, ""));
}

#[tokio::test]
async fn a_relay_says_why_it_does_not_start_or_waits() {
    let memory = Config::sqlite();
    memory
        .run(&["relay"])
        .await
        .refused(2, &["\"memory\"", "would wait for ever"]);
    let none = Config::new("[store]\nurl = 'sqlite://a.db'\n");
    none.run(&["relay"]).await.refused(2, &["no kind"]);
    let unknown = Config::new("[store]\nurl = 'sqlite://a.db'\n[transport]\nkind = 'ampq'\n");
    unknown
        .run(&["relay"])
        .await
        .refused(2, &["did you mean \"amqp\"?"]);
    let destination = "[store]\nurl = 'sqlite://a.db'\n[transport]\nkind = 'amqp'\n[transport.amqp]\nurl = 'amqp://127.0.0.1:1'\n\
         [destinations.main]\ntopics = ['a..b']\n";
    Config::new(destination)
        .run(&["relay"])
        .await
        .refused(2, &["destinations.main.topics"]);

    // Nobody listens there: it waits, and says so once.
    let away = config(
        "postgres://shop:hunter2@127.0.0.1:1/shop",
        "amqp://127.0.0.1:1",
    );
    let mut relay = Relay::start(&away, &[]);
    relay.says("waiting for the database").await;
    relay.signal(Signal::TERM);
    let said = relay.said.clone();
    let (code, out) = relay.ended().await;
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, answer), (0, json!({ "ended": "stopped" })));
    assert!(!said.borrow().contains("hunter2"), "{}", *said.borrow());

    let Some(postgres) = servers::required(servers::postgres().await) else {
        return;
    };
    let empty = config(
        &postgres.create_database().await.unwrap(),
        "amqp://127.0.0.1:1",
    );
    empty
        .run(&["relay"])
        .await
        .refused(1, &["pillarbox migrate"]);
}

/// What the library refuses, a plain INSERT cannot get past either: the database refuses it, or the relay gives it up with the reason,
/// and lives.
#[tokio::test]
async fn what_no_broker_may_see_is_refused_or_given_up_with_its_reason() {
    let Some(world) = World::servers().await else {
        return;
    };
    let (url, amqp) = (&world.urls.0, world.amqp_url.as_deref().unwrap());
    let config = config(url, amqp);
    let client = tap(amqp).await;
    let mut relay = Relay::start(&config, &[]);
    relay.says("relay owns a partition").await;
    // (SQL, what the database says).
    for (statement, says) in [
        (
            "SELECT pillarbox.enqueue('test.events', E'test.known.a\\u0000b', '{}')",
            "invalid Unicode escape value",
        ),
        (
            "SELECT pillarbox.enqueue('test.events', 'test.known.a', '{\"a\": \"\\u0000\"}')",
            "unsupported Unicode escape sequence",
        ),
        (
            "INSERT INTO pillarbox.outbox (topic, type, key) VALUES ('test.events', 'test.known.a', E'\\x00')",
            "invalid byte sequence",
        ),
        (
            "INSERT INTO pillarbox.outbox (topic, type, headers) VALUES ('test.events', 'test.known.a', '{\"a\": \"\\u0000\"}')",
            "unsupported Unicode escape sequence",
        ),
        (
            "SELECT pillarbox.enqueue(NULL, 'test.known.a', '{}')",
            "null value in column",
        ),
        (
            "SELECT pillarbox.enqueue('test.events', NULL, '{}')",
            "null value in column \"type\"",
        ),
        (
            "INSERT INTO pillarbox.outbox (topic, type, id) VALUES ('test.events', 'test.known.a', 'no-uuid')",
            "invalid input syntax for type uuid",
        ),
        (
            "SELECT pillarbox.enqueue('test.events', 'test.known.a', 'no json')",
            "invalid input syntax for type json",
        ),
    ] {
        let ran = psql(url, statement).await;
        assert!(
            ran.code != 0 && ran.err.contains(says),
            "{statement}: {ran:?}"
        );
    }
    // (key, columns, values, what the reason says).
    let topic = "'test.events'";
    let kind = "'test.known.a'";
    let rows: &[(&str, &str, &str)] = &[
        ("type a..b.", "type", "'a..b.'"),
        ("type with a space", "type", "'a b'"),
        ("no type at all", "type", "''"),
        ("topic a..b.", "topic", "'a..b.'"),
        (
            "a payload over the limit",
            "payload",
            "convert_to(repeat('x', 1001), 'UTF8')",
        ),
        (
            "headers of 2 MB",
            "headers",
            "jsonb_build_object('a', repeat('x', 2 << 20))",
        ),
        (
            "2 MB of attributes",
            "attributes",
            "jsonb_build_object('a', repeat('x', 2 << 20))",
        ),
        ("a header without a name", "headers", "'{\"\": \"x\"}'"),
        ("a header with a space", "headers", "'{\"a b\": \"x\"}'"),
        (
            "a header of two lines",
            "headers",
            "jsonb_build_object('a', E'1\\r\\nb: 2')",
        ),
        ("a reserved header", "headers", "'{\"ce_id\": \"x\"}'"),
        (
            "another reserved header",
            "headers",
            "'{\"cloudEvents:id\": \"x\"}'",
        ),
        ("headers that are a list", "headers", "'[1]'"),
        ("a header that is an object", "headers", "'{\"a\": {}}'"),
        (
            "an attribute of no such name",
            "attributes",
            "'{\"Bad\": \"1\"}'",
        ),
        (
            "an attribute of a column",
            "attributes",
            "'{\"id\": \"1\"}'",
        ),
        ("a negative version", "version", "-1"),
    ];
    let mut script = String::new();
    for (key, column, value) in rows {
        let mut columns = vec![("topic", topic), ("type", kind)];
        columns.retain(|(name, _)| name != column);
        columns.push((column, value));
        let names: Vec<_> = columns.iter().map(|(n, _)| *n).collect();
        let values: Vec<_> = columns.iter().map(|(_, v)| *v).collect();
        script.push_str(&format!(
            "INSERT INTO pillarbox.outbox (key, {}) VALUES ('{key}', {});\n",
            names.join(", "),
            values.join(", ")
        ));
    }
    script.push_str(
        "INSERT INTO pillarbox.outbox (topic, type, key) VALUES ('test.events', 'test.known.a', repeat('k', 1025));\n\
         INSERT INTO pillarbox.outbox (topic, type, key) VALUES ('test.events', 'test.known.a', E'k\\n');\n\
         SELECT pillarbox.enqueue_bytes('test.events', 'a..b.', 'x', key => 'by the function');\n\
         SELECT pillarbox.enqueue('test.events', 'test.known.good', '{}', key => 'good');\n",
    );
    let ran = psql(url, &script).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(
        arrived(&client, 1).await,
        [("test.known.good".to_owned(), b"{}".to_vec())]
    );
    let expected = rows.len() + 3;
    until("all are given up", async || {
        tables::dead_letters(&world.producer).await.len() >= expected
    })
    .await;
    relay.signal(Signal::TERM);
    assert_eq!(relay.ended().await.0, 0);

    let list = config
        .run(&["dead-letters", "list", "--destination", "main", "--json"])
        .await
        .json(0);
    let letters = list["letters"].as_array().unwrap();
    assert_eq!(letters.len(), expected);
    let reason = |key: &str| {
        let letter = letters.iter().find(|l| l["key"] == key);
        letter.unwrap_or_else(|| panic!("no letter of {key:?}"))["reason"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    for (key, says) in [
        ("type a..b.", "the type \"a..b.\""),
        ("type with a space", "the type \"a b\""),
        ("no type at all", "the type \"\""),
        ("topic a..b.", "the topic \"a..b.\""),
        (
            "a payload over the limit",
            "the payload has 1001 bytes; at most 1000",
        ),
        (
            "headers of 2 MB",
            "headers and attributes together has 20971",
        ),
        (
            "2 MB of attributes",
            "headers and attributes together has 20971",
        ),
        ("a header without a name", "header"),
        ("a header with a space", "\"a b\""),
        ("a header of two lines", "control character"),
        ("a reserved header", "reserved"),
        ("another reserved header", "header"),
        ("headers that are a list", "headers are no JSON object"),
        (
            "a header that is an object",
            "\"a\" of the headers is no text",
        ),
        ("an attribute of no such name", "\"Bad\""),
        ("an attribute of a column", "\"id\""),
        ("a negative version", "the version is -1"),
        (&"k".repeat(1025), "the key has 1025 bytes"),
        ("k\n", "control character"),
        ("by the function", "the type \"a..b.\""),
    ] {
        let reason = reason(key);
        assert!(reason.contains(says), "{key:?}: {reason}");
        assert!(reason.len() < 1_000, "no header and no payload in a reason");
    }
    // And shown whole, whatever it is.
    let exported = config.run(&["dead-letters", "export"]).await;
    assert_eq!(exported.out.lines().count(), expected);
}
