use std::time::Duration;

/// A random share of one. Inside a simulation it follows the seed.
pub(crate) fn chance() -> f64 {
    #[cfg(any(test, feature = "simulation"))]
    if let Some(share) = crate::simulation::jitter() {
        return share;
    }
    rand::random()
}

/// Waits between tries to reach something that is away: doubling, with jitter, so that replicas do not knock together.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
    longest: Duration,
}

impl Backoff {
    /// For a database or a broker.
    pub(crate) fn connection() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(5))
    }

    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self {
            next: first,
            first,
            longest,
        }
    }

    /// The next wait.
    pub(crate) fn step(&mut self) -> Duration {
        self.step_by(chance())
    }

    /// The same with a given share of the jitter, 0 to 1.
    pub(crate) fn step_by(&mut self, share: f64) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        wait.mul_f64(0.8 + 0.2 * share)
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}
