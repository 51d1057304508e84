//! One partition: lease, session, again.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Core, session};
use crate::{
    backoff::Backoff,
    error::{Kind, Result},
    lease::{Keeper, LeaseKey},
};

pub(super) async fn run(core: Core, partition: u16, stop: CancellationToken) -> Result<()> {
    let key = LeaseKey::Relay {
        destination: core.destination.to_string(),
        partition,
    };
    let with = |what| session::trouble_with(partition, what);
    let mut backoff = Backoff::connection();
    while !stop.is_cancelled() {
        // Before the acquisition is sent: the database's clock starts no earlier.
        let sent = Instant::now();
        let wait = match core.acquire(&key).await {
            Ok(Some(acquired)) => {
                core.goes_on(&with("lease"));
                let lease = acquired.lease.clone();
                let keeper =
                    Keeper::start(core.store.clone(), lease.clone(), core.settings.lease, sent);
                tracing::info!(destination = %core.destination, partition, epoch = lease.epoch, "relay owns a partition");
                core.report.held(true);
                let ended = session::run(&core, partition, acquired, &keeper, &stop).await;
                core.report.held(false);
                drop(keeper);
                let released = core.store.release(&lease).await;
                match ended.and(released) {
                    Ok(()) => {
                        core.report.forget(&with(""));
                        backoff.reset();
                        Duration::ZERO
                    }
                    Err(e) if e.is_temporary() || e.kind() == Kind::Database => {
                        // Over when the next session has read.
                        core.waits(&with(session::READING), &e.to_string());
                        backoff.step()
                    }
                    Err(e) => return Err(e),
                }
            }
            Ok(None) => {
                // Another's now, with its troubles.
                core.goes_on(&with("lease"));
                core.report.forget(&with(""));
                core.settings.lease.renewal() / 2
            }
            Err(e) if e.is_temporary() || e.kind() == Kind::Database => {
                core.waits(&with("lease"), &e.to_string());
                backoff.step()
            }
            Err(e) => return Err(e),
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
    Ok(())
}
