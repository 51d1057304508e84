//! The consumer's side of an event's way: subscription, inbox, handler, one transaction.
//!
//! Never acknowledges what is not committed, never requeues, and never lets broker exclusivity stand in for its lease.

mod apply;
mod attempt;
mod effect;
mod handler;
mod pump;
mod session;
mod source;
mod suspect;

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    marker::PhantomData,
    sync::Arc,
    time::Duration,
};

use pillarbox_transport::{Binding, Message, Source, Transport};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, RwLock, Semaphore};
use tokio_util::sync::CancellationToken;

use effect::AnyEffect;
pub use effect::Effect;
pub(crate) use handler::Next;
use handler::{AnyHandler, Typed};
pub use handler::{Context, Delivery, Failure, Handler};

use crate::{
    backoff::Backoff,
    connection::Database,
    error::{Error, Kind, Result},
    event::Event,
    failure::{Retry, Side},
    lease::LeaseTerm,
    outbox::Outbox,
    pause::{Watched, Watcher},
    retention::{Cleaner, RetentionSettings, Scope},
    running::{Report, Running, task},
    store::Store,
    supervise::Supervised,
};

/// Bounds and rhythms of a consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerSettings {
    /// How long its leases last. Defaults to 10 s.
    pub lease: LeaseTerm,
    /// Most events in one transaction. Defaults to 100.
    pub batch: usize,
    /// Workers of each source, and lines that are gone on with at once: batches that run side by side, each with the keys
    /// that are its own. On PostgreSQL each takes a transaction and so a connection. SQLite has one writer: transactions
    /// take turns there, effects run side by side. Defaults to 1.
    pub workers: usize,
    /// How long one run of an [`Effect`] may take. Longer than [`ConsumerSettings::drain`], a stop may cut one off.
    /// Defaults to 20 s.
    pub effect_timeout: Duration,
    /// Most deferred events of the group; at it, the source waits. Defaults to 10,000.
    pub deferred: u64,
    /// Most deferred events of one key; at it, the source waits. Defaults to 1,000.
    pub deferred_per_key: u64,
    /// How long a stop waits for the transaction under way. Defaults to 25 s.
    pub drain: Duration,
    /// How long the inbox remembers an event, in running time of its source (a gap between arrivals counts 60 s at most):
    /// an event that comes again later is applied again. Must outlast the retries and what the broker redelivers. At
    /// most 36 h, for the inbox is a ring of two days. Defaults to 24 h.
    pub remember: Duration,
}

impl Default for ConsumerSettings {
    fn default() -> Self {
        Self {
            lease: LeaseTerm::default(),
            batch: 100,
            workers: 1,
            effect_timeout: Duration::from_secs(20),
            deferred: 10_000,
            deferred_per_key: 1_000,
            drain: Duration::from_secs(25),
            remember: Duration::from_secs(24 * 3_600),
        }
    }
}

/// A check of payloads before their handler sees them, such as a JSON Schema: the reason if one does not fit.
pub type PayloadCheck = dyn Fn(&Message) -> Result<(), String> + Send + Sync;

/// Applies each event of its topics once, in order for each key.
///
/// ```no_run
/// # use std::sync::Arc;
/// # use pillarbox_core::{Consumer, Context, Delivery, Event, Failure, Handler, transport::Transport};
/// # #[derive(serde::Deserialize)] struct OrderPlaced { order: String }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "shop.order.placed"; const TOPIC: &'static str = "shop.events"; }
/// # struct Mark;
/// # impl Handler<OrderPlaced> for Mark { async fn handle(&self, _: Delivery<OrderPlaced>, _: &mut Context<'_>) -> Result<(), Failure> { Ok(()) } }
/// # async fn f(pool: sqlx::PgPool, transport: Arc<dyn Transport>) -> pillarbox_core::Result<()> {
/// let consumer = Consumer::new(&pool, transport, "billing").on::<OrderPlaced>(Mark).spawn();
/// // …
/// consumer.shutdown().await
/// # }
/// ```
#[must_use = "a consumer does nothing until it runs"]
pub struct Consumer {
    core: Core,
    sources: Option<Vec<Source>>,
}

/// What the tasks of a consumer share.
#[derive(Clone)]
struct Core {
    store: Arc<dyn Store>,
    transport: Arc<dyn Transport>,
    group: Arc<str>,
    types: Arc<HashMap<&'static str, Registered>>,
    check: Option<Arc<PayloadCheck>>,
    outbox: Outbox,
    settings: Arc<ConsumerSettings>,
    retry: Arc<Retry>,
    retention: Arc<RetentionSettings>,
    report: Report,
    pauses: Watched,
    /// A line was made, or grew: the pump looks.
    deferred: Arc<Notify>,
    /// Transactions that may be open at once.
    turns: Arc<Semaphore>,
    /// Held by each batch, and alone by an event beside which nothing may be under way.
    quiet: Arc<RwLock<()>>,
}

