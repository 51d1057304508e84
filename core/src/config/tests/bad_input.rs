//! One clear message each; no panic, no secret.

use serde::Deserialize;

use super::config;
use crate::config::{Config, Settings};

/// Whatever the program does with its configuration at start.
fn everything(
    toml: &str,
    variables: &[(&str, &str)],
    section: Option<&str>,
) -> Result<Settings, String> {
    let text = |e: crate::Error| e.to_string();
    let config = config(toml, variables).map_err(text)?;
    let settings = match section {
        Some(section) => config.at(section),
        None => config.settings(),
    };
    settings.map_err(text)
}

#[track_caller]
fn says(toml: &str, expected: &str) {
    says_with(toml, &[], None, expected);
}

#[track_caller]
fn says_with(toml: &str, variables: &[(&str, &str)], section: Option<&str>, expected: &str) {
    let found = match everything(toml, variables, section) {
        Ok(_) => "nothing".to_owned(),
        Err(text) => text,
    };
    assert_eq!(found, format!("read configuration: {expected}"));
}

#[test]
fn a_missing_file_is_named_with_the_way_out() {
    let e = Config::load("no/such.toml").unwrap_err();
    assert_eq!(e.kind(), crate::Kind::Configuration);
    let (text, here) = (e.to_string(), std::env::current_dir().unwrap());
    let expected = format!(
        "read configuration: found no file no/such.toml (looked for from {}); give the path of another, or write it: every \
         field with its default stands in configs/reference.toml",
        here.display()
    );
    assert_eq!(text, expected);
}

#[test]
fn what_is_no_text_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let text = Config::load(folder.path()).unwrap_err().to_string();
    assert!(
        text.ends_with("found a folder, expected a TOML file"),
        "{text}"
    );
    let file = folder.path().join("a.toml");
    std::fs::write(&file, b"a = '\xff'").unwrap();
    let text = Config::load(&file).unwrap_err().to_string();
    assert!(text.contains("bytes that are no text"), "{text}");
    std::fs::write(&file, vec![b'\n'; (1 << 20) + 1]).unwrap();
    let text = Config::load(&file).unwrap_err().to_string();
    assert!(text.contains("more than 1048576 bytes"), "{text}");
}

#[test]
fn a_syntax_error_is_placed() {
    says(
        "[relay]\nbatch = = 1",
        "shop.toml, line 2, column 9: this is not TOML: extra `=`, expected nothing",
    );
}

#[test]
fn an_unknown_key_is_placed_and_the_nearest_named() {
    says(
        "[relay]\n\nbacth = 1",
        "shop.toml, line 3: relay.bacth: this key is unknown; did you mean batch?",
    );
    says(
        "[store]\nulr = ''",
        "shop.toml, line 2: store.ulr: this key is unknown; did you mean url?",
    );
    says(
        "[retry]\ndelay = []",
        "shop.toml, line 2: retry.delay: this key is unknown; did you mean delays?",
    );
    says(
        "[retry]\nfoo = 1",
        "shop.toml, line 2: retry.foo: this key is unknown, expected delays, jitter or on_exhausted",
    );
    says(
        "transport.kind = 'amqp://u:canary@h'",
        "shop.toml, line 1: transport.kind: found a text that is no word (not shown), expected a word such as \"amqp\"",
    );
    says(
        "[transport]\nkint = 'memory'",
        "shop.toml, line 2: transport.kint: this key is unknown; did you mean kind?",
    );
    says(
        "[types.\"a.b\"]\nunroutet = 'accept'",
        "shop.toml, line 2: types.\"a.b\".unroutet: this key is unknown; did you mean unrouted?",
    );
}

#[test]
fn a_misspelt_table_is_not_taken_for_the_programs_own() {
    says(
        "[realy]\nbatch = 1",
        "shop.toml, line 1: realy: this table is unknown; did you mean [relay]? (if not, choose a name less like it)",
    );
    let expected = "shop.toml, line 1: inventory.stor: this table is unknown; did you mean [store]? (if not, choose a name \
                    less like it)";
    says_with(
        "[inventory.stor]\nurl = ''",
        &[],
        Some("inventory"),
        expected,
    );
    says_with(
        "[realy]\n[inventory]",
        &[],
        Some("inventory"),
        "shop.toml, line 1: realy: this table is unknown; did you mean [relay]? (if not, choose a name less like it)",
    );
}

