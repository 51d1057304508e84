//! Holding back, and going on.

use pillarbox_tests::{Tick, TickHandler, World, in_both_worlds, until};
use serde_json::{Value, json};

use crate::program::Config;

in_both_worlds!(a_pause_is_shown_obeyed_and_ended);

async fn a_pause_is_shown_obeyed_and_ended(world: World) {
    let config = Config::producer(&world);
    let target = ["--destination", "main"];
    for (arguments, code, says) in [
        (&["pause", "--why", "x"][..], 2, "--destination"),
        (
            &["pause", "--destination", "main", "--key", "k"],
            2,
            "--topic",
        ),
        (
            &["pause", "--destination", "main", "--for", "soon"],
            2,
            "--for",
        ),
        (
            &["pause", "--destination", "main", "--for", "30days"],
            1,
            "7 days",
        ),
        (&["pause", "--destination", "mian"], 1, "\"mian\""),
        (&["resume", "--destination", "main"], 1, "is not paused"),
    ] {
        config.run(arguments).await.refused(code, &[says]);
    }
    let pause = [
        "pause",
        "--why",
        "the broker is being moved",
        "--for",
        "30m",
        "--operator",
        "ada",
        "--json",
    ];
    let mut paused = config.run(&[&pause[..], &target].concat()).await.json(0);
    let status = config.run(&["status", "--json"]).await.json(0);
    assert_eq!(status["pauses"], json!([paused]));
    for time in ["since", "until"] {
        let text = paused[time].take();
        assert!(text.as_str().unwrap().ends_with('Z'), "{text}");
    }
    assert_eq!(
        paused,
        json!({ "side": "relay", "scope": "main", "topic": null, "key": null, "since": null, "until": null,
                "reason": "the broker is being moved", "operator": "ada" })
    );
    let text = config.run(&["status"]).await;
    assert!(
        text.out.contains("destination \"main\" is paused until"),
        "{text:?}"
    );

    let outbox = world.outbox();
    world.commit(&outbox, &[Tick::new("a", 1)]).await;
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    // Before its first look it sends nothing, after it it knows.
    until("the relay knows", async || {
        !way.relay.health().pauses.is_empty()
    })
    .await;
    let status = config.run(&["status", "--json"]).await.json(0);
    assert_eq!(status["pauses"].as_array().map(Vec::len), Some(1));
    assert_eq!(world.count_effects().await, 0);
    let resumed = config
        .run(&[&["resume", "--json"][..], &target].concat())
        .await
        .json(0);
    assert_eq!(resumed["reason"], "the broker is being moved");
    world.until_effects(1).await;
    way.stop().await;
    let status = config.run(&["status", "--json"]).await.json(0);
    assert_eq!(status["pauses"], Value::Array(Vec::new()));
}
