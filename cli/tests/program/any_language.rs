//! The snippets of docs/guide/any-language.md, word by word, as a role with no more rights than the page grants.

use std::{io::Write as _, path::Path, process::Stdio, time::Duration};

use pillarbox_tests::is_soak;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tempfile::TempDir;
use tokio::process::Command;

use crate::{
    migrate::database,
    program::{Config, Ran, ended_within, psql},
};

const PAGE: &str = include_str!("../../../docs/guide/any-language.md");

/// The blocks of the page whose first line says that they are run as this.
fn snippets(language: &str, marker: &str) -> Vec<&'static str> {
    let begin = format!("```{language}\n");
    let blocks = PAGE.split(begin.as_str()).skip(1);
    let blocks = blocks.map(|rest| rest.split("```").next().unwrap());
    blocks
        .filter(|block| {
            block
                .lines()
                .next()
                .is_some_and(|line| line.ends_with(marker))
        })
        .collect()
}

/// A database with the page's table, and the address of a writer with the page's rights.
async fn prepared() -> Option<(String, String)> {
    let url = database().await?;
    let config = Config::of(&url);
    assert_eq!(config.run(&["migrate"]).await.code, 0);
    let role = format!("shop_{}", uuid::Uuid::now_v7().simple());
    let grants = snippets("sql", "run: grants")
        .concat()
        .replace("TO shop", &format!("TO {role}"));
    assert!(grants.contains("GRANT INSERT"));
    let script = format!(
        "CREATE TABLE stock (product text PRIMARY KEY, quantity int); INSERT INTO stock VALUES ('sku-1', 100); \
         CREATE ROLE {role} LOGIN PASSWORD 'w'; GRANT SELECT, UPDATE ON stock TO {role}; {grants}"
    );
    let ran = psql(&url, &script).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let (_, rest) = url.split_once('@').unwrap();
    Some((url.clone(), format!("postgres://{role}:w@{rest}")))
}

async fn rows(url: &str, sql: &str) -> Vec<String> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let rows = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
    rows.fetch_all(&mut connection).await.unwrap()
}

const LOG: &str = "SELECT concat_ws(' ', topic, type, key, encode(payload, 'escape'), content_type, headers, attributes) \
     FROM pillarbox.outbox ORDER BY position";

#[tokio::test]
async fn psql_runs_the_pages_snippets() {
    let Some((url, writer)) = prepared().await else {
        return;
    };
    let snippets = snippets("sql", "run: psql");
    assert_eq!(snippets.len(), 3);
    for snippet in &snippets {
        let ran = psql(&writer, snippet).await;
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{snippet}");
        // The same, rolled back.
        let undone = psql(&writer, &snippet.replace("COMMIT;", "ROLLBACK;")).await;
        assert_eq!(undone.code, 0, "{undone:?}");
    }
    assert_eq!(
        rows(&url, LOG).await,
        [
            "inventory.events inventory.stock.depleted sku-1 {\"productId\": \"sku-1\"} application/json",
            "inventory.events inventory.label.printed sku-1 %PDF- application/pdf {\"tenant\": \"t1\"} {\"correlationid\": \"c-7\"}",
            "inventory.events inventory.stock.counted sku-1 {\"n\":1} application/json",
            "inventory.events inventory.stock.counted sku-2 {\"n\":2} application/json",
        ]
    );
    // Nothing of others can be read, and nothing of the engine's be set.
    for statement in [
        "SELECT count(*) FROM pillarbox.outbox",
        "INSERT INTO pillarbox.outbox (topic, type, xact_id) VALUES ('t', 'a', '1')",
        "INSERT INTO pillarbox.outbox (topic, type) VALUES ('t', 'a') RETURNING id",
        "UPDATE pillarbox.cursor SET base = 0",
    ] {
        let ran = psql(&writer, statement).await;
        assert!(
            ran.err.contains("permission denied"),
            "{statement}: {ran:?}"
        );
    }
}

#[tokio::test]
async fn python_runs_the_pages_snippet() {
    let [snippet] = snippets("python", "run: psycopg")[..] else {
        panic!("no snippet")
    };
    let probe = Command::new("python3")
        .args(["-c", "import psycopg"])
        .stderr(Stdio::null())
        .status();
    if !probe.await.is_ok_and(|s| s.success()) {
        return skipped("python3 with psycopg is not here (pip install 'psycopg[binary]')");
    }
    let Some((url, writer)) = prepared().await else {
        return;
    };
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("snippet.py"), snippet).unwrap();
    let mut python = Command::new("python3");
    python.arg("snippet.py");
    assert_enqueues(&url, &writer, folder.path(), python).await;
}

/// Fetches and builds the driver, and so only where long tests run.
#[tokio::test]
async fn go_runs_the_pages_snippet() {
    let [snippet] = snippets("go", "run: pgx")[..] else {
        panic!("no snippet")
    };
    let is_here = Command::new("go")
        .arg("version")
        .stdout(Stdio::null())
        .status()
        .await;
    if !is_soak() || !is_here.is_ok_and(|s| s.success()) {
        return skipped("needs go, and PILLARBOX_SOAK=1 (it fetches and builds pgx)");
    }
    let Some((url, writer)) = prepared().await else {
        return;
    };
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("main.go"), snippet).unwrap();
    for arguments in [
        &["mod", "init", "example.com/snippet"][..],
        &["mod", "tidy"],
        &["build", "-o", "snippet"],
    ] {
        let mut go = Command::new("go");
        go.args(arguments);
        let ran = run_in(folder.path(), go, &writer).await;
        assert_eq!(ran.code, 0, "{arguments:?}: {ran:?}");
    }
    let program = Command::new(folder.path().join("snippet"));
    assert_enqueues(&url, &writer, folder.path(), program).await;
}

async fn assert_enqueues(url: &str, writer: &str, folder: &Path, command: Command) {
    let ran = run_in(folder, command, writer).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let expected = rows(url, LOG).await;
    let [event] = &expected[..] else {
        panic!("{expected:?}")
    };
    // Each language has its own idea of spaces.
    let event = event.replace("\": \"", "\":\"");
    assert_eq!(
        event,
        "inventory.events inventory.stock.depleted sku-1 {\"productId\":\"sku-1\"} application/json"
    );
    assert_eq!(rows(url, "SELECT quantity::text FROM stock").await, ["99"]);
}

async fn run_in(folder: &Path, mut command: Command, writer: &str) -> Ran {
    command
        .current_dir(folder)
        .env("DATABASE_URL", writer)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    // Go fetches its driver and builds it.
    ended_within(Duration::from_secs(600), command.spawn().unwrap()).await
}

/// Straight to stderr: the test harness swallows what a passing test prints.
fn skipped(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
