//! What operators do with dead letters, by the program.

use pillarbox::{
    Database,
    failure::{DeadLetter, RETRIED},
    lease::{LeaseKey, LeaseTerm},
    transport::Message,
};
use pillarbox_tests::{World, in_both_worlds, tables};
use serde_json::{Value, json};

use crate::program::{Config, Ran};

in_both_worlds!(
    letters_are_listed_and_shown,
    what_is_not_there_is_said,
    one_letter_is_retried_or_discarded_by_its_id,
    many_need_a_yes_and_go_in_order,
    letters_are_exported_whole,
);

const IDS: [&str; 4] = [
    "0198c0de-0000-7000-8000-000000000001",
    "0198c0de-0000-7000-8000-000000000002",
    "0198c0de-0000-7000-8000-000000000003",
    "0198c0de-0000-7000-8000-000000000004",
];

/// Three of key a and one of key b, the last one with a payload that is no text.
async fn given_up(world: &World) -> Config {
    let event = |n: usize, key: &str, kind: &str, payload: &'static [u8]| {
        let mut message = Message::new(IDS[n], "test.events", kind, payload).with_key(key);
        message = message
            .with_attribute("source", "shop")
            .with_header("tenant", "t1");
        message
    };
    give_up(
        &world.producer,
        &[
            event(0, "a", "test.one", b"{\"n\":1}"),
            event(1, "a", "test.two", b"{\"n\":2}"),
            event(2, "a\x1b[2J", "test.two", b"{\"n\":3}"),
            event(3, "b", "test.two", &[0xff, 0x00]),
        ],
    )
    .await;
    Config::producer(world)
}

async fn give_up(database: &Database, messages: &[Message]) {
    let key = LeaseKey::Relay {
        destination: "main".to_owned(),
        partition: 0,
    };
    let store = database.store();
    let lease = store
        .acquire(&key, LeaseTerm::default())
        .await
        .unwrap()
        .unwrap()
        .lease;
    let letters: Vec<DeadLetter> = messages
        .iter()
        .zip(1..)
        .map(|(message, position)| DeadLetter {
            message: message.clone(),
            position,
            attempts: 4,
            reason: format!("no queue wants {}", message.kind),
            maybe_sent: position == 2,
        })
        .collect();
    store.bury(&lease, &letters).await.unwrap();
    store.release(&lease).await.unwrap();
}

fn ids(answer: &Value) -> Vec<&str> {
    let letters = answer["letters"].as_array().unwrap();
    letters.iter().map(|l| l["id"].as_str().unwrap()).collect()
}

async fn letters(config: &Config, more: &[&str]) -> Ran {
    config.run(&[&["dead-letters"][..], more].concat()).await
}

async fn letters_are_listed_and_shown(world: World) {
    let config = given_up(&world).await;
    let all = letters(&config, &["list", "--json"]).await.json(0);
    assert_eq!(ids(&all), [IDS[3], IDS[2], IDS[1], IDS[0]]);
    assert_eq!(all["next"], Value::Null);
    let mut first = all["letters"][3].clone();
    for time in ["time", "first_failure", "last_failure"] {
        let text = first[time].take();
        assert!(text.as_str().unwrap().ends_with('Z'), "{text}");
    }
    let number = first["number"].take();
    let expected = json!({
        "number": null, "side": "relay", "scope": "main", "source": "shop", "id": IDS[0], "topic": "test.events",
        "type": "test.one", "key": "a", "time": null, "position": 1, "attempts": 4, "reason": "no queue wants test.one",
        "first_failure": null, "last_failure": null, "maybe_sent": false, "retried": 0, "unreadable": false,
    });
    assert_eq!(first, expected);

    for (filter, expected) in [
        (&["--type", "test.one"][..], &IDS[..1]),
        (&["--key", "b", "--topic", "test.events"], &IDS[3..]),
        (&["--reason", "test.one"], &IDS[..1]),
        (
            &["--destination", "main", "--oldest", "--limit", "2"],
            &IDS[..2],
        ),
        (&["--since", "2020-01-01T00:00:00Z", "--before", "1h"], &[]),
        (&["--parked"], &[]),
        (&["--topic", "elsewhere"], &[]),
    ] {
        let found = letters(&config, &[&["list", "--json"], filter].concat())
            .await
            .json(0);
        assert_eq!(ids(&found), expected, "{filter:?}");
    }
    let page = letters(&config, &["list", "--json", "--oldest", "--limit", "1"])
        .await
        .json(0);
    assert_eq!(page["next"], number);
    let after = number.to_string();
    let next = letters(&config, &["list", "--json", "--oldest", "--after", &after])
        .await
        .json(0);
    assert_eq!(ids(&next), IDS[1..]);

    let text = letters(&config, &["list"]).await;
    assert_eq!(text.out.lines().count(), 5, "{text:?}");
    assert!(
        !text.out.contains('\x1b'),
        "a key commands no terminal: {text:?}"
    );
    let shown = letters(&config, &["show", IDS[1], "--json"]).await.json(0);
    assert_eq!(shown["payload"], "{\"n\":2}");
    assert_eq!(shown["payload_base64"], Value::Null);
    assert_eq!(shown["headers"], json!({ "tenant": "t1" }));
    assert_eq!(shown["attributes"]["source"], "shop");
    assert_eq!(shown["maybe_sent"], true);
    let bytes = letters(&config, &["show", IDS[3], "--json"]).await.json(0);
    assert_eq!(
        (&bytes["payload"], &bytes["payload_base64"]),
        (&Value::Null, &json!("/wA="))
    );
    let text = letters(&config, &["show", IDS[2]]).await;
    assert!(
        text.out.contains("{\"n\":3}") && !text.out.contains('\x1b'),
        "{text:?}"
    );
}

