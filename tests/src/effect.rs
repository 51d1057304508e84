use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use futures_util::future::BoxFuture;
use pillarbox_core::{Connection, Context, Database, Delivery, Event, Failure, Handler};
use pillarbox_transport::Message;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{TOPIC, tables};

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

    /// Without a key.
    #[must_use]
    pub fn keyless(n: u32) -> Self {
        Self { key: None, n }
    }

    /// As a message of `kind` that did not pass through an outbox's typed side.
    #[must_use]
    pub fn message(&self, kind: &str) -> Message {
        let payload = serde_json::to_vec(self).expect("JSON");
        let message = Message::new(Uuid::now_v7().to_string(), TOPIC, kind, payload)
            .with_attribute("datacontenttype", "application/json");
        Message {
            key: self.key.clone(),
            ..message
        }
    }
}

impl Event for Tick {
    const TYPE: &'static str = "test.tick";
    const TOPIC: &'static str = TOPIC;
    fn key(&self) -> Option<Cow<'_, str>> {
        self.key.as_deref().map(Into::into)
    }
}

type Act = dyn for<'a> Fn(&'a Delivery<Tick>, Connection<'a>) -> BoxFuture<'a, Result<(), Failure>>
    + Send
    + Sync;

/// One call of a handler, whether it was committed or not.
#[derive(Debug, Clone)]
pub struct Call {
    /// The event's key, `""` without one.
    pub key: String,
    /// Its number.
    pub n: u32,
    /// Failed attempts before.
    pub attempts: u32,
    /// When.
    pub at: Instant,
}

/// Writes each tick into the table `effect`, and then does as it is told.
#[derive(Clone)]
pub struct TickHandler {
    act: Arc<Act>,
    calls: Arc<Mutex<Vec<Call>>>,
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
        Self::acting(move |delivery, _| {
            let verdict = judge(delivery);
            Box::pin(async move { verdict })
        })
    }

    /// Does `act` after the effect was written, in the same transaction.
    pub fn acting(
        act: impl for<'a> Fn(&'a Delivery<Tick>, Connection<'a>) -> BoxFuture<'a, Result<(), Failure>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self {
            act: Arc::new(act),
            calls: Arc::default(),
        }
    }

    /// Every call so far, committed or not.
    pub fn calls(&self) -> Vec<Call> {
        self.lock().clone()
    }

    /// The calls for one event.
    pub fn calls_of(&self, key: &str, n: u32) -> Vec<Call> {
        let mut calls = self.calls();
        calls.retain(|c| c.key == key && c.n == n);
        calls
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for TickHandler {
    fn default() -> Self {
        Self::new()
    }
}

impl Handler<Tick> for TickHandler {
    async fn handle(&self, d: Delivery<Tick>, cx: &mut Context<'_>) -> Result<(), Failure> {
        self.lock().push(Call {
            key: d.event.key.clone().unwrap_or_default(),
            n: d.event.n,
            attempts: d.attempts,
            at: Instant::now(),
        });
        write(&d, cx.tx()).await?;
        (self.act)(&d, cx.tx()).await
    }
}

async fn write(d: &Delivery<Tick>, connection: Connection<'_>) -> sqlx::Result<()> {
    let key = d.event.key.clone().unwrap_or_default();
    let (id, n) = (d.message.id.clone(), i64::from(d.event.n));
    macro_rules! insert {
        ($connection:expr, $sql:literal) => {
            sqlx::query($sql)
                .bind(id)
                .bind(key)
                .bind(n)
                .execute($connection)
                .await
                .map(drop)
        };
    }
    match connection {
        Connection::Postgres(c) => {
            insert!(
                c,
                "INSERT INTO effect (event_id, key, n) VALUES ($1, $2, $3)"
            )
        }
        Connection::Sqlite(c) => {
            insert!(
                c,
                "INSERT INTO effect (event_id, key, n) VALUES (?1, ?2, ?3)"
            )
        }
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
    let seq = if tables::is_postgres(database) {
        "bigserial"
    } else {
        "INTEGER"
    };
    let sql = format!(
        "CREATE TABLE IF NOT EXISTS effect (seq {seq} PRIMARY KEY, event_id text, key text, n bigint)"
    );
    tables::query(database, &sql).await;
}

/// The committed effects, in the order in which they happened.
pub async fn effects(database: &Database) -> Vec<Ticked> {
    try_effects(database).await.expect("effects")
}

async fn try_effects(database: &Database) -> sqlx::Result<Vec<Ticked>> {
    let sql = "SELECT event_id, key, CAST(n AS TEXT) FROM effect ORDER BY seq";
    let ticked = |row: Vec<Option<String>>| {
        let text = |i: usize| row[i].clone().unwrap_or_default();
        Ticked {
            id: text(0),
            key: text(1),
            n: text(2).parse().expect("a number"),
        }
    };
    let rows = tables::try_query(database, sql).await?;
    Ok(rows.into_iter().map(ticked).collect())
}

/// The numbers of each key, in the given order.
pub fn numbers_by_key<'a>(
    pairs: impl IntoIterator<Item = (&'a str, u32)>,
) -> BTreeMap<String, Vec<u32>> {
    let mut numbers = BTreeMap::<String, Vec<u32>>::new();
    for (key, n) in pairs {
        numbers.entry(key.to_owned()).or_default().push(n);
    }
    numbers
}
