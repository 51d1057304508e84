//! One process at a time on the `memory` transport.
//!
//! Relay leases and group leases are taken one by one. Two processes, each with an in-process broker of its own, could
//! share them out so that neither has both ends, and wait for ever. One more lease, taken first, decides.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    connection::Database,
    error::Result,
    lease::{Keeper, Lease, LeaseKey, LeaseTerm},
    store::Store,
};

/// The right to run relays and consumers on `memory` in these databases. Dropping it lets the leases run out;
/// [`Held::release`] hands them on at once.
pub struct Held {
    leases: Vec<(Arc<dyn Store>, Lease, Keeper)>,
    lost: CancellationToken,
}

/// Waits until this process may run relays and consumers on the `memory` transport in all these databases. Until then
/// it may serve everything else.
///
/// Every process names the databases in the same order. Retries while a database is away.
///
/// # Errors
/// What waiting does not mend: no schema, for example.
pub async fn hold(databases: &[&Database], term: LeaseTerm) -> Result<Held> {
    let mut backoff = Backoff::connection();
    let mut told = false;
    loop {
        let wait = match try_hold(databases, term).await {
            Ok(Some(held)) => return Ok(held),
            Ok(None) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(
                        "another process runs the memory transport on these databases; waiting for it to end"
                    );
                }
                term.renewal() / 4
            }
            Err(e) if e.is_temporary() => {
                tracing::warn!(error = %e, "waiting for the database");
                backoff.step()
            }
            Err(e) => return Err(e),
        };
        tokio::time::sleep(wait).await;
    }
}

/// All or none: a part held would make another process wait that holds the rest.
async fn try_hold(databases: &[&Database], term: LeaseTerm) -> Result<Option<Held>> {
    let key = LeaseKey::Duty {
        kind: "memory",
        scope: String::new(),
        shard: 0,
    };
    let mut held = Held {
        leases: Vec::new(),
        lost: CancellationToken::new(),
    };
    for database in databases {
        let store = database.store().clone();
        let sent = Instant::now();
        match store.acquire(&key, term).await {
            Ok(Some(acquired)) => {
                let keeper = Keeper::start(store.clone(), acquired.lease.clone(), term, sent);
                held.leases.push((store, acquired.lease, keeper));
            }
            Ok(None) => {
                held.release().await?;
                return Ok(None);
            }
            Err(e) => {
                // The first error says more than that of the release.
                let _ = held.release().await;
                return Err(e);
            }
        }
    }
    let lost = held.lost.clone();
    for (_, _, keeper) in &held.leases {
        let (one, all) = (keeper.lost().clone(), lost.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = one.cancelled() => all.cancel(),
                () = all.cancelled() => {}
            }
        });
    }
    Ok(Some(held))
}

impl Held {
    /// Resolves when a lease is lost, or could be: stop relays and consumers at once, then [`hold`] again.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Gives the leases back; relays and consumers have stopped before.
    ///
    /// # Errors
    /// The database's; the leases then run out by themselves.
    pub async fn release(mut self) -> Result<()> {
        let mut result = Ok(());
        for (store, lease, keeper) in std::mem::take(&mut self.leases) {
            drop(keeper);
            result = result.and(store.release(&lease).await);
        }
        result
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Ends the watching tasks.
        self.lost.cancel();
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held")
            .field("databases", &self.leases.len())
            .finish_non_exhaustive()
    }
}
