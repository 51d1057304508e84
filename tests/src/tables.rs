//! The engine's tables by plain SQL, the same for both databases.

use pillarbox_core::{Database, Pool};
use sqlx::{AssertSqlSafe, Row as _};

/// Runs a statement in which `{t}` stands before each table's name. All columns must be texts (`CAST(x AS TEXT)`).
pub async fn query(database: &Database, sql: &str) -> Vec<Vec<Option<String>>> {
    try_query(database, sql).await.expect(sql)
}

/// [`query`], for a database that may be away.
///
/// # Errors
/// The database's.
pub async fn try_query(database: &Database, sql: &str) -> sqlx::Result<Vec<Vec<Option<String>>>> {
    macro_rules! rows {
        ($pool:expr, $before:literal) => {
            sqlx::query(AssertSqlSafe(sql.replace("{t}", $before)))
                .fetch_all(&$pool)
                .await?
                .iter()
                .map(|row| (0..row.len()).map(|i| row.get(i)).collect())
                .collect()
        };
    }
    Ok(match database.pool().expect("a pool") {
        Pool::Postgres(pool) => rows!(pool, "pillarbox."),
        Pool::Sqlite(pool) => rows!(pool, "pillarbox_"),
    })
}

/// Whether it is PostgreSQL.
pub fn is_postgres(database: &Database) -> bool {
    matches!(database.pool(), Some(Pool::Postgres(_)))
}

/// A number that a statement answers.
pub async fn number(database: &Database, sql: &str) -> i64 {
    let rows = query(database, sql).await;
    let text = rows.first().and_then(|row| row.first().cloned().flatten());
    text.expect(sql).parse().expect(sql)
}

/// A row of `dead_letter`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dead {
    /// `relay` or `consumer`.
    pub side: String,
    /// The event's id.
    pub id: String,
    /// Its type.
    pub kind: String,
    /// Its key.
    pub key: Option<String>,
    /// Failed attempts.
    pub attempts: u32,
    /// Why.
    pub reason: String,
    /// Whether the broker has a copy.
    pub copied: bool,
}

/// All dead letters, oldest first.
pub async fn dead_letters(database: &Database) -> Vec<Dead> {
    let sql = "SELECT side, id, type, key, CAST(attempts AS TEXT), reason, CAST(copied_at AS TEXT) \
               FROM {t}dead_letter ORDER BY seq";
    let dead = |row: Vec<Option<String>>| {
        let text = |i: usize| row[i].clone().unwrap_or_default();
        Dead {
            side: text(0),
            id: text(1),
            kind: text(2),
            key: row[3].clone(),
            attempts: text(4).parse().expect("a number"),
            reason: text(5),
            copied: row[6].is_some(),
        }
    };
    query(database, sql).await.into_iter().map(dead).collect()
}

/// How many rows a table has (`{t}` before the name of one of the engine's).
pub async fn count(database: &Database, table: &str) -> usize {
    let sql = format!("SELECT CAST(count(*) AS TEXT) FROM {table}");
    usize::try_from(number(database, &sql).await).expect("a count")
}

/// How many events wait.
pub async fn deferred(database: &Database) -> usize {
    count(database, "{t}deferred").await
}

/// A row of the log, or a waiting one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    /// Its place.
    pub position: i64,
    /// The event's id.
    pub id: String,
    /// Its key.
    pub key: Option<String>,
    /// Its number, from the payload; none if it has another payload.
    pub n: Option<u32>,
}

/// The whole log, in order.
pub async fn log(database: &Database) -> Vec<Logged> {
    try_log(database).await.expect("the log")
}

/// [`log`], for a database that may be away.
///
/// # Errors
/// The database's.
pub async fn try_log(database: &Database) -> sqlx::Result<Vec<Logged>> {
    let payload = if is_postgres(database) {
        "convert_from(payload, 'UTF8')"
    } else {
        "CAST(payload AS TEXT)"
    };
    let sql = format!(
        "SELECT CAST(position AS TEXT), CAST(id AS TEXT), key, {payload} FROM {{t}}outbox ORDER BY position"
    );
    let logged = |row: Vec<Option<String>>| Logged {
        position: row[0]
            .as_deref()
            .unwrap_or_default()
            .parse()
            .expect("a position"),
        id: row[1].clone().unwrap_or_default(),
        key: row[2].clone(),
        n: row[3]
            .as_deref()
            .and_then(|payload| serde_json::from_str::<serde_json::Value>(payload).ok())
            .and_then(|payload| payload["n"].as_u64())
            .and_then(|n| u32::try_from(n).ok()),
    };
    Ok(try_query(database, &sql)
        .await?
        .into_iter()
        .map(logged)
        .collect())
}

/// Sets the relay's cursors back to the start of the log: everything comes again.
pub async fn rewind(database: &Database) {
    let sql = if is_postgres(database) {
        "UPDATE {t}cursor SET seen = '1:1:', base = 0, upto = NULL, last = 0"
    } else {
        "UPDATE {t}cursor SET last = 0"
    };
    query(database, sql).await;
}