#[derive(Clone)]
struct Registered {
    topic: &'static str,
    versions: BTreeMap<u32, Way>,
    /// It was given a handler and an effect.
    both: bool,
}

/// What is done for an event.
#[derive(Clone)]
enum Way {
    /// In the transaction.
    Handler(Arc<dyn AnyHandler>),
    /// Before it.
    Effect(Arc<dyn AnyEffect>),
}

impl Consumer {
    /// A consumer of `group`, with inbox, cursors and exceptions in the database that its handlers write to.
    pub fn new(
        database: impl Into<Database>,
        transport: Arc<dyn Transport>,
        group: impl Into<String>,
    ) -> Self {
        let database = database.into();
        let core = Core {
            store: database.store().clone(),
            transport,
            group: group.into().into(),
            types: Arc::default(),
            check: None,
            outbox: Outbox::new(database.clone()),
            settings: Arc::default(),
            retry: Arc::default(),
            retention: Arc::default(),
            report: Report::new().0,
            pauses: Watched::unknown(),
            deferred: Arc::default(),
            turns: Arc::new(Semaphore::new(database.store().writers())),
            quiet: Arc::default(),
        };
        Self {
            core,
            sources: None,
        }
    }

    /// Handles the events of one type and version. A later handler for the same replaces an earlier one.
    pub fn on<E>(self, handler: impl Handler<E>) -> Self
    where
        E: Event + DeserializeOwned + Send + 'static,
    {
        self.register::<E>(Way::Handler(Arc::new(Typed {
            handler,
            event: PhantomData,
        })))
    }

    /// Runs an effect outside of the database for the events of one type and version. A later effect for the same
    /// replaces an earlier one. A type has handlers or effects, not both: [`Consumer::bind`] refuses it. Two groups may
    /// have one each.
    pub fn on_effect<E>(self, effect: impl Effect<E>) -> Self
    where
        E: Event + DeserializeOwned + Send + Sync + 'static,
    {
        self.register::<E>(Way::Effect(Arc::new(Typed {
            handler: effect,
            event: PhantomData,
        })))
    }

    fn register<E: Event>(mut self, way: Way) -> Self {
        let types = Arc::make_mut(&mut self.core.types);
        let registered = types.entry(E::TYPE).or_insert_with(|| Registered {
            topic: E::TOPIC,
            versions: BTreeMap::new(),
            both: false,
        });
        let is_effect = |way: &Way| matches!(way, Way::Effect(_));
        registered.both |= registered
            .versions
            .values()
            .any(|other| is_effect(other) != is_effect(&way));
        registered.versions.insert(E::VERSION, way);
        self
    }

    /// Checks each payload before its handler: one that does not fit becomes a dead letter with the check's reason.
    pub fn check(
        mut self,
        check: impl Fn(&Message) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.core.check = Some(Arc::new(check));
        self
    }

    /// Events that handlers enqueue are seen at once by the relays of this outbox.
    pub fn outbox(mut self, outbox: &Outbox) -> Self {
        self.core.outbox = outbox.clone().refusing_nothing();
        self
    }

    /// With other bounds.
    pub fn settings(mut self, settings: ConsumerSettings) -> Self {
        self.core.settings = Arc::new(settings);
        self
    }