#[test]
fn a_name_with_dots_needs_quotes() {
    says(
        "[types.orders.created]\nunrouted = 'accept'",
        "shop.toml, line 1: types.orders.created: this key is unknown, expected unrouted (a name with dots is one name only \
         in quotes: [types.\"a.b\"])",
    );
}

#[test]
fn a_wrong_type_says_what_was_found_and_expected() {
    says(
        "[relay]\nbatch = 'many'",
        "shop.toml, line 2: relay.batch: found \"many\", expected a whole number, not below 0",
    );
    says(
        "[relay]\nbatch = -1",
        "shop.toml, line 2: relay.batch: found -1, expected a whole number, not below 0",
    );
    says(
        "[relay]\nlease = 10",
        "shop.toml, line 2: relay.lease: found 10, expected a duration such as \"10s\", \"250ms\" or \"1m 30s\"",
    );
    says(
        "[relay]\nlease = 'soon'",
        "shop.toml, line 2: relay.lease: found \"soon\", expected a duration such as \"10s\", \"250ms\" or \"1m 30s\"",
    );
    says(
        "relay = 1",
        "shop.toml, line 1: relay: found 1, expected a table",
    );
    says(
        "store = ['a']",
        "shop.toml, line 1: store: found a list, expected a table",
    );
    says(
        "[[relay]]",
        "shop.toml, line 1: relay: found a list, expected a table",
    );
    says(
        "[retry]\njitter = 'some'",
        "shop.toml, line 2: retry.jitter: found \"some\", expected a number",
    );
    says(
        "[retry]\ndelays = ['1s', 2]",
        "shop.toml, line 2: retry.delays.1: found 2, expected a duration such as \"10s\", \"250ms\" or \"1m 30s\"",
    );
    says(
        "[types.a]\nunrouted = 'acept'",
        "shop.toml, line 2: types.a.unrouted: found \"acept\", expected wait or accept (accept?)",
    );
}

#[test]
fn a_value_out_of_range_says_the_range() {
    for (key, found, range) in [
        ("relay.lease", "'500ms'", "found 500ms, expected 1s to 5m"),
        ("relay.lease", "'1h'", "found 1h, expected 1s to 5m"),
        ("relay.batch", "0", "found 0, expected 1 to 10000"),
        (
            "relay.publish",
            "10_001",
            "found 10001, expected 1 to 10000",
        ),
        ("relay.unsettled", "0", "found 0, expected 1 to 1000000"),
        (
            "relay.held_bytes",
            "1",
            "found 1, expected 1048576 to 1073741824",
        ),
        ("relay.held", "0", "found 0, expected 1 to 1000000"),
        ("relay.in_flight", "0", "found 0, expected 1 to 100000"),
        ("relay.idle_poll", "'0s'", "found 0s, expected 1ms to 1m"),
        ("relay.busy_poll", "'2m'", "found 2m, expected 1ms to 1m"),
        ("relay.settle", "'0s'", "found 0s, expected 1ms to 10s"),
        ("relay.deferred", "0", "found 0, expected 1 to 1000000"),
        (
            "relay.deferred_per_key",
            "0",
            "found 0, expected 1 to 1000000",
        ),
        ("relay.drain", "'0s'", "found 0s, expected 1ms to 10m"),
        ("consumer.lease", "'6m'", "found 6m, expected 1s to 5m"),
        ("consumer.batch", "0", "found 0, expected 1 to 10000"),
        ("consumer.deferred", "0", "found 0, expected 1 to 1000000"),
        (
            "consumer.deferred_per_key",
            "0",
            "found 0, expected 1 to 1000000",
        ),
        ("consumer.drain", "'1h'", "found 1h, expected 1ms to 10m"),
        (
            "consumer.remember",
            "'37h'",
            "found 1day 13h, expected 1h to 1day 12h",
        ),
        ("retention.log", "'59s'", "found 59s, expected 1m to 30days"),
        (
            "retention.dead_letters",
            "'1m'",
            "found 1m, expected 1h to 10years",
        ),
        (
            "retention.dead_letters_max",
            "0",
            "found 0, expected 1 to 10000000",
        ),
        ("retention.interval", "'2m'", "found 2m, expected 1s to 1m"),
        ("retry.jitter", "1.5", "found 1.5, expected 0 to 1"),
        ("retry.jitter", "nan", "found NaN, expected 0 to 1"),
        ("retry.delays", "['0s']", "found 0s, expected 1ms to 1day"),
        ("store.max_connections", "0", "found 0, expected 1 to 1000"),
        (
            "store.connect_timeout",
            "'0s'",
            "found 0s, expected 100ms to 1h",
        ),
        (
            "outbox.payload_limit",
            "0",
            "found 0, expected 1 to 134217728",
        ),
        ("outbox.key_limit", "0", "found 0, expected 1 to 16384"),
        ("outbox.header_limit", "0", "found 0, expected 16 to 1024"),
        (
            "outbox.header_name_limit",
            "0",
            "found 0, expected 8 to 255",
        ),
        (
            "outbox.header_bytes_limit",
            "0",
            "found 0, expected 1024 to 65536",
        ),
        (
            "outbox.source",
            "''",
            "found 0 bytes, expected 1 to 255 bytes without spaces, such as \"inventory-service\"",
        ),
        (
            "outbox.source",
            "'a b'",
            "found 3 bytes, expected 1 to 255 bytes without spaces, such as \"inventory-service\"",
        ),
        (
            "topics.a.in_flight_per_key",
            "0",
            "found 0, expected 1 to 10000",
        ),
        (
            "retention.abandon_after",
            "'1m'",
            "found 1m, expected 1h to 10years",
        ),
    ] {
        says(
            &format!("{key} = {found}"),
            &format!("shop.toml, line 1: {key}: {range}"),
        );
    }
}

