//! Where an event's way begins: one INSERT in the application's own transaction.

mod statements;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use pillarbox_transport::{Limits, Message};
use serde::Serialize;
use uuid::Uuid;

use crate::{
    backpressure::{Backlog, Pressure},
    connection::{Connection, Database},
    error::{Error, Kind, Result, sqlstate},
    event::Event,
    wake::Wake,
};
use statements::{Row, Statements, micros};

/// Writes events into the application's own transaction. Cheap to clone; fits an axum state.
///
/// Order: a position is drawn at the INSERT. Writers of one key stay in commit order if they lock something of that key
/// (its row) before they enqueue.
///
/// ```no_run
/// # use pillarbox_core::{Event, Outbox};
/// # #[derive(serde::Serialize)] struct OrderPlaced { order: u32 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "shop.order.placed"; const TOPIC: &'static str = "shop.events"; }
/// # async fn f(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let outbox = Outbox::new(&pool);
/// let mut tx = pool.begin().await?;
/// // … the application's own writes …
/// outbox.enqueue(&mut tx, &OrderPlaced { order: 7 }).await?;
/// tx.commit().await?;
/// outbox.wake();
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Outbox {
    database: Database,
    limits: Limits,
    attributes: Vec<(String, String)>,
    statements: Arc<Statements>,
    wake: Wake,
    pressure: Option<Arc<Pressure>>,
}

/// An event that is sent at a time of its own: what [`Outbox::cancel`] needs. Keep both to cancel it later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// The event's id.
    pub id: Uuid,
    /// Not before this time, by the database's clock; in whole microseconds.
    pub at: SystemTime,
}

/// How far ahead an event may be scheduled: ten years.
const FARTHEST: Duration = Duration::from_secs(315_360_000);

impl Outbox {
    /// An outbox in this database, with the default [`Limits`].
    #[must_use]
    pub fn new(database: impl Into<Database>) -> Self {
        let database = database.into();
        let statements = Arc::new(Statements::new(&database));
        Self {
            database,
            limits: Limits::default(),
            attributes: Vec::new(),
            statements,
            wake: Wake::new(),
            pressure: None,
        }
    }

    /// With other limits for payloads, keys and headers.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Refuses events with [`Kind::Backlogged`] while the relays are farther behind than this. What counts was seen a
    /// second ago or so, by a look of its own: an enqueue stays one statement, and this no exact bound. Handlers'
    /// events are never refused. Without it, which is the default, the log takes everything.
    #[must_use]
    pub fn refuse_beyond(mut self, most: Backlog) -> Self {
        self.pressure = Some(Arc::new(Pressure::new(most)));
        self
    }

    /// For handlers: what came in must come out, or the refusal would become their dead letter.
    pub(crate) fn refusing_nothing(mut self) -> Self {
        self.pressure = None;
        self
    }

    /// How far the relays are behind. A cheap look at the log, for metrics and to slow down by.
    ///
    /// # Errors
    /// The database's: it needs the right to read log and cursors.
    pub async fn backlog(&self) -> Result<Backlog> {
        self.database.store().backlog().await
    }

    /// A clone that gives each event this CloudEvents attribute unless it has one: `correlationid`, `causationid`, `traceparent`, `source`.
    #[must_use]
    pub fn with_attribute(&self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let mut outbox = self.clone();
        let name = name.into();
        outbox.attributes.retain(|(n, _)| *n != name);
        outbox.attributes.push((name, value.into()));
        outbox
    }

    /// A clone whose events follow from `message`: they carry on its correlation (its id, where it has none) and name it as
    /// their cause. [`Context::enqueue`](crate::Context::enqueue) does this; an [`Effect`](crate::Effect) enqueues in a
    /// transaction of its own.
    ///
    /// ```
    /// # use pillarbox_core::{Delivery, Outbox};
    /// # fn f<E>(outbox: &Outbox, delivery: &Delivery<E>) {
    /// let outbox = outbox.caused_by(&delivery.message);
    /// // … outbox.enqueue(&mut transaction, &event).await? …
    /// # }
    /// ```
    #[must_use]
    pub fn caused_by(&self, message: &Message) -> Self {
        let correlation = message.attribute("correlationid").unwrap_or(&message.id);
        self.with_attribute("correlationid", correlation)
            .with_attribute("causationid", &message.id)
    }

