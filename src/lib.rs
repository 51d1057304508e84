//! An embeddable, broker-agnostic transactional outbox: commit an event with your data; it reaches the broker, and its
//! effect happens once.
//!
//! | to | use |
//! |---|---|
//! | write events in your own transaction | [`Outbox`], [`Event`] |
//! | publish what was committed | [`Relay`] |
//! | apply each event once | [`Consumer`], [`Handler`] |
//! | send a mail or make a call for each event | [`Consumer`], [`Effect`] |
//! | make or complete the tables | [`migrate`] |
//! | read it all from one file | [`Config`], [`connect`], [`relays`] |
//! | write a transport for another broker | [`transport`] |
//!
//! ```no_run
//! use pillarbox::{Config, Event};
//!
//! #[derive(serde::Serialize)]
//! struct OrderPlaced { order: i64 }
//!
//! impl Event for OrderPlaced {
//!     const TYPE: &'static str = "shop.order.placed";
//!     const TOPIC: &'static str = "shop.events";
//! }
//!
//! # async fn f() -> pillarbox::Result<()> {
//! let settings = Config::load("shop.toml")?.settings()?;
//! let database = settings.store.open().await?;
//! pillarbox::migrate(&database).await?;
//!
//! let outbox = settings.new_outbox(&database);
//! let broker = pillarbox::connect(&settings.transport).await?;
//! let relay = settings.new_relay(&outbox, broker).spawn();
//! // … outbox.enqueue(&mut transaction, &OrderPlaced { order: 7 }).await? …
//! relay.shutdown().await
//! # }
//! ```
//!
//! Nothing needs the file: [`Outbox::new`] takes a pool of your own, [`Relay::new`] any [`transport::Transport`].
//!
//! # Features
//!
//! | feature | brings | default |
//! |---|---|---|
//! | `postgres` | PostgreSQL | yes |
//! | `sqlite` | SQLite, compiled in | |
//! | `amqp` | RabbitMQ, as the module `amqp` | yes |
//! | `nats` | NATS JetStream, as the module `nats` | |
//! | `tls-ring` | TLS to database and broker, with ring | yes |
//! | `tls-aws-lc-rs` | the same with AWS-LC | |
//!
//! The [`transport::memory`] broker is always there.

use std::sync::Arc;

#[cfg(feature = "amqp")]
#[doc(inline)]
pub use pillarbox_amqp as amqp;
#[doc(inline)]
pub use pillarbox_core::{config::TransportSettings, failure::Retry, *};
#[cfg(feature = "nats")]
#[doc(inline)]
pub use pillarbox_nats as nats;

use transport::{Transport, memory::Memory};

#[cfg(test)]
mod tests;

/// The words for `[transport] kind`.
const KINDS: [&str; 3] = ["memory", "amqp", "nats"];
/// Those of later versions.
const LATER: [&str; 1] = ["kafka"];

/// Makes the transport that the settings select. Connects to nothing yet: a program starts without its broker, and the
/// relay waits for it.
///
/// With `memory` each call makes a broker of its own: call it once in a process, and share what it answers.
///
/// # Errors
/// [`Kind::Configuration`] names the file or environment variable, the key, what was found and what was expected; for an
/// unknown key or kind, the nearest known one. No secret is shown.
///
/// ```
/// # async fn f() -> pillarbox::Result<()> {
/// let settings = pillarbox::Config::parse("transport.kind = 'memory'")?.settings()?;
/// let broker = pillarbox::connect(&settings.transport).await?;
/// assert_eq!(broker.kind(), "memory");
/// # Ok(()) }
/// ```
pub async fn connect(settings: &TransportSettings) -> Result<Arc<dyn Transport>> {
    match settings.kind(&KINDS, &LATER)? {
        "amqp" => amqp(settings),
        "nats" => nats(settings),
        _ => {
            settings.no_table("memory")?;
            Ok(Arc::new(Memory::new()))
        }
    }
}

/// Makes a relay for each destination that this program [relays to](Settings::relayed), each with its own broker; those without
/// a broker of their own share `transport`, which is what `[transport]` selects. Connects to nothing yet.
///
/// # Errors
/// As [`connect`].
///
/// ```
/// # async fn f(database: pillarbox::Database) -> pillarbox::Result<()> {
/// let settings = pillarbox::Config::parse(
///     r#"
///     transport.kind = "memory"
///     [destinations.audit]
///     start = "now"
///     transport = { kind = "amqp", amqp = { url = "amqp://localhost" } }
///     "#,
/// )?
/// .settings()?;
/// let outbox = settings.new_outbox(&database);
/// let broker = pillarbox::connect(&settings.transport).await?;
/// for relay in pillarbox::relays(&settings, &outbox, broker).await? {
///     let _running = relay.spawn();
/// }
/// # Ok(()) }
/// ```
pub async fn relays(
    settings: &Settings,
    outbox: &Outbox,
    transport: Arc<dyn Transport>,
) -> Result<Vec<Relay>> {
    let mut relays = Vec::new();
    for name in settings.relayed() {
        let own = settings.destinations.get(name);
        let broker = match own.and_then(|d| d.transport.as_ref()) {
            Some(own) => connect(own).await?,
            None => transport.clone(),
        };
        relays.push(settings.new_relay_to(name, outbox, broker)?);
    }
    Ok(relays)
}

#[cfg(feature = "amqp")]
fn amqp(settings: &TransportSettings) -> Result<Arc<dyn Transport>> {
    let amqp = amqp::Amqp::new(settings.table("amqp")?);
    Ok(Arc::new(amqp.map_err(|e| refused(settings, "amqp", &e))?))
}

#[cfg(not(feature = "amqp"))]
fn amqp(settings: &TransportSettings) -> Result<Arc<dyn Transport>> {
    Err(left_out(settings, "amqp"))
}

#[cfg(feature = "nats")]
fn nats(settings: &TransportSettings) -> Result<Arc<dyn Transport>> {
    let nats = nats::Nats::new(settings.table("nats")?);
    Ok(Arc::new(nats.map_err(|e| refused(settings, "nats", &e))?))
}

#[cfg(not(feature = "nats"))]
fn nats(settings: &TransportSettings) -> Result<Arc<dyn Transport>> {
    Err(left_out(settings, "nats"))
}

/// An adapter's error about its own table.
#[cfg(any(feature = "amqp", feature = "nats"))]
fn refused(settings: &TransportSettings, kind: &str, e: &transport::Error) -> Error {
    let (text, operation) = (e.to_string(), format!("{}: ", e.operation()));
    settings.refuse(kind, text.strip_prefix(&operation).unwrap_or(&text))
}

#[cfg(not(all(feature = "amqp", feature = "nats")))]
fn left_out(settings: &TransportSettings, feature: &str) -> Error {
    let text =
        format!("this program was built without the feature {feature:?}, which is needed for it");
    settings.refuse("kind", &text)
}
