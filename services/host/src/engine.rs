//! Relays and consumers of all services of the process.

use std::{mem::take, sync::Arc};

use futures_util::future::{join_all, select_all};
use pillarbox::{Database, Kind, Running, memory};
use tokio_util::sync::CancellationToken;

use crate::{Exclusive, Service, Status};

/// A service with the place where its state is told.
pub(crate) struct Hosted {
    pub(crate) service: Arc<dyn Service>,
    pub(crate) status: Status,
}

/// Runs until `stop`, then drains: relays first, because on the `memory` transport their confirms come from the consumers.
pub(crate) async fn run(
    hosted: Vec<Hosted>,
    exclusive: Exclusive,
    stop: CancellationToken,
) -> pillarbox::Result<()> {
    while !stop.is_cancelled() {
        if exclusive == Exclusive::No {
            let running = Engines::start(&hosted, exclusive).await?;
            return running.until(stop.cancelled()).await.map(drop);
        }
        for one in &hosted {
            one.status
                .waits("another process runs relays and consumers on these databases");
        }
        let databases: Vec<&Database> = hosted.iter().map(|h| h.service.database()).collect();
        let term = hosted
            .iter()
            .map(|h| h.service.lease())
            .max_by_key(|t| t.term());
        let held = tokio::select! {
            () = stop.cancelled() => break,
            held = memory::hold(&databases, term.unwrap_or_default()) => held?,
        };
        tracing::info!("this process runs relays and consumers on these databases");
        let running = Engines::start(&hosted, exclusive).await?;
        tokio::select! {
            // Whoever has the right now must not find half of the leases taken.
            () = held.lost() => tracing::warn!("the right to run on these databases was lost"),
            stopped = running.until(stop.cancelled()) => {
                stopped?;
                return held.release().await;
            }
        }
    }
    Ok(())
}

struct Engines {
    relays: Vec<Running>,
    consumers: Vec<Running>,
}

impl Engines {
    async fn start(hosted: &[Hosted], exclusive: Exclusive) -> pillarbox::Result<Self> {
        let mut consumers: Vec<_> = hosted.iter().map(|h| h.service.consumer()).collect();
        if exclusive == Exclusive::Yes {
            // A relay that meets a topic without its groups would take the groups that it finds for all there are.
            for consumer in &mut consumers {
                consumer.bind().await?;
            }
        }
        let consumers: Vec<_> = consumers
            .into_iter()
            .map(pillarbox::Consumer::spawn)
            .collect();
        let relays: Vec<_> = hosted.iter().map(|h| h.service.relay().spawn()).collect();
        for ((one, relay), consumer) in hosted.iter().zip(&relays).zip(&consumers) {
            one.status.runs(relay.watch(), consumer.watch());
        }
        Ok(Self { relays, consumers })
    }

    /// Runs until `over` and drains; one that ends by itself is an error. Dropped, all of them end at once.
    async fn until(mut self, over: impl Future<Output = ()>) -> pillarbox::Result<()> {
        let any = select_all(self.relays.iter_mut().chain(&mut self.consumers));
        tokio::select! {
            () = over => {}
            (ended, ..) = any => {
                let text = "a relay or consumer ended by itself";
                let early = pillarbox::Error::new(Kind::Panicked, "run", text);
                return Err(ended.err().unwrap_or(early));
            }
        }
        let (relays, consumers) = (take(&mut self.relays), take(&mut self.consumers));
        let relays = join_all(relays.into_iter().map(Running::shutdown)).await;
        let consumers = join_all(consumers.into_iter().map(Running::shutdown)).await;
        relays.into_iter().chain(consumers).collect()
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        for running in self.relays.iter().chain(&self.consumers) {
            running.abort();
        }
    }
}
