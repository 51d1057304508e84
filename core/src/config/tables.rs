//! The tables as they are written, one struct each, and the checks that make settings of them. No I/O.

use std::{collections::BTreeMap, fmt::Display, time::Duration};

use humantime_serde::re::humantime::format_duration;
use pillarbox_transport::{Limits, limits::NAME_BYTES};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    problem::{Wrong, cut},
    settings::{DestinationSettings, OutboxSettings, TopicSettings, TypeSettings, Unrouted},
};
use crate::{
    consumer::ConsumerSettings,
    destination::{self, MAIN, Start},
    failure::{OnExhausted, Retry},
    lease::LeaseTerm,
    relay::RelaySettings,
    retention::RetentionSettings,
    window,
};

const MILLISECOND: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// As durations are written: of 365.25 days.
const YEAR: Duration = Duration::from_secs(31_557_600);

/// `[relay]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RelayTable {
    #[serde(with = "humantime_serde")]
    lease: Duration,
    batch: u32,
    publish: usize,
    unsettled: usize,
    held: usize,
    held_bytes: usize,
    in_flight: usize,
    #[serde(with = "humantime_serde")]
    idle_poll: Duration,
    #[serde(with = "humantime_serde")]
    busy_poll: Duration,
    #[serde(with = "humantime_serde")]
    settle: Duration,
    deferred: u64,
    deferred_per_key: u64,
    scheduled: u64,
    #[serde(with = "humantime_serde")]
    drain: Duration,
}

impl Default for RelayTable {
    fn default() -> Self {
        // Taken apart whole, so that a new setting cannot be forgotten here.
        let RelaySettings {
            lease,
            batch,
            publish,
            window,
            idle_poll,
            busy_poll,
            settle,
            deferred,
            deferred_per_key,
            scheduled,
            drain,
        } = RelaySettings::default();
        Self {
            lease: lease.term(),
            batch,
            publish,
            unsettled: window.unsettled,
            held: window.held,
            held_bytes: window.bytes,
            in_flight: window.in_flight,
            idle_poll,
            busy_poll,
            settle,
            deferred,
            deferred_per_key,
            scheduled,
            drain,
        }
    }
}

impl RelayTable {
    pub(super) fn build(self) -> Result<RelaySettings, Wrong> {
        let unsettled = within("unsettled", self.unsettled, 1, 1_000_000)?;
        Ok(RelaySettings {
            lease: lease(self.lease)?,
            batch: within("batch", self.batch, 1, 10_000)?,
            publish: within("publish", self.publish, 1, 10_000)?,
            window: window::Limits {
                unsettled,
                held: within("held", self.held, 1, 1_000_000)?,
                bytes: within("held_bytes", self.held_bytes, 1 << 20, 1 << 30)?,
                in_flight: within("in_flight", self.in_flight, 1, 100_000)?,
                // Set for each topic.
                per_key: 1,
            },
            idle_poll: lasting("idle_poll", self.idle_poll, MILLISECOND, MINUTE)?,
            busy_poll: lasting("busy_poll", self.busy_poll, MILLISECOND, MINUTE)?,
            settle: lasting("settle", self.settle, MILLISECOND, Duration::from_secs(10))?,
            deferred: within("deferred", self.deferred, 1, 1_000_000)?,
            deferred_per_key: within("deferred_per_key", self.deferred_per_key, 1, 1_000_000)?,
            scheduled: within("scheduled", self.scheduled, 1, 10_000_000)?,
            drain: lasting("drain", self.drain, MILLISECOND, 10 * MINUTE)?,
        })
    }
}

/// `[consumer]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ConsumerTable {
    #[serde(with = "humantime_serde")]
    lease: Duration,
    batch: usize,
    workers: usize,
    #[serde(with = "humantime_serde")]
    effect_timeout: Duration,
    deferred: u64,
    deferred_per_key: u64,
    #[serde(with = "humantime_serde")]
    drain: Duration,
    #[serde(with = "humantime_serde")]
    remember: Duration,
}

impl Default for ConsumerTable {
    fn default() -> Self {
        let ConsumerSettings {
            lease,
            batch,
            workers,
            effect_timeout,
            deferred,
            deferred_per_key,
            drain,
            remember,
        } = ConsumerSettings::default();
        Self {
            lease: lease.term(),
            batch,
            workers,
            effect_timeout,
            deferred,
            deferred_per_key,
            drain,
            remember,
        }
    }
}

impl ConsumerTable {
    pub(super) fn build(self) -> Result<ConsumerSettings, Wrong> {
        Ok(ConsumerSettings {
            lease: lease(self.lease)?,
            batch: within("batch", self.batch, 1, 10_000)?,
            workers: within("workers", self.workers, 1, 64)?,
            effect_timeout: lasting(
                "effect_timeout",
                self.effect_timeout,
                MILLISECOND,
                10 * MINUTE,
            )?,
            deferred: within("deferred", self.deferred, 1, 1_000_000)?,
            deferred_per_key: within("deferred_per_key", self.deferred_per_key, 1, 1_000_000)?,
            drain: lasting("drain", self.drain, MILLISECOND, 10 * MINUTE)?,
            // The ring of the inbox turns in 48 h, and six of them belong to the present.
            remember: lasting("remember", self.remember, HOUR, 36 * HOUR)?,
        })
    }
}

