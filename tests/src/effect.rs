use std::{
    borrow::Cow,
    sync::{Arc, Mutex},
};

use pillarbox_core::{Connection, Context, Database, Delivery, Event, Failure, Handler, Pool};
use serde::{Deserialize, Serialize};
use sqlx::Row as _;

/// The tests' event: the n-th of its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tick {
    /// The key; none for an event without order.
    pub key: Option<String>,
    /// Which one.
    pub n: u32,
}

impl Tick {
    /// The n-th of a key.
    pub fn new(key: impl Into<String>, n: u32) -> Self {
        Self {
            key: Some(key.into()),
            n,
        }
    }
}

impl Event for Tick {
    const TYPE: &'static str = "test.tick";
    const TOPIC: &'static str = "test.events";
    fn key(&self) -> Option<Cow<'_, str>> {
        self.key.as_deref().map(Into::into)
    }
}

type Judge = dyn Fn(&Delivery<Tick>) -> Result<(), Failure> + Send + Sync;

/// Writes each tick into the table `effect`, and then does as it is told.
#[derive(Clone)]
pub struct TickHandler {
    judge: Arc<Judge>,
    /// Every call, committed or not: (key, n, failed attempts before).
    pub calls: Arc<Mutex<Vec<(String, u32, u32)>>>,
}

impl TickHandler {
    /// Applies all.
    pub fn new() -> Self {
        Self::judging(|_| Ok(()))
    }

    /// Applies what `judge` lets pass.
    pub fn judging(
        judge: impl Fn(&Delivery<Tick>) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        Self {
            judge: Arc::new(judge),
            calls: Arc::default(),
        }
    }
}

impl Default for TickHandler {
    fn default() -> Self {
        Self::new()
    }
}

impl Handler<Tick> for TickHandler {
    async fn handle(&self, d: Delivery<Tick>, cx: &mut Context<'_>) -> Result<(), Failure> {
        let key = d.event.key.clone().unwrap_or_default();
        self.calls
            .lock()
            .expect("no panic")
            .push((key.clone(), d.event.n, d.attempts));
        let (id, n) = (d.message.id.clone(), i64::from(d.event.n));
        match cx.tx() {
            Connection::Postgres(c) => {
                let insert = "INSERT INTO effect (event_id, key, n) VALUES ($1, $2, $3)";
                sqlx::query(insert)
                    .bind(id)
                    .bind(key)
                    .bind(n)
                    .execute(c)
                    .await?;
            }
            Connection::Sqlite(c) => {
                let insert = "INSERT INTO effect (event_id, key, n) VALUES (?1, ?2, ?3)";
                sqlx::query(insert)
                    .bind(id)
                    .bind(key)
                    .bind(n)
                    .execute(c)
                    .await?;
            }
        }
        (self.judge)(&d)
    }
}

/// One row of `effect`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticked {
    /// The event's id.
    pub id: String,
    /// Its key.
    pub key: String,
    /// Its number.
    pub n: u32,
}

/// No unique constraint: an effect that happened twice must show.
pub(crate) async fn create_table(database: &Database) {
    match database.pool() {
        Some(Pool::Postgres(pool)) => {
            let sql = "CREATE TABLE IF NOT EXISTS effect (seq bigserial PRIMARY KEY, event_id text, key text, n bigint)";
            sqlx::query(sql).execute(&pool).await.expect("a table");
        }
        Some(Pool::Sqlite(pool)) => {
            let sql = "CREATE TABLE IF NOT EXISTS effect (seq INTEGER PRIMARY KEY, event_id TEXT, key TEXT, n INTEGER)";
            sqlx::query(sql).execute(&pool).await.expect("a table");
        }
        None => {}
    }
}

/// The committed effects, in the order in which they happened.
pub async fn effects(database: &Database) -> Vec<Ticked> {
    const SQL: &str = "SELECT event_id, key, n FROM effect ORDER BY seq";
    macro_rules! rows {
        ($pool:expr) => {
            sqlx::query(SQL)
                .fetch_all(&$pool)
                .await
                .expect("effects")
                .iter()
                .map(|r| Ticked {
                    id: r.get(0),
                    key: r.get(1),
                    n: u32::try_from(r.get::<i64, _>(2)).expect("a number"),
                })
                .collect()
        };
    }
    match database.pool() {
        Some(Pool::Postgres(pool)) => rows!(pool),
        Some(Pool::Sqlite(pool)) => rows!(pool),
        None => Vec::new(),
    }
}
