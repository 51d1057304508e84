//! The files under `configs/`, and what `connect` says.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Deserializer, de};

use crate::{Config, Result, Settings, connect, transport::Transport};

const EMBEDDED: &str = include_str!("../configs/embedded.toml");
const RABBITMQ: &str = include_str!("../configs/rabbitmq.toml");
const NATS: &str = include_str!("../configs/nats.toml");

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inventory {
    http: Http,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Orders {
    http: Http,
    inventory: Peer,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Http {
    listen: std::net::SocketAddr,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    url: String,
}

fn both(file: &str) -> (Settings, Settings) {
    let config = Config::parse(file).unwrap();
    (
        config.at("inventory").unwrap(),
        config.at("orders").unwrap(),
    )
}

#[test]
fn nothing_but_database_and_broker_differs_between_the_shops_files() {
    for other in [RABBITMQ, NATS] {
        nothing_else_differs(other);
    }
}

fn nothing_else_differs(other: &str) {
    let ((inventory, orders), (other_inventory, other_orders)) = (both(EMBEDDED), both(other));
    assert_eq!(
        inventory.host::<Inventory>().unwrap(),
        other_inventory.host().unwrap()
    );
    assert_eq!(
        orders.host::<Orders>().unwrap(),
        other_orders.host().unwrap()
    );
    for (one, other) in [(&inventory, &other_inventory), (&orders, &other_orders)] {
        assert_eq!(one.outbox, other.outbox);
        assert_eq!(one.types, other.types);
        assert_eq!(one.relay, other.relay);
        let accepted = ["orders.order.confirmed", "orders.order.created"];
        assert_eq!(one.accept_unrouted(), accepted);
    }
    assert_eq!(
        inventory.outbox.source.as_deref(),
        Some("inventory-service")
    );
    assert_eq!(orders.outbox.source.as_deref(), Some("orders-service"));
}

#[tokio::test]
async fn the_embedded_shop_connects_memory() {
    let (inventory, _) = both(EMBEDDED);
    assert_eq!(
        connect(&inventory.transport).await.unwrap().kind(),
        "memory"
    );
}

async fn refusal(file: &str) -> String {
    let settings = Config::parse(file).unwrap().settings().unwrap();
    let connected: Result<Arc<dyn Transport>> = connect(&settings.transport).await;
    connected.err().expect("an error").to_string()
}

#[tokio::test]
async fn a_wrong_kind_is_told_the_right_ones() {
    for (file, expected) in [
        (
            "",
            "transport: found no kind, expected kind = \"memory\", \"amqp\" or \"nats\"",
        ),
        (
            "transport.kind = 'rabbit'",
            "line 1: transport.kind: found \"rabbit\", expected \"memory\", \"amqp\" or \"nats\"",
        ),
        (
            "transport.kind = 'amqps'",
            "\"nats\" (did you mean \"amqp\"?)",
        ),
        (
            "transport.kind = 'kafka'",
            "found \"kafka\", which this version does not have, expected \"memory\", \"amqp\" or \"nats\"",
        ),
        (
            "transport.kind = 'memory'\n[transport.memory]\nsize = 1",
            "line 3: transport.memory.size: this key is unknown, expected none here",
        ),
    ] {
        let text = refusal(file).await;
        assert!(
            text.ends_with(expected),
            "{text}\nshould end with\n{expected}"
        );
    }
}

#[cfg(feature = "amqp")]
mod rabbitmq {
    use super::*;
    use crate::amqp::{Config as Amqp, Queue, Tls};

    #[tokio::test]
    async fn the_shop_connects_rabbitmq_with_both_queues() {
        let (inventory, _) = both(RABBITMQ);
        assert_eq!(connect(&inventory.transport).await.unwrap().kind(), "amqp");
        let config: Amqp = inventory.transport.table("amqp").unwrap();
        let groups: Vec<_> = config
            .queues
            .iter()
            .map(|(name, q)| (name.as_str(), q.group.as_str()))
            .collect();
        let expected = [
            ("inventory.events.queue", "orders"),
            ("orders.events.queue", "inventory"),
        ];
        assert_eq!(groups, expected);
    }

    #[tokio::test]
    async fn what_is_wrong_with_its_table_is_placed_and_named() {
        let kind = "transport.kind = 'amqp'\n[transport.amqp]\n";
        for (table, expected) in [
            (
                "ulr = 'amqp://u:canary@h'",
                "line 3: transport.amqp.ulr: this key is unknown; did you mean url?",
            ),
            (
                "url = 'amqp://h'\nheartbeat = 10",
                "line 4: transport.amqp.heartbeat: found 10, expected a duration such as \"10s\", \"250ms\" or \"1m 30s\"",
            ),
            (
                "url = 'amqp://h'\nprefetch = 0",
                "line 4: transport.amqp.prefetch: found 0 (no limit), expected 1 to 65535",
            ),
            (
                "",
                "line 2: transport.amqp: found neither url nor url_file, expected one of them",
            ),
            (
                "url = 'amqp://h'\nqueues.q.topik = 'a'",
                "line 4: transport.amqp.queues.q.topik: this key is unknown; did you mean topic?",
            ),
            (
                "url = 'amqp://h'\nqueues.q.topic = 'a'",
                "line 4: transport.amqp.queues.q: found no group, which is needed",
            ),
            (
                "url = 'amqp://h'\nqueue_type = 'quorun'",
                "line 4: transport.amqp.queue_type: found \"quorun\", expected quorum or classic (quorum?)",
            ),
            (
                "url = 'postgres://u:canary@h'",
                "expected amqp://user:password@host:port/vhost or amqps://…",
            ),
        ] {
            let text = refusal(&format!("{kind}{table}")).await;
            assert!(
                text.starts_with("read configuration: the configuration, line "),
                "{text}"
            );
            assert!(
                text.ends_with(expected),
                "{text}\nshould end with\n{expected}"
            );
            assert!(!text.contains("canary"), "{text}");
        }
    }

    #[test]
    fn the_reference_says_what_holds_and_names_every_field() {
        let text = include_str!("../configs/reference.toml");
        let said: Amqp = Config::parse(text)
            .unwrap()
            .settings()
            .unwrap()
            .transport
            .table("amqp")
            .unwrap();
        let held = Amqp::new("amqp://guest:guest@localhost:5672");
        assert_eq!(format!("{said:?}"), format!("{held:?}"));
        for (table, fields) in [
            ("[transport.amqp]", fields::<Amqp>()),
            ("[transport.amqp.tls]", fields::<Tls>()),
            (
                "# [transport.amqp.queues.\"inventory.events.queue\"]",
                fields::<Queue>(),
            ),
        ] {
            let (_, rest) = text.split_once(&format!("\n{table}\n")).expect(table);
            let body = rest.split("\n[").next().unwrap();
            for field in fields.iter().filter(|f| !["tls", "queues"].contains(f)) {
                let named = body.lines().any(|l| {
                    l.trim_start_matches("# ")
                        .starts_with(&format!("{field} = "))
                });
                assert!(named, "{table} lacks {field}");
            }
        }
    }
}

#[cfg(feature = "nats")]
mod jetstream {
    use super::*;
    use crate::nats::{Config as Nats, Stream, Tls};

    #[tokio::test]
    async fn the_shop_connects_nats_with_both_streams() {
        let (inventory, _) = both(NATS);
        assert_eq!(connect(&inventory.transport).await.unwrap().kind(), "nats");
        let config: Nats = inventory.transport.table("nats").unwrap();
        let topics: Vec<_> = config
            .streams
            .iter()
            .map(|(name, s)| (name.as_str(), s.topic.as_str()))
            .collect();
        let expected = [
            ("inventory_events", "inventory.events"),
            ("orders_events", "orders.events"),
        ];
        assert_eq!(topics, expected);
    }

    #[tokio::test]
    async fn what_is_wrong_with_its_table_is_placed_and_named() {
        let kind = "transport.kind = 'nats'\n[transport.nats]\n";
        for (table, expected) in [
            (
                "ulr = 'nats://u:canary@h'",
                "line 3: transport.nats.ulr: this key is unknown; did you mean url?",
            ),
            (
                "url = 'nats://h'\nprefetch = 0",
                "line 4: transport.nats.prefetch: found 0, expected 1 to 65536",
            ),
            (
                "",
                "line 2: transport.nats: found neither url nor url_file, expected one of them",
            ),
            (
                "url = 'nats://h'\nstreams.s.topic = 'a'",
                "line 4: transport.nats.streams.s: found no subjects, which is needed",
            ),
            (
                "url = 'amqp://u:canary@h'",
                "expected nats://user:password@host:port, nats://token@host:port or tls://…",
            ),
        ] {
            let text = refusal(&format!("{kind}{table}")).await;
            assert!(
                text.ends_with(expected),
                "{text}\nshould end with\n{expected}"
            );
            assert!(!text.contains("canary"), "{text}");
        }
    }

    #[test]
    fn the_reference_says_what_holds_and_names_every_field() {
        let text = include_str!("../configs/reference.toml");
        let settings = Config::parse(text).unwrap().settings().unwrap();
        let said: Nats = settings.transport.table("nats").unwrap();
        let held = Nats::new("nats://localhost:4222");
        assert_eq!(format!("{said:?}"), format!("{held:?}"));
        for (table, fields) in [
            ("[transport.nats]", fields::<Nats>()),
            ("[transport.nats.tls]", fields::<Tls>()),
            (
                "# [transport.nats.streams.inventory_events]",
                fields::<Stream>(),
            ),
        ] {
            let (_, rest) = text.split_once(&format!("\n{table}\n")).expect(table);
            let body = rest.split("\n[").next().unwrap();
            for field in fields.iter().filter(|f| !["tls", "streams"].contains(f)) {
                let named = body.lines().any(|l| {
                    l.trim_start_matches("# ")
                        .starts_with(&format!("{field} = "))
                });
                assert!(named, "{table} lacks {field}");
            }
        }
    }
}

/// The fields of a struct, as its `Deserialize` asks for them.
#[cfg(any(feature = "amqp", feature = "nats"))]
fn fields<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    match T::deserialize(Fields) {
        Err(Asked(fields)) => fields,
        Ok(_) => panic!("it asked for no struct"),
    }
}

struct Fields;

#[derive(Debug)]
struct Asked(&'static [&'static str]);

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl std::error::Error for Asked {}

impl de::Error for Asked {
    fn custom<T: fmt::Display>(text: T) -> Self {
        panic!("{text}")
    }
}

impl<'de> Deserializer<'de> for Fields {
    type Error = Asked;

    fn deserialize_struct<V: de::Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Asked> {
        Err(Asked(fields))
    }

    fn deserialize_any<V: de::Visitor<'de>>(self, _: V) -> Result<V::Value, Asked> {
        Err(Asked(&[]))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
