//! The measuring program: the relay from PostgreSQL to RabbitMQ beside a raw client, and the consumer beside itself with
//! other settings, in one run.
//!
//! Absolute figures belong to the machine; compare the ratios. Servers come from `TEST_POSTGRES_URL` and
//! `TEST_AMQP_URL`, else they are started.

mod consume;
mod drain;
mod latency;
mod memory;
mod raw;
mod stage;

use clap::{Args, Command, Parser, Subcommand};

type Failed = Box<dyn std::error::Error + Send + Sync>;
type Measured<T> = Result<T, Failed>;

/// Measures the relay from PostgreSQL to RabbitMQ beside a raw client, and the consumer on the way back.
#[derive(Parser)]
struct Arguments {
    /// Without it, all of them with their defaults.
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Subcommand)]
enum What {
    /// Events a second: a raw publisher with windowed confirms, and the relay draining a backlog.
    Drain(drain::Drain),
    /// Effects a second: a consumer with one transaction for each event, with batches, and with several workers.
    Consume(consume::Consume),
    /// Milliseconds from commit to a raw consumer, writer in the relay's process and apart.
    Latency(latency::Latency),
    /// Peak memory of a relay with a small and with a large backlog.
    Memory(memory::Memory),
    /// A relay by itself, for the other measurements.
    #[command(hide = true)]
    Relay(memory::Child),
}

#[tokio::main]
async fn main() -> Measured<()> {
    match Arguments::parse().what {
        Some(What::Drain(drain)) => drain.run().await,
        Some(What::Consume(consume)) => consume.run().await,
        Some(What::Latency(latency)) => latency.run().await,
        Some(What::Memory(memory)) => memory.run().await,
        Some(What::Relay(child)) => child.run().await,
        None => {
            defaults::<drain::Drain>().run().await?;
            defaults::<consume::Consume>().run().await?;
            defaults::<latency::Latency>().run().await?;
            defaults::<memory::Memory>().run().await
        }
    }
}

/// What the arguments are when none are given.
fn defaults<T: Args>() -> T {
    let command = T::augment_args(Command::new("defaults"));
    let matches = command.get_matches_from(["defaults"]);
    T::from_arg_matches(&matches).unwrap_or_else(|e| e.exit())
}