async fn what_is_not_there_is_said(world: World) {
    let config = given_up(&world).await;
    for command in ["show", "retry", "discard"] {
        let ran = letters(&config, &[command, "0198c0de-0000-7000-8000-00000000ffff"]).await;
        ran.refused(1, &["there is no dead letter of the event"]);
        assert_eq!(ran.out, "");
    }
    for command in ["list", "export", "retry", "discard"] {
        let ran = letters(&config, &[command, "--destination", "mian"]).await;
        ran.refused(2, &["there is no destination \"mian\"", "main"]);
        let ran = letters(&config, &[command, "--group", "billing"]).await;
        ran.refused(2, &["there is no group \"billing\""]);
    }
    for command in ["retry", "discard"] {
        let ran = letters(
            &config,
            &[command, "--destination", "main", "--type", "none", "--yes"],
        )
        .await;
        ran.refused(1, &["no dead letter matches"]);
        letters(&config, &[command])
            .await
            .refused(2, &["--destination or --group"]);
        letters(&config, &[command, "--key", "a", "--yes"])
            .await
            .refused(2, &["--destination or --group"]);
    }
    assert_eq!(tables::dead_letters(&world.producer).await.len(), 4);
}

async fn one_letter_is_retried_or_discarded_by_its_id(world: World) {
    let config = given_up(&world).await;
    let dry = letters(&config, &["retry", IDS[1], "--dry-run", "--json"])
        .await
        .json(0);
    assert_eq!(
        dry,
        json!({ "dry_run": true, "letters": 1, "keys": 1, "keyless": 0, "maybe_sent": 1, "newer": 0, "parked": 0 })
    );
    assert_eq!(tables::dead_letters(&world.producer).await.len(), 4);
    let retried = letters(&config, &["retry", IDS[1], "--why", "a test", "--json"])
        .await
        .json(0);
    assert_eq!(
        retried,
        json!({ "retried": 1, "unreadable": 0, "ended": "complete" })
    );
    assert_eq!(tables::deferred(&world.producer).await, 1);
    // It waits now, and is no dead letter.
    letters(&config, &["retry", IDS[1]])
        .await
        .refused(1, &["there is no dead letter"]);
    let discarded = letters(&config, &["discard", IDS[0], "--json"])
        .await
        .json(0);
    assert_eq!(
        discarded,
        json!({ "discarded": 1, "unreadable": 0, "ended": "complete" })
    );
    assert_eq!(tables::dead_letters(&world.producer).await.len(), 2);
}

