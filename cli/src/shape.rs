//! What the answers look like as JSON. These shapes are a contract: fields are added, never renamed or removed.

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use pillarbox::admin;
use serde::Serialize;

use crate::answer::rfc3339;

/// `status`.
#[derive(Serialize)]
pub(crate) struct Status {
    schema: Schema,
    seen: String,
    destinations: Vec<Destination>,
    groups: Vec<Group>,
    duties: Vec<Duty>,
    pauses: Vec<Pause>,
    findings: Vec<String>,
}

#[derive(Serialize)]
pub(crate) struct Schema {
    name: String,
    version: u32,
    partitions: u16,
}

#[derive(Serialize)]
struct Destination {
    name: String,
    lag_seconds: f64,
    partitions: Vec<Partition>,
    exceptions: Exceptions,
}

#[derive(Serialize)]
struct Partition {
    partition: u16,
    owner: Option<Owner>,
    epoch: i64,
    settled: i64,
    lag_seconds: f64,
    behind: u64,
}

#[derive(Serialize)]
struct Group {
    name: String,
    sources: Vec<Source>,
    exceptions: Exceptions,
}

#[derive(Serialize)]
struct Source {
    transport: String,
    cluster: String,
    name: String,
    partition: u32,
    owner: Option<Owner>,
    epoch: i64,
    position: Option<u64>,
}

#[derive(Serialize)]
struct Duty {
    kind: String,
    scope: String,
    shard: u16,
    owner: Option<Owner>,
}

#[derive(Serialize)]
struct Owner {
    id: String,
    expires_in_seconds: f64,
}

#[derive(Serialize)]
struct Exceptions {
    deferred: u64,
    parked: u64,
    longest_line: u64,
    scheduled: u64,
    dead_letters: u64,
}

impl Status {
    pub(crate) fn new(
        status: &admin::Status,
        pauses: &[admin::Pause],
        findings: &[String],
    ) -> Self {
        Self {
            schema: (&status.installation).into(),
            seen: rfc3339(status.seen),
            destinations: status.destinations.iter().map(Into::into).collect(),
            groups: status.groups.iter().map(Into::into).collect(),
            duties: status.duties.iter().map(Into::into).collect(),
            pauses: pauses.iter().map(Into::into).collect(),
            findings: findings.to_vec(),
        }
    }
}

impl From<&admin::Installation> for Schema {
    fn from(i: &admin::Installation) -> Self {
        Self {
            name: i.schema.clone(),
            version: i.version,
            partitions: i.partitions,
        }
    }
}

impl From<&admin::DestinationStatus> for Destination {
    fn from(d: &admin::DestinationStatus) -> Self {
        Self {
            name: d.name.clone(),
            lag_seconds: seconds(d.lag()),
            partitions: d.partitions.iter().map(Into::into).collect(),
            exceptions: d.exceptions.into(),
        }
    }
}

impl From<&admin::PartitionStatus> for Partition {
    fn from(p: &admin::PartitionStatus) -> Self {
        Self {
            partition: p.partition,
            owner: p.owner.as_ref().map(Into::into),
            epoch: p.epoch,
            settled: p.settled,
            lag_seconds: seconds(p.lag),
            behind: p.behind,
        }
    }
}

impl From<&admin::GroupStatus> for Group {
    fn from(g: &admin::GroupStatus) -> Self {
        Self {
            name: g.name.clone(),
            sources: g.sources.iter().map(Into::into).collect(),
            exceptions: g.exceptions.into(),
        }
    }
}

impl From<&admin::SourceStatus> for Source {
    fn from(s: &admin::SourceStatus) -> Self {
        Self {
            transport: s.transport.clone(),
            cluster: s.cluster.clone(),
            name: s.name.clone(),
            partition: s.partition,
            owner: s.owner.as_ref().map(Into::into),
            epoch: s.epoch,
            position: s.position,
        }
    }
}

impl From<&admin::DutyStatus> for Duty {
    fn from(d: &admin::DutyStatus) -> Self {
        Self {
            kind: d.kind.clone(),
            scope: d.scope.clone(),
            shard: d.shard,
            owner: d.owner.as_ref().map(Into::into),
        }
    }
}

impl From<&admin::Owner> for Owner {
    fn from(o: &admin::Owner) -> Self {
        Self {
            id: o.id.clone(),
            expires_in_seconds: seconds(o.expires_in),
        }
    }
}

impl From<admin::Exceptions> for Exceptions {
    fn from(e: admin::Exceptions) -> Self {
        Self {
            deferred: e.deferred,
            parked: e.parked,
            longest_line: e.longest_line,
            scheduled: e.scheduled,
            dead_letters: e.dead_letters,
        }
    }
}

/// A dead letter or parked event, as lists show it: without payload, headers and attributes.
#[derive(Serialize)]
pub(crate) struct Letter {
    number: i64,
    side: &'static str,
    scope: String,
    source: String,
    id: String,
    topic: String,
    #[serde(rename = "type")]
    kind: String,
    key: Option<String>,
    time: String,
    position: i64,
    attempts: u32,
    reason: String,
    first_failure: String,
    last_failure: String,
    maybe_sent: bool,
    retried: u32,
    unreadable: bool,
}

