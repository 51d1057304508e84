use super::*;

const URL: &str = "nats://user:canary@nats.example:4223";

fn parsed(text: &str) -> Result<Config, toml::de::Error> {
    toml::from_str(text)
}

#[test]
fn a_whole_table_is_read_and_an_unknown_key_is_named() {
    let config = parsed(
        r#"
        url = "tls://one:4222,tls://two"
        credentials_file = "user.creds"
        cluster = "shop"
        ping_interval = "5s"
        connect_timeout = "1s"
        confirm_timeout = "1m"
        send_queue = 8
        prefetch = 50
        max_payload = 1000
        replicas = 3
        duplicate_window = "5m"
        declare = false
        tls = { ca_file = "ca.pem", certificate_file = "c.pem", key_file = "k.pem", first = true }
        [streams.inventory_events]
        topic = "inventory.events"
        subjects = ["inventory.>"]
        dead_letter = "inventory_dead"
        replicas = 1
        duplicate_window = "2m"
        max_age = "30d"
        max_bytes = 1000000
        "#,
    )
    .unwrap();
    config.validate().unwrap();
    assert_eq!(config.streams["inventory_events"].replicas, Some(1));
    for (text, expected) in [
        ("uri = \"\"", "unknown field `uri`"),
        ("streams.q = { topic = \"t\" }", "missing field `subjects`"),
        ("streams.q.subject = []", "unknown field `subject`"),
        ("tls.ca = \"x\"", "unknown field `ca`"),
    ] {
        let error = parsed(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn each_mistake_is_told_with_what_was_found() {
    let url = |url: &str| Config::new(url);
    let set = |change: &dyn Fn(&mut Config)| {
        let mut config = url(URL);
        change(&mut config);
        config
    };
    let streams = |all: &[(&str, &str, &[&str])]| {
        let mut config = url(URL);
        for (name, topic, subjects) in all {
            let stream = Stream::new(*topic, subjects.iter().copied());
            config.streams.insert((*name).into(), stream);
        }
        config
    };
    let stream = |change: &dyn Fn(&mut Stream)| {
        let mut config = streams(&[("s", "t", &["t.>"])]);
        config.streams.values_mut().for_each(change);
        config
    };
    let seconds = Duration::from_secs;
    let cases: Vec<(Config, &str)> = vec![
        (Config::default(), "neither url nor url_file"),
        (
            set(&|c| c.url_file = Some("f".into())),
            "both url and url_file",
        ),
        (
            set(&|c| c.nkey_file = Some("f".into())),
            "found a user in the url",
        ),
        (
            set(&|c| {
                c.nkey_file = Some("f".into());
                c.credentials_file = Some("f".into());
            }),
            "one of them at most",
        ),
        (
            set(&|c| c.ping_interval = Duration::ZERO),
            "ping_interval: found 0ns",
        ),
        (
            set(&|c| c.send_queue = 0),
            "send_queue: found 0, expected 1 to",
        ),
        (set(&|c| c.prefetch = 0), "prefetch: found 0"),
        (
            set(&|c| c.max_payload = 70_000_000),
            "max_payload: found 70000000",
        ),
        (
            set(&|c| c.replicas = 6),
            "replicas: found 6, expected 1 to 5",
        ),
        (set(&|c| c.cluster = Some("a b".into())), "cluster: "),
        (
            set(&|c| c.duplicate_window = seconds(29)),
            "duplicate_window: found 29s, expected 30s (confirm_timeout)",
        ),
        (set(&|c| c.tls.first = true), "expected tls://"),
        (
            Config {
                tls: Tls {
                    key_file: Some("k".into()),
                    ..Tls::default()
                },
                ..url("tls://h")
            },
            "one of certificate_file and key_file",
        ),
        (url("http://h"), "no such URL"),
        (url("h:4222"), "without a scheme"),
        (url("ws://h"), "a websocket"),
        (url("nats://user:canary@h:port"), "no such URL"),
        (url("nats://:canary@h"), "a password without a user"),
        (url("nats://u:canary@h/path"), "more than a host and a port"),
        (url("nats://u:12/canary@h"), "url: found"),
        (url("nats://u:canary%zz@h"), "hexadecimal"),
        (url("nats://a,tls://b"), "nats:// and tls:// together"),
        (
            streams(&[("a.b", "t", &["t.>"])]),
            "the name: found \"a.b\"",
        ),
        (streams(&[("s", "t", &[])]), "subjects: found none"),
        (streams(&[("s", "t", &["a b"])]), "subjects: found \"a b\""),
        (
            streams(&[("s", "t", &["a.>.b"])]),
            "subjects: found \"a.>.b\"",
        ),
        (
            streams(&[("r", "t", &["a.>"]), ("s", "t", &["b.>"])]),
            "streams \"r\" and \"s\" for topic \"t\"",
        ),
        (
            streams(&[("r", "t", &["a.>"]), ("s", "u", &["*.b"])]),
            "overlaps with \"a.>\" of stream \"r\"",
        ),
        (
            streams(&[("s", "t", &["a.>"]), ("s_dlq", "u", &["b.>"])]),
            "expected another name",
        ),
        (
            stream(&|s| s.replicas = Some(0)),
            "stream \"s\": replicas: found 0",
        ),
        (stream(&|s| s.max_bytes = Some(0)), "max_bytes: found 0"),
        (
            stream(&|s| s.max_age = Some(seconds(60))),
            "max_age: found 60s, expected 120s",
        ),
        (
            stream(&|s| s.duplicate_window = Some(seconds(1))),
            "duplicate_window: found 1s",
        ),
    ];
    for (config, expected) in cases {
        let error = config.validate().unwrap_err();
        assert_eq!(error.kind(), Kind::Configuration);
        let text = error.to_string();
        assert!(text.contains(expected), "{text:?} should say {expected:?}");
        assert!(!text.contains("canary"), "{text}");
    }
}

#[test]
fn no_secret_is_shown() {
    for url in [URL, "nats://canary@h", "nats://u:canary@h/path", "canary"] {
        let shown = format!("{:?}", Config::new(url));
        assert!(!shown.contains("canary"), "{shown}");
    }
    assert!(format!("{:?}", Config::new(URL)).contains("nats://***@nats.example:4223"));
}

#[test]
fn a_url_gives_servers_and_credentials_apart() {
    let address = Address::parse("tls://u:p%40%2F@b, tls://u@[::1]:7").unwrap();
    assert_eq!(address.cluster(), "[::1]:7,b:4222");
    assert!(address.is_tls() && !address.exposes_secrets());
    assert!(Address::parse(URL).unwrap().exposes_secrets());
    assert!(
        !Address::parse("nats://u:p@localhost")
            .unwrap()
            .exposes_secrets()
    );
    let Some(crate::address::User::Password(user, password)) = address.user else {
        panic!("no password")
    };
    assert_eq!((user.as_str(), password.expose_secret()), ("u", "p@/"));
}
