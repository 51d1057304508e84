//! What a consumer is given, and what its handler makes of it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use pillarbox_transport::Message;
use tokio::time::Instant;

use super::{
    application::topic,
    database::Number,
    transaction::lost_to_another,
    world::{Inner, World},
};
use crate::{Context, Delivery, Effect, Event, Failure, Handler};

pub(super) const GROUP: &str = "group";

/// How long what a handler needs may be away.
pub(super) const AWAY: Duration = Duration::from_secs(2);

/// How the handler takes to an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Temper {
    Good,
    /// Fails for a while; [`Given::left`] says how often.
    Fails,
    Panics,
    /// Takes longer than a handler may.
    Slow,
    Rejects,
    /// Nothing to do.
    Skips,
    /// No handler is there for its type.
    Unhandled,
    /// No handler is there for its version.
    Unknown,
    /// It cannot be read.
    Defect,
}

impl Temper {
    const ALL: [Self; 8] = [
        Self::Fails,
        Self::Panics,
        Self::Slow,
        Self::Rejects,
        Self::Skips,
        Self::Unhandled,
        Self::Unknown,
        Self::Defect,
    ];
}

/// An event that was put into the queue.
#[derive(Debug, Clone)]
pub(super) struct Given {
    pub(super) message: Message,
    pub(super) temper: Temper,
    /// Failures until it passes.
    left: u32,
    /// Failures that there were.
    pub(super) failures: u32,
    /// How often its owner died, and nothing else was under way.
    pub(super) accused: u32,
}

#[derive(Debug, Default)]
pub(super) struct Consumption {
    pub(super) events: Vec<Given>,
    /// All that is to be given was given.
    pub(super) given: bool,
    /// Something that the handler needs is away.
    pub(super) away: Option<Instant>,
    /// What effects without a transaction have done, repeats included.
    pub(super) done: Vec<Number>,
}

#[derive(Debug, serde::Deserialize)]
pub(super) struct Happened {
    number: Number,
}

impl Event for Happened {
    const TYPE: &'static str = "happened";
    const TOPIC: &'static str = "topic-0";
}

/// One process's handler.
pub(super) struct Apply {
    pub(super) world: Arc<World>,
    pub(super) process: usize,
}

impl Handler<Happened> for Apply {
    async fn handle(
        &self,
        delivery: Delivery<Happened>,
        _: &mut Context<'_>,
    ) -> Result<(), Failure> {
        let number = delivery.event.number;
        self.world.pause(0..=2).await;
        let written = self
            .world
            .with(|w| w.effect(self.process, GROUP, &delivery.message));
        if !written {
            return Err(Failure::from(sqlx::Error::WorkerCrashed));
        }
        let limit = self.world.with(|w| w.plan.consumer.settings.lease.term());
        self.behave(number, limit * 3 / 5).await
    }
}

impl Effect<Happened> for Apply {
    async fn run(&self, delivery: &Delivery<Happened>) -> Result<(), Failure> {
        let number = delivery.event.number;
        self.world.pause(0..=2).await;
        let limit = self.world.with(|w| w.plan.consumer.settings.effect_timeout);
        self.behave(number, limit * 2).await?;
        self.world.with(|w| {
            w.tell(|| format!("effect: {number}"));
            w.consumption.done.push(number);
        });
        Ok(())
    }
}

impl Apply {
    /// Does as its temper is; a slow one takes so long.
    async fn behave(&self, number: Number, slow: Duration) -> Result<(), Failure> {
        let lost = self.world.with(Inner::loses);
        if lost {
            return Err(Failure::from(lost_to_another()));
        }
        let temper = self.world.with(|w| w.temper(number));
        match temper {
            None => return Err(Failure::unavailable("away")),
            Some(Temper::Fails) => return Err(Failure::from(std::fmt::Error)),
            Some(Temper::Rejects) => return Err(Failure::reject("rejected")),
            Some(Temper::Skips) => return Err(Failure::skip()),
            Some(Temper::Panics) => std::panic::resume_unwind(Box::new("a handler panics")),
            Some(Temper::Slow) => tokio::time::sleep(slow).await,
            _ => {}
        }
        Ok(())
    }
}

