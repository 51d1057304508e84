use std::time::Duration;

/// The retry schedule: how long to wait after each failed attempt, and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    /// The wait after the first, second, … failure; after the last one comes the dead letter. Defaults to 1 s, 2 s, 4 s.
    pub delays: Vec<Duration>,
    /// Each wait is varied by up to this share, up or down. Defaults to 0.1.
    pub jitter: f64,
    /// What becomes of an event whose waits are used up, or that is refused for good.
    pub on_exhausted: OnExhausted,
}

/// What becomes of an event that is given up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnExhausted {
    /// It becomes a dead letter, and its key goes on without it.
    #[default]
    Continue,
    /// Its key waits behind it, in order, until an operator retries or discards it. One without a key becomes a dead letter,
    /// and so does one that could not even be read: nobody knows its key.
    Park,
}

impl Retry {
    /// The wait after `attempts` failures, none when they are used up.
    #[must_use]
    pub fn after(&self, attempts: u32) -> Option<Duration> {
        let index = usize::try_from(attempts).ok()?.checked_sub(1)?;
        let delay = *self.delays.get(index)?;
        let jitter = self.jitter.clamp(0.0, 1.0);
        let share = 1.0 + jitter * (crate::backoff::chance() * 2.0 - 1.0);
        Some(delay.mul_f64(share))
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            delays: [1, 2, 4].map(Duration::from_secs).to_vec(),
            jitter: 0.1,
            on_exhausted: OnExhausted::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_end() {
        let retry = Retry {
            jitter: 0.0,
            ..Retry::default()
        };
        let waits: Vec<_> = (1..=4)
            .map(|n| retry.after(n).map(|d| d.as_secs()))
            .collect();
        assert_eq!(waits, [Some(1), Some(2), Some(4), None]);
        assert_eq!(retry.after(0), None);
    }

    #[test]
    fn jitter_stays_within_its_share() {
        let retry = Retry {
            jitter: 0.1,
            ..Retry::default()
        };
        for _ in 0..100 {
            let wait = retry.after(1).unwrap().as_secs_f64();
            assert!((0.9..=1.1).contains(&wait), "{wait}");
        }
    }
}
