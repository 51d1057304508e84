use super::*;

const URL: &str = "amqp://user:canary@rabbit.example:5673/shop";

fn parsed(text: &str) -> Result<Config, toml::de::Error> {
    toml::from_str(text)
}

#[test]
fn a_whole_table_is_read_and_an_unknown_key_is_named() {
    let config = parsed(
        r#"
        url = "amqps://localhost/shop"
        heartbeat = "5s"
        connect_timeout = "1s"
        confirm_timeout = "1m"
        channels = 2
        prefetch = 50
        max_payload = 1000
        queue_type = "classic"
        declare = false
        tls = { ca_file = "ca.pem", certificate_file = "c.pem", key_file = "k.pem" }
        [queues."inventory.events.queue"]
        topic = "inventory.events"
        group = "orders"
        types = ["inventory.stock.*"]
        dead_letter = "inventory.events.dlq"
        queue_type = "quorum"
        prefetch = 10
        "#,
    )
    .unwrap();
    config.validate().unwrap();
    assert_eq!(config.heartbeat, Duration::from_secs(5));
    assert_eq!(config.queues["inventory.events.queue"].prefetch, Some(10));
    for (text, expected) in [
        ("uri = \"\"", "unknown field `uri`"),
        (
            "queues.q = { topic = \"t\", group = \"g\" }",
            "missing field `types`",
        ),
        ("queues.q.tipes = []", "unknown field `tipes`"),
        ("tls.ca = \"x\"", "unknown field `ca`"),
        ("queue_type = \"stream\"", "unknown variant `stream`"),
    ] {
        let error = parsed(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn each_mistake_is_told_with_what_was_found() {
    let good = || Config::new(URL);
    let queue = || Queue::new("t", "g", ["t.a"]);
    let with = |name: &str, queue: Queue| {
        let mut config = good();
        config.queues.insert(name.into(), queue);
        config
    };
    let zero = Duration::ZERO;
    let url = |url: &str| Config::new(url);
    let mut twice = with("q", queue());
    twice.queues.insert("p".into(), queue());
    let mut own = with(
        "q",
        Queue {
            dead_letter: Some("p".into()),
            ..queue()
        },
    );
    own.queues.insert("p".into(), Queue::new("t", "h", ["t.a"]));
    let tls = |tls: Tls| Config {
        tls,
        ..url("amqps://h")
    };
    let cases: Vec<(Config, &str)> = vec![
        (Config::default(), "neither url nor url_file"),
        (
            Config {
                url_file: Some("f".into()),
                ..good()
            },
            "both url and url_file",
        ),
        (
            Config {
                heartbeat: zero,
                ..good()
            },
            "heartbeat: found 0s",
        ),
        (
            Config {
                heartbeat: Duration::from_millis(500),
                ..good()
            },
            "found 500ms",
        ),
        (
            Config {
                connect_timeout: zero,
                ..good()
            },
            "connect_timeout: found 0s",
        ),
        (
            Config {
                confirm_timeout: zero,
                ..good()
            },
            "confirm_timeout: found 0s",
        ),
        (
            Config {
                channels: 0,
                ..good()
            },
            "channels: found 0, expected 1 to 64",
        ),
        (
            Config {
                prefetch: 0,
                ..good()
            },
            "prefetch: found 0",
        ),
        (
            Config {
                max_payload: 0,
                ..good()
            },
            "max_payload: found 0",
        ),
        (url("http://h"), "no such URL"),
        (url("amqp://user:canary@h:port"), "no such URL"),
        (url("amqp://:5672/x"), "found"),
        (url("amqp://h/"), "a vhost without a name"),
        (
            url(&format!("amqp://h/{}", "v".repeat(256))),
            "a vhost of 256 bytes",
        ),
        (url("amqp://h?heartbeat=1"), "the parameter \"heartbeat\""),
        (url("amqp://u:12/canary@h/v"), "percent-encoded"),
        (
            Config {
                tls: Tls {
                    ca_file: Some("c".into()),
                    ..Tls::default()
                },
                ..good()
            },
            "expected amqps://",
        ),
        (
            tls(Tls {
                key_file: Some("k".into()),
                ..Tls::default()
            }),
            "expected both or none",
        ),
        (
            tls(Tls {
                pkcs12_password_file: Some("k".into()),
                ..Tls::default()
            }),
            "expected pkcs12_file",
        ),
        (
            with(
                "q",
                Queue {
                    types: vec![],
                    ..queue()
                },
            ),
            "queue \"q\": types: found none",
        ),
        (
            with(&"q".repeat(201), queue()),
            "of 201 bytes, expected 1 to 200",
        ),
        (with("amq.q", queue()), "the prefix \"amq.\""),
        (
            with(
                "q",
                Queue {
                    topic: String::new(),
                    ..queue()
                },
            ),
            "topic: found \"\"",
        ),
        (
            with(
                "q",
                Queue {
                    group: "a\nb".into(),
                    ..queue()
                },
            ),
            "group: found \"a\\nb\"",
        ),
        (
            with(
                "q",
                Queue {
                    types: vec!["t".repeat(201)],
                    ..queue()
                },
            ),
            "types: found",
        ),
        (
            with(
                "q",
                Queue {
                    dead_letter: Some("q".into()),
                    ..queue()
                },
            ),
            "itself a configured queue",
        ),
        (
            with(
                "q",
                Queue {
                    prefetch: Some(0),
                    ..queue()
                },
            ),
            "prefetch: found 0",
        ),
        (own, "itself a configured queue"),
        (
            twice,
            "the queues \"p\" and \"q\" for topic \"t\" and group \"g\"",
        ),
    ];
    for (config, expected) in cases {
        let error = config.validate().unwrap_err();
        assert_eq!(error.kind(), Kind::Configuration);
        let text = error.to_string();
        assert!(text.contains(expected), "{text:?} should say {expected:?}");
        assert!(
            text.contains("expected"),
            "{text:?} should say what was expected"
        );
        assert!(!text.contains("canary"), "{text}");
    }
}

#[test]
fn no_debug_shows_a_password_or_a_user() {
    let config = Config::new(URL);
    let shown = format!("{config:?}");
    assert!(
        shown.contains("amqp://***@rabbit.example:5673/shop"),
        "{shown}"
    );
    assert!(
        !shown.contains("canary") && !shown.contains("user"),
        "{shown}"
    );
    let amqp = crate::Amqp::new(config.clone()).unwrap();
    assert!(!format!("{amqp:?}").contains("canary"));
    let endpoint = config.endpoint(URL).unwrap();
    assert_eq!(format!("{endpoint:?}"), "rabbit.example:5673/shop");
    let broken = format!("{:?}", Config::new("amqp:canary"));
    assert!(!broken.contains("canary"), "{broken}");
}

#[test]
fn hosts_of_every_form_are_read() {
    let config = Config::new(URL);
    for (url, cluster, exposes) in [
        ("amqp://h", "h:5672//", true),
        ("amqps://h", "h:5671//", false),
        ("amqp://127.0.0.1:1/%2f", "127.0.0.1:1//", false),
        ("amqp://u:p@[::1]:7/v", "[::1]:7/v", false),
        ("amqp://[2001:db8::1]/v", "[2001:db8::1]:5672/v", true),
        ("amqp://localhost/a%2Fb", "localhost:5672/a/b", false),
    ] {
        let endpoint = config.endpoint(url).unwrap();
        assert_eq!(endpoint.cluster(), cluster, "{url}");
        assert_eq!(endpoint.exposes_password(), exposes, "{url}");
        assert_eq!(endpoint.0.query.heartbeat, Some(10));
    }
}
