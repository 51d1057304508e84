//! The use cases and handlers, on SQLite and on PostgreSQL by the same bodies, beside an inventory service that answers
//! as a test wants.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Json, Router, extract::State, http::StatusCode, response::IntoResponse, routing::any};
use pillarbox::{
    Consumer, Database, Event, Outbox,
    transport::{Message, Outcome, Transport, memory::Memory},
};
use pillarbox_contracts::{
    Refusal, ReleaseReason, StockConfirmed, StockDepleted, StockFailed, StockReleased,
    StockReplenished, StockReserved, check,
    http::{NewOrder, Status},
};
use pillarbox_host::{Error, http::Correlation, migrate};
use pillarbox_orders::{
    ClientSettings, GROUP, InventoryClient, Orders, Wish,
    handlers::{Procure, StockMoved},
    repository::{MIGRATIONS, Order},
};
use pillarbox_testkit::servers;
use serde_json::{Value, json};
use sqlx::{PgPool, SqlitePool, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use time::OffsetDateTime;
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
    an_order_is_committed_before_inventory_is_asked,
    an_order_stays_pending_while_inventory_is_away,
    events_lead_an_order_to_its_end,
    an_event_that_comes_again_changes_nothing,
    a_refusal_fails_the_order,
    a_confirmation_waits_for_inventory,
    a_cancellation_that_came_too_late_shows_what_is_true,
    stock_for_an_ended_order_is_given_back_by_its_end_event,
    a_product_that_ran_out_is_procured_once,
    strangers_orders_are_noted_and_left_alone,
);

struct World {
    orders: Orders,
    outbox: Outbox,
    pools: Pools,
    inventory: Inventory,
    _folder: Option<TempDir>,
}

enum Pools {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// Answers by the last part of the path; notes what it was asked. 503 for what it has no answer to.
#[derive(Clone, Default)]
struct Inventory(Arc<Mutex<Talk>>);

#[derive(Default)]
struct Talk {
    answers: HashMap<&'static str, (StatusCode, Value)>,
    asked: Vec<String>,
}

impl Inventory {
    fn answers(&self, what: &'static str, status: StatusCode, body: Value) {
        self.0.lock().unwrap().answers.insert(what, (status, body));
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().asked)
    }

    async fn serve(&self) -> String {
        let routes = Router::new().fallback(any(answer)).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(axum::serve(listener, routes).into_future());
        format!("http://{address}")
    }
}

async fn answer(State(inventory): State<Inventory>, uri: axum::http::Uri) -> impl IntoResponse {
    let what = uri.path().rsplit('/').next().unwrap_or_default().to_owned();
    let mut talk = inventory.0.lock().unwrap();
    let answer = talk.answers.get(what.as_str()).cloned();
    talk.asked.push(what);
    let (status, body) = answer.unwrap_or((StatusCode::SERVICE_UNAVAILABLE, json!({})));
    (status, Json(body))
}

impl World {
    async fn sqlite() -> Self {
        let folder = TempDir::new().unwrap();
        let options = SqliteConnectOptions::new()
            .filename(folder.path().join("orders.db"))
            .create_if_missing(true);
        let pool = SqlitePool::connect_with(options).await.unwrap();
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
        let outbox = Outbox::new(&database);
        let inventory = Inventory::default();
        let client = InventoryClient::new(&ClientSettings {
            url: Some(inventory.serve().await),
            timeout: Duration::from_secs(2),
            tries: 2,
        });
        Self {
            orders: Orders::new(outbox.clone(), client.unwrap()).unwrap(),
            outbox,
            pools,
            inventory,
            _folder: folder,
        }
    }

    async fn place(&self) -> Order {
        let new = NewOrder {
            user_id: Uuid::now_v7(),
            product_id: "sku".parse().unwrap(),
            quantity: pillarbox_contracts::Quantity::new(2).unwrap(),
        };
        self.orders
            .place(&new, &Correlation::fresh())
            .await
            .unwrap()
    }

