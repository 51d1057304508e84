//! How everything stands, as any process can tell.

use pillarbox_tests::{Tick, TickHandler, World, in_both_worlds, until};
use serde_json::{Value, json};

use crate::{migrate::version, program::Config};

in_both_worlds!(anybody_sees_owners_lag_and_groups, an_idle_database_is_well);

async fn an_idle_database_is_well(world: World) {
    let config = Config::producer(&world);
    let status = config
        .run(&["status", "--json", "--max-lag", "1ms"])
        .await
        .json(0);
    let partitions = if world.amqp_url.is_some() { 4 } else { 1 };
    assert_eq!(
        status["schema"],
        json!({ "name": "pillarbox", "version": version(), "partitions": partitions })
    );
    let [main] = &status["destinations"].as_array().unwrap()[..] else {
        panic!("{status}")
    };
    assert_eq!(main["name"], "main");
    assert_eq!(main["lag_seconds"], 0.0);
    assert_eq!(main["partitions"].as_array().unwrap().len(), partitions);
    assert_eq!(
        main["partitions"][0],
        json!({ "partition": 0, "owner": null, "epoch": 0, "settled": 0, "lag_seconds": 0.0, "behind": 0 })
    );
    assert_eq!(
        main["exceptions"],
        json!({ "deferred": 0, "parked": 0, "longest_line": 0, "scheduled": 0, "dead_letters": 0 })
    );
    for none in ["groups", "duties", "pauses", "findings"] {
        assert_eq!(status[none], json!([]), "{status}");
    }
    let seen = status["seen"].as_str().unwrap();
    assert!(seen.starts_with("20") && seen.ends_with('Z'), "{seen}");
    let text = config.run(&["status"]).await;
    assert!(
        text.out
            .contains("destination main: lag 0s, 0 dead letters"),
        "{text:?}"
    );
}

async fn anybody_sees_owners_lag_and_groups(world: World) {
    let (producer, consumer) = (Config::producer(&world), Config::of(&world.urls.1));
    let outbox = world.outbox();
    world
        .commit(&outbox, &[Tick::new("a", 1), Tick::new("a", 2)])
        .await;
    // Waits for its age, which is the answer.
    until("the oldest event is 50 ms old", async || {
        outbox.backlog().await.unwrap().age.as_millis() >= 50
    })
    .await;
    let late = producer
        .run(&["status", "--json", "--max-lag", "50ms"])
        .await;
    late.refused(1, &["destination main", "50ms"]);
    let status: Value = late.json(1);
    assert_eq!(status["findings"].as_array().unwrap().len(), 1);
    assert!(status["destinations"][0]["lag_seconds"].as_f64().unwrap() >= 0.05);
    let behind = |status: &Value| {
        let all = status["destinations"][0]["partitions"].as_array().unwrap();
        all.iter()
            .map(|p| p["behind"].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(behind(&status), 2);

    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    world.until_effects(2).await;
    until("the cursor has passed", async || {
        outbox.backlog().await.unwrap().events == 0
    })
    .await;
    let status = producer
        .run(&["status", "--json", "--max-lag", "1h"])
        .await
        .json(0);
    assert_eq!(behind(&status), 0);
    for partition in status["destinations"][0]["partitions"].as_array().unwrap() {
        assert_eq!(
            partition["owner"]["id"].as_str().unwrap().len(),
            36,
            "{partition}"
        );
        assert!(partition["owner"]["expires_in_seconds"].as_f64().unwrap() > 0.0);
        assert_eq!(partition["epoch"], 1);
    }
    let status = consumer.run(&["status", "--json"]).await.json(0);
    let [group] = &status["groups"].as_array().unwrap()[..] else {
        panic!("{status}")
    };
    assert_eq!(group["name"], world.group.as_str());
    let source = &group["sources"][0];
    assert_eq!(source["transport"], world.transport.kind());
    assert!(
        source["name"].as_str().unwrap().starts_with("test.events"),
        "{source}"
    );
    assert!(source["owner"]["id"].is_string(), "{source}");
    let duties = status["duties"].as_array().unwrap();
    assert!(
        duties
            .iter()
            .any(|d| d["kind"] == "pump" && d["scope"] == world.group.as_str()),
        "{status}"
    );
    let text = consumer.run(&["status"]).await;
    assert!(
        text.out.contains(&format!("group {}", world.group)),
        "{text:?}"
    );

    // Handed over: nobody's.
    way.stop().await;
    let status = producer.run(&["status", "--json"]).await.json(0);
    assert_eq!(
        status["destinations"][0]["partitions"][0]["owner"],
        Value::Null
    );
}
