//! Whether a destination's broker is worth asking: one state for all partitions of a relay.
//!
//! Pure: no I/O, no clock, no randomness; `relay/circuit.rs` drives it. It opens when a publisher cannot be opened, or when
//! publishers die over what they were given several times in a row. One partition then probes for all: it opens a publisher
//! and, where something waits, has one event answered. That closes it.
//!
//! What a topic alone cannot take (a missing exchange, a full queue) is not its business: the broker has answered.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;

#[cfg(test)]
mod tests;

/// Publishers that die in a row, with no answer between them, before the broker counts as away. One that dies over an event
/// of its own must not stop the other partitions.
const LOSSES: u32 = 3;
/// Losses this close to each other are one: partitions share a connection.
const TOGETHER: Duration = Duration::from_secs(1);
/// The waits between probes double from the first to the longest, which bounds how late work goes on.
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3);
/// Between two lines in the log about one outage.
const SUMMARY: Duration = Duration::from_secs(60);

/// The state of the circuit breaker between a relay and its broker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum BreakerState {
    /// Events flow, as far as the broker is concerned.
    #[default]
    Closed,
    /// One partition probes: it connects, and sends one event. The others wait for the outcome.
    HalfOpen,
    /// The broker is away: nothing is sent, nothing is counted against an event, and a probe follows within 3 s.
    Open,
}

impl BreakerState {
    /// In a word: `closed`, `half_open` or `open`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::HalfOpen => "half_open",
            Self::Open => "open",
        }
    }
}

/// What a partition without a publisher may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permit {
    /// Open one.
    Go,
    /// Open one as the probe of this number.
    Probe(u64),
    /// Ask again then.
    At(Instant),
    /// Ask again when the state has changed.
    Wait,
}

/// What is worth a line in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Opened,
    Still { away: Duration, probes: u64 },
    Closed { away: Duration, probes: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed { losses: u32 },
    Open { until: Instant },
    HalfOpen { probe: u64 },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Breaker {
    state: State,
    backoff: Backoff,
    /// The number of the last probe, of all there ever were.
    last: u64,
    /// When the last loss was counted.
    lost_at: Option<Instant>,
    outage: Option<Outage>,
}

#[derive(Debug, Clone, Copy)]
struct Outage {
    since: Instant,
    told: Instant,
    probes: u64,
}

impl Breaker {
    pub(crate) fn new() -> Self {
        Self {
            state: State::Closed { losses: 0 },
            backoff: Backoff::new(FIRST, LONGEST),
            last: 0,
            lost_at: None,
            outage: None,
        }
    }

    pub(crate) fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// Closed, and nothing that an answer would change.
    pub(crate) fn is_calm(&self) -> bool {
        self.state == State::Closed { losses: 0 }
    }

    /// What whoever has no publisher may do now. One that is told to probe answers for it: [`Breaker::answered`],
    /// [`Breaker::failed`], [`Breaker::lost`] or [`Breaker::abandoned`].
    pub(crate) fn ask(&mut self, now: Instant) -> Permit {
        match self.state {
            State::Closed { .. } => Permit::Go,
            State::Open { until } if until > now => Permit::At(until),
            State::Open { .. } => {
                self.last += 1;
                if let Some(outage) = &mut self.outage {
                    outage.probes += 1;
                }
                self.state = State::HalfOpen { probe: self.last };
                Permit::Probe(self.last)
            }
            State::HalfOpen { .. } => Permit::Wait,
        }
    }

    /// The broker answered somebody, whatever it said: it is not away.
    pub(crate) fn answered(&mut self, now: Instant) -> Option<Told> {
        self.state = State::Closed { losses: 0 };
        self.lost_at = None;
        self.backoff.reset();
        let outage = self.outage.take()?;
        Some(Told::Closed {
            away: now.saturating_duration_since(outage.since),
            probes: outage.probes,
        })
    }

    /// No publisher could be opened. `share`: of the jitter, 0 to 1.
    pub(crate) fn failed(&mut self, now: Instant, share: f64, probe: Option<u64>) -> Option<Told> {
        match self.state {
            State::Closed { .. } => Some(self.open(now, share)),
            _ => self.ended(now, share, probe),
        }
    }

    /// A publisher died without an answer to what it was given.
    pub(crate) fn lost(&mut self, now: Instant, share: f64, probe: Option<u64>) -> Option<Told> {
        let State::Closed { losses } = self.state else {
            return self.ended(now, share, probe);
        };
        let together = |at: Instant| now.saturating_duration_since(at) < TOGETHER;
        if self.lost_at.is_some_and(together) {
            return None;
        }
        self.lost_at = Some(now);
        if losses + 1 >= LOSSES {
            return Some(self.open(now, share));
        }
        self.state = State::Closed { losses: losses + 1 };
        None
    }

    /// Its prober is gone and has found nothing out: somebody else probes at once.
    pub(crate) fn abandoned(&mut self, now: Instant, probe: u64) {
        if self.state == (State::HalfOpen { probe }) {
            self.state = State::Open { until: now };
        }
    }

    fn open(&mut self, now: Instant, share: f64) -> Told {
        self.lost_at = None;
        self.outage = Some(Outage {
            since: now,
            told: now,
            probes: 0,
        });
        let until = now + self.backoff.step_by(share);
        self.state = State::Open { until };
        Told::Opened
    }

    /// A try during an outage was in vain. Only the probe's own changes anything: others began before it opened.
    fn ended(&mut self, now: Instant, share: f64, probe: Option<u64>) -> Option<Told> {
        let State::HalfOpen { probe: current } = self.state else {
            return None;
        };
        if probe != Some(current) {
            return None;
        }
        let until = now + self.backoff.step_by(share);
        self.state = State::Open { until };
        let outage = self.outage.as_mut()?;
        if now.saturating_duration_since(outage.told) < SUMMARY {
            return None;
        }
        outage.told = now;
        Some(Told::Still {
            away: now.saturating_duration_since(outage.since),
            probes: outage.probes,
        })
    }
}
