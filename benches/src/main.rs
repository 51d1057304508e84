//! The measuring program: the relay from PostgreSQL to RabbitMQ beside a raw client, in one run.
//!
//! Absolute figures belong to the machine; compare the ratios. Servers come from `TEST_POSTGRES_URL` and
//! `TEST_AMQP_URL`, else they are started.

mod drain;
mod latency;
mod memory;
mod raw;
mod stage;

use clap::{Parser, Subcommand};

type Failed = Box<dyn std::error::Error + Send + Sync>;
type Measured<T> = Result<T, Failed>;

/// Measures the relay from PostgreSQL to RabbitMQ beside a raw client.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Events a second: a raw publisher with windowed confirms, and the relay draining a backlog.
    Drain(drain::Drain),
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
        What::Drain(drain) => drain.run().await,
        What::Latency(latency) => latency.run().await,
        What::Memory(memory) => memory.run().await,
        What::Relay(child) => child.run().await,
    }
}