    /// Writes one event, as JSON. Answers its id (UUIDv7).
    ///
    /// All checks run before the statement, so a refused event leaves the transaction usable. The event is there if and only
    /// if the transaction's other writes are: if the answer to your COMMIT is lost, look for those, and never enqueue alone.
    ///
    /// # Errors
    /// [`Kind::Invalid`] and [`Kind::TooLarge`] name what is wrong with the event, or that no transaction is open on
    /// the connection; else the database's own, after which the transaction is the database's to judge.
    pub async fn enqueue<E: Event + Serialize>(
        &self,
        tx: impl InTransaction,
        event: &E,
    ) -> Result<Uuid> {
        let (id, message) = self.message(event)?;
        self.write(tx, vec![message]).await?;
        Ok(id)
    }

    /// Writes many events in one statement (SQLite: in one call). Answers their ids.
    ///
    /// # Errors
    /// As [`Outbox::enqueue`]; if one event is refused, none is written.
    pub async fn enqueue_all<E: Event + Serialize>(
        &self,
        tx: impl InTransaction,
        events: &[E],
    ) -> Result<Vec<Uuid>> {
        let all = events
            .iter()
            .map(|e| self.message(e))
            .collect::<Result<Vec<_>>>()?;
        let (ids, messages) = all.into_iter().unzip();
        self.write(tx, messages).await?;
        Ok(ids)
    }

    /// Writes one event that is not sent before `at` (by the database's clock; at most ten years ahead; one that has passed
    /// is sent at once).
    ///
    /// It takes its place in its key's order when its time comes: behind what is being sent or waits then, before what is
    /// committed later. Until then it holds nothing back. Within about a second, and later while the relay or the broker is away.
    ///
    /// ```no_run
    /// # use std::time::{Duration, SystemTime};
    /// # use pillarbox_core::{Event, Outbox};
    /// # #[derive(serde::Serialize)] struct Remind { order: u32 }
    /// # impl Event for Remind { const TYPE: &'static str = "shop.order.remind"; const TOPIC: &'static str = "shop.events"; }
    /// # async fn f(outbox: Outbox, pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tx = pool.begin().await?;
    /// let tomorrow = SystemTime::now() + Duration::from_secs(24 * 3600);
    /// let reminder = outbox.enqueue_at(&mut tx, &Remind { order: 7 }, tomorrow).await?;
    /// tx.commit().await?;
    /// // … the order was paid …
    /// let mut tx = pool.begin().await?;
    /// let is_cancelled = outbox.cancel(&mut tx, &reminder).await?;
    /// tx.commit().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`Outbox::enqueue`].
    pub async fn enqueue_at<E: Event + Serialize>(
        &self,
        tx: impl InTransaction,
        event: &E,
        at: SystemTime,
    ) -> Result<Scheduled> {
        let (id, message) = self.message(event)?;
        let at = self.write_at(tx, &message, at).await?;
        Ok(Scheduled { id, at })
    }

    /// Writes a message of any content that is not sent before `at`; as [`Outbox::enqueue_at`].
    ///
    /// # Errors
    /// As [`Outbox::enqueue`].
    pub async fn enqueue_message_at(
        &self,
        tx: impl InTransaction,
        message: Message,
        at: SystemTime,
    ) -> Result<Scheduled> {
        let at = self.write_at(tx, &message, at).await?;
        let id = Uuid::try_parse(&message.id).unwrap_or_default();
        Ok(Scheduled { id, at })
    }

    /// Cancels an event before its time. True: once this transaction is committed, the event is never sent. False: its time
    /// has come, and it is sent (or was). Nothing in between: while this transaction is open past the event's time, the event
    /// waits for its end. May be repeated.
    ///
    /// The database's role needs the right to insert into the table `cancelled`. Works whether the relay has read the event or
    /// not; one INSERT, and a lock that only the event's own delivery meets.
    ///
    /// # Errors
    /// [`Kind::Invalid`] without a transaction; the database's.
    pub async fn cancel(&self, mut tx: impl InTransaction, event: &Scheduled) -> Result<bool> {
        let mut connection = tx.connection();
        in_transaction(&connection, "cancel")?;
        let cancelled = self.statements.cancel(&mut connection, event).await;
        Ok(cancelled.map_err(|e| self.failed("cancel", e))? > 0)
    }

