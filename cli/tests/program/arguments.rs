//! What the program is told, and what it makes of what is wrong.

use std::process::Stdio;

use serde_json::Value;

use crate::program::{Config, bare, finish};

#[tokio::test]
async fn help_shows_examples_and_completions_know_the_commands() {
    for command in [
        &["--help"][..],
        &["migrate", "--help"],
        &["relay", "--help"],
        &["status", "--help"],
        &["pause", "--help"],
        &["resume", "--help"],
        &["replay", "--help"],
        &["destinations", "list", "--help"],
        &["destinations", "add", "--help"],
        &["destinations", "remove", "--help"],
        &["dead-letters", "list", "--help"],
        &["dead-letters", "show", "--help"],
        &["dead-letters", "retry", "--help"],
        &["dead-letters", "discard", "--help"],
        &["dead-letters", "export", "--help"],
        &["completions", "--help"],
    ] {
        let ran = finish(bare(command)).await;
        assert_eq!(ran.code, 0, "{command:?}");
        assert!(
            ran.out.contains("Examples:\n  pillarbox "),
            "{command:?}: {}",
            ran.out
        );
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = finish(bare(&["completions", shell])).await;
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{shell}");
        assert!(ran.out.contains("dead-letters"), "{shell}");
    }
    let version = finish(bare(&["--version"])).await;
    assert_eq!(
        version.out,
        format!("pillarbox {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[tokio::test]
async fn wrong_arguments_exit_with_2_and_say_what_was_expected() {
    let config = Config::sqlite();
    for (arguments, says) in [
        (
            &["migrate", "--partitions", "3"][..],
            "power of two from 1 to 64",
        ),
        (
            &["migrate", "--partitions", "0"],
            "power of two from 1 to 64",
        ),
        (
            &["migrate", "--partitions", "128"],
            "power of two from 1 to 64",
        ),
        (
            &["migrate", "--partitions", "many"],
            "power of two from 1 to 64",
        ),
        (&["migrate", "--compat", "kafka"], "debezium"),
        (&["migrate", "--compat-table", "a"], "--compat"),
        (
            &["migrate", "--compat", "debezium", "--compat-table", "a b"],
            "letters, digits",
        ),
        (
            &["migrate", "--compat", "debezium", "--compat-topic", "a..b"],
            "joined by '.'",
        ),
        (&["migrate", "--print", "--json"], "cannot be used with"),
        (&["status", "--max-lag", "soon"], "--max-lag"),
        (&["dead-letters", "list", "--limit", "0"], "1..=1000"),
        (
            &["dead-letters", "list", "--since", "yesterday"],
            "how long ago",
        ),
        (
            &["dead-letters", "list", "--group", "a", "--destination", "b"],
            "cannot be used with",
        ),
        (&["dead-letters", "retry", "--rate", "0"], "0.01 to 10000"),
        (&["dead-letters", "retyr"], "retry"),
        (&["migarte"], "migrate"),
    ] {
        config.run(arguments).await.refused(2, &[says]);
    }
    finish(bare(&["completions", "tcsh"]))
        .await
        .refused(2, &["bash"]);
    finish(bare(&[])).await.refused(2, &["Usage"]);
    finish(bare(&["status"])).await.refused(2, &["--config"]);
}

#[tokio::test]
async fn a_wrong_configuration_exits_with_2_and_says_where() {
    let missing = bare(&["status", "--config", "/nowhere/shop.toml"]);
    finish(missing).await.refused(2, &["/nowhere/shop.toml"]);
    for (toml, says) in [
        ("[stroe]\nurl = 'sqlite://a.db'", "did you mean [store]?"),
        ("[store]\nurl = 'sqlite://a.db'\nshcema = 'a'", "line 3"),
        ("[store]", "neither url nor url_file"),
        ("[store]\nurl = 'mysql://a'", "postgres://"),
        (
            "[store]\nurl = 'postgres://a/b'\nschema = 'A'",
            "lower-case letter",
        ),
    ] {
        Config::new(toml).run(&["status"]).await.refused(2, &[says]);
    }
    let config = Config::new("[orders.store]\nurl = 'sqlite://a.db'");
    let ran = config.run(&["status", "--at", "order"]).await;
    ran.refused(2, &["did you mean [orders]?"]);
}

#[tokio::test]
async fn an_error_for_machines_is_json_too_and_shows_no_secret() {
    // Nobody listens on port 1.
    let config = Config::new(
        "[store]\nurl = 'postgres://shop:hunter2@127.0.0.1:1/shop'\nconnect_timeout = '2s'\n",
    );
    let ran = config.run(&["status", "--json"]).await;
    ran.refused(1, &["127.0.0.1:1"]);
    assert!(!ran.err.contains("hunter2"), "{ran:?}");
    assert_eq!(ran.out, "");
    let error: Value = serde_json::from_str(ran.err.lines().last().unwrap()).unwrap();
    assert_eq!(error["error"]["kind"], "unavailable");
    assert!(error["error"]["advice"].is_string());
    let wrong = Config::new("[store]\nurl = 'postgres://shop:hunter2@127.0.0.1:1/shop?sslmode=no'");
    let ran = wrong.run(&["migrate"]).await;
    ran.refused(2, &["sslmode"]);
    assert!(!ran.err.contains("hunter2"), "{ran:?}");
}

#[tokio::test]
async fn a_reader_who_has_gone_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = bare(&["completions", "bash"]);
    command.stdout(Stdio::from(writer));
    let ran = finish(command).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));

    let config = Config::sqlite();
    assert_eq!(config.run(&["migrate"]).await.code, 0);
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["dead-letters", "list"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = config.command(arguments);
        command.stdout(Stdio::from(writer));
        let ran = finish(command).await;
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{arguments:?}");
    }
}
