//! What befalls the relays and their servers.

use std::time::Duration;

use pillarbox_testkit::{
    proxy::{Direction, Proxy},
    servers::{Postgres, RabbitMq, Shutdown},
};
use pillarbox_tests::{
    World, is_soak,
    node::{Node, Task},
};
use rand::{RngExt, rngs::StdRng, seq::SliceRandom};
use tokio::time::Instant;

use super::relay;
use crate::NODE;

/// One thing that goes wrong. Each strikes one relay, or a server that all use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP until its leases are over, then SIGCONT.
    Freeze,
    /// SIGTERM, and another one later.
    Leave,
    /// Its connections to the broker end, in the middle of a frame perhaps.
    CutBroker,
    CutDatabase,
    /// Nothing passes, and nothing ends.
    SilentBroker,
    SilentDatabase,
    StopBroker,
    KillBroker,
    /// An immediate stop: what was not flushed is lost.
    CrashDatabase,
    /// SIGKILL for one of its processes: it ends the others and recovers.
    KillBackend,
}

const EACH: [Fault; 9] = [
    Fault::Kill,
    Fault::Freeze,
    Fault::Leave,
    Fault::CutBroker,
    Fault::CutDatabase,
    Fault::SilentBroker,
    Fault::SilentDatabase,
    Fault::CrashDatabase,
    Fault::KillBackend,
];
/// A broker takes its time to come back: in the short form of the test, only one of them.
const BROKER: [Fault; 2] = [Fault::StopBroker, Fault::KillBroker];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cure {
    Start(usize),
    Thaw(usize),
    Hear(usize),
    StartBroker,
}

struct Relay {
    node: Node,
    task: Task,
    broker: Proxy,
    database: Proxy,
}

/// The relays, the servers, and what is still to be mended.
pub(super) struct Storm<'a> {
    relays: Vec<Relay>,
    postgres: &'a mut Postgres,
    rabbitmq: &'a mut RabbitMq,
    cures: Vec<(Instant, Cure)>,
}

impl<'a> Storm<'a> {
    pub(super) async fn start(
        world: &World,
        postgres: &'a mut Postgres,
        rabbitmq: &'a mut RabbitMq,
        count: usize,
    ) -> Self {
        let mut relays = Vec::new();
        for _ in 0..count {
            let amqp = world.amqp_url.as_deref().expect("a broker");
            let (broker, amqp) = Proxy::before(amqp).await.expect("a proxy");
            let (database, url) = Proxy::before(&world.urls.0).await.expect("a proxy");
            let task = relay(world, url, amqp);
            relays.push(Relay {
                node: Node::start(NODE, &task),
                task,
                broker,
                database,
            });
        }
        for relay in &relays {
            relay.node.says("works").await;
        }
        eprintln!("{count} relays");
        Self {
            relays,
            postgres,
            rabbitmq,
            cures: Vec::new(),
        }
    }

    /// Every kind of fault in a random order, each at a random moment, some while the last one is not over yet. Mends all
    /// of it in the end, and answers how many there were.
    pub(super) async fn rage(&mut self, rng: &mut StdRng) -> usize {
        let mut faults = EACH.to_vec();
        if is_soak() {
            faults.extend(EACH);
            faults.extend(BROKER);
        } else {
            faults.push(BROKER[rng.random_range(0..2)]);
        }
        faults.shuffle(rng);
        for fault in &faults {
            let next = Instant::now() + Duration::from_millis(rng.random_range(300..2_500));
            self.mend_until(next).await;
            self.strike(*fault, rng).await;
        }
        self.mend().await;
        faults.len()
    }

    /// The relays stop in order.
    pub(super) async fn end(mut self) {
        for relay in &mut self.relays {
            assert!(relay.node.end().await, "{}", relay.node.last_words());
            assert!(
                !relay.node.said().contains("panicked"),
                "{}",
                relay.node.said()
            );
        }
    }