    /// Writes a message of any content. Its id must be a UUID; its time is the database's.
    ///
    /// # Errors
    /// As [`Outbox::enqueue`].
    pub async fn enqueue_message(&self, tx: impl InTransaction, message: Message) -> Result<()> {
        self.write(tx, vec![message]).await
    }

    /// The statement that [`Outbox::enqueue_message`] would run, for any other driver.
    ///
    /// # Errors
    /// As [`Outbox::enqueue`], but for the transaction, which is not seen.
    pub fn insert(&self, message: &Message) -> Result<Insert<'_>> {
        let row = self.row(message)?;
        Ok(Insert {
            sql: &self.statements.one,
            params: row.into(),
        })
    }

    /// Tells the relays of this process that a transaction has committed. Optional: they look by themselves.
    pub fn wake(&self) {
        self.wake.committed();
    }

    /// The database it writes to.
    #[must_use]
    pub fn database(&self) -> &Database {
        &self.database
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn waker(&self) -> &Wake {
        &self.wake
    }

    fn message<E: Event + Serialize>(&self, event: &E) -> Result<(Uuid, Message)> {
        let payload = serde_json::to_vec(event).map_err(|e| {
            Error::new(
                Kind::Invalid,
                "enqueue",
                format!("{} cannot be written as JSON", E::TYPE),
            )
            .caused_by(e)
        })?;
        let id = Uuid::now_v7();
        let mut message = Message::new(id.to_string(), E::TOPIC, E::TYPE, payload)
            .with_attribute("datacontenttype", "application/json")
            .with_attribute("dataversion", E::VERSION.to_string());
        message.key = event.key().map(Into::into);
        Ok((id, message))
    }

    async fn write_at(
        &self,
        mut tx: impl InTransaction,
        message: &Message,
        at: SystemTime,
    ) -> Result<SystemTime> {
        let ahead = at.duration_since(SystemTime::now()).unwrap_or_default();
        if ahead > FARTHEST {
            let text = "the event is to be sent more than ten years from now";
            return Err(Error::new(Kind::Invalid, "enqueue", text));
        }
        let row = self.row(message)?;
        let mut connection = tx.connection();
        in_transaction(&connection, "enqueue")?;
        let micros = micros(at);
        let written = self.statements.run_at(&mut connection, row, micros).await;
        written.map_err(|e| self.failed("enqueue", e))?;
        self.wake.enqueued();
        Ok(SystemTime::UNIX_EPOCH + Duration::from_micros(micros.unsigned_abs()))
    }

    async fn write(&self, mut tx: impl InTransaction, messages: Vec<Message>) -> Result<()> {
        let rows = messages
            .iter()
            .map(|m| self.row(m))
            .collect::<Result<Vec<_>>>()?;
        let mut connection = tx.connection();
        in_transaction(&connection, "enqueue")?;
        if let Some(pressure) = &self.pressure {
            pressure.check(self.database.store())?;
        }
        self.statements
            .run(&mut connection, rows)
            .await
            .map_err(|e| self.failed("enqueue", e))?;
        self.wake.enqueued();
        Ok(())
    }

    fn failed(&self, operation: &'static str, e: sqlx::Error) -> Error {
        let state = sqlstate(&e);
        let missing = format!("no such table: {}_outbox", self.database.store().schema());
        let no_table = matches!(state.as_deref(), Some("42P01" | "3F000"))
            || e.as_database_error()
                .is_some_and(|d| d.message() == missing);
        if no_table {
            let text =
                "the outbox is not in this database: call pillarbox::migrate once at the start";
            return Error::new(Kind::NotMigrated, operation, text).caused_by(e);
        }
        Error::database(operation, e)
    }

    fn row(&self, message: &Message) -> Result<Row> {
        let mut message = message.clone();
        for (name, value) in &self.attributes {
            message
                .attributes
                .entry(name.clone())
                .or_insert_with(|| value.clone());
        }
        self.limits.check(&message)?;
        if Uuid::try_parse(&message.id).is_err() {
            let text = format!("the id {:?} is no UUID", message.id);
            return Err(Error::new(Kind::Invalid, "enqueue", text));
        }
        let Some(version) = message.version() else {
            let text = "the attribute dataversion must be a whole number from 0 to 4294967295";
            return Err(Error::new(Kind::Invalid, "enqueue", text));
        };
        message.attributes.remove("dataversion");
        let content_type = message.attributes.remove("datacontenttype");
        let json = |map: &std::collections::BTreeMap<String, String>| {
            serde_json::to_string(map)
                .map_err(|e| Error::new(Kind::Invalid, "enqueue", "headers").caused_by(e))
        };
        Ok(Row {
            headers: (!message.headers.is_empty())
                .then(|| json(&message.headers))
                .transpose()?,
            attributes: (!message.attributes.is_empty())
                .then(|| json(&message.attributes))
                .transpose()?,
            topic: message.topic,
            kind: message.kind,
            key: message.key,
            payload: message.payload.map(|p| p.to_vec()),
            content_type,
            id: message.id,
            version: i64::from(version),
        })
    }
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox")
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

fn in_transaction(connection: &Connection<'_>, operation: &'static str) -> Result<()> {
    if connection.is_in_transaction() {
        return Ok(());
    }
    let text = "no transaction is open on this connection; begin one with sqlx (a BEGIN by hand is not seen)";
    Err(Error::new(Kind::Invalid, operation, text))
}

/// A statement for any driver.
#[derive(Debug)]
pub struct Insert<'a> {
    /// With numbered parameters.
    pub sql: &'a str,
    /// In the order of their numbers.
    pub params: Vec<Param>,
}

