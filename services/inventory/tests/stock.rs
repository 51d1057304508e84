//! The use cases and handlers, on SQLite and on PostgreSQL by the same bodies.
// The bodies stand outside the test functions, where clippy does not know them for tests.
#![allow(clippy::unwrap_used)]

use std::{collections::HashSet, sync::Arc, time::Duration};

use pillarbox::{
    Consumer, Database, Event, Outbox,
    transport::{Message, Outcome, Transport, memory::Memory},
};
use pillarbox_contracts::{
    OrderCancelled, OrderFacts, OrderFailed, ProductId, Quantity, Refusal, ReleaseReason, check,
    http::{EndStatus, NewProduct, ProductStock, Refused, Reserve, Reserved},
};
use pillarbox_host::{Error, http::Correlation, migrate};
use pillarbox_inventory::{GROUP, handlers::OrderEnded, repository::MIGRATIONS, stock::Stock};
use pillarbox_testkit::servers;
use serde_json::Value;
use sqlx::{
    PgPool, SqlitePool,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use uuid::Uuid;

/// Runs one body in both worlds.
macro_rules! both {
    ($($body:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $body() {
                super::$body(super::World::sqlite().await).await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $body() {
                if let Some(world) = super::World::postgres().await {
                    super::$body(world).await;
                }
            })*
        }
    };
}

both!(
    a_reservation_holds_stock_and_says_so,
    the_last_piece_runs_out_twice,
    a_refusal_changes_nothing_but_is_an_event,
    a_repeat_gets_the_same_reservation,
    the_end_that_came_first_stands,
    many_at_once_never_oversell,
    many_ends_at_once_are_one,
    a_restock_adds_to_the_stock,
    an_ended_order_gives_back_and_gets_nothing_more,
    an_end_event_that_does_not_fit_is_a_dead_letter,
);

struct World {
    stock: Stock,
    outbox: Outbox,
    pools: Pools,
    _folder: Option<TempDir>,
}

enum Pools {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

impl World {
    async fn sqlite() -> Self {
        let folder = TempDir::new().unwrap();
        let options = SqliteConnectOptions::new()
            .filename(folder.path().join("inventory.db"))
            .create_if_missing(true);
        let pool = SqlitePoolOptions::new()
            .connect_with(options)
            .await
            .unwrap();
        Self::new(Database::from(&pool), Pools::Sqlite(pool), Some(folder)).await
    }

    async fn postgres() -> Option<Self> {
        let server = servers::required(servers::postgres().await)?;
        let url = server.create_database().await.unwrap();
        let pool = PgPool::connect(&url).await.unwrap();
        Some(Self::new(Database::from(&pool), Pools::Postgres(pool), None).await)
    }

    async fn new(database: Database, pools: Pools, folder: Option<TempDir>) -> Self {
        pillarbox::migrate(&database).await.unwrap();
        migrate(&database, &MIGRATIONS).await.unwrap();
        // Twice, as every start does.
        migrate(&database, &MIGRATIONS).await.unwrap();
        let outbox = Outbox::new(&database);
        Self {
            stock: Stock::new(outbox.clone(), Duration::from_secs(900)).unwrap(),
            outbox,
            pools,
            _folder: folder,
        }
    }

    async fn add(&self, product: &str, quantity: u64) {
        let product_id = id(product);
        let new = NewProduct {
            product_id,
            quantity,
        };
        self.stock.add_product(&new).await.unwrap();
    }

    async fn reserve(&self, wanted: &Reserve) -> Result<Reserved, Refused> {
        self.stock
            .reserve(wanted, &Correlation::fresh())
            .await
            .unwrap()
    }

    /// (quantity, held)
    async fn amounts(&self, product: &str) -> (u64, u64) {
        let ProductStock { quantity, held, .. } = self.stock.product(&id(product)).await.unwrap();
        (quantity, held)
    }

    /// The log: type without its first part, and payload.
    async fn events(&self) -> Vec<(String, Value)> {
        let rows: Vec<(String, Vec<u8>)> = match &self.pools {
            Pools::Sqlite(pool) => {
                let sql = "SELECT type, payload FROM pillarbox_outbox ORDER BY position";
                sqlx::query_as(sql).fetch_all(pool).await.unwrap()
            }
            Pools::Postgres(pool) => {
                let sql = "SELECT type, payload FROM pillarbox.outbox ORDER BY position";
                sqlx::query_as(sql).fetch_all(pool).await.unwrap()
            }
        };
        rows.into_iter()
            .map(|(kind, payload)| {
                let kind = kind.replace("inventory.stock.", "");
                (kind, serde_json::from_slice(&payload).unwrap())
            })
            .collect()
    }

    async fn kinds(&self) -> Vec<String> {
        self.events()
            .await
            .into_iter()
            .map(|(kind, _)| kind)
            .collect()
    }

    async fn dead_letters(&self) -> Vec<String> {
        match &self.pools {
            Pools::Sqlite(pool) => {
                let sql = "SELECT reason FROM pillarbox_dead_letter";
                sqlx::query_scalar(sql).fetch_all(pool).await.unwrap()
            }
            Pools::Postgres(pool) => {
                let sql = "SELECT reason FROM pillarbox.dead_letter";
                sqlx::query_scalar(sql).fetch_all(pool).await.unwrap()
            }
        }
    }

    /// Applies events as the service's consumer does, and waits until it has.
    async fn apply(&self, messages: Vec<Message>) {
        let memory: Arc<dyn Transport> = Arc::new(Memory::new());
        let mut consumer = Consumer::new(self.outbox.database(), memory.clone(), GROUP)
            .check(check)
            .on::<OrderCancelled>(OrderEnded)
            .on::<OrderFailed>(OrderEnded);
        consumer.bind().await.unwrap();
        let running = consumer.spawn();
        let mut health = running.watch();
        health
            .wait_for(|h| h.of > 0 && h.held == h.of)
            .await
            .unwrap();
        let publisher = memory.publisher().await.unwrap();
        for outcome in publisher
            .publish(messages.into_iter().map(Arc::new).collect())
            .await
        {
            assert!(matches!(outcome, Outcome::Stored), "{outcome:?}");
        }
        running.shutdown().await.unwrap();
    }
}

fn id(product: &str) -> ProductId {
    product.parse().unwrap()
}

fn wanted(product: &str, quantity: u32) -> Reserve {
    Reserve {
        order_id: Uuid::now_v7(),
        user_id: Uuid::now_v7(),
        product_id: id(product),
        quantity: Quantity::new(quantity).unwrap(),
    }
}

fn ended(order: &Reserve) -> OrderFacts {
    OrderFacts {
        order_id: order.order_id,
        user_id: order.user_id,
        product_id: order.product_id.clone(),
        quantity: order.quantity,
        reason: None,
        at: OffsetDateTime::now_utc(),
    }
}

fn message<E: Event + serde::Serialize>(event: &E) -> Message {
    let payload = serde_json::to_vec(event).unwrap();
    let message = Message::new(Uuid::now_v7().to_string(), E::TOPIC, E::TYPE, payload);
    message.with_attribute("source", "orders-service")
}

async fn a_reservation_holds_stock_and_says_so(world: World) {
    world.add("sku", 5).await;
    let order = wanted("sku", 2);
    let reserved = world.reserve(&order).await.unwrap();
    assert_eq!(world.amounts("sku").await, (5, 2));
    let events = world.events().await;
    let [(kind, payload)] = events.as_slice() else {
        panic!("one event expected: {events:?}");
    };
    assert_eq!(kind, "reserved");
    assert_eq!(
        payload["reservationId"],
        reserved.reservation_id.to_string()
    );
    assert_eq!(payload["orderId"], order.order_id.to_string());
    assert_eq!(payload["quantity"], 2);
}

async fn the_last_piece_runs_out_twice(world: World) {
    world.add("sku", 3).await;
    let order = wanted("sku", 3);
    let reserved = world.reserve(&order).await.unwrap();
    let correlation = Correlation::fresh();
    world
        .stock
        .confirm(reserved.reservation_id, &correlation)
        .await
        .unwrap();
    assert_eq!(world.amounts("sku").await, (0, 0));
    let events = world.events().await;
    let kinds: Vec<_> = events.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["reserved", "depleted", "confirmed", "depleted"]);
    for depleted in [&events[1].1, &events[3].1] {
        assert_eq!(depleted["lastQuantity"], 3);
        assert_eq!(depleted["orderId"], order.order_id.to_string());
    }
}

async fn a_refusal_changes_nothing_but_is_an_event(world: World) {
    world.add("sku", 1).await;
    let few = world.reserve(&wanted("sku", 2)).await.unwrap_err();
    assert_eq!((few.reason, few.available), (Refusal::InsufficientStock, 1));
    let none = world.reserve(&wanted("other", 1)).await.unwrap_err();
    assert_eq!((none.reason, none.available), (Refusal::UnknownProduct, 0));
    assert_eq!(world.amounts("sku").await, (1, 0));
    let events = world.events().await;
    let reasons: Vec<_> = events
        .iter()
        .map(|(_, payload)| &payload["reason"])
        .collect();
    assert_eq!(reasons, ["insufficient_stock", "unknown_product"]);
    assert_eq!(world.kinds().await, ["failed", "failed"]);
}

async fn a_repeat_gets_the_same_reservation(world: World) {
    world.add("sku", 5).await;
    let mut order = wanted("sku", 2);
    let first = world.reserve(&order).await.unwrap();
    assert_eq!(world.reserve(&order).await.unwrap(), first);
    assert_eq!(world.amounts("sku").await, (5, 2));
    assert_eq!(world.kinds().await, ["reserved"]);
    order.quantity = Quantity::new(3).unwrap();
    let other = world.reserve(&order).await.unwrap_err();
    assert_eq!(other.reason, Refusal::AlreadyReserved);
    assert_eq!(world.amounts("sku").await, (5, 2));
}

async fn the_end_that_came_first_stands(world: World) {
    world.add("sku", 5).await;
    let correlation = Correlation::fresh();
    let (confirm, release) = (wanted("sku", 1), wanted("sku", 2));
    let confirm = world.reserve(&confirm).await.unwrap().reservation_id;
    let release = world.reserve(&release).await.unwrap().reservation_id;
    let manual = ReleaseReason::ManualRelease;
    for _ in 0..2 {
        let end = world.stock.confirm(confirm, &correlation).await.unwrap();
        assert_eq!(end.status, EndStatus::Confirmed);
        let end = world
            .stock
            .release(release, manual, &correlation)
            .await
            .unwrap();
        assert_eq!(end.status, EndStatus::Released);
        let end = world
            .stock
            .release(confirm, manual, &correlation)
            .await
            .unwrap();
        assert_eq!(end.status, EndStatus::Confirmed);
        let end = world.stock.confirm(release, &correlation).await.unwrap();
        assert_eq!(end.status, EndStatus::Released);
    }
    assert_eq!(world.amounts("sku").await, (4, 0));
    assert_eq!(
        world.kinds().await,
        ["reserved", "reserved", "confirmed", "released"]
    );
    let unknown = world.stock.confirm(Uuid::nil(), &correlation).await;
    assert!(matches!(unknown, Err(Error::NotFound(_))), "{unknown:?}");
}

async fn many_at_once_never_oversell(world: World) {
    world.add("sku", 10).await;
    let mut tasks = JoinSet::new();
    for _ in 0..64 {
        let stock = world.stock.clone();
        let order = wanted("sku", 1);
        tasks.spawn(async move { stock.reserve(&order, &Correlation::fresh()).await.unwrap() });
    }
    let answers = tasks.join_all().await;
    let reserved: HashSet<_> = answers.iter().flatten().map(|r| r.reservation_id).collect();
    assert_eq!(reserved.len(), 10);
    assert_eq!(world.amounts("sku").await, (10, 10));
    let kinds = world.kinds().await;
    let count = |kind: &str| kinds.iter().filter(|k| *k == kind).count();
    assert_eq!(
        (count("reserved"), count("failed"), count("depleted")),
        (10, 54, 1)
    );
}

async fn many_ends_at_once_are_one(world: World) {
    world.add("sku", 1).await;
    let reserved = world
        .reserve(&wanted("sku", 1))
        .await
        .unwrap()
        .reservation_id;
    let mut tasks = JoinSet::new();
    for n in 0..32 {
        let stock = world.stock.clone();
        tasks.spawn(async move {
            let correlation = Correlation::fresh();
            let end = match n % 2 {
                0 => stock.confirm(reserved, &correlation).await,
                _ => {
                    stock
                        .release(reserved, ReleaseReason::ManualRelease, &correlation)
                        .await
                }
            };
            end.unwrap().status
        });
    }
    let ends: HashSet<_> = tasks.join_all().await.into_iter().collect();
    assert_eq!(ends.len(), 1, "all are told the same");
    let left = if ends.contains(&EndStatus::Confirmed) {
        0
    } else {
        1
    };
    assert_eq!(world.amounts("sku").await, (left, 0));
}

async fn a_restock_adds_to_the_stock(world: World) {
    world.add("sku", 1).await;
    world.reserve(&wanted("sku", 1)).await.unwrap();
    let correlation = Correlation::fresh();
    let much = Quantity::new(4).unwrap();
    let product = world
        .stock
        .restock(&id("sku"), much, &correlation)
        .await
        .unwrap();
    assert_eq!((product.quantity, product.available), (5, 4));
    let (kind, payload) = world.events().await.pop().unwrap();
    assert_eq!(
        (kind.as_str(), &payload["available"]),
        ("replenished", &Value::from(4))
    );
    let unknown = world.stock.restock(&id("other"), much, &correlation).await;
    assert!(matches!(unknown, Err(Error::NotFound(_))), "{unknown:?}");
}

async fn an_ended_order_gives_back_and_gets_nothing_more(world: World) {
    world.add("sku", 5).await;
    let (cancelled, failed, sold) = (wanted("sku", 1), wanted("sku", 1), wanted("sku", 1));
    world.reserve(&cancelled).await.unwrap();
    let sold_id = world.reserve(&sold).await.unwrap().reservation_id;
    world
        .stock
        .confirm(sold_id, &Correlation::fresh())
        .await
        .unwrap();
    let cancel = message(&OrderCancelled(ended(&cancelled)));
    world
        .apply(vec![
            cancel.clone(),
            message(&OrderFailed(ended(&failed))),
            message(&OrderCancelled(ended(&sold))),
            cancel,
        ])
        .await;
    assert_eq!(world.amounts("sku").await, (4, 0));
    let (kind, payload) = world.events().await.pop().unwrap();
    assert_eq!(
        (kind.as_str(), &payload["reason"]),
        ("released", &Value::from("order_cancelled"))
    );
    for order in [&cancelled, &failed, &sold] {
        assert_eq!(
            world.reserve(order).await.unwrap_err().reason,
            Refusal::OrderEnded
        );
    }
    assert_eq!(world.amounts("sku").await, (4, 0));
}

async fn an_end_event_that_does_not_fit_is_a_dead_letter(world: World) {
    world.add("sku", 5).await;
    let order = wanted("sku", 1);
    world.reserve(&order).await.unwrap();
    let mut none = message(&OrderCancelled(ended(&order)));
    let mut payload = serde_json::to_value(ended(&order)).unwrap();
    payload["quantity"] = Value::from(0);
    none.payload = Some(payload.to_string().into());
    let mut torn = message(&OrderCancelled(ended(&order)));
    torn.payload = Some("{".into());
    let newer = message(&OrderCancelled(ended(&order))).with_attribute("dataversion", "2");
    world.apply(vec![none, torn, newer]).await;
    assert_eq!(world.amounts("sku").await, (5, 1));
    let mut reasons = world.dead_letters().await;
    reasons.sort();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(
        reasons[0].ends_with("/quantity: found 0, expected at least 1"),
        "{reasons:?}"
    );
    assert!(
        reasons[1].contains("the payload is not JSON"),
        "{reasons:?}"
    );
    assert!(reasons[2].contains("unknown version \"2\""), "{reasons:?}");
}
