//! One partition: lease, session, again, for as long as it is in this relay's share.

use std::{future::pending, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Core, balance::Claims, session};
use crate::{
    backoff::Backoff,
    error::{Kind, Result},
    lease::{Acquired, Keeper, LeaseKey},
    supervise::caught,
};

pub(super) async fn run(
    core: Core,
    claims: Arc<Claims>,
    partition: u16,
    stop: CancellationToken,
) -> Result<()> {
    let key = LeaseKey::Relay {
        destination: core.destination.to_string(),
        partition,
    };
    let with = |what| session::trouble_with(partition, what);
    let mut backoff = Backoff::connection();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            () = claims.wanted(partition) => {}
        }
        // Before the acquisition is sent: the database's clock starts no earlier.
        let sent = Instant::now();
        let wait = match core.acquire(&key).await {
            Ok(Some(acquired)) => {
                core.goes_on(&with("lease"));
                match hold(&core, &claims, partition, acquired, sent, &stop).await {
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
                claims.forgo(partition);
                Duration::ZERO
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
}

/// One lease: a session until the lease is lost, or until a stop, or the end of the share, has drained; then it is given back.
async fn hold(
    core: &Core,
    claims: &Arc<Claims>,
    partition: u16,
    acquired: Acquired,
    sent: Instant,
    stop: &CancellationToken,
) -> Result<()> {
    let (lease, term) = (acquired.lease.clone(), core.settings.lease);
    let keeper = Keeper::start(core.store.clone(), lease.clone(), term, sent);
    tracing::info!(destination = %core.destination, partition, epoch = lease.epoch, "relay owns a partition");
    let holding = claims.hold(partition, &core.report);
    let leave = stop.child_token();
    let given_back = async {
        claims.unwanted(partition).await;
        tracing::info!(destination = %core.destination, partition, "beyond its share: the relay gives a partition back");
        leave.cancel();
        pending().await
    };
    let ended = tokio::select! {
        biased;
        ended = caught("relay a partition", session::run(core, partition, acquired, &keeper, &leave)) => ended,
        ended = given_back => ended,
    };
    drop(keeper);
    // Also after a panic: whatever the session left under way is fenced.
    let released = core.store.release(&lease).await;
    drop(holding);
    ended.and(released)
}
