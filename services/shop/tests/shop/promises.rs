//! The check: each promise is broken once, and it is to exit with 1.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use sqlx::{Connection as _, SqliteConnection};
use tempfile::TempDir;

use crate::process::{Shop, check};

/// A copy of the databases with one thing changed.
async fn changed(folder: &Path, database: &str, sql: &'static str) -> TempDir {
    let copy = TempDir::new().unwrap();
    for file in std::fs::read_dir(folder).unwrap() {
        let path: PathBuf = file.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let url = format!("sqlite://{}", copy.path().join(database).display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("PRAGMA ignore_check_constraints = ON; PRAGMA foreign_keys = OFF")
        .execute(&mut connection)
        .await
        .unwrap();
    let done = sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    assert_eq!(done.rows_affected(), 1, "{sql}");
    connection.close().await.unwrap();
    copy
}

#[tokio::test]
async fn a_broken_promise_is_seen() {
    let shop = Shop::open().await;
    shop.trade().await;
    let folder = shop.close();
    let whole = check(folder.path());
    assert!(whole.status.success(), "{whole:?}");

    let lost = "DELETE FROM orders_history WHERE id = (SELECT max(id) FROM orders_history WHERE event_id IS NOT NULL)";
    let doubled = "INSERT INTO orders_history (order_id, product_id, event_id, event_type, what, at) \
                   SELECT order_id, product_id, event_id, event_type, what, at FROM orders_history \
                   WHERE event_id IS NOT NULL LIMIT 1";
    let unheard = "DELETE FROM pillarbox_outbox WHERE type = 'inventory.stock.failed'";
    let cases = [
        ("orders.db", lost, "1 events of inventory lost"),
        (
            "orders.db",
            doubled,
            "1 events of inventory applied more than once",
        ),
        (
            "inventory.db",
            unheard,
            "1 events of inventory applied, but never committed",
        ),
        (
            "inventory.db",
            "DELETE FROM inventory_effect WHERE id = 1",
            "1 events of orders lost",
        ),
        (
            "inventory.db",
            "UPDATE inventory_product SET quantity = -1, held = 0",
            "stock below zero",
        ),
        (
            "inventory.db",
            "UPDATE inventory_product SET quantity = 1",
            "are not initial",
        ),
        (
            "inventory.db",
            "UPDATE inventory_product SET held = 1",
            "are held, but",
        ),
        (
            "inventory.db",
            "UPDATE inventory_reservation SET state = 'released' WHERE state = 'confirmed'",
            "0 confirmed reservations, but 1 events",
        ),
        (
            "orders.db",
            "UPDATE orders_order SET status = 'cancelled' WHERE status = 'confirmed'",
            "but its stock was sold",
        ),
    ];
    for (database, sql, expected) in cases {
        let copy = changed(folder.path(), database, sql).await;
        let broken = Command::new(env!("CARGO_BIN_EXE_check"));
        let found = without_waiting(broken, copy.path());
        let text = String::from_utf8_lossy(&found.stdout).into_owned();
        assert_eq!(found.status.code(), Some(1), "{sql}\n{text}");
        assert!(text.contains(expected), "{expected:?} expected:\n{text}");
    }
}

fn without_waiting(mut check: Command, folder: &Path) -> Output {
    let url = |name: &str| format!("sqlite://{}", folder.join(name).display());
    check.args([
        "--inventory",
        &url("inventory.db"),
        "--orders",
        &url("orders.db"),
        "--quiet",
    ]);
    check.output().unwrap()
}

#[tokio::test]
async fn a_check_that_cannot_look_says_so() {
    let nowhere = TempDir::new().unwrap();
    let found = check(nowhere.path());
    assert_eq!(found.status.code(), Some(2));
    assert!(!found.stderr.is_empty());
}

#[test]
fn the_demo_holds() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/embedded.toml");
    let played = Command::new(env!("CARGO_BIN_EXE_demo"))
        .arg("--config")
        .arg(config)
        .args(["--orders", "120"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&played.stdout).into_owned();
    assert!(played.status.success(), "{said}");
    assert!(said.contains("events come again"), "{said}");
}
