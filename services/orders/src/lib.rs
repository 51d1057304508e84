//! The orders service: takes orders, has their stock reserved, and follows the inventory service's events from then on.

mod change;
mod client;
pub mod handlers;
mod http;
pub mod lifecycle;
pub mod repository;
mod use_cases;

use std::sync::Arc;

use async_trait::async_trait;
use axum::Router;
use pillarbox::{
    Consumer, Database, Outbox, Relay, Settings, lease::LeaseTerm, transport::Transport,
};
use pillarbox_contracts::{
    StockConfirmed, StockDepleted, StockFailed, StockReleased, StockReplenished, StockReserved,
    check,
};
use pillarbox_host::{Fatal, Result, Service, Transactions, http::HttpSettings};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use client::{Away, ClientSettings, InventoryClient};
use handlers::{Procure, StockMoved};
use repository::{MIGRATIONS, repository};
pub use use_cases::{Orders, Wish};

/// Its section of the configuration.
pub const SECTION: &str = "orders";
/// The source of its events, unless `[orders.outbox] source` says otherwise.
pub const SOURCE: &str = "orders-service";
/// Its consumer group.
pub const GROUP: &str = "orders";

/// `[orders]`, apart from the engine's tables.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrdersSettings {
    /// `[orders.http]`
    pub http: HttpSettings,
    /// `[orders.inventory]`
    #[serde(default)]
    pub inventory: ClientSettings,
}

/// The service.
pub struct OrdersService {
    settings: Settings,
    http: HttpSettings,
    transport: Arc<dyn Transport>,
    outbox: Outbox,
    orders: Orders,
    transactions: Transactions,
}

impl OrdersService {
    /// Opens and migrates its database. Waits for one that is away.
    ///
    /// # Errors
    /// What waiting does not mend.
    pub async fn open(
        settings: Settings,
        own: OrdersSettings,
        transport: Arc<dyn Transport>,
        stop: &CancellationToken,
    ) -> Result<Arc<Self>, Fatal> {
        let inventory = InventoryClient::new(&own.inventory)?;
        let database = pillarbox_host::open(&settings, &MIGRATIONS, stop).await?;
        let outbox = settings.new_outbox(&database);
        Ok(Arc::new(Self {
            orders: Orders::new(outbox.clone(), inventory)?,
            transactions: Transactions::new(&database)?,
            settings,
            http: own.http,
            transport,
            outbox,
        }))
    }
}

#[async_trait]
impl Service for OrdersService {
    fn name(&self) -> &'static str {
        SECTION
    }

    fn http(&self) -> &HttpSettings {
        &self.http
    }

    fn routes(self: Arc<Self>) -> Router {
        http::routes(self.orders.clone())
    }

    fn database(&self) -> &Database {
        self.outbox.database()
    }

    fn relay(&self) -> Relay {
        let source = self.settings.outbox.source.as_deref().unwrap_or(SOURCE);
        self.settings
            .new_relay(&self.outbox, self.transport.clone())
            .source(source)
    }

    fn consumer(&self) -> Consumer {
        self.settings
            .new_consumer(&self.outbox, self.transport.clone(), GROUP)
            .check(check)
            .on::<StockReserved>(StockMoved)
            .on::<StockConfirmed>(StockMoved)
            .on::<StockReleased>(StockMoved)
            .on::<StockFailed>(StockMoved)
            .on::<StockDepleted>(Procure)
            .on::<StockReplenished>(Procure)
    }

    fn lease(&self) -> LeaseTerm {
        self.settings.relay.lease
    }

    async fn check(&self) -> Result<()> {
        // Any row will do; that the statement runs shows database and schema.
        let mut reading = self.transactions.read().await?;
        repository(reading.connection()).order(Uuid::nil()).await?;
        Ok(())
    }
}
