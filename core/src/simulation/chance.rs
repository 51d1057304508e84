//! All randomness of a schedule comes from its seed.

use std::{cell::Cell, ops::RangeInclusive, time::Duration};

use uuid::Uuid;

/// A small generator of our own, so that a seed means the same with every version of every library.
#[derive(Debug, Clone)]
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        let mut chance = Self(seed);
        chance.next();
        chance
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A generator of its own, for a part whose draws must not shift another's.
    pub(super) fn fork(&mut self) -> Self {
        Self::new(self.next())
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        let n = u64::try_from(n.max(1)).unwrap_or(u64::MAX);
        usize::try_from(self.next() % n).unwrap_or_default()
    }

    pub(super) fn within(&mut self, range: RangeInclusive<usize>) -> usize {
        range.start() + self.below(range.end() - range.start() + 1)
    }

    pub(super) fn millis(&mut self, range: RangeInclusive<usize>) -> Duration {
        Duration::from_millis(u64::try_from(self.within(range)).unwrap_or_default())
    }

    pub(super) fn share(&mut self) -> f64 {
        // 53 bits: what a double holds.
        #[allow(clippy::cast_precision_loss)]
        let share = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        share
    }

    pub(super) fn hit(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.share() < probability
    }

    pub(super) fn uuid(&mut self) -> Uuid {
        Uuid::from_u64_pair(self.next(), self.next())
    }
}

thread_local! {
    static JITTER: Cell<Option<u64>> = const { Cell::new(None) };
}

/// The next share for the engine's jitter, inside a schedule; none outside.
pub(crate) fn jitter() -> Option<f64> {
    let mut chance = Chance(JITTER.get()?);
    let share = chance.share();
    JITTER.set(Some(chance.0));
    Some(share)
}

/// While it lives, jitter on this thread follows a seed.
pub(super) struct Jitter;

impl Jitter {
    pub(super) fn seeded(seed: u64) -> Self {
        JITTER.set(Some(seed));
        Self
    }
}

impl Drop for Jitter {
    fn drop(&mut self) {
        JITTER.set(None);
    }
}
