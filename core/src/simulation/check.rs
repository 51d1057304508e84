//! The promises, as what happened is compared with them: at each step what can be seen at once, the rest at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use pillarbox_transport::Message;
use uuid::Uuid;

use super::{
    application::{Nature, number_of},
    database::{Database, Number, Row},
    plan::Event,
    world::{Inner, World},
};
use crate::{
    cursor::Progress,
    event::Key,
    failure::Side,
    lease::{Lease, LeaseKey},
};

pub(super) const DESTINATION: &str = "main";

#[derive(Debug, Default)]
pub(super) struct Checks {
    /// Broken promises.
    pub(super) wrong: Vec<String>,
    /// What each process and partition has sent and not heard of: by key, and in all.
    unconfirmed: BTreeMap<(usize, u16), BTreeMap<Number, Option<Key>>>,
    /// Which process owns a partition.
    owners: BTreeMap<u16, usize>,
    /// Owners since all was healed: they stop in order, and give back.
    orderly: BTreeSet<Uuid>,
    /// Processes that are no more: a call of theirs may still be on its way.
    pub(super) crashed: BTreeSet<usize>,
}

/// Messages that were sent and whose outcome is not heard yet.
pub(super) struct InFlight {
    world: Arc<World>,
    place: Vec<((usize, u16), Number)>,
}

impl InFlight {
    pub(super) fn new(world: &Arc<World>, process: usize, messages: &[Message]) -> Self {
        let place = world.with(|w| w.check_publish(process, messages));
        Self {
            world: world.clone(),
            place,
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.world.with(|w| {
            for (place, number) in &self.place {
                if let Some(unconfirmed) = w.checks.unconfirmed.get_mut(place) {
                    unconfirmed.remove(number);
                }
            }
        });
    }
}

impl Inner {
    pub(super) fn check_acquire(&mut self, process: usize, lease: &Lease) {
        if let LeaseKey::Relay { partition, .. } = &lease.key {
            self.checks.owners.insert(*partition, process);
        }
        if self.healed && !self.checks.crashed.contains(&process) {
            self.checks.orderly.insert(lease.owner);
        }
    }

    pub(super) fn check_read(&mut self, limit: usize) {
        let settings = &self.plan.settings;
        let most = settings
            .window
            .unsettled
            .min(usize::try_from(settings.batch).unwrap_or(usize::MAX));
        if limit > most {
            self.wrong(format!(
                "a read of {limit} events, where {most} may be read"
            ));
        }
    }

    /// What a relay hands to the broker.
    fn check_publish(
        &mut self,
        process: usize,
        messages: &[Message],
    ) -> Vec<((usize, u16), Number)> {
        let numbers: Vec<Number> = messages.iter().map(number_of).collect();
        self.tell(|| format!("relay {process}: sends {numbers:?}"));
        if messages.len() > self.plan.settings.publish {
            self.wrong(format!("{} messages in one call", messages.len()));
        }
        let mut places = Vec::new();
        for (message, number) in messages.iter().zip(numbers) {
            let key = Key::of(message);
            let partition = super::store::place(self, message, number);
            let place = (process, partition);
            self.check_sendable(process, partition, number, message);
            self.check_in_flight(place, number, key.as_ref());
            self.checks
                .unconfirmed
                .entry(place)
                .or_default()
                .insert(number, key);
            places.push((place, number));
        }
        places
    }

    fn check_sendable(
        &mut self,
        process: usize,
        partition: u16,
        number: Number,
        message: &Message,
    ) {
        if !self.database.is_durable(number) && !self.database.lost.contains(&number) {
            self.wrong(format!(
                "{number} is sent, and a crash of the database could still undo it"
            ));
        }
        let event = self.application.event(number);
        if event.nature == Nature::Defect {
            self.wrong(format!("{number} is sent, which no broker may see"));
        }
        if self.is_filtered(number) {
            self.wrong(format!(
                "{number} is sent, whose topic the relay does not take"
            ));
        }
        if message.source() != "simulation" {
            self.wrong(format!("{number} is sent without its source"));
        }
        let owner = self.checks.owners.get(&partition).copied();
        if owner != Some(process) && self.owners_know() {
            self.wrong(format!("relay {process} sends {number} though its lease has run out and {owner:?} owns the partition"));
        }
    }

    /// Whether an owner can know in time that its lease runs out: it runs, and the database's clock does.
    fn owners_know(&self) -> bool {
        let blind = [Event::Freeze, Event::ClockJump, Event::Failover];
        !self.plan.faults.events.iter().any(|e| blind.contains(e))
    }

    fn check_in_flight(&mut self, place: (usize, u16), number: Number, key: Option<&Key>) {
        let Some(unconfirmed) = self.checks.unconfirmed.get(&place) else {
            return;
        };
        let beside = unconfirmed
            .iter()
            .find(|(_, k)| key.is_some() && k.as_ref() == key)
            .map(|(n, _)| *n);
        let count = unconfirmed.len();
        if let Some(beside) = beside {
            self.wrong(format!(
                "{number} is sent while {beside} of its key is unconfirmed"
            ));
        }
        if count >= self.plan.settings.window.in_flight {
            self.wrong(format!("{} events in flight", count + 1));
        }
    }

    pub(super) fn is_filtered(&self, number: Number) -> bool {
        self.plan.filter && self.application.event(number).topic != 0
    }

    /// A cursor may cover only what needs nothing more from the log.
    pub(super) fn check_settle(&mut self, lease: &Lease, progress: &Progress) {
        let LeaseKey::Relay { partition, .. } = &lease.key else {
            return;
        };
        let rows = self.database.state.log.values();
        let covered = rows.filter(|r| r.partition == *partition && Database::covers(progress, r));
        let lost: Vec<Number> = covered
            .filter(|r| !self.is_settled(r))
            .map(|r| r.number)
            .collect();
        if !lost.is_empty() {
            self.wrong(format!("the cursor passes {lost:?}, which nobody has"));
        }
    }

