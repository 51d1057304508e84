//! The application: transactions that write events, commit late, in any order, or not at all.
//!
//! Writers of a key hold its lock from before they write until they have ended: only then is order promised.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use pillarbox_transport::Message;
use tokio::{sync::Mutex, time::Instant};

use super::{
    database::{Change, Number, Row},
    store,
    world::{Inner, World},
};
use crate::{Outbox, event::Key};

/// How the broker takes to an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    Good,
    /// Refused by name for a while; [`Written::left`] says how often.
    Refused,
    /// Refused for good.
    Rejected,
    /// No broker may see it.
    Defect,
    /// The broker has nowhere to put it, and that is accepted.
    Unrouted,
    /// The broker ends the session over it, and names nobody.
    Killer,
}

/// An event that was written, whatever became of its transaction.
#[derive(Debug, Clone)]
pub(super) struct Written {
    pub(super) key: Option<Key>,
    pub(super) topic: usize,
    pub(super) nature: Nature,
    /// Refusals until it passes.
    left: u32,
    /// Refusals that its sender heard of.
    pub(super) refusals: u32,
    /// How often it was sent alone and its sender heard nothing.
    pub(super) unanswered: u32,
    /// When it was committed.
    pub(super) committed: Option<Instant>,
}

#[derive(Debug, Default)]
pub(super) struct Application {
    pub(super) events: Vec<Written>,
    pub(super) writers: usize,
}

/// The type of events that need no consumer.
pub(super) const UNROUTED: &str = "unrouted";

pub(super) fn topic(number: usize) -> String {
    format!("topic-{number}")
}

/// The number is the id.
pub(super) fn number_of(message: &Message) -> Number {
    message.id.parse().unwrap_or(Number::MAX)
}

impl Application {
    pub(super) fn event(&self, number: Number) -> &Written {
        &self.events[number]
    }

    pub(super) fn refused(&mut self, number: Number) {
        let event = &mut self.events[number];
        event.refusals += 1;
        event.left = event.left.saturating_sub(1);
        if event.nature == Nature::Refused && event.left == 0 {
            event.nature = Nature::Good;
        }
    }
}

impl Application {
    /// An event that was sent alone, and never answered.
    pub(super) fn unanswered(&mut self, number: Number) {
        self.events[number].unanswered += 1;
    }
}

impl Inner {
    fn write(&mut self, topic_number: usize, key: Option<usize>) -> (Number, Message) {
        let faults = &self.plan.faults;
        let likely = [
            faults.refused,
            faults.rejected,
            faults.defect,
            faults.unrouted,
            faults.killer,
        ];
        let natures = [
            Nature::Refused,
            Nature::Rejected,
            Nature::Defect,
            Nature::Unrouted,
            Nature::Killer,
        ];
        let hits = likely.map(|p| !self.straight && self.chance.hit(p));
        let nature = natures
            .into_iter()
            .zip(hits)
            .find(|(_, hit)| *hit)
            .map_or(Nature::Good, |(n, _)| n);
        let number = self.application.events.len();
        let kind = if nature == Nature::Unrouted {
            UNROUTED
        } else {
            "kind"
        };
        let mut message = Message::new(number.to_string(), topic(topic_number), kind, "{}");
        message.time = SystemTime::UNIX_EPOCH;
        message.key = key.map(|k| format!("key-{k}"));
        self.application.events.push(Written {
            key: Key::of(&message),
            topic: topic_number,
            nature,
            left: u32::try_from(self.chance.within(1..=5)).unwrap_or(1),
            refusals: 0,
            unanswered: 0,
            committed: None,
        });
        (number, message)
    }
}

/// The locks of the keys' rows.
type Locks = Arc<BTreeMap<(usize, usize), Arc<Mutex<()>>>>;

fn locks(w: &Inner) -> Locks {
    let keys = (0..w.plan.topics).flat_map(|t| (0..w.plan.keys).map(move |k| (t, k)));
    Arc::new(keys.map(|name| (name, Arc::default())).collect())
}

/// Starts the writers.
pub(super) fn start(world: &Arc<World>, outbox: &Outbox) {
    let (writers, locks) = world.with(|w| {
        w.application.writers = w.plan.writers;
        (w.plan.writers, locks(w))
    });
    for _ in 0..writers {
        tokio::spawn(write(world.clone(), locks.clone(), outbox.clone()));
    }
}

