//! The shop as a child process, and what is done with it.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use reqwest::{Client, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A program that ends with its test, also when that fails.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    /// SIGTERM: it finishes what is in flight.
    pub(crate) fn stop(mut self) {
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
pub(crate) struct Shop {
    pub(crate) folder: TempDir,
    pub(crate) process: Process,
    pub(crate) inventory: String,
    pub(crate) orders: String,
    pub(crate) client: Client,
}

impl Shop {
    pub(crate) async fn open() -> Self {
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

    pub(crate) async fn until_ready(&self) {
        for at in [&self.inventory, &self.orders] {
            self.until(&format!("{at}/health/ready"), |body| {
                body["status"] == "ready"
            })
            .await;
        }
    }

    /// Looks until the body is as wanted.
    pub(crate) async fn until(&self, url: &str, wanted: impl Fn(&Value) -> bool) -> Value {
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

    pub(crate) async fn post(&self, url: String, body: Value) -> (StatusCode, Value) {
        let request = self
            .client
            .post(url)
            .header("x-correlation-id", "checkout-4711");
        let response = request.json(&body).send().await.unwrap();
        (response.status(), response.json().await.unwrap())
    }

    pub(crate) async fn order(&self, product: &str, quantity: u32) -> String {
        let user = "5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11";
        let body = json!({ "userId": user, "productId": product, "quantity": quantity });
        let (status, order) = self.post(format!("{}/orders", self.orders), body).await;
        assert_eq!(
            (status, &order["status"]),
            (StatusCode::CREATED, &json!("pending"))
        );
        order["orderId"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn until_status(&self, order: &str, status: &str) -> Value {
        let url = format!("{}/orders/{order}", self.orders);
        self.until(&url, |body| body["status"] == status).await
    }

    /// A product of three, an order that takes all and is confirmed, one that is refused, one that is cancelled.
    pub(crate) async fn trade(&self) {
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
    pub(crate) fn close(self) -> TempDir {
        let whole = check(self.folder.path());
        assert!(whole.status.success(), "{whole:?}");
        self.process.stop();
        self.folder
    }
}

pub(crate) fn configuration(folder: &Path) -> String {
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
pub(crate) fn start(config: &Path) -> (Process, String, String) {
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

pub(crate) fn check(folder: &Path) -> Output {
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
