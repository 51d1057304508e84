//! What a program makes of its configuration.

use std::{collections::BTreeMap, fmt, sync::Arc};

use figment::value::{Dict, Value};
use pillarbox_transport::{Limits, Transport};
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    TABLES,
    problem::{Scope, misspelt},
    store::{StoreSettings, StoreTable},
    tables::{self, ConsumerTable, OutboxTable, RelayTable, RetentionTable, RetryTable},
    transport::TransportSettings,
};
use crate::{
    connection::Database,
    consumer::{Consumer, ConsumerSettings},
    destination::{MAIN, Start},
    error::{Error, Kind, Result},
    failure::Retry,
    outbox::Outbox,
    relay::{Relay, RelaySettings},
    retention::RetentionSettings,
};

/// Tables of later versions: refused, because whoever writes one relies on it.
const LATER: [&str; 2] = ["console", "telemetry"];

/// Tables whose keys are names of the program's own, each with a table.
const NAMED: [&str; 3] = ["types", "topics", "destinations"];

/// Checked settings of one program or of one service in it.
///
/// `Debug` shows no secret.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct Settings {
    /// `[store]`: the database.
    pub store: StoreSettings,
    /// `[transport]`: the broker.
    pub transport: TransportSettings,
    /// `[relay]`: bounds and rhythms of the relay.
    pub relay: RelaySettings,
    /// `[consumer]`: bounds and rhythms of consumers.
    pub consumer: ConsumerSettings,
    /// `[retry]`: the schedule for both.
    pub retry: Retry,
    /// `[retention]`: how long what is over is kept.
    pub retention: RetentionSettings,
    /// `[outbox]`: who the events are from, and how large they may be.
    pub outbox: OutboxSettings,
    /// `[types."NAME"]`: what is said about single event types.
    pub types: BTreeMap<String, TypeSettings>,
    /// `[topics."NAME"]`: what is said about single topics.
    pub topics: BTreeMap<String, TopicSettings>,
    /// `[destinations.NAME]`: where else events go, and what is said about `main`, which is there without a table.
    pub destinations: BTreeMap<String, DestinationSettings>,
    host: Host,
}

/// `[outbox]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutboxSettings {
    /// The CloudEvents source of events that name none; consumers remember events by source and id. Defaults to none.
    pub source: Option<String>,
    /// The sizes that events may have. Defaults to [`Limits::default`].
    pub limits: Limits,
}

/// `[types."NAME"]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TypeSettings {
    /// What becomes of an event that the broker has nowhere to put. Defaults to [`Unrouted::Wait`].
    pub unrouted: Unrouted,
}

/// What becomes of an event that no queue and no group wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unrouted {
    /// It is tried again by the schedule, and then becomes a dead letter.
    #[default]
    Wait,
    /// It needs no consumer, and counts as sent.
    Accept,
}

/// `[topics."NAME"]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicSettings {
    /// Unconfirmed events of one key at most. Defaults to 1; see [`Relay::in_flight_per_key`] for what more of them mean.
    pub in_flight_per_key: u32,
}

/// `[destinations.NAME]`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DestinationSettings {
    /// The topics that go there; events of others count as settled. Defaults to all topics.
    pub topics: Option<Vec<String>>,
    /// Where in the log it begins when it is added; of no meaning later. Defaults to the oldest event.
    pub start: Start,
    /// Whether this program relays to it. Defaults to true. For one that another program serves, and for a `main` that was
    /// removed.
    pub relay: bool,
    /// Its broker. Defaults to `[transport]`.
    pub transport: Option<TransportSettings>,
}

impl Default for DestinationSettings {
    fn default() -> Self {
        Self {
            topics: None,
            start: Start::default(),
            relay: true,
            transport: None,
        }
    }
}

/// What is not the engine's.
#[derive(Clone, Default)]
struct Host {
    scope: Scope,
    rest: Dict,
}