/// One writer: transaction after transaction, spread over the time of the faults.
async fn write(world: Arc<World>, locks: Locks, outbox: Outbox) {
    let (transactions, spread) = world.with(|w| {
        let spread = usize::try_from(w.plan.chaos.as_millis()).unwrap_or(0) / w.plan.transactions;
        (w.plan.transactions, spread)
    });
    for _ in 0..transactions {
        transaction(&world, &locks, &outbox).await;
        world.pause(0..=2 * spread).await;
    }
    world.with(|w| w.application.writers -= 1);
}

async fn transaction(world: &Arc<World>, locks: &Locks, outbox: &Outbox) {
    let names: BTreeSet<(usize, usize)> = world.with(|w| {
        let (topics, keys) = (w.plan.topics, w.plan.keys);
        let n = w.chance.within(0..=2);
        (0..n)
            .map(|_| (w.chance.below(topics), w.chance.below(keys)))
            .collect()
    });
    let mut held = Vec::new();
    // In one order everywhere: no deadlock.
    for name in &names {
        if let Some(lock) = locks.get(name) {
            held.push(lock.clone().lock_owned().await);
        }
    }
    let Some((incarnation, xid)) = begin(world).await else {
        return;
    };
    let mut rows = Vec::new();
    for _ in 0..world.with(|w| w.chance.within(1..=3)) {
        let late = world.with(|w| !w.healed && w.chance.hit(w.plan.faults.late_commit));
        world.pause(0..=if late { 400 } else { 2 }).await;
        let row = world.with(|w| w.insert(xid, &names));
        rows.push(row);
    }
    let late = world.with(|w| w.chance.hit(w.plan.faults.late_commit));
    world.pause(0..=if late { 800 } else { 2 }).await;
    world.with(|w| w.end(incarnation, xid, rows));
    drop(held);
    // A writer may share a process with a relay, or not. Only where one task listens: a watch wakes several in an order
    // that no seed governs.
    if world.with(|w| w.chance.hit(0.5) && w.plan.partitions == 1) {
        outbox.wake();
    }
}

async fn begin(world: &Arc<World>) -> Option<(u32, u64)> {
    for _ in 0..1_000 {
        let begun = world.with(|w| {
            let is_away = w.database_away.is_some_and(|until| Instant::now() < until);
            (!is_away).then(|| (w.database.incarnation, w.database.begin()))
        });
        if begun.is_some() {
            return begun;
        }
        world.pause(1..=50).await;
    }
    None
}

impl Inner {
    fn insert(&mut self, xid: u64, names: &BTreeSet<(usize, usize)>) -> Row {
        let keyed = !names.is_empty() && !self.chance.hit(0.1);
        let chosen = self.chance.below(names.len());
        let name = names.iter().nth(chosen).filter(|_| keyed).copied();
        let topic = name.map_or_else(|| self.chance.below(self.plan.topics), |(t, _)| t);
        let (number, message) = self.write(topic, name.map(|(_, k)| k));
        let position = self.database.draw();
        self.tell(|| {
            format!(
                "application: {number} at {position} of {xid}, {:?} {:?}",
                message.topic, message.key
            )
        });
        let defect = self.application.event(number).nature == Nature::Defect;
        Row {
            number,
            position,
            xid,
            partition: store::place(self, &message, number),
            message,
            defect: defect.then(|| "headers that are no object".to_owned()),
        }
    }

    /// One more event of each key, committed at once.
    pub(super) fn write_for_each_key(&mut self) {
        let xid = self.database.begin();
        let names: Vec<_> = (0..self.plan.topics)
            .flat_map(|t| (0..self.plan.keys).map(move |k| (t, k)))
            .collect();
        let rows: Vec<Row> = names
            .into_iter()
            .map(|name| self.insert(xid, &BTreeSet::from([name])))
            .collect();
        let changes = rows.into_iter().map(Change::Log).collect();
        self.database.commit(Some(xid), changes, true);
    }

    fn end(&mut self, incarnation: u32, xid: u64, rows: Vec<Row>) {
        if self.database.incarnation != incarnation {
            return;
        }
        if self.chance.hit(self.plan.faults.rollback) {
            self.tell(|| format!("application: {xid} is rolled back"));
            self.database.rollback(xid);
            return;
        }
        for row in &rows {
            self.application.events[row.number].committed = Some(Instant::now());
        }
        let durable = !self.chance.hit(self.plan.faults.async_commit);
        self.tell(|| {
            format!(
                "application: {xid} commits, {}",
                if durable { "flushed" } else { "not flushed" }
            )
        });
        self.database.commit(
            Some(xid),
            rows.into_iter().map(Change::Log).collect(),
            durable,
        );
    }
}