/// `[retry]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RetryTable {
    delays: Vec<humantime_serde::Serde<Duration>>,
    jitter: f64,
    on_exhausted: OnExhausted,
}

impl Default for RetryTable {
    fn default() -> Self {
        let Retry {
            delays,
            jitter,
            on_exhausted,
        } = Retry::default();
        Self {
            delays: delays.into_iter().map(Into::into).collect(),
            jitter,
            on_exhausted,
        }
    }
}

impl RetryTable {
    pub(super) fn build(self) -> Result<Retry, Wrong> {
        let count = self.delays.len();
        if count > 32 {
            return Err(Wrong::new(
                "delays",
                format!("{count} delays"),
                "32 at most",
            ));
        }
        let delays = self
            .delays
            .into_iter()
            .map(humantime_serde::Serde::into_inner);
        let delays = delays.map(|d| lasting("delays", d, MILLISECOND, DAY));
        Ok(Retry {
            delays: delays.collect::<Result<_, _>>()?,
            jitter: within("jitter", self.jitter, 0.0, 1.0)?,
            on_exhausted: self.on_exhausted,
        })
    }
}

/// `[retention]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RetentionTable {
    #[serde(with = "humantime_serde")]
    log: Duration,
    #[serde(with = "humantime_serde")]
    dead_letters: Duration,
    dead_letters_max: u64,
    #[serde(with = "humantime_serde")]
    abandon_after: Duration,
    #[serde(with = "humantime_serde")]
    interval: Duration,
}

impl Default for RetentionTable {
    fn default() -> Self {
        let RetentionSettings {
            log,
            dead_letters,
            dead_letters_max,
            abandon_after,
            interval,
        } = RetentionSettings::default();
        Self {
            log,
            dead_letters,
            dead_letters_max,
            abandon_after,
            interval,
        }
    }
}

impl RetentionTable {
    pub(super) fn build(self) -> Result<RetentionSettings, Wrong> {
        Ok(RetentionSettings {
            log: lasting("log", self.log, MINUTE, 30 * DAY)?,
            dead_letters: lasting("dead_letters", self.dead_letters, HOUR, 10 * YEAR)?,
            dead_letters_max: within("dead_letters_max", self.dead_letters_max, 1, 10_000_000)?,
            abandon_after: lasting("abandon_after", self.abandon_after, HOUR, 10 * YEAR)?,
            // The inbox's clocks go by what each look finds: less often than once a minute would slow them.
            interval: lasting("interval", self.interval, Duration::from_secs(1), MINUTE)?,
        })
    }
}

/// Events that are retried must be remembered until they are through.
pub(super) fn outlasts(consumer: &ConsumerSettings, retry: &Retry) -> Result<(), Wrong> {
    let waits: Duration = retry.delays.iter().sum();
    let longest = waits.mul_f64(1.0 + retry.jitter);
    if consumer.remember > longest {
        return Ok(());
    }
    let expected = format!(
        "more than all waits of [retry] delays together, {}",
        format_duration(Duration::from_secs(longest.as_secs()))
    );
    Err(Wrong::new(
        "remember",
        format_duration(consumer.remember),
        expected,
    ))
}

/// `[outbox]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct OutboxTable {
    source: Option<String>,
    payload_limit: usize,
    key_limit: usize,
    header_limit: usize,
    header_name_limit: usize,
    header_bytes_limit: usize,
}

impl Default for OutboxTable {
    fn default() -> Self {
        let Limits {
            payload,
            key,
            headers,
            header_name,
            header_bytes,
        } = Limits::default();
        Self {
            source: None,
            payload_limit: payload,
            key_limit: key,
            header_limit: headers,
            header_name_limit: header_name,
            header_bytes_limit: header_bytes,
        }
    }
}

impl OutboxTable {
    pub(super) fn build(self) -> Result<OutboxSettings, Wrong> {
        if let Some(source) = &self.source {
            let good = (1..=255).contains(&source.len())
                && !source.chars().any(|c| c.is_whitespace() || c.is_control());
            if !good {
                let found = format!("{} bytes", source.len());
                let expected = "1 to 255 bytes without spaces, such as \"inventory-service\"";
                return Err(Wrong::new("source", found, expected));
            }
            // It travels with every event.
            if source.contains("://") && source.contains('@') {
                let expected = "a name that everybody may see";
                return Err(Wrong::new("source", "a URL with '@' (not shown)", expected));
            }
        }
        Ok(OutboxSettings {
            source: self.source,
            limits: Limits {
                payload: within("payload_limit", self.payload_limit, 1, 128 << 20)?,
                key: within("key_limit", self.key_limit, 1, 16_384)?,
                headers: within("header_limit", self.header_limit, 16, 1_024)?,
                header_name: within("header_name_limit", self.header_name_limit, 8, 255)?,
                // AMQP puts all headers into one frame of at most 128 KiB.
                header_bytes: within("header_bytes_limit", self.header_bytes_limit, 1_024, 65_536)?,
            },
        })
    }
}

