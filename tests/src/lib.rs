//! What the end-to-end tests share: the two worlds that every test body runs in, an event, and a handler whose effects
//! can be counted.
//!
//! What a test believes comes from plain SQL ([`tables`]) and a raw AMQP client ([`wire`]), never from the engine.

pub mod counts;
mod effect;
pub mod ledger;
pub mod nats;
pub mod node;
pub mod one_world;
pub mod tables;
pub mod wire;
mod world;

pub use effect::{Call, Tick, TickHandler, Ticked, effects, numbers_by_key};
pub use world::{Kind, TOPIC, Way, World, amqp_config, connect, open, until};

/// Runs one body in both worlds: SQLite with the in-process transport, PostgreSQL with RabbitMQ.
#[macro_export]
macro_rules! in_both_worlds {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        mod $name {
            $(#[$doc])*
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn embedded() {
                super::$name($crate::World::embedded().await).await;
            }
            $(#[$doc])*
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn servers() {
                if let Some(world) = $crate::World::servers().await {
                    super::$name(world).await;
                }
            }
        }
    )+};
}

/// Runs a body on PostgreSQL and RabbitMQ alone. Its name stands in [`one_world::CASES`], with the reason.
#[macro_export]
macro_rules! on_servers_alone {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        mod $name {
            $(#[$doc])*
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn servers() {
                $crate::one_world::assert_listed(stringify!($name), $crate::Kind::Servers);
                if let Some(world) = $crate::World::servers().await {
                    super::$name(world).await;
                }
            }
        }
    )+};
}

/// Runs a body on SQLite and `memory` alone. Its name stands in [`one_world::CASES`], with the reason.
#[macro_export]
macro_rules! embedded_alone {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        mod $name {
            $(#[$doc])*
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn embedded() {
                $crate::one_world::assert_listed(stringify!($name), $crate::Kind::Embedded);
                super::$name($crate::World::embedded().await).await;
            }
        }
    )+};
}

/// Runs bodies of other worlds on PostgreSQL and NATS as well.
#[macro_export]
macro_rules! on_nats_too {
    ($($module:ident::$name:ident),+ $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            if let Some(world) = $crate::World::nats().await {
                super::$module::$name(world).await;
            }
        }
    )+};
}

/// Whether the long cases run: many seeds, many rounds (`make soak`).
#[must_use]
pub fn is_soak() -> bool {
    std::env::var("PILLARBOX_SOAK").is_ok_and(|v| !matches!(v.as_str(), "" | "0" | "false"))
}

/// A test's seed, shown when the test fails. `PILLARBOX_SEED` repeats one.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var("PILLARBOX_SEED").ok();
    let seed = given.map_or_else(rand::random, |text| text.parse().expect("a number"));
    eprintln!("PILLARBOX_SEED={seed}");
    seed
}

/// Shows the log where `RUST_LOG` is set.
pub(crate) fn show_log() {
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        // Another test was first.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .try_init();
    }
}
