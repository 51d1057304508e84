//! The statements that writers run, on either database.

use std::time::SystemTime;

use super::Scheduled;
use crate::connection::{Connection, Database};

pub(super) struct Statements {
    pub(super) one: String,
    at: String,
    cancel: String,
    #[cfg(feature = "postgres")]
    many: String,
}

/// One row of the log, as the contract's columns.
pub(super) struct Row {
    pub(super) topic: String,
    pub(super) kind: String,
    pub(super) key: Option<String>,
    pub(super) payload: Option<Vec<u8>>,
    pub(super) content_type: Option<String>,
    pub(super) headers: Option<String>,
    pub(super) id: String,
    pub(super) version: i64,
    pub(super) attributes: Option<String>,
}

/// Whole microseconds since 1970, rounded up: never earlier than asked for. What lies before 1970 has long come.
pub(super) fn micros(at: SystemTime) -> i64 {
    let after = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(after.as_nanos().div_ceil(1_000)).unwrap_or(i64::MAX)
}

/// The contract's columns of one row, in order, onto a query of either database.
macro_rules! bind {
    ($query:expr, $row:expr) => {
        $query
            .bind($row.topic)
            .bind($row.kind)
            .bind($row.key)
            .bind($row.payload)
            .bind($row.content_type)
            .bind($row.headers)
            .bind($row.id)
            .bind($row.version)
            .bind($row.attributes)
    };
}

/// Of one event; its delivery takes the same before it looks whether it was cancelled.
#[cfg(feature = "postgres")]
const LOCK: &str =
    "SELECT pg_advisory_xact_lock(hashtextextended('pillarbox cancel ' || $1::text, 0))";

const COLUMNS: &str = "topic, type, key, payload, content_type, headers, id, version, attributes";

impl Statements {
    pub(super) fn new(database: &Database) -> Self {
        let schema = database.store().schema();
        match database.pool() {
            #[cfg(feature = "postgres")]
            Some(crate::Pool::Postgres(_)) => Self {
                one: format!(
                    "INSERT INTO \"{schema}\".outbox ({COLUMNS}) VALUES ($1::text, $2::text, $3::text, $4::bytea, \
                     $5::text, $6::text::jsonb, $7::text::uuid, $8::bigint::int, $9::text::jsonb)"
                ),
                at: format!(
                    "INSERT INTO \"{schema}\".outbox ({COLUMNS}, deliver_at) VALUES ($1::text, $2::text, $3::text, $4::bytea, \
                     $5::text, $6::text::jsonb, $7::text::uuid, $8::bigint::int, $9::text::jsonb, \
                     timestamptz 'epoch' + $10::bigint * interval '1 microsecond')"
                ),
                cancel: format!(
                    "INSERT INTO \"{schema}\".cancelled (id, deliver_at) SELECT $1::text, t.at \
                     FROM (SELECT timestamptz 'epoch' + $2::bigint * interval '1 microsecond' AS at) t \
                     WHERE t.at > clock_timestamp() ON CONFLICT (id) DO UPDATE SET deliver_at = excluded.deliver_at"
                ),
                // With ORDINALITY, because positions are drawn in the order of the rows.
                many: format!(
                    "INSERT INTO \"{schema}\".outbox ({COLUMNS}) SELECT a, b, c, d, e, f::jsonb, g::uuid, h::int, i::jsonb \
                     FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::text[], $6::text[], $7::text[], \
                     $8::bigint[], $9::text[]) WITH ORDINALITY AS r (a, b, c, d, e, f, g, h, i, n) ORDER BY n"
                ),
            },
            _ => Self {
                one: format!(
                    "INSERT INTO \"{schema}_outbox\" ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)"
                ),
                at: format!(
                    "INSERT INTO \"{schema}_outbox\" ({COLUMNS}, deliver_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"
                ),
                // The clock of the engine's tables; see their schema.
                cancel: format!(
                    "INSERT INTO \"{schema}_cancelled\" (id, deliver_at) SELECT ?1, ?2 \
                     WHERE ?2 > CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000 \
                     ON CONFLICT (id) DO UPDATE SET deliver_at = excluded.deliver_at"
                ),
                #[cfg(feature = "postgres")]
                many: String::new(),
            },
        }
    }

    pub(super) async fn run(
        &self,
        connection: &mut Connection<'_>,
        rows: Vec<Row>,
    ) -> sqlx::Result<()> {
        match connection {
            #[cfg(feature = "postgres")]
            Connection::Postgres(c) => match <[Row; 1]>::try_from(rows) {
                Ok([row]) => {
                    let query = sqlx::query(sqlx::AssertSqlSafe(self.one.as_str()));
                    bind!(query, row).execute(&mut **c).await.map(drop)
                }
                Err(rows) => self.run_many(c, rows).await,
            },
            #[cfg(feature = "sqlite")]
            Connection::Sqlite(c) => {
                for row in rows {
                    let query = sqlx::query(sqlx::AssertSqlSafe(self.one.as_str()));
                    bind!(query, row).execute(&mut **c).await?;
                }
                Ok(())
            }
        }
    }

    pub(super) async fn run_at(
        &self,
        connection: &mut Connection<'_>,
        row: Row,
        at: i64,
    ) -> sqlx::Result<()> {
        let sql = sqlx::AssertSqlSafe(self.at.as_str());
        match connection {
            #[cfg(feature = "postgres")]
            Connection::Postgres(c) => {
                let query = bind!(sqlx::query(sql), row).bind(at);
                query.execute(&mut **c).await.map(drop)
            }
            #[cfg(feature = "sqlite")]
            Connection::Sqlite(c) => {
                let query = bind!(sqlx::query(sql), row).bind(at);
                query.execute(&mut **c).await.map(drop)
            }
        }
    }

    /// Behind the lock, because the event's delivery takes it too, looks whether it is cancelled, and goes on.
    pub(super) async fn cancel(
        &self,
        connection: &mut Connection<'_>,
        event: &Scheduled,
    ) -> sqlx::Result<u64> {
        let (id, at) = (event.id.to_string(), micros(event.at));
        let sql = sqlx::AssertSqlSafe(self.cancel.as_str());
        match connection {
            #[cfg(feature = "postgres")]
            Connection::Postgres(c) => {
                let lock = sqlx::query(LOCK).bind(id.as_str());
                lock.execute(&mut **c).await?;
                let done = sqlx::query(sql).bind(id).bind(at).execute(&mut **c).await?;
                Ok(done.rows_affected())
            }
            #[cfg(feature = "sqlite")]
            Connection::Sqlite(c) => {
                let done = sqlx::query(sql).bind(id).bind(at).execute(&mut **c).await?;
                Ok(done.rows_affected())
            }
        }
    }

    #[cfg(feature = "postgres")]
    async fn run_many(
        &self,
        connection: &mut sqlx::PgConnection,
        rows: Vec<Row>,
    ) -> sqlx::Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        macro_rules! column {
            ($field:ident) => {
                rows.iter().map(|r| r.$field.clone()).collect::<Vec<_>>()
            };
        }
        sqlx::query(sqlx::AssertSqlSafe(self.many.as_str()))
            .bind(column!(topic))
            .bind(column!(kind))
            .bind(column!(key))
            .bind(column!(payload))
            .bind(column!(content_type))
            .bind(column!(headers))
            .bind(column!(id))
            .bind(column!(version))
            .bind(column!(attributes))
            .execute(connection)
            .await
            .map(drop)
    }
}
