//! What every service of the shop stands in, apart from what it does: transactions of either database, its own
//! migrations, the HTTP shell, health and metrics, and the order in which all of it starts and stops.
//!
//! Knows no event, no route and no table of any service.

mod engine;
mod error;
pub mod http;
mod migrations;
mod program;
mod service;
mod status;
mod telemetry;
mod transaction;

pub use error::{Error, Result};
pub use migrations::{Migrations, migrate};
pub use program::{Fatal, program};
pub use service::{Exclusive, Listening, Service, connect, open, run};
pub use status::Status;
pub use telemetry::metrics_text;
pub use transaction::{Reading, Transaction, Transactions, complete};