impl Settings {
    pub(super) fn build(scope: Scope, mut all: Dict) -> Result<Self> {
        let mut ours: BTreeMap<&str, Value> = BTreeMap::new();
        for name in TABLES {
            if let Some(value) = all.remove(name) {
                ours.insert(name, value);
            }
        }
        if let Some(name) = LATER.into_iter().find(|name| ours.contains_key(name)) {
            let expected = "no such table: this version does not read it yet";
            return Err(scope.wrong(&[name], "a table", expected));
        }
        if let Some((name, near)) = misspelt(&all) {
            return Err(scope.misspelt(name, near));
        }
        let reader = Reader { scope, ours };
        let consumer = reader.build("consumer", ConsumerTable::build)?;
        let retry = reader.build("retry", RetryTable::build)?;
        let outlasts = tables::outlasts(&consumer, &retry);
        reader.scope.judge("consumer", outlasts)?;
        Ok(Self {
            store: {
                let table = reader.read::<StoreTable>("store")?;
                let built = StoreSettings::build(table, reader.scope.clone());
                reader.scope.judge("store", built)?
            },
            transport: match reader.ours.get("transport") {
                Some(value) => TransportSettings::read(value, reader.scope.clone())?,
                None => TransportSettings::none(reader.scope.clone()),
            },
            relay: reader.build("relay", RelayTable::build)?,
            consumer,
            retry,
            retention: reader.build("retention", RetentionTable::build)?,
            outbox: reader.build("outbox", OutboxTable::build)?,
            types: reader.build("types", tables::types)?,
            topics: reader.build("topics", tables::topics)?,
            destinations: reader.destinations()?,
            host: Host {
                scope: reader.scope,
                rest: all,
            },
        })
    }

    /// What is left when the engine's tables are taken out: the program's own, such as `[http] listen`.
    ///
    /// Give the type `#[serde(deny_unknown_fields)]`, and a misspelt key is an error that names the nearest known one.
    ///
    /// # Errors
    /// [`Kind::Configuration`](crate::Kind::Configuration) names the file or environment variable, the key, what was
    /// found and what was expected. Values whose key speaks of a URL, password, secret or token are not shown.
    ///
    /// ```
    /// use pillarbox_core::Config;
    /// #[derive(serde::Deserialize)] struct Program { http: Http }
    /// #[derive(serde::Deserialize)] struct Http { listen: std::net::SocketAddr }
    ///
    /// let config = Config::parse("[orders.http]\nlisten = '127.0.0.1:8081'")?;
    /// let program: Program = config.at("orders")?.host()?;
    /// assert_eq!(program.http.listen.port(), 8081);
    /// # Ok::<(), pillarbox_core::Error>(())
    /// ```
    pub fn host<T: DeserializeOwned>(&self) -> Result<T> {
        let rest = Value::from(self.host.rest.clone());
        self.host.scope.read(&[], &rest)
    }

    /// The event types that need no consumer, for [`Relay::accept_unrouted`].
    #[must_use]
    pub fn accept_unrouted(&self) -> Vec<String> {
        let accepted = self.types.iter();
        let accepted = accepted.filter(|(_, t)| t.unrouted == Unrouted::Accept);
        accepted.map(|(name, _)| name.clone()).collect()
    }

    /// An outbox in this database, with the limits of `[outbox]`.
    #[must_use]
    pub fn new_outbox(&self, database: impl Into<Database>) -> Outbox {
        Outbox::new(database).with_limits(self.outbox.limits.clone())
    }

    /// A relay of destination `main` with everything that is said about it: `[relay]`, `[retry]`, `[retention]`, `[outbox]
    /// source`, `[types]`, `[topics]` and `[destinations.main]`.
    pub fn new_relay(&self, outbox: &Outbox, transport: Arc<dyn Transport>) -> Relay {
        let mut relay = Relay::new(outbox, transport)
            .settings(self.relay.clone())
            .retry(self.retry.clone())
            .retention(self.retention.clone())
            .accept_unrouted(self.accept_unrouted());
        if let Some(source) = &self.outbox.source {
            relay = relay.source(source);
        }
        for (topic, settings) in &self.topics {
            relay = relay.in_flight_per_key(topic, settings.in_flight_per_key);
        }
        let main = self.destinations.get(MAIN);
        match main.and_then(|d| d.topics.clone()) {
            Some(topics) => relay.topics(topics),
            None => relay,
        }
    }

    /// A relay of any destination, by `[destinations.NAME]` beside what [`Settings::new_relay`] reads. It makes the destination
    /// where it is missing.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for one that is neither `main` nor in the configuration.
    pub fn new_relay_to(
        &self,
        destination: &str,
        outbox: &Outbox,
        transport: Arc<dyn Transport>,
    ) -> Result<Relay> {
        let relay = self.new_relay(outbox, transport);
        if destination == MAIN {
            return Ok(relay);
        }
        let Some(settings) = self.destinations.get(destination) else {
            return Err(self.unknown_destination(destination));
        };
        let relay = relay.destination(destination).start(settings.start);
        Ok(match &settings.topics {
            Some(topics) => relay.topics(topics),
            None => relay.all_topics(),
        })
    }

