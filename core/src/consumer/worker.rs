//! One source: lease, then subscription, then batches, until the lease or the subscription ends.

use std::time::Duration;

use futures_util::FutureExt;
use pillarbox_transport::{Ack, Delivery, Source, Subscription};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Core,
    apply::{Incoming, Undone, apply},
};
use crate::{
    backoff::Backoff,
    error::{Error, Result},
    lease::{Acquired, Keeper, Lease, LeaseKey},
};

/// A cursor of its own moves at most this often; more would only bloat its row.
const SETTLE: Duration = Duration::from_millis(100);

pub(super) async fn run(core: Core, source: Source, stop: CancellationToken) -> Result<()> {
    let key = LeaseKey::Source {
        group: core.group.to_string(),
        source: source.clone(),
    };
    let mut backoff = Backoff::connection();
    while !stop.is_cancelled() {
        let sent = Instant::now();
        let wait = match core.store.acquire(&key, core.settings.lease).await {
            Ok(Some(acquired)) => {
                let ended = hold(&core, &source, acquired, sent, &stop).await;
                match core.ended(&source.name, ended, &mut backoff)? {
                    Some(wait) => wait,
                    None => continue,
                }
            }
            Ok(None) => core.settings.lease.renewal() / 2,
            Err(e) => core.waits(&source.name, e, &mut backoff)?,
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
    Ok(())
}

impl Core {
    /// After a session: wait how long before the next? None: none at all.
    fn ended(
        &self,
        what: &str,
        ended: Result<()>,
        backoff: &mut Backoff,
    ) -> Result<Option<Duration>> {
        match ended {
            Ok(()) => {
                backoff.reset();
                Ok(None)
            }
            Err(e) => self.waits(what, e, backoff).map(Some),
        }
    }

    /// Notes a trouble that passes and answers how long to wait; what does not pass ends the consumer.
    pub(super) fn waits(&self, what: &str, e: Error, backoff: &mut Backoff) -> Result<Duration> {
        if !e.is_temporary() && e.kind() != crate::error::Kind::Database {
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
    tracing::info!(group = %core.group, source = %source.name, epoch = lease.epoch, "consuming");
    let result = consume(core, source, &lease, &keeper, &mut *subscription, stop).await;
    core.report.held(false);
    // The channel first: only then does the broker give the rest to nobody but the next owner, in order.
    subscription.close().await;
    drop(keeper);
    core.store.release(&lease).await?;
    result
}

async fn consume(
    core: &Core,
    source: &Source,
    lease: &Lease,
    keeper: &Keeper,
    subscription: &mut dyn Subscription,
    stop: &CancellationToken,
) -> Result<()> {
    let mut settled = Settled {
        position: None,
        written: None,
        at: Instant::now(),
    };
    loop {
        let batch = tokio::select! {
            biased;
            () = stop.cancelled() => return settled.write(core, lease, true).await,
            () = keeper.lost().cancelled() => return Ok(()),
            batch = collect(subscription, core.settings.batch) => batch?,
        };
        let (events, acks): (Vec<_>, Vec<_>) = batch.into_iter().map(split).unzip();
        tokio::select! {
            biased;
            // Dropping the transaction undoes it; its fence would refuse it anyhow.
            () = keeper.lost().cancelled() => return Ok(()),
            applied = commit(core, source, lease, keeper, &events) => applied?,
        }
        core.clear(&source.name);
        for (position, ack) in acks {
            settled.position = position.or(settled.position);
            ack.ack().await?;
        }
        settled.write(core, lease, false).await?;
    }
}

/// The cursor of a source that can be read again: behind the effects' commits, never before.
struct Settled {
    position: Option<u64>,
    written: Option<u64>,
    at: Instant,
}

impl Settled {
    async fn write(&mut self, core: &Core, lease: &Lease, now: bool) -> Result<()> {
        let Some(position) = self.position.filter(|p| Some(*p) != self.written) else {
            return Ok(());
        };
        if !now && self.at.elapsed() < SETTLE {
            return Ok(());
        }
        core.store
            .settle_source(lease, position, core.settings.lease)
            .await?;
        (self.written, self.at) = (Some(position), Instant::now());
        Ok(())
    }
}

/// Waits for one delivery, and takes along what is there already.
async fn collect(subscription: &mut dyn Subscription, most: usize) -> Result<Vec<Delivery>> {
    let mut batch = vec![subscription.next().await?];
    while batch.len() < most {
        match subscription.next().now_or_never() {
            Some(Ok(delivery)) => batch.push(delivery),
            // The session's end is met again by the next call, after this batch.
            Some(Err(_)) | None => break,
        }
    }
    Ok(batch)
}

fn split(delivery: Delivery) -> (Incoming, (Option<u64>, Ack)) {
    let Delivery {
        message,
        position,
        defect,
        ack,
    } = delivery;
    (
        Incoming {
            message,
            defect,
            attempts: 0,
            line: None,
        },
        (position, ack),
    )
}

/// Commits a batch, whole or event by event. Comes back only with everything stored, or with an error that ends the session.
async fn commit(
    core: &Core,
    source: &Source,
    lease: &Lease,
    keeper: &Keeper,
    events: &[Incoming],
) -> Result<()> {
    let sent = Instant::now();
    // Where the acknowledgement destroys the message, the commit must be on disk before it.
    match apply(core, lease, events, !source.replayable, None).await {
        Ok(applied) => {
            keeper.renewed(sent);
            if applied.deferred > 0 || applied.dead > 0 {
                core.deferred.notify_one();
            }
            Ok(())
        }
        Err(Undone::Alone(_)) if events.len() > 1 => {
            for event in events {
                alone(core, source, lease, event).await?;
            }
            Ok(())
        }
        Err(undone) => retry_alone(core, source, lease, events, undone).await,
    }
}

async fn alone(core: &Core, source: &Source, lease: &Lease, event: &Incoming) -> Result<()> {
    let event = std::slice::from_ref(event);
    match apply(core, lease, event, !source.replayable, None).await {
        Ok(applied) => {
            if applied.deferred > 0 || applied.dead > 0 {
                core.deferred.notify_one();
            }
            Ok(())
        }
        Err(undone) => retry_alone(core, source, lease, event, undone).await,
    }
}

/// Goes on after an undone transaction for as long as the lease lasts. An outage is left to the session's end, which
/// returns everything to the broker.
async fn retry_alone(
    core: &Core,
    source: &Source,
    lease: &Lease,
    events: &[Incoming],
    mut undone: Undone,
) -> Result<()> {
    let mut backoff = Backoff::connection();
    loop {
        let mut overdue = None;
        match undone {
            Undone::Away(e) => return Err(e),
            Undone::Fenced => return Err(lost(lease)),
            // It named itself by ending alone: an attempt.
            Undone::Alone(reason) if !reason.is_empty() && events.len() == 1 => {
                overdue = Some(reason)
            }
            Undone::Alone(_) => tokio::time::sleep(backoff.step()).await,
            Undone::Unavailable(reason) => {
                core.note(&source.name, &reason);
                tokio::time::sleep(backoff.step()).await;
            }
        }
        match apply(core, lease, events, !source.replayable, overdue.as_deref()).await {
            Ok(applied) => {
                if applied.deferred > 0 || applied.dead > 0 {
                    core.deferred.notify_one();
                }
                return Ok(());
            }
            Err(next) => undone = next,
        }
    }
}

fn lost(lease: &Lease) -> Error {
    Error::new(
        crate::error::Kind::LeaseLost,
        "consume",
        format!("another owner has {}", lease.key),
    )
}
