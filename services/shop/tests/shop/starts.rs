//! Starts: a second process, and configurations that are wrong.

use std::{process::Command, time::Duration};

use pillarbox::Config;
use pillarbox_inventory::InventorySettings;
use pillarbox_orders::OrdersSettings;
use serde_json::Value;
use tempfile::TempDir;

use crate::process::{Shop, check, configuration, start};

#[tokio::test]
async fn a_second_shop_serves_and_waits() {
    let first = Shop::open().await;
    first.trade().await;
    let (second, inventory, _orders) = start(&first.folder.path().join("shop.toml"));
    let ready: Value = first
        .client
        .get(format!("{inventory}/health/ready"))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(ready["status"], "degraded");
    assert!(
        ready["waitsFor"]
            .as_str()
            .unwrap()
            .contains("another process"),
        "{ready}"
    );
    let product: Value = first
        .client
        .get(format!("{inventory}/products/sku"))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(product["quantity"], 0);
    let client = first.client.clone();
    let folder = first.close();
    // The first gives its right back when it stops, and the second takes it.
    let looked = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            let url = format!("{inventory}/health/ready");
            let body: Value = client.get(url).send().await.unwrap().json().await.unwrap();
            if body["status"] == "ready" {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    looked.await.unwrap();
    second.stop();
    for name in ["inventory.db-wal", "orders.db-wal"] {
        let left = folder.path().join(name);
        assert!(!left.exists(), "a database was not closed: {left:?}");
    }
    assert!(check(folder.path()).status.success());
}

#[tokio::test]
async fn a_wrong_configuration_is_said_in_one_line() {
    let folder = TempDir::new().unwrap();
    let config = folder.path().join("shop.toml");
    let whole = configuration(folder.path());
    let cases = [
        (String::new(), "inventory"),
        (
            whole.replace(
                "http.listen = \"127.0.0.1:0\"",
                "http.listne = \"127.0.0.1:0\"",
            ),
            "listne",
        ),
        (whole.replace("127.0.0.1:0", "here"), "http.listen"),
        (
            format!(
                "{whole}\n transport.kind = \"amqp\"\n transport.amqp.url = \"amqp://localhost\""
            ),
            "memory",
        ),
    ];
    for (text, expected) in cases {
        std::fs::write(&config, &text).unwrap();
        let ended = Command::new(env!("CARGO_BIN_EXE_shop"))
            .arg("--config")
            .arg(&config)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(2), "{text}\n{said}");
        assert!(said.contains(expected), "{expected:?} expected: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

/// The page about every field says of the services' own what holds without it.
#[test]
fn the_reference_says_what_holds() {
    fn own<T: serde::de::DeserializeOwned + std::fmt::Debug>(text: &str, section: &str) -> String {
        let settings = Config::parse(text).unwrap().at(section).unwrap();
        format!("{:?}", settings.host::<T>().unwrap())
    }
    let said = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/reference.toml");
    let said = std::fs::read_to_string(said).unwrap();
    let held = "[inventory.http]\nlisten = \"127.0.0.1:8081\"\n[orders.http]\nlisten = \"127.0.0.1:8082\"\n";
    assert_eq!(
        own::<InventorySettings>(&said, "inventory"),
        own::<InventorySettings>(held, "inventory")
    );
    assert_eq!(
        own::<OrdersSettings>(&said, "orders"),
        own::<OrdersSettings>(held, "orders")
    );
}
