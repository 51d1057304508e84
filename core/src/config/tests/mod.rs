//! What is read, how it is merged, and what is said about bad input.

mod bad_input;
mod reference;
mod store;

use std::{ffi::OsString, path::Path, time::Duration};

use serde::Deserialize;

use super::*;

/// With variables that are not this process's.
pub(super) fn config(toml: &str, variables: &[(&str, &str)]) -> Result<Config> {
    let variables = variables
        .iter()
        .map(|(name, text)| (OsString::from(name), OsString::from(text)));
    let source = Source::parse("shop.toml".to_owned(), toml, variables)?;
    Ok(Config {
        source: Arc::new(source),
    })
}

fn settings(toml: &str, variables: &[(&str, &str)]) -> Settings {
    config(toml, variables).unwrap().settings().unwrap()
}

#[test]
fn nothing_said_means_the_defaults() {
    let settings = settings("", &[]);
    assert_eq!(settings.relay, crate::RelaySettings::default());
    assert_eq!(settings.consumer, crate::ConsumerSettings::default());
    assert_eq!(settings.retry, crate::failure::Retry::default());
    assert_eq!(settings.retention, crate::RetentionSettings::default());
    assert_eq!(settings.outbox, OutboxSettings::default());
    assert_eq!(settings.store.schema, "pillarbox");
}

#[test]
fn every_table_reaches_its_settings() {
    let settings = settings(
        r#"
        [relay]
        lease = "30s"
        in_flight = 7
        held_bytes = 1_048_576
        [consumer]
        batch = 3
        remember = "2h"
        [retention]
        log = "7d"
        dead_letters_max = 9
        [retry]
        delays = ["1s", "1m 30s"]
        jitter = 0
        [outbox]
        source = "inventory-service"
        payload_limit = 10
        [types."orders.order.created"]
        unrouted = "accept"
        [types."orders.order.failed"]
        [topics."orders.events"]
        in_flight_per_key = 1
        [destinations.main]
        topics = ["orders.events"]
        "#,
        &[],
    );
    assert_eq!(settings.relay.lease.term(), Duration::from_secs(30));
    assert_eq!(settings.relay.window.in_flight, 7);
    assert_eq!(settings.relay.window.bytes, 1 << 20);
    assert_eq!(settings.consumer.batch, 3);
    assert_eq!(settings.consumer.remember, Duration::from_secs(7_200));
    assert_eq!(settings.retention.log, Duration::from_secs(7 * 86_400));
    assert_eq!(settings.retention.dead_letters_max, 9);
    assert_eq!(settings.retry.delays, [1, 90].map(Duration::from_secs));
    assert_eq!(settings.retry.jitter, 0.0);
    assert_eq!(settings.outbox.source.as_deref(), Some("inventory-service"));
    assert_eq!(settings.outbox.limits.payload, 10);
    assert_eq!(settings.accept_unrouted(), ["orders.order.created"]);
    let unrouted = settings.types["orders.order.failed"].unrouted;
    assert_eq!(unrouted, Unrouted::Wait);
    assert_eq!(settings.topics["orders.events"].in_flight_per_key, 1);
    let topics = settings.destinations["main"].topics.as_deref();
    assert_eq!(topics, Some(&["orders.events".to_owned()][..]));
}

const TWO_SERVICES: &str = r#"
    [relay]
    batch = 10
    publish = 20
    [types."a.b"]
    unrouted = "accept"
    [http]
    listen = "common"

    [inventory.relay]
    batch = 11
    [inventory.types."c.d"]
    unrouted = "accept"
    [inventory.http]
    listen = "inventory"

    [orders.http]
    listen = "orders"
