//! A model of a broker: it stores, loses, refuses, answers late and out of order, and dies in the middle.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use pillarbox_transport::{
    Binding, Error, Kind, Message, Outcome, Publisher, Result, Source, Subscription, Transport,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    application::{Nature, number_of},
    check::InFlight,
    database::Number,
    queue,
    world::{Inner, World},
};

#[derive(Debug, Default)]
pub(super) struct Broker {
    pub(super) stored: BTreeSet<Number>,
    /// In the order in which each came first.
    pub(super) first: Vec<Number>,
    /// All that came, repeats included.
    pub(super) arrivals: usize,
    pub(super) away: Option<Instant>,
    pub(super) topics_away: BTreeMap<String, Instant>,
    /// Grows with each restart: older sessions are dead.
    pub(super) incarnation: u32,
}

/// One process's way to the broker.
pub(super) struct ModelTransport {
    pub(super) world: Arc<World>,
    pub(super) process: usize,
}

fn error(kind: Kind, text: &'static str) -> Error {
    Error::new(kind, "publish", text)
}

fn unknown() -> Outcome {
    Outcome::Unknown(error(Kind::Unreachable, "the session is gone"))
}

#[async_trait]
impl Transport for ModelTransport {
    fn kind(&self) -> &'static str {
        "model"
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        self.world.pause(0..=5).await;
        let incarnation = self.world.with(|w| {
            let is_away = w.broker.is_away();
            let fails = !w.healed && w.chance.hit(w.plan.faults.unreachable);
            (!is_away && !fails).then_some(w.broker.incarnation)
        });
        let Some(incarnation) = incarnation else {
            return Err(error(Kind::Unreachable, "the broker is away"));
        };
        let (queue, batches) = mpsc::unbounded_channel();
        let session = Session {
            world: self.world.clone(),
            incarnation,
            dead: Arc::default(),
        };
        tokio::spawn(session.run(batches));
        Ok(Box::new(ModelPublisher {
            world: self.world.clone(),
            process: self.process,
            queue,
        }))
    }

    async fn bind(&self, binding: &Binding) -> Result<Vec<Source>> {
        Ok(vec![Source {
            transport: "model",
            cluster: String::new(),
            topic: binding.topic.clone(),
            name: "queue".to_owned(),
            partition: 0,
            identity: "1".to_owned(),
            replayable: self.world.with(|w| w.plan.consumer.replayable),
        }])
    }

    async fn subscribe(
        &self,
        source: &Source,
        _group: &str,
        from: Option<u64>,
    ) -> Result<Box<dyn Subscription>> {
        if self.world.with(|w| w.broker.is_away()) {
            return Err(error(Kind::Unreachable, "the broker is away"));
        }
        Ok(queue::subscribe(&self.world, self.process, source, from).await)
    }

    async fn dead_letters(&self, _topic: &str, _group: &str) -> Result<Box<dyn Publisher>> {
        if self.world.with(|w| w.broker.is_away()) {
            return Err(error(Kind::Unreachable, "the broker is away"));
        }
        Ok(Box::new(queue::Copies(self.world.clone())))
    }
}

impl Broker {
    fn is_away(&self) -> bool {
        self.away.is_some_and(|until| Instant::now() < until)
    }
}

struct Batch {
    messages: Vec<Arc<Message>>,
    reply: oneshot::Sender<Vec<Outcome>>,
}

struct ModelPublisher {
    world: Arc<World>,
    process: usize,
    queue: mpsc::UnboundedSender<Batch>,
}

impl Publisher for ModelPublisher {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let in_flight = InFlight::new(&self.world, self.process, &messages);
        let (reply, answer) = oneshot::channel();
        let most = messages.len();
        let (world, process, topics) = (self.world.clone(), self.process, topics(&messages));
        let _ = self.queue.send(Batch { messages, reply });
        Box::pin(async move {
            let outcomes = answer.await;
            drop(in_flight);
            let outcomes = outcomes.unwrap_or_else(|_| (0..most).map(|_| unknown()).collect());
            if let ([(_, number)], None | Some(Outcome::Unknown(_))) =
                (&topics[..], outcomes.first())
            {
                world.with(|w| w.application.unanswered(*number));
            }
            world.with(|w| w.check_answers(process, &topics, &outcomes));
            outcomes
        })
    }
}

fn topics(messages: &[Arc<Message>]) -> Vec<(String, Number)> {
    messages
        .iter()
        .map(|m| (m.topic.clone(), number_of(m)))
        .collect()
}

/// The broker's side of a session. It takes what was sent even when the sender is gone.
struct Session {
    world: Arc<World>,
    incarnation: u32,
    dead: Arc<AtomicBool>,
}

