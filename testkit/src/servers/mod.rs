//! Real servers for tests: PostgreSQL, RabbitMQ and NATS.
//!
//! Where a server comes from, in this order:
//! 1. its address in the environment, `TEST_POSTGRES_URL`, `TEST_AMQP_URL` or `TEST_NATS_URL` (never `PILLARBOX_…`: a test
//!    must not write into what a program is configured for);
//! 2. the programs installed on this machine, started on free loopback ports with their data in a temporary folder.
//!
//! [`postgres`], [`rabbitmq`] and [`nats`] give one shared server for each process; a test takes a database, a vhost or an
//! account of its own from it, so that all tests run side by side. A test that stops or restarts a server starts its own:
//! [`Postgres::start`], [`RabbitMq::start`], [`Nats::start`]. Several run beside each other, and beside servers on the standard ports, as
//! root and as an ordinary user. What was started ends with the process that started it, even when that is killed.
//!
//! ```no_run
//! # async fn test() -> Result<(), pillarbox_testkit::servers::ServerError> {
//! use pillarbox_testkit::servers;
//! let Some(server) = servers::required(servers::postgres().await) else { return Ok(()) };
//! let url = server.create_database().await?;
//! # Ok(()) }
//! ```

use std::io::Write as _;

use tokio::sync::OnceCell;

mod nats;
mod postgres;
mod process;
mod rabbitmq;

pub use nats::Nats;
pub use postgres::{Postgres, Shutdown};
pub use rabbitmq::RabbitMq;

/// Why there is no such server, or why it did not do as told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// No address in the environment and no programs on this machine.
    #[error(
        "{server} is not installed here. Install it (apt-get install {packages}; testkit/install-servers.sh does that), \
         or give the address of one in {variable}"
    )]
    Missing {
        /// The server's name.
        server: &'static str,
        /// The Debian packages that bring it.
        packages: &'static str,
        /// The environment variable that takes an address instead.
        variable: &'static str,
    },
    /// The server, or the program that was asked to change it, failed.
    #[error("{server} could not {operation}: {reason}{}{log}", if log.is_empty() { "" } else { "; its last words:\n" })]
    Failed {
        /// The server's name.
        server: &'static str,
        /// What was asked of it.
        operation: &'static str,
        /// What went wrong.
        reason: String,
        /// The end of its log, empty when there is none.
        log: String,
    },
    /// The address came from the environment, and what was asked takes more than an address.
    #[error(
        "cannot {operation} the {server} from {variable}: start one with {server}::start() for that"
    )]
    NotOurs {
        /// The server's name, as its type is called here.
        server: &'static str,
        /// What was asked.
        operation: &'static str,
        /// Where the address came from.
        variable: &'static str,
    },
    /// A file, a process or a socket of this machine failed.
    #[error("{operation}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The server refused a statement or a login.
    #[error("{operation}: {source}")]
    Sql {
        /// What was being done.
        operation: &'static str,
        /// The driver's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl ServerError {
    fn io(operation: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }

    fn sql(operation: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Sql {
            operation,
            source: source.into(),
        }
    }

    /// Whether the server is just not there, as it may be on a laptop. Everything else is a fault.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}

/// The PostgreSQL that all tests of this process share: the one at `TEST_POSTGRES_URL`, else one that is started now.
///
/// # Errors
/// See [`Postgres::start`].
pub async fn postgres() -> Result<&'static Postgres, ServerError> {
    static SHARED: OnceCell<Postgres> = OnceCell::const_new();
    SHARED.get_or_try_init(Postgres::given_or_started).await
}

/// The RabbitMQ that all tests of this process share: the one at `TEST_AMQP_URL`, else one that is started now.
///
/// # Errors
/// See [`RabbitMq::start`].
pub async fn rabbitmq() -> Result<&'static RabbitMq, ServerError> {
    static SHARED: OnceCell<RabbitMq> = OnceCell::const_new();
    SHARED.get_or_try_init(RabbitMq::given_or_started).await
}

/// The NATS that all tests of this process share: the one at `TEST_NATS_URL`, else one that is started now.
///
/// # Errors
/// See [`Nats::start`].
pub async fn nats() -> Result<&'static Nats, ServerError> {
    static SHARED: OnceCell<Nats> = OnceCell::const_new();
    SHARED.get_or_try_init(Nats::given_or_started).await
}

/// The server, or `None` when it is missing and may be: then the test prints that it is skipped, and returns.
///
/// # Panics
/// When a server is missing and `CI` or `PILLARBOX_REQUIRE_SERVERS` is set (to anything but `0`, `false` or nothing), and
/// always when it is there but failed: a broken server must not look like a missing one.
#[track_caller]
pub fn required<T>(server: Result<T, ServerError>) -> Option<T> {
    let error = match server {
        Ok(server) => return Some(server),
        Err(error) => error,
    };
    let must = ["CI", "PILLARBOX_REQUIRE_SERVERS"]
        .into_iter()
        .find(|name| is_set(name));
    if let (true, None) = (error.is_missing(), must) {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test");
        // Straight to stderr: the test harness swallows what a passing test prints.
        let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {error}");
        return None;
    }
    panic!(
        "{error}{}",
        must.map(|name| format!(" ({name} is set, so it is required)"))
            .unwrap_or_default()
    );
}

fn is_set(name: &str) -> bool {
    variable(name).is_some_and(|value| !matches!(value.as_str(), "0" | "false"))
}

/// An environment variable, where empty counts as absent.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A name that no other test has: for databases and vhosts.
fn fresh_name() -> String {
    format!("pillarbox_test_{}", uuid::Uuid::now_v7().simple())
}
