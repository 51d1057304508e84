//! The relay's side of an event's way: log, window, publisher, cursor.

use std::time::Duration;

use crate::{lease::LeaseTerm, window};

/// Bounds and rhythms of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelaySettings {
    /// How long its leases last. Defaults to 10 s.
    pub lease: LeaseTerm,
    /// Most events read at a time. Defaults to 1,000.
    pub batch: u32,
    /// Most events handed to the broker in one call. Defaults to 256.
    pub publish: usize,
    /// The bounds of each partition's window. Default to 10,000 events or 64 MiB unsettled, 1,024 in flight, 1 of each key.
    pub window: window::Limits,
    /// How often an idle relay looks, and a busy one. Default to 100 ms and 5 ms.
    pub idle_poll: Duration,
    /// See `idle_poll`.
    pub busy_poll: Duration,
    /// How often at most the cursor moves. Defaults to 100 ms.
    pub settle: Duration,
    /// Most deferred events of a destination; at it, partitions wait. Defaults to 10,000.
    pub deferred: u64,
    /// Most deferred events of one key; at it, its partition waits. Defaults to 1,000.
    pub deferred_per_key: u64,
    /// How long a stop waits for confirms. Defaults to 25 s.
    pub drain: Duration,
}

impl Default for RelaySettings {
    fn default() -> Self {
        Self {
            lease: LeaseTerm::default(),
            batch: 1_000,
            publish: 256,
            window: window::Limits { unsettled: 10_000, bytes: 64 << 20, in_flight: 1_024, per_key: 1 },
            idle_poll: Duration::from_millis(100),
            busy_poll: Duration::from_millis(5),
            settle: Duration::from_millis(100),
            deferred: 10_000,
            deferred_per_key: 1_000,
            drain: Duration::from_secs(25),
        }
    }
}
