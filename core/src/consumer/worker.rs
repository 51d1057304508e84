//! One source: lease, then subscription, then batches, until the lease or the subscription ends.

use std::time::Duration;

use futures_util::FutureExt;
use pillarbox_transport::{Ack, Delivery, Source, Subscription};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Core,
    apply::{Applied, Incoming, Undone, apply},
};
use crate::{
    backoff::Backoff,
    error::{Error, Kind, Result},
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
    let trouble = Troubles::new(&source);
    while !stop.is_cancelled() {
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
    let mut session = Session {
        core,
        source,
        trouble,
        lease: &lease,
        keeper: &keeper,
        stop,
        settled: Settled {
            position: None,
            written: None,
            at: Instant::now(),
        },
    };
    let result = session.consume(&mut *subscription).await;
    core.report.held(false);
    // The channel first: only then does the broker give the rest to nobody but the next owner, in order.
    subscription.close().await;
    drop(keeper);
    core.store.release(&lease).await?;
    result
}

/// Resolves when a stop has waited for as long as it may.
async fn overstayed(stop: &CancellationToken, drain: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(drain).await;
}

struct Session<'a> {
    core: &'a Core,
    source: &'a Source,
    trouble: &'a Troubles,
    lease: &'a Lease,
    keeper: &'a Keeper,
    stop: &'a CancellationToken,
    settled: Settled,
}

impl Session<'_> {
    async fn consume(&mut self, subscription: &mut dyn Subscription) -> Result<()> {
        let (core, keeper, stop) = (self.core, self.keeper, self.stop);
        while !stop.is_cancelled() {
            let batch = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = keeper.lost().cancelled() => return Ok(()),
                batch = collect(subscription, core.settings.batch) => batch?,
                () = self.settled.due() => {
                    self.settled.write(core, self.lease, false).await?;
                    continue;
                }
            };
            tokio::select! {
                biased;
                // Dropping the transaction undoes it; its fence would refuse it anyhow.
                () = keeper.lost().cancelled() => return Ok(()),
                () = overstayed(stop, core.settings.drain) => return Ok(()),
                stored = self.store(batch) => stored?,
            }
        }
        self.settled.write(core, self.lease, true).await
    }

    /// Stores a batch, in one transaction or event by event, and acknowledges what is stored. Goes on for as long as the
    /// lease lasts; an outage is left to the session's end, which returns the rest to the broker, as a stop does.
    async fn store(&mut self, batch: Vec<Delivery>) -> Result<()> {
        let (events, acks): (Vec<_>, Vec<_>) = batch.into_iter().map(split).unzip();
        let mut acks = acks.into_iter();
        // So many of the next run one by one.
        let (mut left, mut alone, mut overdue) = (&events[..], 0_usize, None::<String>);
        let mut backoff = Backoff::connection();
        while !left.is_empty() && !self.stop.is_cancelled() {
            let part = if alone == 0 { left } else { &left[..1] };
            match self.apply(part, overdue.take()).await {
                Ok(applied) => {
                    self.acknowledge(acks.by_ref().take(applied.handled))
                        .await?;
                    left = &left[applied.handled..];
                    alone = alone
                        .saturating_sub(applied.handled)
                        .max(usize::from(applied.alone));
                    backoff.reset();
                }
                Err(Undone::Away(e)) => return Err(e),
                Err(Undone::Fenced) => return Err(lost(self.lease)),
                Err(Undone::Alone(_)) if part.len() > 1 => alone = part.len(),
                // It named itself by ending alone: an attempt.
                Err(Undone::Alone(reason)) if !reason.is_empty() => overdue = Some(reason),
                Err(Undone::Alone(_)) => self.wait(&mut backoff).await,
                Err(Undone::Unavailable(reason)) => {
                    self.core.note(&self.trouble.events, &reason);
                    self.wait(&mut backoff).await;
                }
            }
        }
        Ok(())
    }

    async fn apply(&self, events: &[Incoming], overdue: Option<String>) -> Result<Applied, Undone> {
        // Where the acknowledgement destroys the message, the commit must be on disk before it.
        let durable = !self.source.replayable;
        let owner = (self.lease, self.keeper);
        let applied = apply(self.core, owner, events, durable, overdue.as_deref()).await?;
        if applied.deferred > 0 || applied.dead > 0 {
            self.core.deferred.notify_one();
        }
        Ok(applied)
    }

    async fn acknowledge(&mut self, acks: impl Iterator<Item = (Option<u64>, Ack)>) -> Result<()> {
        self.core.clear(&self.trouble.events);
        for (position, ack) in acks {
            self.settled.position = position.or(self.settled.position);
            ack.ack().await?;
        }
        self.settled.write(self.core, self.lease, false).await
    }

    async fn wait(&self, backoff: &mut Backoff) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(backoff.step()) => {}
        }
    }
}

/// The cursor of a source that can be read again: behind the effects' commits, never before.
struct Settled {
    position: Option<u64>,
    written: Option<u64>,
    at: Instant,
}

impl Settled {
    /// Resolves when the last of a burst is to be written, though nothing comes after it: else the next owner would be
    /// given all of it again.
    async fn due(&self) {
        if self.position == self.written {
            std::future::pending().await
        }
        tokio::time::sleep_until(self.at + SETTLE).await;
    }

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

fn lost(lease: &Lease) -> Error {
    Error::new(
        Kind::LeaseLost,
        "consume",
        format!("another owner has {}", lease.key),
    )
}
