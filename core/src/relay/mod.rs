//! The relay's side of an event's way: log, window, publisher, cursor.

mod circuit;
mod destination;
mod lines;
mod partition;
mod session;
mod trail;

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use pillarbox_transport::{Limits, Message, Transport};
use tokio_util::sync::CancellationToken;

pub(crate) use destination::Replaying;

use self::circuit::Circuit;
use crate::{
    backoff::Backoff,
    breaker::BreakerState,
    destination::{MAIN, Start},
    error::{Error, Kind, Result},
    failure::{OnExhausted, Retry, Side},
    lease::LeaseTerm,
    outbox::Outbox,
    pause::{Watched, Watcher},
    retention::{Cleaner, RetentionSettings, Scope},
    running::{Report, Running, task},
    store::Store,
    wake::Wake,
    window,
};

/// Bounds and rhythms of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelaySettings {
    /// How long its leases last. Defaults to 10 s.
    pub lease: LeaseTerm,
    /// Most events read at a time. Defaults to 1,000.
    pub batch: u32,
    /// Most events handed to the broker in one call; never more than a quarter of what may be in flight. Defaults to 256.
    pub publish: usize,
    /// The bounds of each partition's window. Default to 10,000 events unsettled, 2,500 events and 16 MiB of them held in
    /// memory, 1,024 in flight, 1 of each key.
    pub window: window::Limits,
    /// How often an idle relay looks, and a busy one. Default to 100 ms and 5 ms.
    pub idle_poll: Duration,
    /// See `idle_poll`.
    pub busy_poll: Duration,
    /// How often at most the cursor moves. Defaults to 100 ms.
    pub settle: Duration,
    /// Most deferred events of a destination; at it, partitions wait. Defaults to 10,000.
    pub deferred: u64,
    /// Most deferred events of one key; at it, its partition waits. Defaults to 1,000.
    pub deferred_per_key: u64,
    /// Most events of a destination that wait for their `deliver_at`; at it, the next one holds its partition back. Defaults
    /// to 100,000.
    pub scheduled: u64,
    /// How long a stop waits for confirms. Defaults to 25 s.
    pub drain: Duration,
}

impl Default for RelaySettings {
    fn default() -> Self {
        Self {
            lease: LeaseTerm::default(),
            batch: 1_000,
            publish: 256,
            window: window::Limits {
                unsettled: 10_000,
                held: 2_500,
                bytes: 16 << 20,
                in_flight: 1_024,
                per_key: 1,
            },
            idle_poll: Duration::from_millis(100),
            busy_poll: Duration::from_millis(5),
            settle: Duration::from_millis(100),
            deferred: 10_000,
            deferred_per_key: 1_000,
            scheduled: 100_000,
            drain: Duration::from_secs(25),
        }
    }
}

/// Publishes the log: in order for each key, with confirms, with retries, one owner for each partition.
///
/// Any number may run against one database: a lease gives each partition one owner, and when that one ends another takes over.
/// Nothing balances them yet: the first one may own all.
///
/// ```no_run
/// # use std::sync::Arc;
/// # use pillarbox_core::{Outbox, Relay, transport::Transport};
/// # async fn f(outbox: Outbox, transport: Arc<dyn Transport>) -> pillarbox_core::Result<()> {
/// let relay = Relay::new(&outbox, transport).source("shop").spawn();
/// // …
/// relay.shutdown().await
/// # }
/// ```
#[must_use = "a relay does nothing until it runs"]
pub struct Relay {
    core: Core,
}

/// What the tasks of a relay share.
#[derive(Clone)]
struct Core {
    store: Arc<dyn Store>,
    transport: Arc<dyn Transport>,
    wake: Wake,
    limits: Limits,
    destination: Arc<str>,
    start: Option<Start>,
    replay: Option<Arc<Replaying>>,
    topics: Option<Arc<HashSet<String>>>,
    per_key: Arc<HashMap<String, usize>>,
    source: Option<Arc<str>>,
    accept_unrouted: Arc<HashSet<String>>,
    settings: Arc<RelaySettings>,
    retry: Arc<Retry>,
    retention: Arc<RetentionSettings>,
    report: Report,
    circuit: Arc<Circuit>,
    pauses: Watched,
}

impl Relay {
    /// A relay of the outbox's database to this transport, destination `main`, all topics.
    pub fn new(outbox: &Outbox, transport: Arc<dyn Transport>) -> Self {
        let report = Report::new().0;
        let core = Core {
            store: outbox.database().store().clone(),
            transport,
            wake: outbox.waker().clone(),
            limits: outbox.limits().clone(),
            destination: MAIN.into(),
            start: None,
            replay: None,
            topics: None,
            per_key: Arc::default(),
            source: None,
            accept_unrouted: Arc::default(),
            settings: Arc::default(),
            retry: Arc::default(),
            retention: Arc::default(),
            circuit: Circuit::new("main".into(), report.clone()),
            pauses: Watched::unknown(),
            report,
        };
        Self { core }
    }