    /// The names of the destinations that this program relays to: `main` and those of the configuration, without those that
    /// say `relay = false`.
    #[must_use]
    pub fn relayed(&self) -> Vec<&str> {
        let known = self.destinations.keys().map(String::as_str);
        let main = (!self.destinations.contains_key(MAIN)).then_some(MAIN);
        let relays = |name: &&str| self.destinations.get(*name).is_none_or(|d| d.relay);
        main.into_iter().chain(known).filter(relays).collect()
    }

    /// The settings of a destination's broker: its own, or `[transport]`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for one that is neither `main` nor in the configuration.
    pub fn transport_of(&self, destination: &str) -> Result<&TransportSettings> {
        match self.destinations.get(destination) {
            Some(settings) => Ok(settings.transport.as_ref().unwrap_or(&self.transport)),
            None if destination == MAIN => Ok(&self.transport),
            None => Err(self.unknown_destination(destination)),
        }
    }

    fn unknown_destination(&self, name: &str) -> Error {
        let known = self.destinations.keys().map(String::as_str);
        let known = std::iter::once(MAIN).chain(known.filter(|k| *k != MAIN));
        let text = format!(
            "the configuration has no [destinations.{name:?}]; it has: {}",
            known.collect::<Vec<_>>().join(", ")
        );
        Error::new(Kind::NotFound, "look up a destination", text)
    }

    /// A consumer of `group` with `[consumer]`, `[retry]` and `[retention]`, whose handlers enqueue into `outbox`.
    pub fn new_consumer(
        &self,
        outbox: &Outbox,
        transport: Arc<dyn Transport>,
        group: impl Into<String>,
    ) -> Consumer {
        Consumer::new(outbox.database(), transport, group)
            .outbox(outbox)
            .settings(self.consumer.clone())
            .retry(self.retry.clone())
            .retention(self.retention.clone())
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("store", &self.store)
            .field("transport", &self.transport)
            .field("relay", &self.relay)
            .field("consumer", &self.consumer)
            .field("retry", &self.retry)
            .field("retention", &self.retention)
            .field("outbox", &self.outbox)
            .field("types", &self.types)
            .field("topics", &self.topics)
            .field("destinations", &self.destinations)
            .finish_non_exhaustive()
    }
}

struct Reader {
    scope: Scope,
    ours: BTreeMap<&'static str, Value>,
}

impl Reader {
    fn read<T: DeserializeOwned + Default>(&self, table: &str) -> Result<T> {
        match self.ours.get(table) {
            Some(value) => {
                self.is_table(&[table], value)?;
                self.scope.read(&[table], value)
            }
            None => Ok(T::default()),
        }
    }

    /// serde would take a list for a struct, its items in the order of the fields.
    fn is_table(&self, path: &[&str], value: &Value) -> Result<()> {
        match value {
            Value::Array(..) => Err(self.scope.wrong(path, "a list", "a table")),
            Value::Dict(_, below) if NAMED.contains(path.last().unwrap_or(&"")) => {
                let mut below = below.iter();
                below.try_for_each(|(name, value)| self.is_table(&[path, &[name]].concat(), value))
            }
            _ => Ok(()),
        }
    }

    fn build<T: DeserializeOwned + Default, S>(
        &self,
        table: &str,
        build: impl FnOnce(T) -> Result<S, super::problem::Wrong>,
    ) -> Result<S> {
        self.scope.judge(table, build(self.read(table)?))
    }

    /// With their brokers, which are read as `[transport]` is.
    fn destinations(&self) -> Result<BTreeMap<String, DestinationSettings>> {
        let mut all = self.build("destinations", tables::destinations)?;
        let tables = self.ours.get("destinations").and_then(Value::as_dict);
        for (name, settings) in &mut all {
            let table = tables.and_then(|t| t.get(name)).and_then(Value::as_dict);
            if let Some(value) = table.and_then(|t| t.get("transport")) {
                let path = ["destinations", name, "transport"];
                self.is_table(&path, value)?;
                let scope = self.scope.clone();
                settings.transport = Some(TransportSettings::read_at(&path, value, scope)?);
            }
        }
        Ok(all)
    }
}
