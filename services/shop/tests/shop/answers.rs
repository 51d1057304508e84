//! What the services answer, and what their events carry.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, SqliteConnection};

use crate::process::Shop;

const USER: &str = "5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11";

/// A request that is wrong: method and path, body, and the answer's status with a part of its text.
type Wrong = (&'static str, String, u16, &'static str);

fn order(product: &str, quantity: i64) -> String {
    json!({ "userId": USER, "productId": product, "quantity": quantity }).to_string()
}

fn wrong_for_orders() -> Vec<Wrong> {
    let no_body = String::new;
    vec![
        ("POST /orders", "{".to_owned(), 400, "EOF"),
        ("POST /orders", "{}".to_owned(), 422, "userId"),
        ("POST /orders", order("sku", 0), 422, "quantity"),
        ("POST /orders", order("sku", -1), 422, "quantity"),
        (
            "POST /orders",
            order(&"x".repeat(65), 1),
            422,
            "1 to 64 characters",
        ),
        ("POST /orders", order("a\u{7}b", 1), 422, "control"),
        (
            "POST /orders",
            order(&"x".repeat(20_000), 1),
            413,
            "length limit",
        ),
        ("GET /orders/7", no_body(), 400, "UUID"),
        (
            "GET /orders/5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11",
            no_body(),
            404,
            "no order",
        ),
        (
            "POST /orders/5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11/confirm",
            no_body(),
            404,
            "no order",
        ),
        ("GET /nothing", no_body(), 404, "nothing here"),
        ("DELETE /orders", no_body(), 405, "other methods"),
    ]
}

fn wrong_for_inventory() -> Vec<Wrong> {
    let no_body = String::new;
    let red = json!({ "productId": "sku", "quantity": 1, "colour": "red" }).to_string();
    let many = json!({ "productId": "sku", "quantity": u64::MAX }).to_string();
    let whim = json!({ "reason": "whim" }).to_string();
    vec![
        ("GET /products/none", no_body(), 404, "no product"),
        ("GET /products/a%0Ab", no_body(), 400, "control"),
        ("GET /products/a/availability", no_body(), 400, "quantity"),
        (
            "GET /products/a/availability?quantity=0",
            no_body(),
            400,
            "nonzero",
        ),
        ("POST /products", red, 422, "colour"),
        ("POST /products", many, 422, "at most"),
        (
            "POST /reservations/5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11/release",
            whim,
            422,
            "whim",
        ),
        (
            "POST /reservations/5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11/confirm",
            no_body(),
            404,
            "no reservation",
        ),
    ]
}

#[tokio::test]
async fn bad_input_gets_a_clear_answer() {
    let shop = Shop::open().await;
    let services = [
        (&shop.orders, wrong_for_orders()),
        (&shop.inventory, wrong_for_inventory()),
    ];
    for (at, cases) in services {
        for (request, body, status, expected) in cases {
            let (method, path) = request.split_once(' ').unwrap();
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let call = shop
                .client
                .request(method, format!("{at}{path}"))
                .body(body.clone());
            let response = call
                .header("content-type", "application/json")
                .send()
                .await
                .unwrap();
            assert!(
                response.headers().contains_key("x-correlation-id"),
                "{request}"
            );
            assert_eq!(response.status().as_u16(), status, "{request} {body:.80}");
            let answer: Value = response.json().await.unwrap();
            let error = answer["error"].as_str().unwrap_or_default();
            assert!(
                error.contains(expected),
                "{request} {body:.80}: {expected:?} expected: {error}"
            );
        }
    }
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