impl Session {
    async fn run(self, mut batches: mpsc::UnboundedReceiver<Batch>) {
        while let Some(batch) = batches.recv().await {
            let (there, back) = self.world.with(|w| (w.way(), w.way()));
            tokio::time::sleep(there).await;
            let outcomes = self.world.with(|w| {
                let restarted = w.broker.incarnation != self.incarnation;
                if restarted || self.dead.load(Ordering::Relaxed) {
                    self.dead.store(true, Ordering::Relaxed);
                    return None;
                }
                let is_killer =
                    |m: &Arc<Message>| w.application.event(number_of(m)).nature == Nature::Killer;
                let killed = batch.messages.iter().any(is_killer);
                if killed || (!w.healed && w.chance.hit(w.plan.faults.session_death)) {
                    self.dead.store(true, Ordering::Relaxed);
                    w.take_some(&batch.messages);
                    return None;
                }
                Some(w.take(&batch.messages))
            });
            let unknown = || batch.messages.iter().map(|_| unknown()).collect();
            let outcomes = outcomes.unwrap_or_else(unknown);
            let (world, incarnation, dead) =
                (self.world.clone(), self.incarnation, self.dead.clone());
            tokio::spawn(async move {
                tokio::time::sleep(back).await;
                // The session may have died with the confirms on their way.
                let alive = world.with(|w| w.broker.incarnation) == incarnation
                    && !dead.load(Ordering::Relaxed);
                let outcomes = if alive {
                    world.with(|w| w.deliver(&batch.messages, outcomes))
                } else {
                    batch.messages.iter().map(|_| self::unknown()).collect()
                };
                let _ = batch.reply.send(outcomes);
            });
        }
    }
}

impl Inner {
    /// How long something is on its way.
    fn way(&mut self) -> Duration {
        if !self.healed && self.chance.hit(self.plan.faults.slow_batch) {
            let longest = 2 * self.plan.settings.lease.term().as_millis();
            return self
                .chance
                .millis(0..=usize::try_from(longest).unwrap_or(0));
        }
        self.chance.millis(0..=4)
    }

    fn arrive(&mut self, number: Number) {
        self.tell(|| format!("broker: has {number}"));
        self.broker.arrivals += 1;
        if self.broker.stored.insert(number) {
            self.broker.first.push(number);
            self.check_delay(number);
        }
    }

    fn take(&mut self, messages: &[Arc<Message>]) -> Vec<Outcome> {
        messages.iter().map(|m| self.take_one(m)).collect()
    }

    /// The session dies: what lies in the middle is there or not.
    fn take_some(&mut self, messages: &[Arc<Message>]) {
        let prefix = self
            .chance
            .hit(0.5)
            .then(|| self.chance.below(messages.len() + 1));
        for (i, message) in messages.iter().enumerate() {
            let taken = prefix.map_or_else(|| self.chance.hit(0.5), |n| i < n);
            let number = number_of(message);
            if taken && matches!(self.application.event(number).nature, Nature::Good) {
                self.arrive(number);
            }
        }
    }

    fn take_one(&mut self, message: &Message) -> Outcome {
        let number = number_of(message);
        let faults = &self.plan.faults;
        let (nack, lost) = (faults.nack, faults.lost);
        let is_away = self
            .broker
            .topics_away
            .get(&message.topic)
            .is_some_and(|until| Instant::now() < *until);
        if is_away || (!self.healed && self.chance.hit(nack)) {
            self.tell(|| format!("broker: takes nothing now, such as {number}"));
            // Even so some brokers have it: a quorum queue that is full overshoots.
            if self.chance.hit(0.05)
                && matches!(self.application.event(number).nature, Nature::Good)
            {
                self.arrive(number);
            }
            return Outcome::Unavailable(error(Kind::Full, "full"));
        }
        if !self.healed && self.chance.hit(lost) {
            self.tell(|| format!("broker: no answer for {number}"));
            if self.chance.hit(0.5) && matches!(self.application.event(number).nature, Nature::Good)
            {
                self.arrive(number);
            }
            return unknown();
        }
        match self.application.event(number).nature {
            Nature::Good | Nature::Defect => {
                self.arrive(number);
                Outcome::Stored
            }
            Nature::Refused => Outcome::Retry(error(Kind::Missing, "refused")),
            // The session died over it before.
            Nature::Killer => unknown(),
            Nature::Rejected => Outcome::Rejected(error(Kind::TooLarge, "rejected")),
            Nature::Unrouted if number.is_multiple_of(2) => {
                Outcome::Retry(error(Kind::Unrouted, "unrouted"))
            }
            Nature::Unrouted => Outcome::Unavailable(error(Kind::Unrouted, "unrouted")),
        }
    }

    /// What the sender hears, and so may count.
    fn deliver(&mut self, messages: &[Arc<Message>], mut outcomes: Vec<Outcome>) -> Vec<Outcome> {
        if !self.healed && self.chance.hit(self.plan.faults.short_answer) {
            outcomes.truncate(self.chance.below(outcomes.len() + 1));
        }
        for (message, outcome) in messages.iter().zip(&outcomes) {
            let number = number_of(message);
            let named = match outcome {
                Outcome::Retry(_) => "is refused",
                Outcome::Rejected(_) => "is rejected",
                Outcome::Unavailable(e) if e.kind() == Kind::Unrouted => "is unrouted",
                Outcome::Stored | Outcome::Unknown(_) | Outcome::Unavailable(_) => continue,
            };
            self.tell(|| format!("broker: {number} {named}"));
            self.application.refused(number);
        }
        outcomes
    }
}