    async fn status(&self, order: &Order) -> Status {
        self.orders.view(order.id).await.unwrap().status
    }

    async fn wish(&self, order: &Order, wish: Wish) -> Result<Status, Error> {
        let order = self
            .orders
            .wish(order.id, wish, &Correlation::fresh())
            .await?;
        Ok(order.status)
    }

    /// Types in the log, without their first part.
    async fn kinds(&self) -> Vec<String> {
        let kinds: Vec<String> = match &self.pools {
            Pools::Sqlite(pool) => {
                let sql = "SELECT type FROM pillarbox_outbox ORDER BY position";
                sqlx::query_scalar(sql).fetch_all(pool).await.unwrap()
            }
            Pools::Postgres(pool) => {
                let sql = "SELECT type FROM pillarbox.outbox ORDER BY position";
                sqlx::query_scalar(sql).fetch_all(pool).await.unwrap()
            }
        };
        kinds
            .iter()
            .map(|kind| kind.replace("orders.order.", ""))
            .collect()
    }

    async fn history_of(&self, event: &Message) -> Vec<String> {
        let sql = "SELECT what FROM orders_history WHERE event_id = $1";
        match &self.pools {
            Pools::Sqlite(pool) => sqlx::query_scalar(sql)
                .bind(&event.id)
                .fetch_all(pool)
                .await
                .unwrap(),
            Pools::Postgres(pool) => sqlx::query_scalar(sql)
                .bind(&event.id)
                .fetch_all(pool)
                .await
                .unwrap(),
        }
    }

    /// Applies events as the service's consumer does, and waits until it has.
    async fn apply(&self, messages: impl IntoIterator<Item = &Message>) {
        let memory: Arc<dyn Transport> = Arc::new(Memory::new());
        let mut consumer = Consumer::new(self.outbox.database(), memory.clone(), GROUP)
            .check(check)
            .on::<StockReserved>(StockMoved)
            .on::<StockConfirmed>(StockMoved)
            .on::<StockReleased>(StockMoved)
            .on::<StockFailed>(StockMoved)
            .on::<StockDepleted>(Procure)
            .on::<StockReplenished>(Procure);
        consumer.bind().await.unwrap();
        let running = consumer.spawn();
        let mut health = running.watch();
        health
            .wait_for(|h| h.of > 0 && h.held == h.of)
            .await
            .unwrap();
        let publisher = memory.publisher().await.unwrap();
        let messages = messages.into_iter().cloned().map(Arc::new).collect();
        for outcome in publisher.publish(messages).await {
            assert!(matches!(outcome, Outcome::Stored), "{outcome:?}");
        }
        running.shutdown().await.unwrap();
    }
}

fn message<E: Event + serde::Serialize>(event: &E) -> Message {
    let payload = serde_json::to_vec(event).unwrap();
    let mut message = Message::new(Uuid::now_v7().to_string(), E::TOPIC, E::TYPE, payload);
    message.key = event.key().map(Into::into);
    message.with_attribute("source", "inventory-service")
}

fn reserved(order: &Order, reservation_id: Uuid) -> Message {
    message(&StockReserved {
        reservation_id,
        order_id: order.id,
        user_id: order.user_id,
        product_id: order.product_id.clone(),
        quantity: order.quantity,
        expires_at: OffsetDateTime::now_utc(),
    })
}

fn confirmed(order: &Order, reservation_id: Uuid) -> Message {
    message(&StockConfirmed {
        reservation_id,
        order_id: order.id,
        user_id: order.user_id,
        product_id: order.product_id.clone(),
        quantity: order.quantity,
        confirmed_at: OffsetDateTime::now_utc(),
    })
}

fn released(order: &Order, reservation_id: Uuid, reason: ReleaseReason) -> Message {
    message(&StockReleased {
        reservation_id,
        order_id: order.id,
        user_id: order.user_id,
        product_id: order.product_id.clone(),
        quantity: order.quantity,
        released_at: OffsetDateTime::now_utc(),
        reason,
    })
}

