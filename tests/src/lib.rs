//! What the end-to-end tests share: the two worlds that every test body runs in, an event, and a handler whose effects
//! can be counted.

mod effect;
mod world;

pub use effect::{Tick, TickHandler, Ticked, effects};
pub use world::{Kind, World, until};

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
