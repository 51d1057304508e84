//! The engine of Pillarbox. Use it through the package `pillarbox`.

pub mod connection;
pub mod cursor;
pub mod error;
mod event;
pub mod failure;
pub mod lease;
#[doc(hidden)]
pub mod store;

pub use connection::{Connection, Database, Pool, migrate, migrate_with};
pub use error::{Error, Kind, Result};
pub use event::{Event, Key};
pub use pillarbox_transport as transport;
