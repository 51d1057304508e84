//! The shop as a process: what it answers, what its events carry, and whether the check sees a broken promise.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use reqwest::{Client, Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sqlx::{Connection as _, SqliteConnection};
use tempfile::TempDir;

/// A program that ends with its test, also when that fails.
struct Process(Child);

impl Process {
    /// SIGTERM: it finishes what is in flight.
    fn stop(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        let status = self.0.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already where it was stopped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A shop on SQLite files and the in-process transport.
struct Shop {
    folder: TempDir,
    process: Process,
    inventory: String,
    orders: String,
    client: Client,
}

impl Shop {
    async fn open() -> Self {
        let folder = TempDir::new().unwrap();
        let config = folder.path().join("shop.toml");
        std::fs::write(&config, configuration(folder.path())).unwrap();
        let (process, inventory, orders) = start(&config);
        let client = Client::builder()
            .timeout(Duration::from_secs(20))
            .build()
            .unwrap();
        let shop = Self {
            folder,
            process,
            inventory,
            orders,
            client,
        };
        shop.until_ready().await;
        shop
    }

    async fn until_ready(&self) {
        for at in [&self.inventory, &self.orders] {
            self.until(&format!("{at}/health/ready"), |body| {
                body["status"] == "ready"
            })
            .await;
        }
    }

    /// Looks until the body is as wanted.
    async fn until(&self, url: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let look = async {
            loop {
                let body: Value = self
                    .client
                    .get(url)
                    .send()
                    .await
                    .unwrap()
                    .json()
                    .await
                    .unwrap();
                if wanted(&body) {
                    return body;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let looked = tokio::time::timeout(Duration::from_secs(60), look).await;
        looked.unwrap_or_else(|_| panic!("{url} never came to be as wanted"))
    }

    async fn post(&self, url: String, body: Value) -> (StatusCode, Value) {
        let request = self
            .client
            .post(url)
            .header("x-correlation-id", "checkout-4711");
        let response = request.json(&body).send().await.unwrap();
        (response.status(), response.json().await.unwrap())
    }

    async fn order(&self, product: &str, quantity: u32) -> String {
        let user = "5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11";
        let body = json!({ "userId": user, "productId": product, "quantity": quantity });
        let (status, order) = self.post(format!("{}/orders", self.orders), body).await;
        assert_eq!(
            (status, &order["status"]),
            (StatusCode::CREATED, &json!("pending"))
        );
        order["orderId"].as_str().unwrap().to_owned()
    }

    async fn until_status(&self, order: &str, status: &str) -> Value {
        let url = format!("{}/orders/{order}", self.orders);
        self.until(&url, |body| body["status"] == status).await
    }

    /// A product of three, an order that takes all and is confirmed, one that is refused, one that is cancelled.
    async fn trade(&self) {
        let product = json!({ "productId": "sku", "quantity": 3 });
        self.post(format!("{}/products", self.inventory), product)
            .await;
        let cancelled = self.order("sku", 1).await;
        self.until_status(&cancelled, "reserved").await;
        let (status, _) = self
            .post(
                format!("{}/orders/{cancelled}/cancel", self.orders),
                json!({}),
            )
            .await;
        assert_eq!(status, StatusCode::OK);
        let sold = self.order("sku", 3).await;
        self.until_status(&sold, "reserved").await;
        let refused = self.order("sku", 1).await;
        let refused = self.until_status(&refused, "failed").await;
        assert_eq!(refused["reason"], "insufficient_stock");
        let (status, _) = self
            .post(format!("{}/orders/{sold}/confirm", self.orders), json!({}))
            .await;
        assert_eq!(status, StatusCode::OK);
        let procurements = format!("{}/procurements?productId=sku", self.orders);
        self.until(&procurements, |open| {
            open.as_array().is_some_and(|a| a.len() == 1)
        })
        .await;
    }

    /// Waits until everything is applied, then stops it. Answers the folder with the databases.
    fn close(self) -> TempDir {
        let whole = check(self.folder.path());
        assert!(whole.status.success(), "{whole:?}");
        self.process.stop();
        self.folder
    }
}

fn configuration(folder: &Path) -> String {
    let url = |name: &str| format!("sqlite://{}", folder.join(name).display());
    let (inventory, orders) = (url("inventory.db"), url("orders.db"));
    format!(
        r#"
        transport.kind = "memory"
        types."orders.order.created".unrouted = "accept"
        types."orders.order.confirmed".unrouted = "accept"
        [inventory]
        store.url = "{inventory}"
        http.listen = "127.0.0.1:0"
        [orders]
        store.url = "{orders}"
        http.listen = "127.0.0.1:0"
        "#
    )
}

/// Starts the program and reads where it listens.
fn start(config: &Path) -> (Process, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_shop"))
        .arg("--config")
        .arg(config)
        .env("RUST_LOG", "warn")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut address = |name: &str| {
        let line = lines.next().unwrap().unwrap();
        line.strip_prefix(&format!("{name} listens on "))
            .unwrap()
            .to_owned()
    };
    let (inventory, orders) = (address("inventory"), address("orders"));
    (Process(child), inventory, orders)
}

fn check(folder: &Path) -> Output {
    let url = |name: &str| format!("sqlite://{}", folder.join(name).display());
    Command::new(env!("CARGO_BIN_EXE_check"))
        .args([
            "--inventory",
            &url("inventory.db"),
            "--orders",
            &url("orders.db"),
            "--wait",
            "20",
        ])
        .output()
        .unwrap()
}

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

#[tokio::test]
async fn events_carry_the_correlation_of_the_request() {
    let shop = Shop::open().await;
    shop.trade().await;
    let folder = shop.close();
    for (database, least) in [("inventory.db", 5), ("orders.db", 6)] {
        let url = format!("sqlite://{}", folder.path().join(database).display());
        let mut connection = SqliteConnection::connect(&url).await.unwrap();
        let sql = "SELECT json_extract(attributes, '$.correlationid') FROM pillarbox_outbox";
        let ids: Vec<String> = sqlx::query_scalar(sql)
            .fetch_all(&mut connection)
            .await
            .unwrap();
        assert!(ids.len() >= least, "{database}: {ids:?}");
        assert!(
            ids.iter().all(|id| id == "checkout-4711"),
            "{database}: {ids:?}"
        );
    }
}

#[tokio::test]
async fn bad_input_gets_a_clear_answer() {
    let shop = Shop::open().await;
    let (inventory, orders) = (&shop.inventory, &shop.orders);
    let user = "5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11";
    let order = |product: &str, quantity: i64| {
        json!({ "userId": user, "productId": product, "quantity": quantity }).to_string()
    };
    let long = "x".repeat(65);
    let cases = [
        (
            Method::POST,
            format!("{orders}/orders"),
            "{".to_owned(),
            400,
            "EOF",
        ),
        (
            Method::POST,
            format!("{orders}/orders"),
            "{}".to_owned(),
            422,
            "userId",
        ),
        (
            Method::POST,
            format!("{orders}/orders"),
            order("sku", 0),
            422,
            "quantity",
        ),
        (
            Method::POST,
            format!("{orders}/orders"),
            order("sku", -1),
            422,
            "quantity",
        ),
        (
            Method::POST,
            format!("{orders}/orders"),
            order(&long, 1),
            422,
            "1 to 64 characters",
        ),
        (
            Method::POST,
            format!("{orders}/orders"),
            order("a\u{7}b", 1),
            422,
            "control",
        ),
        (
            Method::POST,
            format!("{orders}/orders"),
            order(&"x".repeat(20_000), 1),
            413,
            "length limit",
        ),
        (
            Method::GET,
            format!("{orders}/orders/7"),
            String::new(),
            400,
            "UUID",
        ),
        (
            Method::GET,
            format!("{orders}/orders/{user}"),
            String::new(),
            404,
            "no order",
        ),
        (
            Method::POST,
            format!("{orders}/orders/{user}/confirm"),
            String::new(),
            404,
            "no order",
        ),
        (
            Method::GET,
            format!("{orders}/nothing"),
            String::new(),
            404,
            "nothing here",
        ),
        (
            Method::DELETE,
            format!("{orders}/orders"),
            String::new(),
            405,
            "other methods",
        ),
        (
            Method::GET,
            format!("{inventory}/products/none"),
            String::new(),
            404,
            "no product",
        ),
        (
            Method::GET,
            format!("{inventory}/products/{long}"),
            String::new(),
            400,
            "1 to 64",
        ),
        (
            Method::GET,
            format!("{inventory}/products/a/availability"),
            String::new(),
            400,
            "quantity",
        ),
        (
            Method::POST,
            format!("{inventory}/products"),
            json!({ "productId": "sku", "quantity": 1, "colour": "red" }).to_string(),
            422,
            "colour",
        ),
        (
            Method::POST,
            format!("{inventory}/products"),
            json!({ "productId": "sku", "quantity": u64::MAX }).to_string(),
            422,
            "at most",
        ),
        (
            Method::POST,
            format!("{inventory}/reservations/{user}/release"),
            json!({ "reason": "whim" }).to_string(),
            422,
            "whim",
        ),
    ];
    for (method, url, body, status, expected) in cases {
        let request = shop.client.request(method, &url).body(body.clone());
        let response = request
            .header("content-type", "application/json")
            .send()
            .await
            .unwrap();
        assert!(response.headers().contains_key("x-correlation-id"), "{url}");
        assert_eq!(response.status().as_u16(), status, "{url} {body:.80}");
        let answer: Value = response.json().await.unwrap();
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(
            error.contains(expected),
            "{url} {body:.80}: {expected:?} expected: {error}"
        );
    }
}

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
async fn the_probes_and_the_metrics_answer() {
    let shop = Shop::open().await;
    let live: Value = shop
        .client
        .get(format!("{}/health/live", shop.orders))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(live["status"], "alive");
    let metrics = shop
        .client
        .get(format!("{}/metrics", shop.orders))
        .send()
        .await
        .unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains("http_requests_total{"), "{metrics}");
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
