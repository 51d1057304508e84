//! What befalls processes and servers while faults happen, and the healing afterwards.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    application::{self, UNROUTED},
    broker::ModelTransport,
    consumption::{AWAY, Apply, GROUP},
    plan::Event,
    process::Process,
    store::ModelStore,
    world::World,
};
use crate::{Consumer, Database, Outbox, Relay, Running};

/// What the processes of a schedule are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Relay,
    Consumer,
}

/// How long a broker waits for a sign of life.
const HEARTBEAT: Duration = Duration::from_millis(400);

/// A relay or a consumer, as one process.
struct Instance {
    number: usize,
    process: Arc<Process>,
    running: Option<Running>,
    /// When it starts again, if it is down; when it goes on, if it stands still.
    back: Option<Instant>,
    frozen: bool,
    outbox: Outbox,
}

pub(super) struct Fleet {
    world: Arc<World>,
    role: Role,
    instances: Vec<Instance>,
    /// Each start is another process.
    started: usize,
}

impl Fleet {
    pub(super) fn start(world: &Arc<World>, role: Role) -> Self {
        let mut fleet = Self {
            world: world.clone(),
            role,
            instances: Vec::new(),
            started: 0,
        };
        let count = world.with(|w| match role {
            Role::Relay => w.plan.relays,
            Role::Consumer => w.plan.consumer.consumers,
        });
        for _ in 0..count {
            let instance = fleet.launch();
            fleet.instances.push(instance);
        }
        fleet
    }

    /// Of one of them.
    pub(super) fn outbox(&self) -> Outbox {
        self.instances[0].outbox.clone()
    }

    fn launch(&mut self) -> Instance {
        let process = Arc::<Process>::default();
        let number = self.started;
        self.started += 1;
        let world = self.world.clone();
        let store = ModelStore {
            world: world.clone(),
            process: number,
        };
        let transport = ModelTransport {
            world: world.clone(),
            process: number,
        };
        world.with(|w| w.tell(|| format!("process {number} starts")));
        let outbox = Outbox::new(Database::over(Arc::new(store)));
        let running = process.enter(|| match self.role {
            Role::Relay => self.relay(&outbox, transport).spawn(),
            Role::Consumer => self.consumer(&outbox, transport, number).spawn(),
        });
        Instance {
            number,
            process,
            running: Some(running),
            back: None,
            frozen: false,
            outbox,
        }
    }

    fn relay(&self, outbox: &Outbox, transport: ModelTransport) -> Relay {
        let plan = self.world.with(|w| w.plan.clone());
        let relay = Relay::new(outbox, Arc::new(transport))
            .settings(plan.settings)
            .retry(plan.retry)
            .source("simulation")
            .accept_unrouted([UNROUTED]);
        if plan.filter {
            relay.topics([application::topic(0)])
        } else {
            relay
        }
    }

    fn consumer(&self, outbox: &Outbox, transport: ModelTransport, process: usize) -> Consumer {
        let plan = self.world.with(|w| w.plan.clone());
        let world = self.world.clone();
        let consumer = Consumer::new(outbox.database(), Arc::new(transport), GROUP)
            .settings(plan.consumer.settings)
            .retry(plan.retry);
        let apply = Apply { world, process };
        if plan.consumer.effects {
            consumer.on_effect(apply)
        } else {
            consumer.on(apply)
        }
    }

    /// Faults, one after the other, for as long as the seed says.
    pub(super) async fn suffer(&mut self) {
        let end = Instant::now() + self.world.with(|w| w.plan.chaos);
        while Instant::now() < end && self.world.with(|w| w.checks.wrong.is_empty()) {
            self.world.pause(1..=400).await;
            self.bring_back(false);
            let mut events = self.world.with(|w| w.plan.faults.events.clone());
            // What was acknowledged is gone from a queue, and an effect without a transaction is not undone; only a log is
            // read again after a database has forgotten.
            let plan = self.world.with(|w| w.plan.consumer.clone());
            let forgets = self.role == Role::Consumer && (!plan.replayable || plan.effects);
            events.retain(|e| !forgets || *e != Event::Failover);
            if !events.is_empty() {
                let chosen = self.world.with(|w| w.chance.below(events.len()));
                self.befall(events[chosen]).await;
            }
            let flush = self.world.with(|w| w.chance.hit(0.3));
            if flush {
                self.world.with(|w| {
                    let share = w.chance.share();
                    w.database.flush_some(share);
                });
            }
        }
    }

    /// Starts what is down, lets go on what stands still: those whose time has come, or all.
    fn bring_back(&mut self, all: bool) {
        let now = Instant::now();
        for i in 0..self.instances.len() {
            if self.instances[i].back.is_none_or(|at| !all && now < at) {
                continue;
            }
            if self.instances[i].frozen {
                let instance = &mut self.instances[i];
                (instance.frozen, instance.back) = (false, None);
                self.world.with(|w| {
                    w.tell(|| format!("the process in place {i} goes on"));
                    instance.process.go_on(|wakers| {
                        for n in (1..wakers.len()).rev() {
                            wakers.swap(n, w.chance.below(n + 1));
                        }
                    });
                });
            } else {
                let instance = self.launch();
                self.instances[i] = instance;
            }
        }
    }

