//! One source: lease, then subscription, then a session, until the lease or the subscription ends.

use std::time::Duration;

use pillarbox_transport::Source;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Core, session::Session};
use crate::{
    backoff::Backoff,
    error::{Error, Kind, Result},
    lease::{Acquired, Keeper, LeaseKey},
    supervise::caught,
};

pub(super) async fn run(core: Core, source: Source, stop: CancellationToken) -> Result<()> {
    let key = LeaseKey::Source {
        group: core.group.to_string(),
        source: source.clone(),
    };
    let mut backoff = Backoff::connection();
    let trouble = Troubles::new(&source);
    while !stop.is_cancelled() {
        // Without the lease, which goes with the subscription: whoever has it reads.
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = core.pauses.goes_on() => {}
        }
        let sent = Instant::now();
        let wait = match core.store.acquire(&key, core.settings.lease).await {
            Ok(Some(acquired)) => {
                core.clear(&trouble.lease);
                match hold(&core, &source, &trouble, acquired, sent, &stop).await {
                    Ok(()) => {
                        backoff.reset();
                        continue;
                    }
                    Err(e) if e.kind() == Kind::LeaseLost => backoff.step(),
                    Err(e) => core.waits(trouble.of(&e), e, &mut backoff)?,
                }
            }
            Ok(None) => {
                // Another's now, with its troubles.
                trouble.all().into_iter().for_each(|what| core.clear(what));
                core.settings.lease.renewal() / 2
            }
            Err(e) => core.waits(&trouble.lease, e, &mut backoff)?,
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
    Ok(())
}

/// The names of a source's troubles in the consumer's health: one that is over must not end another's.
struct Troubles {
    lease: String,
    /// Over when it is subscribed.
    broker: String,
    /// Over when an event is stored.
    events: String,
}

impl Troubles {
    fn new(source: &Source) -> Self {
        Self {
            lease: format!("{} lease", source.name),
            broker: source.name.clone(),
            events: format!("{} events", source.name),
        }
    }

    fn of(&self, e: &Error) -> &str {
        if e.kind() == Kind::Transport {
            &self.broker
        } else {
            &self.events
        }
    }

    fn all(&self) -> [&str; 3] {
        [&self.lease, &self.broker, &self.events]
    }
}

impl Core {
    /// Notes a trouble that passes and answers how long to wait; what does not pass ends the consumer.
    pub(super) fn waits(&self, what: &str, e: Error, backoff: &mut Backoff) -> Result<Duration> {
        if !e.is_temporary() && e.kind() != Kind::Database {
            return Err(e);
        }
        self.note(what, &e.to_string());
        Ok(backoff.step())
    }
}

/// One lease: subscribe, consume, close, give back. Returns without error when it should be taken anew at once.
async fn hold(
    core: &Core,
    source: &Source,
    trouble: &Troubles,
    acquired: Acquired,
    sent: Instant,
    stop: &CancellationToken,
) -> Result<()> {
    let lease = acquired.lease.clone();
    let keeper = Keeper::start(core.store.clone(), lease.clone(), core.settings.lease, sent);
    if acquired.reset {
        tracing::warn!(group = %core.group, source = %source.name, "the source was made anew: reading it from its oldest event");
    }
    let from = acquired.position.map(|p| p.saturating_add(1));
    let subscribed = tokio::select! {
        biased;
        () = keeper.lost().cancelled() => return Ok(()),
        subscribed = core.transport.subscribe(source, &core.group, from) => subscribed,
    };
    let mut subscription = match subscribed {
        Ok(subscription) => subscription,
        Err(e) => {
            drop(keeper);
            core.store.release(&lease).await?;
            return Err(e.into());
        }
    };
    core.report.held(true);
    core.clear(&trouble.broker);
    tracing::info!(group = %core.group, source = %source.name, epoch = lease.epoch, "consuming");
    let session = Session::new(core, (source, &trouble.events), (&acquired, &keeper), stop);
    let result = caught("consume", session.run(&mut *subscription)).await;
    core.report.held(false);
    // The channel first: only then does the broker give the rest to nobody but the next owner, in order.
    subscription.close().await;
    drop(keeper);
    core.store.release(&lease).await?;
    result
}
