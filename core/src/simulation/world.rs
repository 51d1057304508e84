//! What all parts of a schedule share: the two servers, the seed's randomness, what happened, what went wrong.

use std::{
    collections::BTreeMap,
    fmt::Display,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use super::{
    application::Application, broker::Broker, chance::Chance, check::Checks,
    consumption::Consumption, database::Database, plan::Plan, queue::Queue, transaction::Units,
};
use crate::error::{Error, Kind, Result};

/// More calls than any sound schedule makes: somebody tries again without waiting.
const CALLS: usize = 200_000;

pub(super) struct World {
    inner: Mutex<Inner>,
    start: Instant,
}

pub(super) struct Inner {
    pub(super) plan: Plan,
    pub(super) chance: Chance,
    pub(super) database: Database,
    pub(super) broker: Broker,
    pub(super) application: Application,
    pub(super) checks: Checks,
    pub(super) queue: Queue,
    pub(super) units: Units,
    pub(super) consumption: Consumption,
    /// No more faults.
    pub(super) healed: bool,
    /// Nothing waits, and nothing is refused any more.
    pub(super) straight: bool,
    pub(super) database_away: Option<Instant>,
    /// Processes that cannot reach the database.
    pub(super) cut_off: BTreeMap<usize, Instant>,
    /// How far the database's clock is off, in milliseconds.
    pub(super) clock: i64,
    start: Instant,
    calls: usize,
    digest: u64,
    story: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(plan: Plan, chance: Chance, tell: bool) -> Arc<Self> {
        let start = Instant::now();
        Arc::new(Self {
            start,
            inner: Mutex::new(Inner {
                plan,
                chance,
                database: Database::default(),
                broker: Broker::default(),
                application: Application::default(),
                checks: Checks::default(),
                queue: Queue::default(),
                units: Units::default(),
                consumption: Consumption::default(),
                healed: false,
                straight: false,
                database_away: None,
                cut_off: BTreeMap::new(),
                clock: 1_000_000,
                start,
                calls: 0,
                digest: 0,
                story: tell.then(Vec::new),
            }),
        })
    }

    pub(super) fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Waits as long as the seed says.
    pub(super) async fn pause(&self, millis: std::ops::RangeInclusive<usize>) {
        let pause = self.with(|w| w.chance.millis(millis));
        tokio::time::sleep(pause).await;
    }

    /// A call to the database, by process `by`. It runs to its end there, whatever becomes of the caller.
    pub(super) async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        by: usize,
        what: &'static str,
        effect: impl FnOnce(&mut Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let world = self.clone();
        if self.with(|w| w.is_too_busy()) {
            std::future::pending::<()>().await;
        }
        tokio::spawn(async move {
            let (there, back, fate) = world.with(Inner::fate);
            tokio::time::sleep(there).await;
            let fate = if world.reconnected(by).await {
                Fate::Before
            } else {
                fate
            };
            let (result, incarnation) =
                world.with(|w| (w.serve(by, what, fate, effect), w.database.incarnation));
            tokio::time::sleep(back).await;
            world.reconnected(by).await;
            let same = world.with(|w| w.database.incarnation) == incarnation;
            let _ = reply.send(if same { result } else { Err(away(what)) });
        });
        answer.await.unwrap_or_else(|_| Err(away(what)))
    }
}

impl World {
    /// Waits until a process is no longer cut off. Whether it was, and what it sent is gone.
    async fn reconnected(&self, process: usize) -> bool {
        let Some(until) = self.with(|w| w.cut_off.get(&process).copied()) else {
            return false;
        };
        let was = Instant::now() < until;
        tokio::time::sleep_until(until).await;
        was
    }
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Fine,
    /// It never arrives.
    Before,
    /// Its answer is lost: the caller cannot know whether it was committed.
    After,
}

fn away(what: &'static str) -> Error {
    Error::new(Kind::Unavailable, what, "the database is away")
}

impl Inner {
    fn fate(&mut self) -> (Duration, Duration, Fate) {
        let calm = self.healed;
        let faults = &self.plan.faults;
        let chance = &mut self.chance;
        let fate = match calm {
            false if chance.hit(faults.fails_before) => Fate::Before,
            false if chance.hit(faults.fails_after) => Fate::After,
            _ => Fate::Fine,
        };
        let way = |chance: &mut Chance| {
            if !calm && chance.hit(faults.slow_call) {
                let longest = 2 * self.plan.settings.lease.term().as_millis();
                chance.millis(0..=usize::try_from(longest).unwrap_or(0))
            } else {
                chance.millis(0..=2)
            }
        };
        (way(chance), way(chance), fate)
    }

    fn serve<T>(
        &mut self,
        by: usize,
        what: &'static str,
        fate: Fate,
        effect: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let fate = if self.healed { Fate::Fine } else { fate };
        let is_away = self
            .database_away
            .is_some_and(|until| Instant::now() < until);
        if is_away || fate == Fate::Before {
            self.tell(|| format!("process {by}: {what}: not reached"));
            return Err(away(what));
        }
        let result = effect(self);
        self.tell(|| match &result {
            Err(e) => format!("process {by}: {what}: {e}"),
            Ok(_) if fate == Fate::After => {
                format!("process {by}: {what}: done, but the answer is lost")
            }
            Ok(_) => format!("process {by}: {what}"),
        });
        if fate == Fate::After {
            Err(away(what))
        } else {
            result
        }
    }

    fn is_too_busy(&mut self) -> bool {
        self.calls += 1;
        if self.calls == CALLS {
            self.wrong(format!(
                "{CALLS} calls to the database: somebody does not wait"
            ));
        }
        self.calls >= CALLS
    }

    /// The time by the database's clock.
    pub(super) fn now(&self) -> i64 {
        crate::store::millis(self.start.elapsed()) + self.clock
    }

    /// Notes what happened: for the digest by which two runs are compared, and for the story of a seed.
    pub(super) fn tell<S: Display>(&mut self, what: impl FnOnce() -> S) {
        let at = self.start.elapsed();
        let turn = u64::try_from(at.as_millis()).unwrap_or(u64::MAX) ^ self.chance.clone().next();
        self.digest = (self.digest ^ turn).wrapping_mul(0x0100_0000_01b3);
        if let Some(story) = &mut self.story {
            story.push(format!("{:9.3} {}", at.as_secs_f64(), what()));
        }
    }

    /// Notes a broken promise.
    pub(super) fn wrong(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.tell(|| format!("WRONG: {what}"));
        self.checks.wrong.push(what);
    }

    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    pub(super) fn story(&mut self) -> Vec<String> {
        self.story.take().unwrap_or_default()
    }
}
