//! What must be true of a relay's schedule when everything has drained.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    application::{Nature, number_of},
    check::DESTINATION,
    database::{Database, Number, Row},
    world::Inner,
};
use crate::{event::Key, lease::LeaseKey};

impl Inner {
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

    /// Whether each relay holds its share of the partitions, at most.
    pub(super) fn is_balanced(&self) -> bool {
        let partitions = self.plan.partitions;
        let held = |partition: &u16| {
            let key = LeaseKey::Relay {
                destination: DESTINATION.to_owned(),
                partition: *partition,
            };
            let row = self.database.state.leases.get(&key.to_string());
            row.is_some_and(|row| !row.is_free(self.now()))
        };
        let mut of = BTreeMap::<usize, usize>::new();
        for process in (0..partitions)
            .filter(held)
            .filter_map(|p| self.checks.owners.get(&p))
        {
            *of.entry(*process).or_default() += 1;
        }
        let most = usize::from(partitions).div_ceil(self.plan.relays);
        of.values().sum::<usize>() == usize::from(partitions) && of.values().all(|n| *n <= most)
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
            let (heard, alone) = (event.refusals, event.unanswered);
            let reason = match event.nature {
                Nature::Defect => true,
                Nature::Rejected => heard > 0 || alone >= most,
                Nature::Refused | Nature::Good | Nature::Killer => heard + alone >= most,
                Nature::Unrouted => alone >= most,
            };
            if !reason {
                wrong.push(format!(
                    "{number} was given up after {heard} refusals and {alone} deaths"
                ));
            }
            if event.nature != Nature::Defect && dead.attempts > heard + alone {
                wrong.push(format!(
                    "{number} counts {} attempts of {heard} refusals and {alone} deaths",
                    dead.attempts
                ));
            }
        }
        wrong.into_iter().for_each(|w| self.wrong(w));
    }
}
