//! PostgreSQL by its URL.

use std::error::Error as _;

use sqlx::{
    ConnectOptions as _, Connection as _, PgConnection, PgPool, Row as _,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use super::{FORMS, OPERATION, StoreSettings, nearest, parameters, shown};
use crate::error::{Error, Kind, Result, is_away, sqlstate};

/// What the driver reads from a URL's query; it ignores anything else, and a misspelt `sslmode` must not be ignored.
const PARAMETERS: [&str; 16] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "application_name",
    "options",
];
const SSL_MODES: [&str; 6] = [
    "disable",
    "allow",
    "prefer",
    "require",
    "verify-ca",
    "verify-full",
];

pub(super) fn pool(settings: &StoreSettings, url: &str) -> Result<PgPool> {
    let mut options = options(settings, url)?;
    if options.get_application_name().is_none() {
        options = options.application_name(settings.scope.section().unwrap_or("pillarbox"));
    }
    let pool = PgPoolOptions::new()
        .max_connections(settings.max_connections)
        .acquire_timeout(settings.connect_timeout)
        .test_before_acquire(false)
        .before_acquire(|connection, _| Box::pin(usable(connection)))
        .connect_lazy_with(options);
    Ok(pool)
}

pub(super) async fn reach(settings: &StoreSettings, pool: &PgPool) -> Result<()> {
    let options = pool.connect_options();
    let connect = tokio::time::timeout(settings.connect_timeout, options.connect());
    let connection = connect
        .await
        .map_err(|_| settings.late(&target(&options)))?
        .map_err(|e| failed(&options, e))?;
    // It is there; how it ends does not matter.
    drop(connection.close().await);
    Ok(())
}

/// Takes the ping's place. A `begin` that was cancelled half-way leaves its transaction open, and the driver does not know
/// (sqlx 0.9.0): what the next borrower writes would be undone with it.
async fn usable(connection: &mut PgConnection) -> sqlx::Result<bool> {
    // Alike unless a transaction began before this statement; one simple query, because the extended protocol's steps
    // each set the second clock anew.
    let left_open: bool = sqlx::raw_sql("SELECT now() <> statement_timestamp()")
        .fetch_one(&mut *connection)
        .await?
        .try_get(0)?;
    if left_open {
        tracing::warn!("rolled back a transaction that a cancelled task left open in the pool");
        sqlx::raw_sql("ROLLBACK").execute(connection).await?;
    }
    Ok(true)
}

fn options(settings: &StoreSettings, url: &str) -> Result<PgConnectOptions> {
    for (name, value) in parameters(url) {
        let plain = name.split('[').next().unwrap_or(name);
        if ["user", "password"].contains(&plain) {
            let text =
                "user and password before the host: postgres://user:password@host:5432/database";
            return Err(settings.wrong(format!("the parameter {plain:?}"), text));
        }
        if !PARAMETERS.contains(&plain) {
            let near = nearest(plain, PARAMETERS.into_iter());
            let near = near.map(|n| format!(" ({n}?)")).unwrap_or_default();
            let expected = format!("one of {}{near}", PARAMETERS.join(", "));
            return Err(settings.wrong(shown(plain), expected));
        }
        if ["sslmode", "ssl-mode"].contains(&plain) && !SSL_MODES.contains(&value) {
            let expected = format!("one of {}", SSL_MODES.join(", "));
            return Err(settings.wrong("an unknown sslmode", expected));
        }
    }
    let options: PgConnectOptions = url.parse().map_err(|e: sqlx::Error| {
        // The driver's reasons ("invalid port number") show nothing of the URL.
        let reason = e.source().map(ToString::to_string).unwrap_or_default();
        let hint = "with '/', '?', '#' and '@' in a password as %2F, %3F, %23 and %40";
        settings.wrong(
            format!("no URL of PostgreSQL: {reason}"),
            format!("{FORMS}, {hint}"),
        )
    })?;
    let database = options.get_database().unwrap_or_default();
    if url.contains('#') || database.contains(['@', '/', ':']) {
        let expected =
            "the characters '#', '@', '/' and ':' of a password as %23, %40, %2F and %3A";
        return Err(settings.wrong(
            "'#', or '@', '/' or ':' in the database's name (not shown)",
            expected,
        ));
    }
    Ok(options)
}

/// What is shown of the address.
fn target(options: &PgConnectOptions) -> String {
    let at = match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    };
    format!("PostgreSQL at {at} (database {:?})", database(options))
}

fn database(options: &PgConnectOptions) -> &str {
    options.get_database().unwrap_or(options.get_username())
}

fn failed(options: &PgConnectOptions, e: sqlx::Error) -> Error {
    let (target, user) = (target(options), options.get_username());
    let state = sqlstate(&e).unwrap_or_default().into_owned();
    let (kind, text) = match state.as_str() {
        "28P01" | "28000" => (
            Kind::Configuration,
            format!("{target} refuses the user {user:?} or its password"),
        ),
        "3D000" => (
            Kind::Configuration,
            format!(
                "{target} has no database {:?}: create it, or name another",
                database(options)
            ),
        ),
        "53300" => (
            Kind::Unavailable,
            format!("{target} has no connection left"),
        ),
        _ if matches!(e, sqlx::Error::Tls(_)) => {
            (Kind::Unavailable, format!("{target}: TLS failed"))
        }
        _ if matches!(e, sqlx::Error::Io(_)) => {
            (Kind::Unavailable, format!("{target} cannot be reached"))
        }
        _ if is_away(&e) => (
            Kind::Unavailable,
            format!("{target} does not take connections now"),
        ),
        _ => (
            Kind::Configuration,
            format!("{target} refuses the connection"),
        ),
    };
    Error::new(kind, OPERATION, text).caused_by(e)
}