#[test]
fn an_inbox_that_forgets_before_the_last_retry_is_refused() {
    says(
        "[consumer]\nremember = '1h'\n[retry]\ndelays = ['59m', '2m']\njitter = 0.0",
        "shop.toml, line 2: consumer.remember: found 1h, expected more than all waits of [retry] delays together, 1h 1m",
    );
}

#[test]
fn names_that_no_event_can_have_are_refused() {
    let expected = "1 to 200 letters, digits, '_', '-', in parts joined by '.'";
    says(
        "[types.'a.*']",
        &format!("shop.toml, line 1: types.\"a.*\": found the name \"a.*\", expected {expected}"),
    );
    says(
        "[topics.'']",
        &format!("shop.toml, line 1: topics.\"\": found the name \"\", expected {expected}"),
    );
    says(
        "[destinations.main]\ntopics = ['a', 'b c']",
        &format!(
            "shop.toml, line 2: destinations.main.topics.1: found the name \"b c\", expected {expected}"
        ),
    );
}

#[test]
fn what_comes_later_is_refused_rather_than_ignored() {
    for table in ["console", "telemetry"] {
        says(
            &format!("[{table}]"),
            &format!(
                "shop.toml, line 1: {table}: found a table, expected no such table: this version does not read it yet"
            ),
        );
    }
}

#[test]
fn destinations_that_make_no_sense_are_refused() {
    says(
        "[destinations.'a b']",
        "shop.toml, line 1: destinations.\"a b\": found the name \"a b\", expected 1 to 64 letters, digits, '_', '-', '.'",
    );
    says(
        "[destinations.audit]\nstart = 'yesterday'",
        "shop.toml, line 2: destinations.audit.start: found \"yesterday\", expected \"earliest\", \"now\" or a time such as \
         \"2026-11-24T15:00:00Z\"",
    );
    says(
        "[destinations.main]\nstart = 'now'",
        "shop.toml, line 2: destinations.main.start: found now, expected \"earliest\", or no such key: main begins with the log",
    );
    says(
        "[destinations.audit]\ntransport = 'kafka'",
        "shop.toml, line 2: destinations.audit.transport: found \"kafka\", expected a table",
    );
    says(
        "[destinations.audit]\ntransport = { kind = 'amqp', amqp = 5 }",
        "shop.toml, line 2: destinations.audit.transport.amqp: this key is unknown, expected kind",
    );
    says(
        "[destinations.main]\ntopics = []",
        "shop.toml, line 2: destinations.main.topics: found an empty list, expected one topic at least, or no such key for \
         all topics",
    );
}

