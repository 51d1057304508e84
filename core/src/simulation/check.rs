//! The promises, as what happened is compared with them: at each step what can be seen at once, the rest at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use pillarbox_transport::{Kind, Message, Outcome};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    application::{Nature, number_of},
    database::{Database, Number, Row, partition_of},
    plan::Event,
    world::{Inner, World},
};
use crate::{
    cursor::Progress,
    event::Key,
    failure::Side,
    lease::{Lease, LeaseKey},
};

/// The shortest pause after "not now", less its jitter.
const PAUSE: Duration = Duration::from_millis(15);

pub(super) const DESTINATION: &str = "main";

#[derive(Debug, Default)]
pub(super) struct Checks {
    /// Broken promises.
    pub(super) wrong: Vec<String>,
    /// What each process and partition has sent and not heard of: by key, and in all.
    unconfirmed: BTreeMap<(usize, u16), BTreeMap<Number, Option<Key>>>,
    /// Which process owns a partition.
    pub(super) owners: BTreeMap<u16, usize>,
    /// Topics that the broker does not take now: since when a process and partition knows, and whether it tried again.
    refused: BTreeMap<(usize, u16, String), (Instant, bool)>,
    /// Owners since all was healed: they stop in order, and give back.
    pub(super) orderly: BTreeSet<Uuid>,
    /// Processes that are no more: a call of theirs may still be on its way.
    pub(super) crashed: BTreeSet<usize>,
}

/// Messages that were sent and whose outcome is not heard yet.
pub(super) struct InFlight {
    world: Arc<World>,
    place: Vec<((usize, u16), Number)>,
}

impl InFlight {
    pub(super) fn new(world: &Arc<World>, process: usize, messages: &[Arc<Message>]) -> Self {
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
            self.checks
                .refused
                .retain(|(p, of, _), _| (*p, *of) != (process, *partition));
        }
        if self.healed && !self.checks.crashed.contains(&process) {
            self.checks.orderly.insert(lease.owner);
        }
    }

    /// The waiting room has a maximum, which those who look and then write at once may overstep.
    pub(super) fn check_room(
        &mut self,
        side: Side,
        scope: &str,
        (most, per_key): (u64, u64),
        at_once: usize,
    ) {
        let (waiting, more) = (self.waiting_room(side, scope), at_once as u64);
        if waiting.total >= most + more || waiting.longest >= per_key + more {
            self.wrong(format!(
                "{waiting:?}, where {most} may wait, {per_key} of a key"
            ));
        }
    }

    pub(super) fn check_relays_room(&mut self) {
        let settings = &self.plan.settings;
        let most = (settings.deferred, settings.deferred_per_key);
        let at_once = settings.window.held * usize::from(self.plan.partitions);
        self.check_room(Side::Relay, DESTINATION, most, at_once);
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
        messages: &[Arc<Message>],
    ) -> Vec<((usize, u16), Number)> {
        let numbers: Vec<Number> = messages.iter().map(|m| number_of(m)).collect();
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
            self.check_pause(process, partition, &message.topic);
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
        if self.owners_know() && self.has_run_out(partition) {
            self.wrong(format!(
                "relay {process} sends {number} though its lease has run out"
            ));
        }
    }

    /// Whether a partition's lease has run out, by the database's clock. A crash may take back a renewal.
    fn has_run_out(&self, partition: u16) -> bool {
        let key = LeaseKey::Relay {
            destination: DESTINATION.to_owned(),
            partition,
        };
        let crashes = self.plan.faults.events.contains(&Event::DatabaseCrash);
        let row = self.database.state.leases.get(&key.to_string());
        !crashes && row.is_some_and(|row| row.expires_at <= self.now())
    }

    /// What a process hears of what it sent.
    pub(super) fn check_answers(
        &mut self,
        process: usize,
        sent: &[(String, Number)],
        outcomes: &[Outcome],
    ) {
        for ((topic, number), outcome) in sent.iter().zip(outcomes) {
            let key = self.application.event(*number).key.clone();
            let partition = partition_of(key.as_ref(), *number, self.plan.partitions);
            let place = (process, partition, topic.clone());
            match outcome {
                Outcome::Unavailable(e) if e.kind() == Kind::Full => {
                    let pause = self
                        .checks
                        .refused
                        .entry(place)
                        .or_insert((Instant::now(), false));
                    if pause.1 {
                        *pause = (Instant::now(), false);
                    }
                }
                Outcome::Unknown(_) => {}
                _ => drop(self.checks.refused.remove(&place)),
            }
        }
    }

    /// A broker that takes nothing of a topic is not asked again at once.
    fn check_pause(&mut self, process: usize, partition: u16, topic: &str) {
        let place = (process, partition, topic.to_owned());
        let Some((since, tried)) = self.checks.refused.get_mut(&place) else {
            return;
        };
        let pause = since.elapsed();
        if !std::mem::replace(tried, true) && pause < PAUSE {
            self.wrong(format!(
                "{topic} is tried again {pause:?} after the broker said that it takes nothing"
            ));
        }
    }

    /// Where nothing disturbs it, an event is not held up by those of other keys.
    pub(super) fn check_delay(&mut self, number: Number) {
        let room = self
            .plan
            .settings
            .deferred
            .min(self.plan.settings.deferred_per_key)
            >= 1_000;
        if !room || !self.plan.is_calm() || !self.plan.faults.events.is_empty() {
            return;
        }
        let event = self.application.event(number);
        let mut of_key = self
            .application
            .events
            .iter()
            .filter(|e| e.key.is_some() && e.key == event.key);
        if event.refusals > 0 || of_key.any(|e| e.refusals > 0 || e.nature != Nature::Good) {
            return;
        }
        let most = Duration::from_millis(1_000 + 40 * self.application.events.len() as u64);
        let delay = event.committed.map(|at| at.elapsed()).unwrap_or_default();
        if delay > most {
            self.wrong(format!("{number} came {delay:?} after its commit"));
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
    pub(super) fn is_through(&self, number: Number) -> bool {
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
}
