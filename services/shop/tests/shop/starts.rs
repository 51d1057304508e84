//! Starts: a second process, and configurations that are wrong.

use std::{process::Command, time::Duration};

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