    async fn befall(&mut self, event: Event) {
        let term = self.world.with(|w| w.plan.settings.lease.term());
        let term = usize::try_from(term.as_millis()).unwrap_or(0);
        let role = self.role;
        let i = self.world.with(|w| {
            w.tell(|| format!("{event:?}"));
            w.chance.below(self.instances.len())
        });
        match event {
            Event::Crash => self.end(i, true).await,
            Event::Shutdown => self.end(i, false).await,
            Event::Freeze => self.freeze(i, 3 * term),
            Event::CutOff => self.cut_off(i, 2 * term),
            _ => self.world.with(|w| {
                let now = Instant::now();
                let until = |d: Duration| Some(now + d);
                match event {
                    Event::DatabaseCrash => {
                        w.database.crash();
                        w.database_away = until(w.chance.millis(0..=500));
                    }
                    Event::DatabaseAway => w.database_away = until(w.chance.millis(0..=2 * term)),
                    Event::BrokerAway => {
                        w.queue.end_all(None);
                        w.broker.incarnation += 1;
                        w.broker.away = until(w.chance.millis(0..=2_000));
                    }
                    Event::TopicAway if role == Role::Consumer => {
                        let away = usize::try_from(AWAY.as_millis()).unwrap_or(0);
                        w.consumption.away = until(w.chance.millis(0..=away));
                    }
                    Event::TopicAway => {
                        let topic = application::topic(w.chance.below(w.plan.topics));
                        let back = now + w.chance.millis(0..=2_000);
                        w.broker.topics_away.insert(topic, back);
                    }
                    Event::ClockJump => {
                        // What waits, or will again after a failover, would wait for as long as the clock is set back.
                        let again = w.plan.faults.events.contains(&Event::Failover);
                        let waits = again || !w.database.state.deferred.is_empty();
                        let kinds = if waits { 4 } else { 6 };
                        w.clock += jump(w.chance.below(kinds));
                    }
                    Event::Failover => {
                        let commits = w.chance.below(6);
                        w.database.fail_over(commits);
                        w.database_away = until(w.chance.millis(0..=500));
                    }
                    Event::Crash | Event::Shutdown | Event::Freeze | Event::CutOff => {}
                }
            }),
        }
    }

    async fn end(&mut self, i: usize, at_once: bool) {
        let down = self.world.with(|w| w.chance.millis(0..=1_500));
        let instance = &mut self.instances[i];
        let Some(running) = instance.running.take() else {
            return;
        };
        instance.back = Some(Instant::now() + down);
        let frozen = std::mem::take(&mut instance.frozen);
        if at_once {
            running.abort();
            let number = instance.number;
            self.world.with(|w| w.checks.crashed.insert(number));
            return;
        }
        if frozen {
            instance.process.go_on(|_| {});
        }
        let drain = self.world.with(|w| w.plan.settings.drain);
        self.stopped(running, drain).await;
    }

    fn cut_off(&self, i: usize, longest: usize) {
        let number = self.instances[i].number;
        self.world.with(|w| {
            let until = Instant::now() + w.chance.millis(0..=longest);
            w.cut_off.insert(number, until);
        });
    }

    fn freeze(&mut self, i: usize, longest: usize) {
        let instance = &mut self.instances[i];
        if instance.running.is_none() || instance.frozen {
            return;
        }
        instance.process.stop();
        instance.frozen = true;
        let time = self.world.with(|w| w.chance.millis(0..=longest));
        instance.back = Some(Instant::now() + time);
        let (world, number, process) = (
            self.world.clone(),
            instance.number,
            instance.process.clone(),
        );
        tokio::spawn(async move {
            tokio::time::sleep(HEARTBEAT).await;
            if process.is_stopped() {
                world.with(|w| w.queue.end_all(Some(number)));
            }
        });
    }

    /// A stop ends in bounded time, and without an error.
    async fn stopped(&self, running: Running, drain: Duration) {
        // Beside the drain: calls to the database, which may be slow or away until they are given up.
        let bound = drain + self.world.with(|w| 10 * w.plan.settings.lease.term());
        match tokio::time::timeout(bound, running.shutdown()).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) if e.is_temporary() => {}
            Ok(Err(e)) => self
                .world
                .with(|w| w.wrong(format!("a process ended with {e}"))),
            Err(_) => self
                .world
                .with(|w| w.wrong(format!("a stop took longer than {bound:?}"))),
        }
    }

    /// No more faults; everything is there again.
    pub(super) fn heal(&mut self) {
        self.world.with(|w| {
            w.tell(|| "healed");
            w.healed = true;
            w.database_away = None;
            w.cut_off.clear();
            w.broker.away = None;
            w.broker.topics_away.clear();
            w.consumption.away = None;
        });
        self.bring_back(true);
    }

    /// Stops all in order.
    pub(super) async fn finish(&mut self) {
        let drain = self.world.with(|w| w.plan.settings.drain);
        for i in 0..self.instances.len() {
            if let Some(running) = self.instances[i].running.take() {
                self.stopped(running, drain).await;
            }
        }
    }
}

/// Forward and back, little and much; the last is longer than any lease.
fn jump(chosen: usize) -> i64 {
    [200, 1_500, 30_000, -200, -20_000, -600_000][chosen]
}
