//! What befalls processes and servers while faults happen, and the healing afterwards.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    application::{self, UNROUTED},
    broker::ModelTransport,
    plan::Event,
    process::Process,
    store::ModelStore,
    world::World,
};
use crate::{Database, Outbox, Relay, Running};

/// A relay, as one process.
struct Instance {
    number: usize,
    process: Arc<Process>,
    running: Option<Running>,
    /// When it starts again, if it is down; when it goes on, if it stands still.
    back: Option<Instant>,
    frozen: bool,
    outbox: Outbox,
}

pub(super) struct Relays {
    world: Arc<World>,
    instances: Vec<Instance>,
    /// Each start is another process.
    started: usize,
}

impl Relays {
    pub(super) fn start(world: &Arc<World>) -> Self {
        let mut relays = Self {
            world: world.clone(),
            instances: Vec::new(),
            started: 0,
        };
        for _ in 0..world.with(|w| w.plan.relays) {
            let instance = relays.launch();
            relays.instances.push(instance);
        }
        relays
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
        let outbox = Outbox::new(Database::over(Arc::new(store)));
        let (settings, retry, filter) = world.with(|w| {
            w.tell(|| format!("relay {number} starts"));
            (w.plan.settings.clone(), w.plan.retry.clone(), w.plan.filter)
        });
        let mut relay = Relay::new(&outbox, Arc::new(transport))
            .settings(settings)
            .retry(retry)
            .source("simulation")
            .accept_unrouted([UNROUTED]);
        if filter {
            relay = relay.topics([application::topic(0)]);
        }
        let running = process.enter(|| relay.spawn());
        Instance {
            number,
            process,
            running: Some(running),
            back: None,
            frozen: false,
            outbox,
        }
    }

    /// Faults, one after the other, for as long as the seed says.
    pub(super) async fn suffer(&mut self) {
        let end = Instant::now() + self.world.with(|w| w.plan.chaos);
        while Instant::now() < end && self.world.with(|w| w.checks.wrong.is_empty()) {
            self.world.pause(1..=400).await;
            self.bring_back(false);
            let events = self.world.with(|w| w.plan.faults.events.clone());
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
                    w.tell(|| format!("relay in place {i} goes on"));
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
        let i = self.world.with(|w| {
            w.tell(|| format!("{event:?}"));
            w.chance.below(self.instances.len())
        });
        match event {
            Event::Crash => self.end(i, true).await,
            Event::Shutdown => self.end(i, false).await,
            Event::Freeze => self.freeze(i, 3 * term),
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
                        w.broker.incarnation += 1;
                        w.broker.away = until(w.chance.millis(0..=2_000));
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
                    Event::Crash | Event::Shutdown | Event::Freeze => {}
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

    fn freeze(&mut self, i: usize, longest: usize) {
        let instance = &mut self.instances[i];
        if instance.running.is_none() || instance.frozen {
            return;
        }
        instance.process.stop();
        instance.frozen = true;
        let time = self.world.with(|w| w.chance.millis(0..=longest));
        instance.back = Some(Instant::now() + time);
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
                .with(|w| w.wrong(format!("a relay ended with {e}"))),
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
            w.broker.away = None;
            w.broker.topics_away.clear();
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
