//! The circuit breaker that the partitions of a relay share, and what it tells.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use pillarbox_transport::Error;
use tokio::{sync::watch, time::Instant};

use crate::{
    backoff::chance,
    breaker::{Breaker, BreakerState, Permit, Told},
    running::Report,
    signal::Signal,
};

/// One breaker, for one destination.
pub(super) struct Circuit {
    destination: Arc<str>,
    report: Report,
    breaker: Mutex<Breaker>,
    state: Signal<BreakerState>,
    /// Asked at every confirm, and nearly always true: there is nothing that an answer would change.
    calm: AtomicBool,
}

/// The right, and the duty, to find out whether the broker is back. Dropped, it is somebody else's.
pub(super) struct Probe {
    circuit: Arc<Circuit>,
    number: u64,
}

/// What a partition without a publisher may do.
pub(super) enum Open {
    Now(Option<Probe>),
    At(Instant),
    /// When the state has changed.
    Later,
}

impl Circuit {
    pub(super) fn new(destination: Arc<str>, report: Report) -> Arc<Self> {
        let circuit = Self {
            destination,
            report,
            breaker: Mutex::new(Breaker::new()),
            state: Signal::new(BreakerState::Closed),
            calm: AtomicBool::new(true),
        };
        Arc::new(circuit)
    }

    /// In the metrics; also before anything has happened, so that an alarm finds its gauge.
    pub(super) fn show(&self, state: BreakerState) {
        let destination = self.destination.to_string();
        let gauge = metrics::gauge!("pillarbox_relay_breaker", "destination" => destination);
        gauge.set(match state {
            BreakerState::Closed => 0.0,
            BreakerState::HalfOpen => 1.0,
            BreakerState::Open => 2.0,
        });
    }

    /// Wakes at each change of the state.
    pub(super) fn watch(&self) -> watch::Receiver<BreakerState> {
        self.state.watch()
    }

    pub(super) fn ask(self: &Arc<Self>, now: Instant) -> Open {
        let mut permit = Permit::Wait;
        self.change(|breaker| {
            permit = breaker.ask(now);
            None
        });
        match permit {
            Permit::Go => Open::Now(None),
            Permit::Probe(number) => Open::Now(Some(Probe {
                circuit: self.clone(),
                number,
            })),
            Permit::At(at) => Open::At(at),
            Permit::Wait => Open::Later,
        }
    }

    /// The broker answered, whatever it said.
    pub(super) fn answered(&self) {
        if self.calm.load(Relaxed) {
            return;
        }
        if let Some(Told::Closed { away, probes }) = self.change(|b| b.answered(Instant::now())) {
            tracing::info!(destination = %self.destination, ?away, probes, "the broker answers again: the circuit breaker is closed");
        }
    }

    /// No publisher could be opened.
    pub(super) fn failed(&self, e: &Error, probe: Option<&Probe>) {
        let number = probe.map(|p| p.number);
        let told = self.change(|b| b.failed(Instant::now(), chance(), number));
        self.tell(told, e);
    }

    /// A publisher died without an answer to what it was given.
    pub(super) fn lost(&self, e: &Error, probe: Option<&Probe>) {
        let number = probe.map(|p| p.number);
        let told = self.change(|b| b.lost(Instant::now(), chance(), number));
        self.tell(told, e);
    }

    /// One line when it opens, and one a minute while it stays so: none for each try.
    fn tell(&self, told: Option<Told>, trouble: &Error) {
        let destination = &self.destination;
        match told {
            Some(Told::Opened) => {
                tracing::warn!(%destination, %trouble, "the broker is away: the circuit breaker is open, events wait");
            }
            Some(Told::Still { away, probes }) => {
                tracing::warn!(%destination, ?away, probes, %trouble, "the broker is still away");
            }
            _ => tracing::debug!(%destination, %trouble, "the broker was tried in vain"),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Breaker) -> Option<Told>) -> Option<Told> {
        let mut breaker = self.breaker.lock().unwrap_or_else(PoisonError::into_inner);
        let told = change(&mut breaker);
        self.calm.store(breaker.is_calm(), Relaxed);
        let now = breaker.state();
        // Under the lock, so that the last change is the last that is told.
        let is_new = self.state.get() != now;
        if is_new {
            self.state.set(now);
            self.report.breaker(now);
            self.show(now);
        }
        told
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Changes nothing where its outcome was told before.
        self.circuit.change(|breaker| {
            breaker.abandoned(Instant::now(), self.number);
            None
        });
    }
}
