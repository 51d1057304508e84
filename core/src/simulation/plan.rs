//! What a seed decides before the schedule begins: sizes, bounds, and which faults there are at all. Few kinds of fault
//! at a time go deeper than all of them at once.

use std::time::Duration;

use super::chance::Chance;
use crate::{ConsumerSettings, failure::Retry, lease::LeaseTerm, relay::RelaySettings, window};

/// One schedule.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) partitions: u16,
    pub(super) relays: usize,
    pub(super) topics: usize,
    pub(super) keys: usize,
    pub(super) writers: usize,
    pub(super) transactions: usize,
    /// How long faults happen.
    pub(super) chaos: Duration,
    pub(super) settings: RelaySettings,
    pub(super) retry: Retry,
    /// The relay sends topic 0 alone.
    pub(super) filter: bool,
    pub(super) faults: Faults,
    pub(super) consumer: ConsumerPlan,
}

/// How likely each fault is; zero where the seed has none of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults {
    // The application's.
    pub(super) rollback: f64,
    pub(super) late_commit: f64,
    pub(super) async_commit: f64,
    // Of one event.
    pub(super) refused: f64,
    pub(super) rejected: f64,
    pub(super) defect: f64,
    pub(super) unrouted: f64,
    pub(super) killer: f64,
    // Of one call to the database.
    pub(super) fails_before: f64,
    pub(super) fails_after: f64,
    pub(super) slow_call: f64,
    // Of one batch at the broker.
    pub(super) lost: f64,
    pub(super) session_death: f64,
    pub(super) short_answer: f64,
    pub(super) nack: f64,
    pub(super) slow_batch: f64,
    pub(super) unreachable: f64,
    // Weights of what happens to whole processes and servers.
    pub(super) events: Vec<Event>,
}

/// What befalls a process or a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A relay ends at once, wherever it is, and another one starts later.
    Crash,
    /// A relay is stopped in order.
    Shutdown,
    /// A relay stands still for longer than its lease, or for less, and goes on.
    Freeze,
    /// The database ends without flushing, and starts again.
    DatabaseCrash,
    /// The database cannot be reached.
    DatabaseAway,
    /// One relay is cut off from the database, which answers the others: what it asks or is answered waits for the end.
    CutOff,
    /// The broker ends its sessions and cannot be reached.
    BrokerAway,
    /// The broker takes nothing of a topic; what a handler needs is away.
    TopicAway,
    /// The database's clock is set forward or back.
    ClockJump,
    /// A standby takes over that lacks the newest commits.
    Failover,
}

const EVENTS: [Event; 10] = [
    Event::Crash,
    Event::Shutdown,
    Event::Freeze,
    Event::DatabaseCrash,
    Event::DatabaseAway,
    Event::CutOff,
    Event::BrokerAway,
    Event::TopicAway,
    Event::ClockJump,
    Event::Failover,
];

impl Plan {
    pub(super) fn new(chance: &mut Chance) -> Self {
        let mut plan = Self {
            partitions: [1, 2, 4][chance.below(3)],
            relays: chance.within(1..=3),
            topics: chance.within(1..=2),
            keys: chance.within(1..=3),
            writers: chance.within(1..=3),
            transactions: chance.within(2..=10),
            chaos: chance.millis(500..=4_000),
            settings: settings(chance),
            retry: Retry {
                delays: (0..chance.within(0..=3))
                    .map(|_| chance.millis(5..=400))
                    .collect(),
                jitter: 0.1,
                ..Retry::default()
            },
            filter: chance.hit(0.15),
            faults: Faults::new(chance),
            consumer: ConsumerPlan::default(),
        };
        plan.consumer = ConsumerPlan::new(chance, plan.settings.lease);
        plan
    }

    /// Whether nothing but the application's own doings and refusals by name disturb the way of an event.
    pub(super) fn is_calm(&self) -> bool {
        let f = &self.faults;
        let calls = [f.fails_before, f.fails_after, f.slow_call];
        let broker = [
            f.lost,
            f.session_death,
            f.short_answer,
            f.nack,
            f.slow_batch,
            f.unreachable,
        ];
        // A relay that stops in order, with time to drain, leaves nothing to repeat: only what was confirmed behind
        // an event that still waits.
        let drains = self.settings.drain >= Duration::from_millis(500) && f.refused == 0.0;
        let orderly = |e: &Event| *e == Event::Shutdown && drains;
        f.events.iter().all(orderly) && calls.iter().chain(&broker).all(|p| *p == 0.0)
    }
}