    /// With another retry schedule.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.core.retry = Arc::new(retry);
        self
    }

    /// With another retention of consumers' dead letters; how long the inbox remembers is among the [`ConsumerSettings`].
    pub fn retention(mut self, retention: RetentionSettings) -> Self {
        self.core.retention = Arc::new(retention);
        self
    }

    /// Makes the group known to the broker now, rather than when it runs: a relay on the `memory` transport starts
    /// after all groups of its process are bound. Tries once.
    ///
    /// # Errors
    /// [`Kind::Invalid`] without any handler, or with a handler and an effect for one type; [`Kind::NotMigrated`]; the transport's, which names a type that the
    /// group's queue does not receive.
    pub async fn bind(&mut self) -> Result<()> {
        if self.sources.is_some() {
            return Ok(());
        }
        self.check_types()?;
        self.core.store.partitions().await?;
        let mut topics = BTreeMap::<&str, Vec<String>>::new();
        for (kind, registered) in self.core.types.iter() {
            topics
                .entry(registered.topic)
                .or_default()
                .push((*kind).to_owned());
        }
        let mut sources = Vec::new();
        for (topic, mut kinds) in topics {
            kinds.sort();
            let binding = Binding {
                topic: topic.to_owned(),
                group: self.core.group.to_string(),
                kinds,
            };
            sources.extend(self.core.transport.bind(&binding).await?);
        }
        self.sources = Some(sources);
        Ok(())
    }

    fn check_types(&self) -> Result<()> {
        let (group, types) = (&self.core.group, &self.core.types);
        let wrong = |text| Err(Error::new(Kind::Invalid, "bind", text));
        if types.is_empty() {
            return wrong(format!("group {group:?} has no handler"));
        }
        match types
            .iter()
            .filter(|(_, t)| t.both)
            .map(|(kind, _)| kind)
            .min()
        {
            Some(kind) => wrong(format!(
                "group {group:?} has a handler and an effect for {kind:?}: one of them, the other in a group of its own"
            )),
            None => Ok(()),
        }
    }

    /// Runs until `stop` resolves, then finishes the transactions under way.
    ///
    /// Waits for a database or broker that is away, for as long as it takes.
    ///
    /// # Errors
    /// What nobody but a person can mend: no schema, bad credentials, a topology that contradicts the broker's.
    pub async fn run_until(self, stop: impl Future<Output = ()> + Send) -> Result<()> {
        let token = CancellationToken::new();
        let run = self.run(token.clone());
        tokio::pin!(run, stop);
        tokio::select! {
            biased;
            result = &mut run => return result,
            () = &mut stop => token.cancel(),
        }
        run.await
    }

    /// Runs in a task of its own.
    pub fn spawn(mut self) -> Running {
        let (report, health) = Report::new();
        self.core.report = report;
        let stop = CancellationToken::new();
        Running::new(stop.clone(), health, self.run(stop))
    }

    async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let mut backoff = Backoff::connection();
        while let Err(e) = self.bind().await {
            if !e.is_temporary() {
                return Err(e);
            }
            let what = if e.kind() == Kind::Transport {
                "broker"
            } else {
                "database"
            };
            self.core.note(what, &e.to_string());
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(backoff.step()) => {}
            }
        }
        self.core.clear("broker");
        self.core.clear("database");
        let sources = self.sources.unwrap_or_default();
        // One source and the pump find room as it is.
        let sides = sources.len().saturating_add(1);
        let more = sides.saturating_mul(self.core.settings.workers.max(1));
        let _room = Room::new(&self.core.store, more.saturating_sub(2));
        self.core.report.expect(sources.len());
        let (group, report) = (self.core.group.clone(), self.core.report.clone());
        let store = self.core.store.clone();
        let watcher;
        (watcher, self.core.pauses) = Watcher::new(store, Side::Consumer, group, report);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(task(watcher.run(stop.clone())));
        for source in sources {
            let (core, at) = (self.core.clone(), stop.clone());
            let watched = self.core.supervised("source", source.name.clone());
            tasks.spawn(task(watched.run(stop.clone(), move || {
                source::run(core.clone(), source.clone(), at.clone())
            })));
        }
        let (core, at) = (self.core.clone(), stop.clone());
        let watched = self.core.supervised("pump", "deferred lines".to_owned());
        tasks.spawn(task(
            watched.run(stop.clone(), move || pump::run(core.clone(), at.clone())),
        ));
        let (core, at) = (self.core.clone(), stop.clone());
        let watched = self.core.supervised("cleaner", "cleaner".to_owned());
        tasks.spawn(task(
            watched.run(stop.clone(), move || core.cleaner().run(at.clone())),
        ));
        let mut result = Ok(());
        while let Some(joined) = tasks.join_next().await {
            let ended = joined.unwrap_or_else(|e| {
                Err(
                    Error::new(Kind::Panicked, "consume", "a task of the consumer panicked")
                        .caused_by(e),
                )
            });
            if ended.is_err() && result.is_ok() {
                // One that cannot go on stops all: a half-working consumer looks healthy.
                stop.cancel();
                result = ended;
            }
        }
        result
    }
}

/// Connections for more than the usual number of transactions, while it lives.
struct Room(Arc<dyn Store>, usize);

impl Room {
    fn new(store: &Arc<dyn Store>, more: usize) -> Self {
        store.widen(more);
        Self(store.clone(), more)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.0.narrow(self.1);
    }
}

impl Core {
    fn has_effects(&self) -> bool {
        let mut ways = self.types.values().flat_map(|t| t.versions.values());
        ways.any(|way| matches!(way, Way::Effect(_)))
    }

    fn supervised(&self, task: &'static str, name: String) -> Supervised {
        Supervised {
            task,
            name,
            report: self.report.clone(),
        }
    }

    fn cleaner(&self) -> Cleaner {
        Cleaner {
            store: self.store.clone(),
            scope: Scope::Inbox(self.settings.remember),
            term: self.settings.lease,
            settings: self.retention.clone(),
            report: self.report.clone(),
        }
    }

    /// One line at each change of state, none for each try.
    fn note(&self, what: &str, trouble: &str) {
        if self.report.trouble(what, trouble) {
            tracing::warn!(group = %self.group, what, trouble, "consumer waits");
        }
    }

    fn clear(&self, what: &str) {
        if self.report.clear(what) {
            tracing::info!(group = %self.group, what, "consumer goes on");
        }
    }
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consumer")
            .field("group", &self.core.group)
            .finish_non_exhaustive()
    }
}