#[test]
fn two_urls_contradict_each_other() {
    says(
        "[store]\nurl = 'sqlite://a'\nurl_file = 'b'",
        "shop.toml, line 1: store: found both url and url_file, expected one of them",
    );
}

#[test]
fn a_variable_is_named() {
    says_with(
        "[relay]\nbatch = 1",
        &[("PILLARBOX_RELAY__BATCH", "many")],
        None,
        "the environment variable PILLARBOX_RELAY__BATCH: relay.batch: found \"many\", expected a whole number, not below 0",
    );
    says_with(
        "",
        &[("PILLARBOX_STORE__ULR", "postgres://u:canary@h")],
        None,
        "the environment variable PILLARBOX_STORE__ULR: store.ulr: this key is unknown; did you mean url?",
    );
    says_with(
        "[inventory]",
        &[("PILLARBOX_INVENTORY__RELAY__BATCH", "0")],
        Some("inventory"),
        "the environment variable PILLARBOX_INVENTORY__RELAY__BATCH: inventory.relay.batch: found 0, expected 1 to 10000",
    );
    says_with(
        "",
        &[("PILLARBOX_RELAY__", "1")],
        None,
        "the environment variable PILLARBOX_RELAY__: found an empty name beside __, expected PILLARBOX_TABLE__KEY",
    );
    says_with(
        "",
        &[
            ("PILLARBOX_RELAY__BATCH", "1"),
            ("PILLARBOX_RELAY__BATCH__X", "1"),
        ],
        None,
        "the environment variables PILLARBOX_RELAY__BATCH and PILLARBOX_RELAY__BATCH__X contradict each other: expected one \
         of them",
    );
}