fn settings(chance: &mut Chance) -> RelaySettings {
    RelaySettings {
        lease: LeaseTerm::new(chance.millis(1_000..=2_000)),
        batch: u32::try_from(chance.within(1..=8)).unwrap_or(1),
        publish: chance.within(1..=4),
        window: window::Limits {
            unsettled: chance.within(1..=16),
            held: chance.within(1..=16),
            bytes: [40, 400, 1 << 20][chance.below(3)],
            in_flight: chance.within(1..=8),
            per_key: 1,
        },
        idle_poll: chance.millis(50..=400),
        busy_poll: chance.millis(1..=20),
        settle: chance.millis(0..=200),
        deferred: [2, 8, 1_000][chance.below(3)],
        deferred_per_key: [1, 3, 1_000][chance.below(3)],
        scheduled: 100_000,
        drain: chance.millis(0..=1_000),
    }
}

impl Faults {
    fn new(chance: &mut Chance) -> Self {
        // Some seeds have no trouble with servers: without faults there are no repeats either.
        let calm = chance.hit(0.1);
        let mut some = |likely: f64, most: f64| {
            let (has, share) = (chance.hit(likely), chance.share());
            if has { share * most } else { 0.0 }
        };
        let faults = Self {
            rollback: some(0.5, 0.5),
            late_commit: some(0.5, 0.6),
            async_commit: some(0.5, 1.0),
            refused: some(0.6, 0.5),
            rejected: some(0.3, 0.2),
            defect: some(0.2, 0.2),
            unrouted: some(0.2, 0.3),
            killer: some(0.2, 0.15),
            fails_before: some(0.4, 0.15),
            fails_after: some(0.5, 0.2),
            slow_call: some(0.3, 0.05),
            lost: some(0.5, 0.3),
            session_death: some(0.4, 0.2),
            short_answer: some(0.15, 0.1),
            nack: some(0.3, 0.2),
            slow_batch: some(0.3, 0.1),
            unreachable: some(0.3, 0.3),
            events: Vec::new(),
        };
        let faults = if calm { faults.calm() } else { faults };
        let events: Vec<Event> = EVENTS.into_iter().filter(|_| chance.hit(0.3)).collect();
        Self {
            events: if calm {
                vec![Event::Shutdown; chance.below(2)]
            } else {
                events
            },
            ..faults
        }
    }

    fn calm(self) -> Self {
        Self {
            rollback: self.rollback,
            late_commit: self.late_commit,
            async_commit: self.async_commit,
            refused: self.refused,
            rejected: self.rejected,
            defect: self.defect,
            unrouted: self.unrouted,
            ..Self::default()
        }
    }
}

/// The consumers' part of a plan.
#[derive(Debug, Clone, Default)]
pub(super) struct ConsumerPlan {
    pub(super) replayable: bool,
    /// Effects without a transaction, instead of handlers.
    pub(super) effects: bool,
    pub(super) consumers: usize,
    pub(super) events: usize,
    pub(super) settings: ConsumerSettings,
    /// How likely each temper is.
    pub(super) tempers: [f64; 8],
    pub(super) repeats: f64,
    pub(super) conflict: f64,
}

impl ConsumerPlan {
    pub(super) fn new(chance: &mut Chance, lease: LeaseTerm) -> Self {
        let mut some = |likely: f64, most: f64| {
            let (has, share) = (chance.hit(likely), chance.share());
            if has { share * most } else { 0.0 }
        };
        let tempers = [
            some(0.6, 0.5),
            some(0.15, 0.2),
            some(0.1, 0.05),
            some(0.2, 0.2),
            some(0.2, 0.2),
            some(0.2, 0.2),
            some(0.15, 0.2),
            some(0.15, 0.2),
        ];
        let (repeats, conflict) = (some(0.6, 0.5), some(0.3, 0.05));
        Self {
            replayable: chance.hit(0.5),
            effects: chance.hit(0.3),
            consumers: chance.within(1..=3),
            events: chance.within(4..=40),
            settings: ConsumerSettings {
                lease,
                batch: chance.within(1..=8),
                workers: chance.within(1..=3),
                effect_timeout: chance.millis(50..=500),
                deferred: [2, 8, 1_000][chance.below(3)],
                deferred_per_key: [1, 3, 1_000][chance.below(3)],
                drain: chance.millis(0..=1_000),
                ..ConsumerSettings::default()
            },
            tempers,
            repeats,
            conflict,
        }
    }
}
