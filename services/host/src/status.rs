use std::sync::{Arc, Mutex, PoisonError};

use pillarbox::Health;
use serde_json::{Value, json};
use tokio::sync::watch;

/// How a service's relay and consumer are, for its readiness probe. Clones share it.
#[derive(Clone, Debug)]
pub struct Status(Arc<Mutex<State>>);

#[derive(Debug)]
enum State {
    Waiting(&'static str),
    Running {
        relay: watch::Receiver<Health>,
        consumer: watch::Receiver<Health>,
    },
}

impl Status {
    /// Neither runs yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(State::Waiting("the service starts"))))
    }

    pub(crate) fn waits(&self, why: &'static str) {
        self.set(State::Waiting(why));
    }

    pub(crate) fn runs(&self, relay: watch::Receiver<Health>, consumer: watch::Receiver<Health>) {
        self.set(State::Running { relay, consumer });
    }

    /// Whether everything flows, and the details as JSON. Trouble here degrades a service; it never takes it out of
    /// traffic: events wait in the database.
    pub(crate) fn report(&self) -> (bool, Value) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Waiting(why) => (false, json!({ "waitsFor": why })),
            State::Running { relay, consumer } => {
                let (relay, consumer) = (relay.borrow(), consumer.borrow());
                let flows = |h: &Health| h.trouble.is_none() && h.held == h.of && h.of > 0;
                let shown =
                    |h: &Health| json!({ "held": h.held, "of": h.of, "trouble": h.trouble });
                (
                    flows(&relay) && flows(&consumer),
                    json!({ "relay": shown(&relay), "consumer": shown(&consumer) }),
                )
            }
        }
    }

    fn set(&self, state: State) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

impl Default for Status {
    fn default() -> Self {
        Self::new()
    }
}