    /// Publishes these topics alone; events of others count as settled.
    pub fn topics(mut self, topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.core.topics = Some(Arc::new(topics.into_iter().map(Into::into).collect()));
        self
    }

    /// Publishes all topics, as it does without [`Relay::topics`].
    pub fn all_topics(mut self) -> Self {
        self.core.topics = None;
        self
    }

    /// Lets so many unconfirmed events of each key of a topic be in flight at once, instead of one. Faster where few keys have
    /// many events, and weaker: when one of them is refused or its answer is lost while later ones are taken, these come before
    /// it, and consumers see the key out of order. Other topics keep their order.
    pub fn in_flight_per_key(mut self, topic: impl Into<String>, events: u32) -> Self {
        let events = usize::try_from(events).unwrap_or(usize::MAX).max(1);
        Arc::make_mut(&mut self.core.per_key).insert(topic.into(), events);
        self
    }

    /// The CloudEvents source of events that name none. Consumers remember events by source and id.
    pub fn source(mut self, source: impl AsRef<str>) -> Self {
        self.core.source = Some(source.as_ref().into());
        self
    }

    /// Event types that need no consumer: the broker's "nowhere to put it" counts as a confirm.
    pub fn accept_unrouted(mut self, kinds: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.core.accept_unrouted = Arc::new(kinds.into_iter().map(Into::into).collect());
        self
    }

    /// With other bounds and rhythms.
    pub fn settings(mut self, settings: RelaySettings) -> Self {
        self.core.settings = Arc::new(settings);
        self
    }

    /// With another retry schedule.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.core.retry = Arc::new(retry);
        self
    }

    /// With another retention of the log and of relays' dead letters.
    pub fn retention(mut self, retention: RetentionSettings) -> Self {
        self.core.retention = Arc::new(retention);
        self
    }

    /// Runs until `stop` resolves; then waits for confirms (at most the drain time), moves its cursors and gives its leases back.
    ///
    /// Waits for a database or broker that is away, for as long as it takes.
    ///
    /// # Errors
    /// What nobody but a person can mend: no schema, or one that is too new.
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

    async fn run(self, stop: CancellationToken) -> Result<()> {
        let (core, watcher) = self.core.watched();
        let mut backoff = Backoff::connection();
        let partitions = loop {
            match core.enter().await {
                Ok(partitions) => break partitions,
                Err(e) if e.is_temporary() => core.waits("database", &e.to_string()),
                Err(e) => return Err(e),
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(backoff.step()) => {}
            }
        };
        core.goes_on("database");
        core.report.expect(usize::from(partitions));
        let mut tasks = tokio::task::JoinSet::new();
        for partition in 0..partitions {
            tasks.spawn(task(partition::run(core.clone(), partition, stop.clone())));
        }
        tasks.spawn(task(watcher.run(stop.clone())));
        // A replay's settings are not the database's.
        if core.replay.is_none() {
            tasks.spawn(task(core.cleaner().run(stop.clone())));
        }
        let mut result = Ok(());
        while let Some(joined) = tasks.join_next().await {
            let ended = joined.unwrap_or_else(|e| {
                Err(
                    Error::new(Kind::Panicked, "relay", "a task of the relay panicked")
                        .caused_by(e),
                )
            });
            if ended.is_err() && result.is_ok() {
                // One that cannot go on stops all: a half-working relay looks healthy.
                stop.cancel();
                result = ended;
            }
        }
        result
    }
}

impl Core {
    /// Its destination and where it reports to are known now.
    fn watched(mut self) -> (Self, Watcher) {
        let (destination, report) = (self.destination.clone(), self.report.clone());
        self.circuit = Circuit::new(destination.clone(), report.clone());
        self.circuit.show(BreakerState::Closed);
        let watcher;
        (watcher, self.pauses) = Watcher::new(self.store.clone(), Side::Relay, destination, report);
        (self, watcher)
    }

    fn cleaner(&self) -> Cleaner {
        Cleaner {
            store: self.store.clone(),
            scope: Scope::Log,
            term: self.settings.lease,
            settings: self.retention.clone(),
            report: self.report.clone(),
        }
    }

    /// One line at each change of state, none for each try.
    fn waits(&self, what: &str, trouble: &str) {
        if self.report.trouble(what, trouble) {
            tracing::warn!(destination = %self.destination, what, trouble, "relay waits");
        }
    }

    /// Whether an event that is given up stays first in its line instead.
    fn parks(&self, message: &Message) -> bool {
        self.retry.on_exhausted == OnExhausted::Park && message.key.is_some()
    }

    fn goes_on(&self, what: &str) {
        if self.report.clear(what) {
            tracing::info!(destination = %self.destination, what, "relay goes on");
        }
    }
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay")
            .field("destination", &self.core.destination)
            .finish_non_exhaustive()
    }
}