/// `[types."NAME"]`.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TypeTable {
    unrouted: Unrouted,
}

/// `[topics."NAME"]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TopicTable {
    in_flight_per_key: u32,
}

impl Default for TopicTable {
    fn default() -> Self {
        Self {
            in_flight_per_key: 1,
        }
    }
}

/// `[destinations.NAME]`.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct DestinationTable {
    topics: Option<Vec<String>>,
    start: Option<String>,
    relay: Option<bool>,
    /// Read by [`TransportSettings`](super::TransportSettings), with what stands in it.
    transport: Option<IgnoredAny>,
}

pub(super) fn types(
    tables: BTreeMap<String, TypeTable>,
) -> Result<BTreeMap<String, TypeSettings>, Wrong> {
    let build = |(name, table): (String, TypeTable)| {
        event_name(&name).map_err(|w| w.below(&name))?;
        let settings = TypeSettings {
            unrouted: table.unrouted,
        };
        Ok((name, settings))
    };
    tables.into_iter().map(build).collect()
}

pub(super) fn topics(
    tables: BTreeMap<String, TopicTable>,
) -> Result<BTreeMap<String, TopicSettings>, Wrong> {
    let build = |(name, table): (String, TopicTable)| {
        event_name(&name).map_err(|w| w.below(&name))?;
        let found = within("in_flight_per_key", table.in_flight_per_key, 1, 10_000);
        let found = found.map_err(|w| w.below(&name))?;
        let settings = TopicSettings {
            in_flight_per_key: found,
        };
        Ok((name, settings))
    };
    tables.into_iter().map(build).collect()
}

pub(super) fn destinations(
    tables: BTreeMap<String, DestinationTable>,
) -> Result<BTreeMap<String, DestinationSettings>, Wrong> {
    let build = |(name, table): (String, DestinationTable)| {
        if !destination::is_name(&name) {
            let found = format!("the name {:?}", cut(&name));
            let path = vec![name];
            return Err(Wrong {
                path,
                found,
                expected: destination::NAMES.into(),
            });
        }
        let start = match &table.start {
            None => Start::Earliest,
            Some(text) => text.parse().map_err(|_| {
                let found = format!("{:?}", cut(text));
                let expected = "\"earliest\", \"now\" or a time such as \"2026-11-24T15:00:00Z\"";
                Wrong::new("start", found, expected).below(&name)
            })?,
        };
        if name == MAIN && start != Start::Earliest {
            let expected = "\"earliest\", or no such key: main begins with the log";
            return Err(Wrong::new("start", start, expected).below(&name));
        }
        if table.topics.as_ref().is_some_and(Vec::is_empty) {
            let expected = "one topic at least, or no such key for all topics";
            return Err(Wrong::new("topics", "an empty list", expected).below(&name));
        }
        for (index, topic) in table.topics.iter().flatten().enumerate() {
            event_name(topic)
                .map_err(|w| w.below(&index.to_string()).below("topics").below(&name))?;
        }
        let settings = DestinationSettings {
            topics: table.topics,
            start,
            relay: table.relay.unwrap_or(true),
            transport: None,
        };
        Ok((name, settings))
    };
    tables.into_iter().map(build).collect()
}

/// The name of a type or topic, for which no event would ever be let through otherwise.
fn event_name(name: &str) -> Result<(), Wrong> {
    let good = name.len() <= NAME_BYTES
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.split('.').any(str::is_empty);
    if good {
        return Ok(());
    }
    Err(Wrong {
        path: Vec::new(),
        found: format!("the name {:?}", cut(name)),
        expected: format!("1 to {NAME_BYTES} letters, digits, '_', '-', in parts joined by '.'"),
    })
}

fn lease(found: Duration) -> Result<LeaseTerm, Wrong> {
    lasting("lease", found, LeaseTerm::SHORTEST, LeaseTerm::LONGEST).map(LeaseTerm::new)
}

pub(super) fn lasting(
    key: &str,
    found: Duration,
    least: Duration,
    most: Duration,
) -> Result<Duration, Wrong> {
    match (least..=most).contains(&found) {
        true => Ok(found),
        false => {
            let expected = format!("{} to {}", format_duration(least), format_duration(most));
            Err(Wrong::new(key, format_duration(found), expected))
        }
    }
}

pub(super) fn within<T: PartialOrd + Display>(
    key: &str,
    found: T,
    least: T,
    most: T,
) -> Result<T, Wrong> {
    // No number is within, not even where it is not a number.
    match found >= least && found <= most {
        true => Ok(found),
        false => Err(Wrong::new(key, found, format!("{least} to {most}"))),
    }
}