/// A parameter of [`Insert`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Param {
    /// A text or NULL.
    Text(Option<String>),
    /// A 64-bit number or NULL.
    Bigint(Option<i64>),
    /// Bytes or NULL.
    Bytea(Option<Vec<u8>>),
}

impl From<Row> for Vec<Param> {
    fn from(row: Row) -> Self {
        vec![
            Param::Text(Some(row.topic)),
            Param::Text(Some(row.kind)),
            Param::Text(row.key),
            Param::Bytea(row.payload),
            Param::Text(row.content_type),
            Param::Text(row.headers),
            Param::Text(Some(row.id)),
            Param::Bigint(Some(row.version)),
            Param::Text(row.attributes),
        ]
    }
}

/// A connection inside a transaction: `&mut` of a sqlx transaction, of a connection on which sqlx has begun one, or a
/// handler's [`Connection`].
#[diagnostic::on_unimplemented(
    message = "an event is enqueued in the transaction that makes it true, and `{Self}` is none",
    label = "expected `&mut` of a sqlx transaction (or a connection inside one)",
    note = "begin one: `let mut tx = pool.begin().await?;`, write, then `outbox.enqueue(&mut tx, &event)`"
)]
pub trait InTransaction: sealed::Sealed + Send {
    /// The connection.
    fn connection(&mut self) -> Connection<'_>;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! in_transaction {
    ($feature:literal, $variant:ident, $database:ty, $connection:ty) => {
        #[cfg(feature = $feature)]
        impl sealed::Sealed for &mut sqlx::Transaction<'_, $database> {}
        #[cfg(feature = $feature)]
        impl InTransaction for &mut sqlx::Transaction<'_, $database> {
            fn connection(&mut self) -> Connection<'_> {
                Connection::$variant(self)
            }
        }
        #[cfg(feature = $feature)]
        impl sealed::Sealed for &mut $connection {}
        #[cfg(feature = $feature)]
        impl InTransaction for &mut $connection {
            fn connection(&mut self) -> Connection<'_> {
                Connection::$variant(self)
            }
        }
    };
}
in_transaction!("postgres", Postgres, sqlx::Postgres, sqlx::PgConnection);
in_transaction!("sqlite", Sqlite, sqlx::Sqlite, sqlx::SqliteConnection);

impl sealed::Sealed for Connection<'_> {}
impl InTransaction for Connection<'_> {
    fn connection(&mut self) -> Connection<'_> {
        self.reborrow()
    }
}
impl sealed::Sealed for &mut Connection<'_> {}
impl InTransaction for &mut Connection<'_> {
    fn connection(&mut self) -> Connection<'_> {
        self.reborrow()
    }
}
