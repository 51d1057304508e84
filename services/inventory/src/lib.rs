//! The inventory service: it alone knows what there is, holds stock for orders, and tells about every change by an event
//! that is committed with the change.

pub mod handlers;
mod http;
pub mod repository;
pub mod stock;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::Router;
use pillarbox::{
    Consumer, Database, Outbox, Relay, Settings, lease::LeaseTerm, transport::Transport,
};
use pillarbox_contracts::{OrderCancelled, OrderFailed, check};
use pillarbox_host::{Fatal, Result, Service, Transactions, http::HttpSettings};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use handlers::OrderEnded;
use repository::{MIGRATIONS, repository};
use stock::Stock;

/// Its section of the configuration.
pub const SECTION: &str = "inventory";
/// The source of its events, unless `[inventory.outbox] source` says otherwise.
pub const SOURCE: &str = "inventory-service";
/// Its consumer group.
pub const GROUP: &str = "inventory";

/// `[inventory]`, apart from the engine's tables.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InventorySettings {
    /// `[inventory.http]`
    pub http: HttpSettings,
    /// `[inventory.reservations]`
    #[serde(default)]
    pub reservations: ReservationSettings,
}

/// `[inventory.reservations]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReservationSettings {
    /// How long a reservation holds its stock. Defaults to 15 minutes.
    #[serde(with = "humantime_serde")]
    pub hold: Duration,
}

impl Default for ReservationSettings {
    fn default() -> Self {
        Self {
            hold: Duration::from_secs(15 * 60),
        }
    }
}

/// The service.
pub struct Inventory {
    settings: Settings,
    http: HttpSettings,
    transport: Arc<dyn Transport>,
    outbox: Outbox,
    stock: Stock,
    transactions: Transactions,
}

impl Inventory {
    /// Opens and migrates its database. Waits for one that is away.
    ///
    /// # Errors
    /// What waiting does not mend.
    pub async fn open(
        settings: Settings,
        own: InventorySettings,
        transport: Arc<dyn Transport>,
        stop: &CancellationToken,
    ) -> Result<Arc<Self>, Fatal> {
        let database = pillarbox_host::open(&settings, &MIGRATIONS, stop).await?;
        let outbox = settings.new_outbox(&database);
        Ok(Arc::new(Self {
            stock: Stock::new(outbox.clone(), own.reservations.hold)?,
            transactions: Transactions::new(&database)?,
            settings,
            http: own.http,
            transport,
            outbox,
        }))
    }
}

#[async_trait]
impl Service for Inventory {
    fn name(&self) -> &'static str {
        SECTION
    }

    fn http(&self) -> &HttpSettings {
        &self.http
    }

    fn routes(self: Arc<Self>) -> Router {
        http::routes(self.stock.clone())
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
            .on::<OrderCancelled>(OrderEnded)
            .on::<OrderFailed>(OrderEnded)
    }

    fn lease(&self) -> LeaseTerm {
        self.settings.relay.lease
    }

    async fn check(&self) -> Result<()> {
        // Any row will do; that the statement runs shows database and schema.
        let mut reading = self.transactions.read().await?;
        repository(reading.connection())
            .reservation(Uuid::nil())
            .await?;
        Ok(())
    }
}