fn refused(order: &Order) -> Message {
    message(&StockFailed {
        order_id: order.id,
        user_id: order.user_id,
        product_id: order.product_id.clone(),
        requested: order.quantity,
        available: 1,
        reason: Refusal::InsufficientStock,
    })
}

fn depleted(order: &Order) -> Message {
    message(&StockDepleted {
        product_id: order.product_id.clone(),
        order_id: order.id,
        user_id: order.user_id,
        depleted_at: OffsetDateTime::now_utc(),
        last_quantity: order.quantity,
    })
}

async fn an_order_is_committed_before_inventory_is_asked(world: World) {
    let advice = json!({ "productId": "sku", "quantity": 2, "available": 0, "sufficient": false });
    let refusal = json!({ "reason": "insufficient_stock", "available": 0 });
    world
        .inventory
        .answers("availability", StatusCode::OK, advice);
    world
        .inventory
        .answers("reservations", StatusCode::CONFLICT, refusal);
    let order = world.place().await;
    // Advice keeps nobody from asking, and the refusal is believed when its event comes.
    assert_eq!(world.inventory.asked(), ["availability", "reservations"]);
    assert_eq!(world.status(&order).await, Status::Pending);
    assert_eq!(world.kinds().await, ["created"]);
}

async fn an_order_stays_pending_while_inventory_is_away(world: World) {
    let order = world.place().await;
    assert_eq!(
        world.inventory.asked(),
        ["availability", "reservations", "reservations"]
    );
    assert_eq!(world.status(&order).await, Status::Pending);
    // It can be cancelled: inventory will hear of it, and refuse what is still under way.
    assert_eq!(
        world.wish(&order, Wish::Cancel).await.unwrap(),
        Status::Cancelled
    );
    assert_eq!(world.kinds().await, ["created", "cancelled"]);
    let confirmed = world.wish(&order, Wish::Confirm).await;
    assert!(
        matches!(confirmed, Err(Error::Conflict(_))),
        "{confirmed:?}"
    );
}

async fn events_lead_an_order_to_its_end(world: World) {
    let (sold, expired, given_back) = (
        world.place().await,
        world.place().await,
        world.place().await,
    );
    let [a, b, c] = [1, 2, 3].map(Uuid::from_u128);
    let events = [
        reserved(&sold, a),
        reserved(&expired, b),
        reserved(&given_back, c),
        confirmed(&sold, a),
        released(&expired, b, ReleaseReason::Expired),
        released(&given_back, c, ReleaseReason::ManualRelease),
    ];
    world.apply(&events[..1]).await;
    assert_eq!(world.status(&sold).await, Status::Reserved);
    world.apply(&events[1..]).await;
    assert_eq!(world.status(&sold).await, Status::Confirmed);
    assert_eq!(world.status(&expired).await, Status::Failed);
    assert_eq!(world.status(&given_back).await, Status::Cancelled);
    let kinds = world.kinds().await;
    assert_eq!(kinds[3..], ["confirmed", "failed", "cancelled"]);
    let history = world.orders.view(sold.id).await.unwrap().history;
    let lines: Vec<_> = history.iter().map(|line| line.what.as_str()).collect();
    assert_eq!(lines, ["placed", "reserved", "confirmed"]);
}

async fn an_event_that_comes_again_changes_nothing(world: World) {
    let order = world.place().await;
    let (reserved, confirmed) = (
        reserved(&order, Uuid::nil()),
        confirmed(&order, Uuid::nil()),
    );
    world
        .apply([&reserved, &confirmed, &reserved, &confirmed])
        .await;
    world.apply([&reserved]).await;
    assert_eq!(world.history_of(&reserved).await, ["reserved"]);
    assert_eq!(world.history_of(&confirmed).await, ["confirmed"]);
    assert_eq!(world.kinds().await, ["created", "confirmed"]);
}

async fn a_refusal_fails_the_order(world: World) {
    let order = world.place().await;
    world.apply([&refused(&order)]).await;
    let view = world.orders.view(order.id).await.unwrap();
    assert_eq!(view.status, Status::Failed);
    assert_eq!(view.reason.as_deref(), Some("insufficient_stock"));
    assert_eq!(world.kinds().await, ["created", "failed"]);
}