#[test]
fn a_section_is_placed() {
    let file = "[relay]\nbatch = 0\n[inventory.relay]\npublish = 0\n[orders.relay]\nbatch = 1";
    says_with(
        file,
        &[],
        Some("inventory"),
        "shop.toml, line 2: relay.batch: found 0, expected 1 to 10000",
    );
    let fixed = file.replacen("batch = 0", "batch = 1", 1);
    let expected = "shop.toml, line 4: inventory.relay.publish: found 0, expected 1 to 10000";
    says_with(&fixed, &[], Some("inventory"), expected);
    says_with(
        file,
        &[],
        Some("order"),
        "shop.toml: found no section [order], expected one of the sections: inventory or orders (did you mean [orders]?)",
    );
    says_with(
        "a = 1",
        &[],
        Some("a"),
        "shop.toml, line 1: a: found a value, expected a table",
    );
    says_with(
        file,
        &[],
        Some("relay"),
        "shop.toml, line 1: relay: found a section of this name, expected a section of the program's own: this table is \
         Pillarbox's",
    );
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct Program {
    http: Http,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct Http {
    listen: std::net::SocketAddr,
    #[serde(default)]
    token: Option<String>,
}

#[test]
fn the_programs_own_tables_get_the_same_care() {
    for (file, expected) in [
        ("", "orders: found no http, which is needed"),
        (
            "[orders.http]",
            "orders.http: found no listen, which is needed",
        ),
        (
            "[orders.http]\nlisten = '0.0.0.0'",
            "orders.http.listen: found \"0.0.0.0\": invalid socket address syntax",
        ),
        (
            "[orders.http]\nlistn = ''",
            "orders.http.listn: this key is unknown; did you mean listen?",
        ),
        (
            "[orders.http]\ntoken = ['canary']",
            "orders.http.token: found a list, expected a text",
        ),
        (
            "[orders.http]\ntoken = 1234567",
            "orders.http.token: found a value that is no text (not shown), expected a text",
        ),
    ] {
        let file = format!("{file}\n[orders]\n").replace(
            "[orders]\n",
            if file.is_empty() { "[orders]\n" } else { "" },
        );
        let settings = config(&file, &[]).unwrap().at("orders").unwrap();
        let text = settings.host::<Program>().unwrap_err().to_string();
        assert!(
            text.ends_with(expected),
            "{text}\nshould end with\n{expected}"
        );
        assert!(
            text.starts_with("read configuration: shop.toml, line "),
            "{text}"
        );
    }
}

#[test]
fn the_transports_word_is_checked_against_those_that_there_are() {
    let known = ["memory", "amqp"];
    for (file, expected) in [
        (
            "",
            "shop.toml: transport: found no kind, expected kind = \"memory\" or \"amqp\"",
        ),
        (
            "transport.kind = 'ampq'",
            "shop.toml, line 1: transport.kind: found \"ampq\", expected \"memory\" or \"amqp\" (did you mean \"amqp\"?)",
        ),
        (
            "transport.kind = 'kafka'\n[transport.kafka]",
            "shop.toml, line 1: transport.kind: found \"kafka\", which this version does not have, expected \"memory\" or \
             \"amqp\"",
        ),
        (
            "transport.kind = 'amqp'\n[transport.ampq]\nurl = 'amqp://u:canary@h'",
            "shop.toml, line 2: transport.ampq: this key is unknown; did you mean amqp?",
        ),
    ] {
        let transport = config(file, &[]).unwrap().settings().unwrap().transport;
        let text = transport.kind(&known, &["kafka"]).unwrap_err().to_string();
        assert_eq!(text, format!("read configuration: {expected}"));
    }
}

/// A password survives no slip of the hand: cut anywhere, quotes lost, put where something else belongs.
#[test]
fn no_error_shows_a_password() {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Adapter {
        url: String,
        #[serde(default, with = "humantime_serde")]
        heartbeat: std::time::Duration,
    }
    let whole = "[store]\nurl = \"postgres://shop:canary@db/shop\"\n[transport]\nkind = \"amqp\"\n[transport.amqp]\n\
                 url = \"amqp://shop:canary@mq\"\nheartbeat = \"10s\"\n[retry]\njitter = 0.1\n";
    let mut files: Vec<String> = (0..whole.len()).map(|n| whole[..n].to_owned()).collect();
    for (at, _) in whole.char_indices() {
        for slip in [
            "", "\"", "'", "=", "\n", "[", "]", "{", "#", "\\", "\0", "é",
        ] {
            files.push(format!("{}{slip}{}", &whole[..at], &whole[at + 1..]));
            files.push(format!("{}{slip}{}", &whole[..at], &whole[at..]));
        }
    }
    for key in [
        "store",
        "store.max_connections",
        "store.connect_timeout",
        "transport",
        "transport.kind",
        "transport.amqp",
        "retry.delays",
        "outbox.source",
        "types",
        "transport.amqp.heartbeat",
        "transport.amqp.url",
    ] {
        for value in [
            "'amqp://shop:canary@mq'",
            "['amqp://shop:canary@mq']",
            "{ url = 'amqp://shop:canary@mq' }",
            "{ 'x' = 'amqp://shop:canary@mq' }",
        ] {
            files.push(format!("{key} = {value}"));
        }
    }
    let mut refused = 0;
    for file in files {
        let read = everything(&file, &[], None).and_then(|settings| {
            let shown = format!("{settings:?}");
            assert!(!shown.contains("canary"), "{shown}");
            let kind = settings.transport.kind(&["memory", "amqp"], &[]);
            kind.map_err(|e| e.to_string())?;
            settings
                .transport
                .table::<Adapter>("amqp")
                .map_err(|e| format!("{e} {e:?}"))
        });
        if let Err(text) = read {
            refused += 1;
            assert!(!text.contains("canary"), "{file}\n→ {text}");
        }
    }
    assert!(refused > 1_000, "{refused}");
}

#[test]
fn nothing_makes_it_panic() {
    let deep = "[".repeat(100_000);
    assert!(config(&format!("a = {deep}"), &[]).is_err());
    assert!(config("", &[("PILLARBOX_A__B", &deep)]).is_ok());
    let table = format!("a = {}", "{ a = ".repeat(10_000));
    assert!(config(&table, &[]).is_err());
    assert!(config("PILLARBOX", &[("PILLARBOX___", ""), ("PILLARBOX_", "")]).is_err());
}