    fn is_settled(&self, row: &Row) -> bool {
        self.is_through(row.number) || self.waits(&row.message)
    }

    /// Whether the broker has it, or nobody will: dead, filtered out, or not wanted by anybody.
    fn is_through(&self, number: Number) -> bool {
        let event = self.application.event(number);
        let unrouted = event.nature == Nature::Unrouted && event.refusals > 0;
        self.broker.stored.contains(&number)
            || self.is_dead(number)
            || self.is_filtered(number)
            || unrouted
    }

    fn waits(&self, message: &Message) -> bool {
        let deferred = &self.database.state.deferred;
        deferred
            .keys()
            .any(|id| id.0 == Side::Relay.as_str() && id.3 == message.id)
    }

    fn is_dead(&self, number: Number) -> bool {
        let id = number.to_string();
        self.database
            .state
            .dead
            .keys()
            .any(|dead| dead.0 == Side::Relay.as_str() && dead.3 == id)
    }

    /// Whether everything that was committed has come to its end, and every cursor says so.
    pub(super) fn is_drained(&self) -> bool {
        let state = &self.database.state;
        self.application.writers == 0
            && state.deferred.is_empty()
            && state
                .log
                .values()
                .all(|row| self.is_through(row.number) && self.is_covered(row))
    }

    /// What has not drained.
    pub(super) fn check_drained(&mut self) {
        let state = &self.database.state;
        let waiting: Vec<Number> = state
            .deferred
            .values()
            .map(|r| number_of(&r.message))
            .collect();
        let rows = || state.log.values();
        let missing: Vec<Number> = rows()
            .map(|r| r.number)
            .filter(|n| !self.is_through(*n))
            .collect();
        let uncovered: Vec<i64> = rows()
            .filter(|r| !self.is_covered(r))
            .map(|r| r.position)
            .collect();
        let writers = self.application.writers;
        self.wrong(format!(
            "it does not drain: nobody has {missing:?}, {waiting:?} wait, no cursor covers the positions {uncovered:?}, \
             {writers} writers go on"
        ));
    }

    fn is_covered(&self, row: &Row) -> bool {
        let key = LeaseKey::Relay {
            destination: DESTINATION.to_owned(),
            partition: row.partition,
        };
        let lease = self.database.state.leases.get(&key.to_string());
        lease.is_some_and(|l| Database::covers(&l.progress, row))
    }

    /// At the end, when everything has drained.
    pub(super) fn check_end(&mut self) {
        self.check_order();
        self.check_dead();
        let state = &self.database.state;
        let committed: BTreeSet<Number> = state.log.values().map(|r| r.number).collect();
        let strangers: Vec<Number> = self
            .broker
            .stored
            .iter()
            .copied()
            .filter(|n| !committed.contains(n) && !self.database.lost.contains(n))
            .collect();
        if !strangers.is_empty() {
            self.wrong(format!(
                "the broker has {strangers:?}, which were never committed"
            ));
        }
        if self.plan.is_calm() && self.broker.arrivals != self.broker.stored.len() {
            let repeats = self.broker.arrivals - self.broker.stored.len();
            self.wrong(format!("{repeats} repeats without any fault"));
        }
        let leases = self.database.state.leases.iter();
        let kept =
            leases.filter(|(_, row)| row.owner.is_some_and(|o| self.checks.orderly.contains(&o)));
        let kept: Vec<String> = kept.map(|(name, _)| name.clone()).collect();
        if !kept.is_empty() {
            self.wrong(format!(
                "not given back by relays that stopped in order: {kept:?}"
            ));
        }
    }

    /// First arrivals of each key in commit order, but for events that were given up.
    fn check_order(&mut self) {
        let mut expected = BTreeMap::<Key, Vec<Number>>::new();
        let mut counted = BTreeSet::new();
        for row in self.database.state.log.values() {
            let Some(key) = Key::of(&row.message) else {
                continue;
            };
            if !self.database.given_up.contains(&row.number)
                && self.broker.stored.contains(&row.number)
            {
                counted.insert(row.number);
                expected.entry(key).or_default().push(row.number);
            }
        }
        let mut found = BTreeMap::<Key, Vec<Number>>::new();
        for number in self.broker.first.iter().filter(|n| counted.contains(n)) {
            if let Some(key) = self.application.event(*number).key.clone() {
                found.entry(key).or_default().push(*number);
            }
        }
        for (key, expected) in expected {
            let found = found.remove(&key).unwrap_or_default();
            if found != expected {
                self.wrong(format!(
                    "{key:?} was committed as {expected:?} and came as {found:?}"
                ));
            }
        }
    }

    /// Only refusals that name an event count, and only they give it up.
    fn check_dead(&mut self) {
        let most = u32::try_from(self.plan.retry.delays.len()).unwrap_or(0) + 1;
        let mut wrong = Vec::new();
        for dead in self.database.state.dead.values() {
            let number = number_of(&dead.message);
            let event = self.application.event(number);
            let heard = event.refusals;
            let reason = match event.nature {
                Nature::Defect => true,
                Nature::Rejected => heard > 0,
                Nature::Refused | Nature::Good => heard >= most,
                Nature::Unrouted => false,
            };
            if !reason {
                wrong.push(format!("{number} was given up after {heard} refusals"));
            }
            if event.nature != Nature::Defect && dead.attempts > heard {
                wrong.push(format!(
                    "{number} counts {} attempts of {heard} refusals",
                    dead.attempts
                ));
            }
        }
        wrong.into_iter().for_each(|w| self.wrong(w));
    }
}
