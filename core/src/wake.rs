//! Tells a relay in the same process that there is, or soon will be, something to read. Polling alone always suffices.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

/// How long an enqueue keeps the relays in their busy rhythm: its transaction is about to commit.
const BUSY: Duration = Duration::from_millis(200);

/// Shared by the clones of an outbox and its relays.
#[derive(Debug, Clone)]
pub(crate) struct Wake {
    calls: watch::Sender<u64>,
    busy_until: Arc<Mutex<Option<Instant>>>,
}

impl Wake {
    pub(crate) fn new() -> Self {
        Self {
            calls: watch::Sender::new(0),
            busy_until: Arc::default(),
        }
    }

    /// An event was written in a transaction that is still open.
    pub(crate) fn enqueued(&self) {
        let now = Instant::now();
        let mut busy = self
            .busy_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let was_idle = busy.is_none_or(|until| until < now);
        *busy = Some(now + BUSY);
        drop(busy);
        if was_idle {
            self.committed();
        }
    }

    /// A transaction has committed: read now.
    pub(crate) fn committed(&self) {
        self.calls.send_modify(|n| *n = n.wrapping_add(1));
    }

    pub(crate) fn is_busy(&self) -> bool {
        let busy = self
            .busy_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        busy.is_some_and(|until| Instant::now() <= until)
    }

    pub(crate) fn listen(&self) -> watch::Receiver<u64> {
        self.calls.subscribe()
    }
}