impl Inner {
    /// A handler's statement loses to another transaction. Its savepoint could be undone, and its own goes on.
    fn loses(&mut self) -> bool {
        !self.healed && self.chance.hit(self.plan.consumer.conflict)
    }

    /// How the handler takes to an event now; none if what it needs is away.
    fn temper(&mut self, number: Number) -> Option<Temper> {
        if self
            .consumption
            .away
            .is_some_and(|until| Instant::now() < until)
        {
            return None;
        }
        let event = &mut self.consumption.events[number];
        let temper = match event.temper {
            Temper::Fails | Temper::Panics | Temper::Slow if event.left == 0 => Temper::Good,
            temper => temper,
        };
        if matches!(
            temper,
            Temper::Fails | Temper::Panics | Temper::Slow | Temper::Rejects
        ) {
            event.left = event.left.saturating_sub(1);
            event.failures += 1;
        }
        self.tell(|| format!("handler: {number} is {temper:?}"));
        Some(temper)
    }

    fn give(&mut self) {
        let number = self.consumption.events.len();
        let likely = self.plan.consumer.tempers;
        let hits = likely.map(|p| !self.straight && self.chance.hit(p));
        let temper = Temper::ALL
            .into_iter()
            .zip(hits)
            .find(|(_, hit)| *hit)
            .map_or(Temper::Good, |(t, _)| t);
        let kind = if temper == Temper::Unhandled {
            "other"
        } else {
            Happened::TYPE
        };
        let body = format!("{{\"number\":{number}}}");
        let mut message = Message::new(number.to_string(), topic(0), kind, body);
        message.time = SystemTime::UNIX_EPOCH;
        if temper == Temper::Unknown {
            message = message.with_attribute("dataversion", "9");
        }
        let keyed = !self.chance.hit(0.1);
        let key = self.chance.below(self.plan.keys);
        message.key = keyed.then(|| format!("key-{key}"));
        self.put(number, message.clone(), temper);
        self.consumption.events.push(Given {
            message,
            temper,
            left: u32::try_from(self.chance.within(1..=5)).unwrap_or(1),
            failures: 0,
            accused: 0,
        });
    }

    fn put(&mut self, number: Number, message: Message, temper: Temper) {
        self.tell(|| format!("queue: {number} {:?} {temper:?}", message.key));
        let defect = (temper == Temper::Defect).then(|| "it cannot be read".to_owned());
        self.queue.put(message, defect);
    }

    /// An event comes again, as relays may send it.
    fn repeat(&mut self) {
        let count = self.consumption.events.len();
        if count > 0 {
            let number = self.chance.below(count);
            let Given {
                message, temper, ..
            } = self.consumption.events[number].clone();
            self.put(number, message, temper);
        }
    }

    /// Two more events for each key.
    pub(super) fn give_for_each_key(&mut self) {
        for _ in 0..2 * self.plan.keys {
            self.give();
        }
    }
}

/// Gives events for as long as faults happen, in the order of their keys, some of them again.
pub(super) async fn give(world: Arc<World>) {
    let (count, spread) = world.with(|w| {
        let count = w.plan.consumer.events;
        (
            count,
            2 * usize::try_from(w.plan.chaos.as_millis()).unwrap_or(0) / count,
        )
    });
    for _ in 0..count {
        let burst = world.with(|w| w.chance.hit(0.5));
        world.pause(0..=if burst { 1 } else { spread }).await;
        world.with(|w| {
            w.give();
            if w.chance.hit(w.plan.consumer.repeats) {
                w.repeat();
            }
        });
    }
    world.with(|w| w.consumption.given = true);
}
