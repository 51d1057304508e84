//! Several destinations, and events that are sent once more.

use pillarbox_tests::{World, in_both_worlds, tables, until, wire::Client};
use serde_json::{Value, json};

use crate::{
    program::{Config, psql},
    relay::{Relay, config, tap},
};
use rustix::process::Signal;

in_both_worlds!(destinations_are_added_listed_and_removed);

async fn destinations_are_added_listed_and_removed(world: World) {
    let config = Config::producer(&world);
    let add = ["destinations", "add", "audit", "--start", "now", "--json"];
    let added = |is_new| json!({ "name": "audit", "start": "now", "added": is_new });
    assert_eq!(config.run(&add).await.json(0), added(true));
    assert_eq!(config.run(&add).await.json(0), added(false));
    let other = ["destinations", "add", "audit"];
    config.run(&other).await.refused(1, &["is there already"]);
    config
        .run(&["destinations", "add", "a b"])
        .await
        .refused(1, &["letters, digits"]);
    let wrong = ["destinations", "add", "x", "--start", "soon"];
    config.run(&wrong).await.refused(2, &["earliest"]);
    let list = config
        .run(&["destinations", "list", "--json"])
        .await
        .json(0);
    let names: Vec<&str> = list["destinations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| d["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["audit", "main"]);
    assert_eq!(
        (&list["destinations"][0]["served"], &list["removed"]),
        (&json!(false), &json!([]))
    );
    let status = config.run(&["status", "--json"]).await.json(0);
    assert_eq!(status["destinations"][0]["name"], "audit");

    config
        .run(&["destinations", "remove", "none", "--yes"])
        .await
        .refused(2, &["audit, main"]);
    config
        .run(&["destinations", "remove", "audit"])
        .await
        .refused(2, &["--yes"]);
    let removed = config
        .run(&["destinations", "remove", "audit", "--yes", "--json"])
        .await
        .json(0);
    assert_eq!(
        (&removed["name"], &removed["unpublished"]),
        (&json!("audit"), &json!(0))
    );
    let last = config
        .run(&["destinations", "remove", "main", "--yes"])
        .await;
    last.refused(1, &["main"]);
    let list = config
        .run(&["destinations", "list", "--json"])
        .await
        .json(0);
    assert_eq!(list["removed"], json!([removed]));
}

#[tokio::test]
async fn a_replay_sends_what_is_named_once_more() {
    let Some(world) = World::servers().await else {
        return;
    };
    let amqp = world.amqp_url.as_deref().unwrap();
    let config = config(&world.urls.0, amqp);
    let client: Client = tap(amqp).await;
    let mut relay = Relay::start(&config, &[]);
    relay.says("relay owns a partition").await;
    let script = "SELECT pillarbox.enqueue('test.events', 'test.known.a', '{\"n\": 1}', key => 'k'); \
                  SELECT pillarbox.enqueue('test.events', 'test.known.b', '{\"n\": 2}', key => 'k')";
    assert_eq!(psql(&world.urls.0, script).await.code, 0);
    let outbox = world.outbox();
    until("all are settled", async || {
        outbox.backlog().await.unwrap().events == 0
    })
    .await;
    relay.signal(Signal::TERM);
    assert_eq!(relay.ended().await.0, 0);
    assert_eq!(client.take("tap").await.len(), 2);

    for (arguments, code, says) in [
        (&["replay", "r", "--destination", "mian"][..], 1, "mian"),
        (&["replay", "r", "--type", "test.none"], 1, "names no event"),
        (&["replay", "r", "--since", "yesterday"], 2, "how long ago"),
        (
            &["replay", "r", "--from", "9", "--to", "1"],
            1,
            "`to` lies before",
        ),
        (&["replay", "r", "--cancel"], 1, "there is no replay"),
    ] {
        config.run(arguments).await.refused(code, &[says]);
    }
    let replay = [
        "replay",
        "again",
        "--type",
        "test.known.b",
        "--rate",
        "1000",
        "--json",
    ];
    let plan = config
        .run(&[&replay[..], &["--dry-run"]].concat())
        .await
        .json(0);
    assert_eq!(
        (&plan["dry_run"], &plan["events"]),
        (&json!(true), &json!(1))
    );
    let sent: Value = config.run(&replay).await.json(0);
    assert_eq!(
        sent,
        json!({ "name": "again", "ended": "complete", "events": 1, "sent": 1, "deferred": 0, "dead_letters": 0 })
    );
    let again = client.take("tap").await;
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].attribute("pillarboxreplayed"), Some("again"));
    assert_eq!(tables::dead_letters(&world.producer).await.len(), 0);
}