    /// A relay to which nothing has happened, after all were mended if there was none.
    async fn victim(&mut self, rng: &mut StdRng) -> usize {
        let hurt: Vec<usize> = self
            .cures
            .iter()
            .filter_map(|(_, cure)| match cure {
                Cure::Start(n) | Cure::Thaw(n) | Cure::Hear(n) => Some(*n),
                Cure::StartBroker => None,
            })
            .collect();
        let mut well: Vec<usize> = (0..self.relays.len())
            .filter(|n| !hurt.contains(n))
            .collect();
        if well.is_empty() {
            self.mend().await;
            well = (0..self.relays.len()).collect();
        }
        well[rng.random_range(0..well.len())]
    }

    async fn strike(&mut self, fault: Fault, rng: &mut StdRng) {
        let n = self.victim(rng).await;
        let after = |least: u64, most: u64, rng: &mut StdRng| {
            Instant::now() + Duration::from_millis(rng.random_range(least..most))
        };
        eprintln!("{fault:?} (relay {n})");
        let relay = &mut self.relays[n];
        let cure = match fault {
            Fault::Kill => {
                relay.node.kill().await;
                (after(0, 2_500, rng), Cure::Start(n))
            }
            Fault::Leave => {
                assert!(relay.node.end().await, "{}", relay.node.last_words());
                (after(0, 1_000, rng), Cure::Start(n))
            }
            Fault::Freeze => {
                relay.node.freeze();
                let lease = relay.task.lease_ms;
                (after(lease + 300, lease + 2_500, rng), Cure::Thaw(n))
            }
            Fault::CutBroker => return cut(&relay.broker, rng),
            Fault::CutDatabase => return cut(&relay.database, rng),
            Fault::SilentBroker => {
                relay.broker.black_hole(true);
                (after(500, 5_000, rng), Cure::Hear(n))
            }
            Fault::SilentDatabase => {
                relay.database.black_hole(true);
                (after(500, 5_000, rng), Cure::Hear(n))
            }
            Fault::StopBroker | Fault::KillBroker => {
                let ended = if fault == Fault::StopBroker {
                    self.rabbitmq.stop().await
                } else {
                    self.rabbitmq.kill().await
                };
                ended.expect("the broker ends");
                (after(0, 2_000, rng), Cure::StartBroker)
            }
            Fault::CrashDatabase => {
                let restarted = self.postgres.restart(Shutdown::Immediate).await;
                return restarted.expect("the database starts again");
            }
            Fault::KillBackend => {
                let recovered = self.postgres.kill_backend().await;
                return recovered.expect("the database recovers");
            }
        };
        self.cures.push(cure);
    }

    /// Mends what is due by then, and waits for that moment.
    async fn mend_until(&mut self, then: Instant) {
        self.cures.sort_by_key(|(due, _)| *due);
        while self.cures.first().is_some_and(|(due, _)| *due <= then) {
            let (due, cure) = self.cures.remove(0);
            tokio::time::sleep_until(due).await;
            self.cure(cure).await;
        }
        tokio::time::sleep_until(then).await;
    }

    /// Mends everything, each in its time.
    async fn mend(&mut self) {
        let last = self.cures.iter().map(|(due, _)| *due).max();
        self.mend_until(last.unwrap_or_else(Instant::now)).await;
    }

    async fn cure(&mut self, cure: Cure) {
        match cure {
            Cure::Start(n) => self.relays[n].node = Node::start(NODE, &self.relays[n].task),
            Cure::Thaw(n) => self.relays[n].node.thaw(),
            Cure::Hear(n) => {
                self.relays[n].broker.black_hole(false);
                self.relays[n].database.black_hole(false);
            }
            Cure::StartBroker => {
                let started = self.rabbitmq.start_again().await;
                started.expect("the broker starts again");
            }
        }
    }
}

/// At once, or after some more bytes in one direction.
fn cut(proxy: &Proxy, rng: &mut StdRng) {
    let direction = [Direction::ToServer, Direction::ToClient][rng.random_range(0..2)];
    match rng.random_range(0..4) {
        0 => proxy.cut(),
        1 => proxy.reset(),
        2 => proxy.cut_after_bytes(direction, rng.random_range(1..20_000)),
        _ => proxy.reset_after_bytes(direction, rng.random_range(1..20_000)),
    }
}
