//! What must have come of what a consumer was given: at each step what can be seen at once, the rest at the end.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    application::number_of,
    consumption::{GROUP, Temper},
    database::Number,
    world::Inner,
};
use crate::{event::Key, failure::Side};

impl Inner {
    fn of_consumer(&self, ids: impl Iterator<Item = (&'static str, String)>) -> BTreeSet<Number> {
        let consumers = ids.filter(|(side, _)| *side == Side::Consumer.as_str());
        consumers.filter_map(|(_, id)| id.parse().ok()).collect()
    }

    fn waiting_numbers(&self) -> BTreeSet<Number> {
        let ids = self.database.state.deferred.keys();
        self.of_consumer(ids.map(|id| (id.0, id.3.clone())))
    }

    fn dead_numbers(&self) -> BTreeSet<Number> {
        let ids = self.database.state.dead.keys();
        self.of_consumer(ids.map(|id| (id.0, id.3.clone())))
    }

    fn is_known(&self, number: Number) -> bool {
        let id = number.to_string();
        self.database.state.inbox.keys().any(|key| key.2 == id)
    }

    /// Whether the source need not hold it any longer.
    fn is_stored(&self, number: Number) -> bool {
        let unhandled = self.consumption.events[number].temper == Temper::Unhandled;
        unhandled || self.is_known(number) || self.waiting_numbers().contains(&number)
    }

    /// An acknowledgement destroys the message: what came of it must be on disk.
    pub(super) fn check_acknowledged(&mut self, number: Number) {
        if !self.is_stored(number) {
            self.wrong(format!(
                "{number} is acknowledged, and nothing of it is stored"
            ));
        } else if self.database.could_lose(&number.to_string()) {
            self.wrong(format!(
                "{number} is acknowledged, and a crash could still undo what came of it"
            ));
        }
    }

    /// A cursor may cover only what needs nothing more from the source.
    pub(super) fn check_settle_source(&mut self, position: u64) {
        let count = usize::try_from(position).unwrap_or(usize::MAX);
        let passed = self
            .queue
            .messages
            .iter()
            .take(count)
            .map(|(m, _)| number_of(m));
        let lost: Vec<Number> = passed.filter(|n| !self.is_stored(*n)).collect();
        if !lost.is_empty() {
            self.wrong(format!(
                "the source's cursor passes {lost:?}, of which nothing is stored"
            ));
        }
    }

    /// What a transaction is about to commit.
    pub(super) fn check_effects(&mut self, effects: &[Number]) {
        let again: Vec<Number> = effects
            .iter()
            .copied()
            .filter(|n| self.database.state.effects.contains(n))
            .collect();
        if !again.is_empty() {
            self.wrong(format!("a second effect of {again:?}"));
        }
    }

    /// The waiting room has a maximum, which each worker's batch may overstep.
    pub(super) fn check_consumers_room(&mut self) {
        let settings = &self.plan.consumer.settings;
        let (most, per_key) = (settings.deferred, settings.deferred_per_key);
        // Each worker may, at the same time.
        let over = settings.batch * settings.workers;
        self.check_room(Side::Consumer, GROUP, (most, per_key), over);
    }

    /// Once every key takes the straight way, nothing waits.
    pub(super) fn check_waits(&mut self, number: Number) {
        if self.straight {
            self.wrong(format!("{number} waits, and nothing of its key does"));
        }
    }

    /// What the broker is sent as a dead letter.
    pub(super) fn check_copy(&mut self, number: Number) {
        if !self.dead_numbers().contains(&number) && !self.database.given_up.contains(&number) {
            self.wrong(format!(
                "{number} is copied as a dead letter, which it is not"
            ));
        }
    }

    /// Whether everything that was given has come to its end, and the source says so.
    pub(super) fn is_consumed(&self) -> bool {
        let state = &self.database.state;
        let sources = state
            .leases
            .iter()
            .filter(|(name, _)| name.starts_with("group "));
        let newest = u64::try_from(self.queue.messages.len()).unwrap_or(u64::MAX);
        let read = if self.plan.consumer.replayable {
            newest == 0
                || sources
                    .into_iter()
                    .any(|(_, row)| row.position == Some(newest))
        } else {
            self.queue.is_empty()
        };
        self.consumption.given
            && read
            && state.deferred.is_empty()
            && state.dead.values().all(|row| row.copied)
    }

    /// What was not consumed.
    pub(super) fn check_consumed(&mut self) {
        let waiting = self.waiting_numbers();
        let missing: Vec<Number> = (0..self.consumption.events.len())
            .filter(|n| !self.is_stored(*n))
            .collect();
        let uncopied = self
            .database
            .state
            .dead
            .values()
            .filter(|row| !row.copied)
            .count();
        let positions: Vec<_> = self
            .database
            .state
            .leases
            .iter()
            .map(|(name, row)| (name, row.position))
            .collect();
        let text = format!(
            "it is not consumed: nothing is stored of {missing:?}, {waiting:?} wait, {uncopied} dead letters have no copy; \
             of {} messages, cursors {positions:?}",
            self.queue.messages.len()
        );
        self.wrong(text);
    }

    /// At the end, when everything has drained.
    pub(super) fn check_consumption(&mut self) {
        let dead = self.dead_numbers();
        let mut effects = BTreeMap::<Number, usize>::new();
        for number in self.effects() {
            *effects.entry(number).or_default() += 1;
        }
        let most = u32::try_from(self.plan.retry.delays.len()).unwrap_or(0) + 1;
        let mut wrong = Vec::new();
        for (number, event) in self.consumption.events.iter().enumerate() {
            let none =
                matches!(event.temper, Temper::Skips | Temper::Unhandled) || dead.contains(&number);
            let (found, expected) = (
                effects.get(&number).copied().unwrap_or(0),
                usize::from(!none),
            );
            if found != expected {
                wrong.push(format!("{number} ({:?}) has {found} effects", event.temper));
            }
            let given_up = match event.temper {
                Temper::Rejects | Temper::Unknown | Temper::Defect => true,
                Temper::Fails | Temper::Panics | Temper::Slow => {
                    event.failures + event.accused >= most
                }
                Temper::Good | Temper::Skips | Temper::Unhandled => event.accused >= most,
            };
            if dead.contains(&number) && !given_up {
                wrong.push(format!(
                    "{number} ({:?}) was given up after {} failures",
                    event.temper, event.failures
                ));
            }
            if dead.contains(&number) && !self.queue.copies.contains(&number) {
                wrong.push(format!(
                    "the broker has no copy of the dead letter {number}"
                ));
            }
        }
        for row in self.database.state.dead.values() {
            let event = &self.consumption.events[number_of(&row.message)];
            let counted = !matches!(event.temper, Temper::Unknown | Temper::Defect);
            if counted && row.attempts > event.failures + event.accused {
                let number = number_of(&row.message);
                wrong.push(format!(
                    "{number} counts {} attempts of {} failures",
                    row.attempts, event.failures
                ));
            }
        }
        wrong.into_iter().for_each(|w| self.wrong(w));
        self.check_effects_order();
    }

    /// In the order in which they happened. Those without a transaction may happen again: only the first counts.
    fn effects(&self) -> Vec<Number> {
        if !self.plan.consumer.effects {
            return self.database.state.effects.clone();
        }
        let mut seen = BTreeSet::new();
        let done = self.consumption.done.iter().copied();
        done.filter(|n| seen.insert(*n)).collect()
    }

    /// Effects of each key in the order in which its events came first.
    fn check_effects_order(&mut self) {
        let mut of_key = BTreeMap::<Key, Vec<Number>>::new();
        for number in self.effects() {
            if let Some(key) = Key::of(&self.consumption.events[number].message) {
                of_key.entry(key).or_default().push(number);
            }
        }
        for (key, found) in of_key {
            if !found.is_sorted() {
                self.wrong(format!("{key:?} took effect as {found:?}"));
            }
        }
    }
}