"#;

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Program {
    http: Http,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Http {
    listen: String,
}

#[test]
fn a_section_is_laid_over_what_is_common() {
    let config = config(TWO_SERVICES, &[]).unwrap();
    let inventory = config.at("inventory").unwrap();
    assert_eq!(inventory.relay.batch, 11);
    assert_eq!(inventory.relay.publish, 20);
    assert_eq!(inventory.accept_unrouted(), ["a.b", "c.d"]);
    let host: Program = inventory.host().unwrap();
    assert_eq!(host.http.listen, "inventory");

    let orders = config.at("orders").unwrap();
    assert_eq!(orders.relay.batch, 10);
    assert_eq!(orders.accept_unrouted(), ["a.b"]);
    assert_eq!(orders.host::<Program>().unwrap().http.listen, "orders");

    let whole = config.settings().unwrap();
    assert_eq!(whole.relay.batch, 10);
    assert!(
        whole.host::<Program>().is_err(),
        "the sections are left over"
    );
}

#[test]
fn variables_override_the_file_in_common_and_in_a_section() {
    let variables = [
        ("PILLARBOX_RELAY__PUBLISH", "21"),
        ("PILLARBOX_INVENTORY__RELAY__BATCH", " 12\n"),
        ("PILLARBOX_ORDERS__HTTP__LISTEN", "0.0.0.0:80"),
        ("PILLARBOX_RETRY__DELAYS", r#"["5s", 7s]"#),
        ("PILLARBOX_TYPES__X.Y__UNROUTED", "accept"),
        ("PILLARBOX_NEW__HTTP__LISTEN", "here"),
        ("PILLARBOX_SERVICE_HOST", "10.0.0.1"),
        ("PILLARBOX_PORT_5432_TCP", "tcp://10.0.0.1:5432"),
        ("OTHER_RELAY__BATCH", "1"),
    ];
    let config = config(TWO_SERVICES, &variables).unwrap();
    let inventory = config.at("inventory").unwrap();
    assert_eq!((inventory.relay.batch, inventory.relay.publish), (12, 21));
    assert_eq!(inventory.retry.delays, [5, 7].map(Duration::from_secs));
    assert!(inventory.accept_unrouted().contains(&"x.y".to_owned()));
    let orders: Program = config.at("orders").unwrap().host().unwrap();
    assert_eq!(orders.http.listen, "0.0.0.0:80");
    let new: Program = config.at("new").unwrap().host().unwrap();
    assert_eq!(new.http.listen, "here");
}

#[test]
fn a_variable_of_digits_may_be_text() {
    let variables = [
        ("PILLARBOX_OUTBOX__SOURCE", "007"),
        ("PILLARBOX_HTTP__LISTEN", "true"),
        ("PILLARBOX_DESTINATIONS__MAIN__TOPICS", "[a, 5]"),
    ];
    let config = config("", &variables).unwrap();
    // A number in a list is no text: the list's own spelling decides.
    let text = config.settings().unwrap_err().to_string();
    assert!(
        text.contains("PILLARBOX_DESTINATIONS__MAIN__TOPICS"),
        "{text}"
    );
    let config = self::config("", &variables[..2]).unwrap();
    let settings = config.settings().unwrap();
    assert_eq!(settings.outbox.source.as_deref(), Some("007"));
    assert_eq!(settings.host::<Program>().unwrap().http.listen, "true");
}

#[test]
fn of_url_and_url_file_the_later_one_counts() {
    let file = "[store]\nurl = 'sqlite://a.db'\n[inventory.store]\nurl_file = 'secret'";
    let variables = [("PILLARBOX_STORE__URL_FILE", "other")];
    for (variables, section, expected) in [
        (
            &[][..],
            "inventory",
            "url: None, url_file: Some(\"secret\")",
        ),
        (
            &variables[..],
            "inventory",
            "url: None, url_file: Some(\"secret\")",
        ),
    ] {
        let settings = config(file, variables).unwrap().at(section).unwrap();
        assert!(format!("{settings:?}").contains(expected), "{settings:?}");
    }
    let settings = settings(file, &variables);
    let expected = "url: None, url_file: Some(\"other\")";
    assert!(format!("{settings:?}").contains(expected), "{settings:?}");
}

#[test]
fn the_adapter_reads_its_own_table() {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Adapter {
        url: String,
        #[serde(default)]
        queues: std::collections::BTreeMap<String, Vec<String>>,
    }
    let file = r#"
        [transport]
        kind = "amqp"
        [transport.amqp]
        url = "amqp://localhost"
        [transport.amqp.queues]
        "inventory.events.queue" = ["a.b"]
    "#;
    let variables = [("PILLARBOX_TRANSPORT__AMQP__URL", "amqp://u:p,[x@other")];
    let settings = settings(file, &variables);
    assert_eq!(
        settings.transport.kind(&["memory", "amqp"], &[]).unwrap(),
        "amqp"
    );
    let adapter: Adapter = settings.transport.table("amqp").unwrap();
    assert_eq!(adapter.url, "amqp://u:p,[x@other");
    assert_eq!(adapter.queues["inventory.events.queue"], ["a.b"]);
    assert!(settings.transport.table::<Adapter>("kafka").is_err());
}

#[test]
fn a_file_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shop.toml");
    std::fs::write(&path, TWO_SERVICES).unwrap();
    let config = Config::load(&path).unwrap();
    assert_eq!(config.at("inventory").unwrap().relay.batch, 11);
    assert!(Config::load(Path::new("Cargo.toml")).is_ok());
}

#[test]
fn a_destination_has_its_own_broker_and_start() {
    let settings = Config::parse(
        r#"
        transport.kind = "memory"
        [destinations.audit]
        topics = ["orders.events"]
        start = "2026-11-24T15:00:00Z"
        transport = { kind = "amqp", amqp = { url = "amqp://localhost" } }
        [destinations.elsewhere]
        relay = false
        "#,
    )
    .unwrap()
    .settings()
    .unwrap();
    assert_eq!(settings.relayed(), ["main", "audit"]);
    let audit = &settings.destinations["audit"];
    assert_eq!(audit.start.to_string(), "2026-11-24T15:00:00Z");
    let kind = |name: &str| {
        let transport = settings.transport_of(name).unwrap();
        transport.kind(&["memory", "amqp"], &[]).unwrap().to_owned()
    };
    assert_eq!(
        ["main", "audit", "elsewhere"].map(kind),
        ["memory", "amqp", "memory"]
    );
    let table = settings.transport_of("audit").unwrap();
    let table: toml::Table = table.table("amqp").unwrap();
    assert_eq!(table["url"].as_str(), Some("amqp://localhost"));
    let refused = table_of(&settings, "audit", "nats")
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("destinations.audit.transport.kind"),
        "{refused}"
    );
    let unknown = settings.transport_of("audti").unwrap_err();
    assert_eq!(unknown.kind(), crate::Kind::NotFound);
    assert!(
        unknown.to_string().contains("main, audit, elsewhere"),
        "{unknown}"
    );
}

/// A broker's kind in a program that knows others alone.
fn table_of(settings: &crate::Settings, name: &str, known: &str) -> crate::Result<String> {
    let transport = settings.transport_of(name)?;
    transport.kind(&[known], &[]).map(str::to_owned)
}

#[test]
fn main_can_be_left_to_others() {
    let settings = Config::parse("[destinations.main]\nrelay = false\n[destinations.next]")
        .unwrap()
        .settings()
        .unwrap();
    assert_eq!(settings.relayed(), ["next"]);
}