async fn a_confirmation_waits_for_inventory(world: World) {
    let order = world.place().await;
    let early = world.wish(&order, Wish::Confirm).await;
    assert!(matches!(early, Err(Error::Conflict(_))), "{early:?}");
    let reservation = Uuid::from_u128(7);
    world.apply([&reserved(&order, reservation)]).await;
    world.inventory.asked();
    assert_eq!(
        world.wish(&order, Wish::Confirm).await.unwrap(),
        Status::Confirming
    );
    assert_eq!(world.inventory.asked(), ["confirm", "confirm"]);
    // Asking again goes on from the intention.
    let end = json!({ "reservationId": reservation, "status": "confirmed" });
    world.inventory.answers("confirm", StatusCode::OK, end);
    assert_eq!(
        world.wish(&order, Wish::Confirm).await.unwrap(),
        Status::Confirmed
    );
    assert_eq!(
        world.wish(&order, Wish::Confirm).await.unwrap(),
        Status::Confirmed
    );
    // The event says the same, later.
    world.apply([&confirmed(&order, reservation)]).await;
    assert_eq!(world.kinds().await, ["created", "confirmed"]);
}

async fn a_cancellation_that_came_too_late_shows_what_is_true(world: World) {
    let order = world.place().await;
    let reservation = Uuid::from_u128(7);
    world.apply([&reserved(&order, reservation)]).await;
    assert_eq!(
        world.wish(&order, Wish::Confirm).await.unwrap(),
        Status::Confirming
    );
    // The confirmation was carried out; its answer was lost.
    let end = json!({ "reservationId": reservation, "status": "confirmed" });
    world
        .inventory
        .answers("release", StatusCode::CONFLICT, end);
    let late = world.wish(&order, Wish::Cancel).await;
    assert!(matches!(late, Err(Error::Conflict(_))), "{late:?}");
    assert_eq!(world.status(&order).await, Status::Confirmed);
    assert_eq!(world.kinds().await, ["created", "confirmed"]);
}

async fn stock_for_an_ended_order_is_given_back_by_its_end_event(world: World) {
    let order = world.place().await;
    world.wish(&order, Wish::Cancel).await.unwrap();
    world.apply([&reserved(&order, Uuid::nil())]).await;
    assert_eq!(world.status(&order).await, Status::Cancelled);
    assert_eq!(world.kinds().await, ["created", "cancelled", "cancelled"]);
}

async fn a_product_that_ran_out_is_procured_once(world: World) {
    let (one, two) = (world.place().await, world.place().await);
    let (first, second, third) = (depleted(&one), depleted(&two), depleted(&one));
    let more = message(&StockReplenished {
        product_id: one.product_id.clone(),
        quantity: one.quantity,
        available: 2,
    });
    world.apply([&first, &second]).await;
    assert_eq!(world.history_of(&first).await, ["procurement opened"]);
    assert_eq!(world.history_of(&second).await, ["procurement is open"]);
    let open = world
        .orders
        .procurements(Some(&one.product_id))
        .await
        .unwrap();
    assert!(open.len() == 1 && open[0].closed_at.is_none(), "{open:?}");
    world.apply([&more, &third]).await;
    assert_eq!(world.history_of(&more).await, ["procurement closed"]);
    assert_eq!(world.history_of(&third).await, ["procurement opened"]);
    assert_eq!(world.orders.procurements(None).await.unwrap().len(), 2);
}

async fn strangers_orders_are_noted_and_left_alone(world: World) {
    let mut stranger = world.place().await;
    stranger.id = Uuid::now_v7();
    let event = reserved(&stranger, Uuid::nil());
    world.apply([&event]).await;
    assert_eq!(world.history_of(&event).await, ["unknown order"]);
    let unknown = world.orders.view(stranger.id).await;
    assert!(matches!(unknown, Err(Error::NotFound(_))), "{unknown:?}");
}
