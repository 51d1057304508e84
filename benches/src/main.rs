//! The measuring program: the relay from PostgreSQL to RabbitMQ beside a raw client, and the consumer beside itself with
//! other settings, in one run.
//!
//! Absolute figures belong to the machine; compare the ratios. Servers come from `TEST_POSTGRES_URL` and
//! `TEST_AMQP_URL`, else they are started.

mod backlog;
mod consume;
mod discard;
mod drain;
mod enqueue;
mod idle;
mod latency;
mod long;
mod memory;
mod plot;
mod process;
mod raw;
mod relays;
mod retention;
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
    /// Transactions a second of writers with an enqueue, beside a plain table and nothing; bytes of WAL; lock waits.
    Enqueue(enqueue::Enqueue),
    /// Queries a second and processor time of a relay and a consumer that have nothing to do.
    Idle(idle::Idle),
    /// The relay beside transactions that stay open for the whole run.
    Long(long::Long),
    /// One relay process, and two that share the partitions.
    Relays(relays::Relays),
    /// Large backlogs beside small ones, and the memory of the relay that drains them.
    Backlog(backlog::Backlog),
    /// Sizes of the tables at load and with a short retention, as a plot.
    Retention(retention::Retention),
    /// A relay by itself, for the other measurements.
    #[command(hide = true)]
    Relay(memory::Child),
    /// A relay or a consumer by itself, for the other measurements.
    #[command(hide = true)]
    Part(process::Part),
}

#[tokio::main]
async fn main() -> Measured<()> {
    match Arguments::parse().what {
        Some(What::Drain(drain)) => drain.run().await,
        Some(What::Consume(consume)) => consume.run().await,
        Some(What::Latency(latency)) => latency.run().await,
        Some(What::Memory(memory)) => memory.run().await,
        Some(What::Enqueue(enqueue)) => enqueue.run().await,
        Some(What::Idle(idle)) => idle.run().await,
        Some(What::Long(long)) => long.run().await,
        Some(What::Relays(relays)) => relays.run().await,
        Some(What::Backlog(backlog)) => backlog.run().await,
        Some(What::Retention(retention)) => retention.run().await,
        Some(What::Relay(child)) => child.run().await,
        Some(What::Part(part)) => part.run().await,
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
