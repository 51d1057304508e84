//! The README's program, word by word, in a fresh package with default features.

use std::{path::Path, process::Stdio, time::Duration};

use futures_util::StreamExt;
use lapin::{
    Connection, ConnectionProperties,
    options::{BasicConsumeOptions, QueueDeclareOptions},
    types::FieldTable,
};
use pillarbox_testkit::servers;
use pillarbox_tests::until;
use tokio::process::Command;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The first block of a language.
fn block(readme: &str, language: &str) -> String {
    let begin = format!("```{language}\n");
    let rest = readme.split_once(&begin).expect("a block").1;
    rest.split_once("```").expect("its end").0.to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_screen_compiles_and_sends_its_event() {
    let Some(postgres) = servers::required(servers::postgres().await) else {
        return;
    };
    let Some(rabbitmq) = servers::required(servers::rabbitmq().await) else {
        return;
    };
    let database = postgres.create_database().await.expect("a database");
    let vhost = rabbitmq.create_vhost().await.expect("a vhost");

    let folder = tempfile::tempdir().expect("a folder");
    let package = folder.path();
    write_package(package);
    let built = cargo(package).arg("build").status().await.expect("cargo");
    assert!(built.success(), "the README's program does not compile");

    let mut program = cargo(package)
        .arg("run")
        .env("DATABASE_URL", database)
        .env("AMQP_URL", &vhost)
        .kill_on_drop(true)
        .spawn()
        .expect("the program");
    let (kind, body) = received(&vhost).await;
    assert_eq!(
        (kind.as_str(), body.as_str()),
        ("shop.order.placed", r#"{"order":7}"#)
    );
    interrupt(&program);
    let ended = tokio::time::timeout(Duration::from_secs(60), program.wait()).await;
    assert!(
        ended
            .expect("it ends after Ctrl-C")
            .expect("a status")
            .success()
    );
}

fn write_package(package: &Path) {
    let readme = std::fs::read_to_string(format!("{ROOT}/README.md")).expect("the README");
    let wanted = "pillarbox = \"0.1\"";
    let dependencies = block(&readme, "toml");
    assert!(
        dependencies.contains(wanted),
        "the README's dependencies name no pillarbox"
    );
    // Not published yet: the same line, from this checkout.
    let here = dependencies.replace(wanted, &format!("pillarbox = {{ path = {ROOT:?} }}"));
    let manifest = format!(
        "[package]\nname = \"fresh\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n{here}\n[workspace]\n\
         [profile.dev]\ndebug = \"line-tables-only\"\n"
    );
    std::fs::create_dir(package.join("src")).expect("a folder");
    std::fs::write(package.join("Cargo.toml"), manifest).expect("a manifest");
    std::fs::write(package.join("src/main.rs"), block(&readme, "rust")).expect("a program");
    std::fs::copy(format!("{ROOT}/Cargo.lock"), package.join("Cargo.lock")).expect("a lock file");
}

fn cargo(package: &Path) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    // Beside the workspace's own build, so that what both need is built once.
    let target = Path::new(env!("CARGO_BIN_EXE_pillarbox-test-node"))
        .ancestors()
        .nth(2)
        .expect("the target folder");
    cargo
        .current_dir(package)
        .env("CARGO_TARGET_DIR", target)
        .stdin(Stdio::null());
    cargo
}

/// The event, by an independent client that waits until the program has sent it.
async fn received(vhost: &str) -> (String, String) {
    let connection = Connection::connect(vhost, ConnectionProperties::default())
        .await
        .expect("a connection");
    // A quorum queue that is just being made refuses consumers; one that has the event is complete.
    until("the event is in the queue", || async {
        let channel = connection.create_channel().await.expect("a channel");
        let options = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        channel
            .queue_declare("billing".into(), options, FieldTable::default())
            .await
            .is_ok_and(|queue| queue.message_count() > 0)
    })
    .await;
    let channel = connection.create_channel().await.expect("a channel");
    let options = BasicConsumeOptions::default();
    let consumed = channel
        .basic_consume(
            "billing".into(),
            "test".into(),
            options,
            FieldTable::default(),
        )
        .await;
    let delivery = consumed
        .expect("a consumer")
        .next()
        .await
        .expect("an event")
        .expect("a delivery");
    let kind = delivery.routing_key.to_string();
    (kind, String::from_utf8(delivery.data).expect("a text"))
}

/// Ctrl-C. `cargo run` replaces itself by the program on Unix.
fn interrupt(program: &tokio::process::Child) {
    let pid = program
        .id()
        .and_then(|id| rustix::process::Pid::from_raw(id.cast_signed()))
        .expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a signal");
}