async fn many_need_a_yes_and_go_in_order(world: World) {
    let config = given_up(&world).await;
    let retry = [
        "retry",
        "--destination",
        "main",
        "--topic",
        "test.events",
        "--key",
        "a",
    ];
    let ran = letters(&config, &retry).await;
    ran.refused(2, &["would retry 2 dead letters of 1 keys", "--yes"]);
    // Somebody at a terminal, who says no, and then yes.
    let (code, _) = at_a_terminal(&config, &retry, "n\n").await;
    assert_eq!(code, 1);
    let dry = letters(&config, &[&retry[..], &["--dry-run", "--json"]].concat())
        .await
        .json(0);
    assert_eq!(
        (&dry["letters"], &dry["maybe_sent"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(tables::dead_letters(&world.producer).await.len(), 4);
    let (code, said) = at_a_terminal(&config, &retry, "y\n").await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("Go on? [y/N]") && said.contains("retried 2 dead letters"),
        "{said}"
    );
    let line = tables::query(
        &world.producer,
        "SELECT id, CAST(attributes AS TEXT) FROM {t}deferred ORDER BY position",
    )
    .await;
    let waiting: Vec<&str> = line.iter().map(|row| row[0].as_deref().unwrap()).collect();
    assert_eq!(waiting, IDS[..2]);
    assert!(
        line.iter()
            .all(|row| row[1].as_deref().unwrap().contains(RETRIED))
    );

    let most = [
        "discard",
        "--destination",
        "main",
        "--most",
        "1",
        "--rate",
        "1000",
        "--yes",
        "--json",
    ];
    let discarded = letters(&config, &most).await.json(0);
    assert_eq!(
        discarded,
        json!({ "discarded": 1, "unreadable": 0, "ended": "most" })
    );
    let full = [
        "retry",
        "--destination",
        "main",
        "--waiting",
        "2",
        "--yes",
        "--json",
    ];
    let ran = letters(&config, &full).await;
    assert_eq!(
        ran.json(1),
        json!({ "retried": 0, "unreadable": 0, "ended": "waiting" })
    );
    ran.refused(1, &["too many wait"]);
    assert_eq!(tables::dead_letters(&world.producer).await.len(), 1);
}

async fn letters_are_exported_whole(world: World) {
    let config = given_up(&world).await;
    let ran = letters(&config, &["export", "--destination", "main"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines: Vec<Value> = ran
        .out
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let exported: Vec<&str> = lines.iter().map(|l| l["id"].as_str().unwrap()).collect();
    assert_eq!(exported, IDS);
    assert_eq!(lines[0]["payload"], "{\"n\":1}");
    assert_eq!(lines[3]["payload_base64"], "/wA=");
    let shown = letters(&config, &["show", IDS[3], "--json"]).await.json(0);
    assert_eq!(lines[3], shown);
    assert_eq!(letters(&config, &["export", "--parked"]).await.out, "");
}

/// Through a pseudo-terminal, which `script` of Debian's essential packages makes. What it printed, both streams in one.
async fn at_a_terminal(config: &Config, arguments: &[&str], types: &str) -> (i32, String) {
    use tokio::io::AsyncWriteExt as _;
    let program = config.command(&[&["dead-letters"][..], arguments].concat());
    let program = program.as_std();
    let quoted = program
        .get_args()
        .map(|a| format!("'{}'", a.to_string_lossy()));
    let line = format!(
        "{} {}",
        program.get_program().to_string_lossy(),
        quoted.collect::<Vec<_>>().join(" ")
    );
    let mut command = tokio::process::Command::new("script");
    command
        .args(["-q", "-e", "-c", &line, "/dev/null"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().expect("script");
    let mut input = child.stdin.take().unwrap();
    input.write_all(types.as_bytes()).await.unwrap();
    // Held open: its end would end the terminal.
    let ran = crate::program::ended(child).await;
    drop(input);
    (ran.code, ran.out)
}

/// The event of one id may have been given up at both ends.
#[tokio::test]
async fn an_id_that_is_in_two_places_is_asked_about() {
    let world = World::embedded().await;
    let config = given_up(&world).await;
    tables::query(
        &world.producer,
        "INSERT INTO {t}dead_letter (side, scope, source, id, shard, position, topic, type, key, payload, headers, attributes, time, \
           attempts, reason, first_failure, last_failure, maybe_sent) \
         SELECT 'consumer', 'billing', source, id, 0, 0, topic, type, key, payload, headers, attributes, time, 1, 'no such account', \
           first_failure, last_failure, 0 FROM {t}dead_letter WHERE type = 'test.one'",
    )
    .await;
    letters(&config, &["show", IDS[0]])
        .await
        .refused(2, &["relay main", "consumer billing", "--group"]);
    let shown = letters(&config, &["show", IDS[0], "--group", "billing", "--json"])
        .await
        .json(0);
    assert_eq!(shown["reason"], "no such account");
    let status = config.run(&["status", "--json"]).await.json(0);
    assert_eq!(status["groups"][0]["exceptions"]["dead_letters"], 1);
}
