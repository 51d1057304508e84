//! The engine of Pillarbox. Use it through the package `pillarbox`.

#[cfg(not(any(feature = "postgres", feature = "sqlite")))]
compile_error!("pillarbox needs a database: switch on its feature `postgres` or `sqlite`");

pub mod admin;
mod backoff;
mod backpressure;
mod breaker;
pub mod config;
pub mod connection;
pub mod consumer;
pub mod cursor;
#[cfg(feature = "postgres")]
pub mod debezium;
mod destination;
pub mod error;
mod event;
pub mod failure;
pub mod lease;
pub mod memory;
mod outbox;
#[doc(hidden)]
pub mod pause;
pub mod relay;
mod retention;
mod running;
mod signal;
#[cfg(any(test, feature = "simulation"))]
#[doc(hidden)]
pub mod simulation;
#[doc(hidden)]
pub mod store;
mod supervise;
mod wake;
pub mod window;

pub use admin::Admin;
pub use backpressure::Backlog;
pub use breaker::BreakerState;
pub use config::{Config, Settings};
#[cfg(feature = "postgres")]
pub use connection::migration_script;
pub use connection::{Connection, Database, Pool, migrate, migrate_with, repartition};
pub use consumer::{Consumer, ConsumerSettings, Context, Delivery, Effect, Failure, Handler};
pub use destination::{Reanchored, Start};
pub use error::{Error, Kind, Result};
pub use event::{Event, Key};
pub use outbox::{InTransaction, Insert, Outbox, Param, Scheduled};
pub use pillarbox_transport as transport;
pub use relay::{Relay, RelaySettings};
pub use retention::RetentionSettings;
pub use running::{Health, Running};
