use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    breaker::BreakerState,
    destination::Reanchored,
    error::{Error, Kind, Result},
    pause::Pause,
};

/// What a relay or a consumer says of itself. Trouble with a broker is no reason to take a service out of traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// Partitions or sources whose lease it holds.
    pub held: usize,
    /// Partitions or sources there are.
    pub of: usize,
    /// Keys of its destination or group that wait for an operator (see [`OnExhausted::Park`](crate::failure::OnExhausted)),
    /// as of the last look, about a second ago.
    pub parked: u64,
    /// A relay's circuit breaker: whether its broker is there. A consumer's is always closed.
    pub breaker: BreakerState,
    /// What operators hold back of its destination or group, as of the last look, about a second ago. While the whole of it
    /// is paused, `trouble` says so too.
    pub pauses: Vec<Pause>,
    /// Relays: its database was found in another cluster or behind another server, as of the last time in this run. Events come
    /// again by that.
    pub reanchored: Option<Reanchored>,
    /// What it waits for, if it waits: the newest trouble, in a sentence.
    pub trouble: Option<String>,
}

/// Every task of the engine is spawned through this, so that a simulation can freeze a process as a whole.
#[cfg(not(any(test, feature = "simulation")))]
pub(crate) fn task<F: Future>(f: F) -> F {
    f
}
#[cfg(any(test, feature = "simulation"))]
pub(crate) use crate::simulation::task;

/// A spawned relay or consumer. A future that ends when it does; dropping it lets it run on.
#[must_use = "keep it to stop it, or await it"]
#[derive(Debug)]
pub struct Running {
    task: JoinHandle<Result<()>>,
    stop: CancellationToken,
    health: watch::Receiver<Health>,
}

impl Running {
    pub(crate) fn new(
        stop: CancellationToken,
        health: watch::Receiver<Health>,
        task: impl Future<Output = Result<()>> + Send + 'static,
    ) -> Self {
        Self {
            task: tokio::spawn(self::task(task)),
            stop,
            health,
        }
    }

    /// How it is.
    #[must_use]
    pub fn health(&self) -> Health {
        self.health.borrow().clone()
    }

    /// A view of its health that outlives this handle.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// Stops taking, finishes what is in flight (within the drain time), hands its leases back.
    ///
    /// # Errors
    /// What ended it.
    pub async fn shutdown(self) -> Result<()> {
        self.stop.cancel();
        self.await
    }

    /// Ends it at once, as a crash would: leases run out, and what was in flight comes again.
    pub fn abort(&self) {
        self.task.abort();
    }
}

impl Future for Running {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.task)
            .poll(cx)
            .map(|joined| match joined {
                Ok(result) => result,
                Err(e) if e.is_cancelled() => Ok(()),
                Err(e) => Err(
                    Error::new(Kind::Panicked, "run", "a task of the engine panicked").caused_by(e),
                ),
            })
    }
}

/// Shared by the tasks of one relay or consumer.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    health: watch::Sender<Health>,
    troubles: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Report {
    pub(crate) fn new() -> (Self, watch::Receiver<Health>) {
        let (health, receiver) = watch::channel(Health::default());
        (
            Self {
                health,
                troubles: Arc::default(),
            },
            receiver,
        )
    }

    pub(crate) fn expect(&self, of: usize) {
        self.health.send_modify(|h| h.of = of);
    }

    pub(crate) fn held(&self, held: bool) {
        self.health.send_modify(|h| {
            h.held = if held {
                h.held + 1
            } else {
                h.held.saturating_sub(1)
            }
        });
    }

    pub(crate) fn parked(&self, parked: u64) {
        self.health.send_if_modified(|h| {
            let differs = h.parked != parked;
            h.parked = parked;
            differs
        });
    }

    pub(crate) fn breaker(&self, breaker: BreakerState) {
        self.health.send_modify(|h| h.breaker = breaker);
    }

    pub(crate) fn pauses(&self, pauses: Vec<Pause>) {
        self.health.send_modify(|h| h.pauses = pauses);
    }

    pub(crate) fn reanchored(&self, reanchored: Reanchored) {
        self.health.send_modify(|h| h.reanchored = Some(reanchored));
    }

    /// Notes a trouble with something. True if it is new: worth a line in the log, where a repeat is not.
    pub(crate) fn trouble(&self, what: &str, trouble: &str) -> bool {
        self.change(|troubles| {
            troubles
                .insert(what.to_owned(), trouble.to_owned())
                .is_none()
        })
    }

    /// The trouble is over. True if there was one.
    pub(crate) fn clear(&self, what: &str) -> bool {
        self.is_troubled() && self.change(|troubles| troubles.remove(what).is_some())
    }

    /// Cheap: asked at every confirm, and nearly always in vain.
    pub(crate) fn is_troubled(&self) -> bool {
        self.health.borrow().trouble.is_some()
    }

    /// What concerned something that is no longer this process's is no trouble of its own.
    pub(crate) fn forget(&self, prefix: &str) {
        self.change(|troubles| troubles.retain(|what, _| !what.starts_with(prefix)));
    }

    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<String, String>) -> T) -> T {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut troubles);
        let first = troubles
            .iter()
            .next()
            .map(|(what, trouble)| format!("{what}: {trouble}"));
        self.health.send_if_modified(|h| {
            let differs = h.trouble != first;
            h.trouble = first;
            differs
        });
        changed
    }
}