impl From<&admin::Letter> for Letter {
    fn from(l: &admin::Letter) -> Self {
        Self {
            number: l.number,
            side: l.id.side.as_str(),
            scope: l.id.scope.clone(),
            source: l.id.source.clone(),
            id: l.id.id.clone(),
            topic: l.topic.clone(),
            kind: l.kind.clone(),
            key: l.key.clone(),
            time: rfc3339(l.time),
            position: l.position,
            attempts: l.attempts,
            reason: l.reason.clone(),
            first_failure: rfc3339(l.first_failure),
            last_failure: rfc3339(l.last_failure),
            maybe_sent: l.maybe_sent,
            retried: l.retried,
            unreadable: l.unreadable,
        }
    }
}

/// A whole one. One of `payload` and `payload_base64` is a text, unless the event is a tombstone.
#[derive(Serialize)]
pub(crate) struct Shown {
    #[serde(flatten)]
    letter: Letter,
    attributes: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    payload: Option<String>,
    payload_base64: Option<String>,
}

impl From<&admin::Shown> for Shown {
    fn from(s: &admin::Shown) -> Self {
        let body = s.message.payload.as_deref();
        let text = body.and_then(|b| std::str::from_utf8(b).ok());
        let bytes = if text.is_none() { body } else { None };
        Self {
            letter: (&s.letter).into(),
            attributes: s.message.attributes.clone(),
            headers: s.message.headers.clone(),
            payload: text.map(ToOwned::to_owned),
            payload_base64: bytes.map(|b| BASE64_STANDARD.encode(b)),
        }
    }
}

/// What a command for many letters would touch.
#[derive(Serialize)]
pub(crate) struct DryRun {
    dry_run: bool,
    letters: u64,
    keys: u64,
    keyless: u64,
    maybe_sent: u64,
    newer: Option<u64>,
    parked: u64,
}

impl DryRun {
    pub(crate) fn new(d: &admin::DryRun, parked: u64) -> Self {
        Self {
            dry_run: true,
            letters: d.letters,
            keys: d.keys,
            keyless: d.keyless,
            maybe_sent: d.maybe_sent,
            newer: d.newer,
            parked,
        }
    }
}

fn seconds(d: Duration) -> f64 {
    // To the millisecond: the rest is noise of the two clock readings.
    (d.as_secs_f64() * 1_000.0).round() / 1_000.0
}

/// A pause, as `pause`, `resume` and `status` show it.
#[derive(Serialize)]
pub(crate) struct Pause {
    side: &'static str,
    scope: String,
    topic: Option<String>,
    key: Option<String>,
    since: String,
    until: String,
    reason: String,
    operator: String,
}

impl From<&admin::Pause> for Pause {
    fn from(p: &admin::Pause) -> Self {
        Self {
            side: p.target.side.as_str(),
            scope: p.target.scope.clone(),
            topic: p.target.topic.clone(),
            key: p.target.key.clone(),
            since: rfc3339(p.since),
            until: rfc3339(p.until),
            reason: p.reason.clone(),
            operator: p.operator.clone(),
        }
    }
}

/// A destination, as `destinations list` shows it.
#[derive(Serialize)]
pub(crate) struct KnownDestination {
    name: String,
    start: String,
    added: String,
    served: bool,
    unserved_seconds: f64,
    lag_seconds: f64,
    behind: u64,
    deferred: u64,
    parked: u64,
    scheduled: u64,
    dead_letters: u64,
}

impl From<&admin::Destination> for KnownDestination {
    fn from(d: &admin::Destination) -> Self {
        Self {
            name: d.name.clone(),
            start: d.start.to_string(),
            added: rfc3339(d.added),
            served: d.is_served(),
            unserved_seconds: seconds(d.unserved),
            lag_seconds: seconds(d.lag),
            behind: d.behind,
            deferred: d.deferred,
            parked: d.parked,
            scheduled: d.scheduled,
            dead_letters: d.dead_letters,
        }
    }
}

/// A destination that was removed, and what was lost by it.
#[derive(Serialize)]
pub(crate) struct Removed {
    name: String,
    at: String,
    why: String,
    unpublished: u64,
    deferred: u64,
    dead_letters: u64,
}

impl From<&admin::Removed> for Removed {
    fn from(r: &admin::Removed) -> Self {
        Self {
            name: r.name.clone(),
            at: rfc3339(r.at),
            why: r.why.clone(),
            unpublished: r.unpublished,
            deferred: r.deferred,
            dead_letters: r.dead_letters,
        }
    }
}

/// What a replay would send.
#[derive(Serialize)]
pub(crate) struct ReplayPlan {
    dry_run: bool,
    events: u64,
    first: Option<String>,
    last: Option<String>,
    forgotten: u64,
    gone_position: Option<i64>,
    gone_time: Option<String>,
}

impl From<&admin::ReplayPlan> for ReplayPlan {
    fn from(p: &admin::ReplayPlan) -> Self {
        Self {
            dry_run: true,
            events: p.events,
            first: p.between.map(|(first, _)| rfc3339(first)),
            last: p.between.map(|(_, last)| rfc3339(last)),
            forgotten: p.forgotten,
            gone_position: p.gone.map(|g| g.position),
            gone_time: p.gone.map(|g| rfc3339(g.time)),
        }
    }
}
