//! Which partitions this relay takes: a fair share among the relays of its destination that live.
//!
//! Each relay has a seat, a lease without a cursor: one that holds nothing is seen by it, and one that is killed is forgotten
//! when it expires. Once a second each looks who sits and what is free. Its share follows from its place among the seats, so
//! that all shares together are all partitions without anybody telling anybody. A newcomer sits down behind the others, and
//! what is over after an even division goes to those in front: so it moves as few partitions as can be.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::Core;
use crate::{
    backoff::Backoff,
    error::{Kind, Result},
    lease::{Keeper, Lease, LeaseKey, RELAYS},
    running::Report,
    store::Relays,
};

/// Seats of a destination: more relays than these may run, and take what the others leave.
const SEATS: u16 = 256;
/// How often a relay looks, at the least.
const LOOK: Duration = Duration::from_secs(1);
/// Its name in the relay's health.
const SHARES: &str = "shares";

/// What the relay is to hold and what it holds, shared by its tasks: a channel for each partition's.
#[derive(Debug)]
pub(super) struct Claims(Vec<watch::Sender<Claim>>);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Claim {
    wanted: bool,
    held: bool,
}

impl Claims {
    pub(super) fn new(partitions: u16) -> Self {
        let claims = (0..partitions).map(|_| watch::Sender::new(Claim::default()));
        Self(claims.collect())
    }

    /// Resolves while the partition is to be held.
    pub(super) async fn wanted(&self, partition: u16) {
        self.until(partition, true).await;
    }

    /// Resolves when the partition is to be given back.
    pub(super) async fn unwanted(&self, partition: u16) {
        self.until(partition, false).await;
    }

    async fn until(&self, partition: u16, wanted: bool) {
        if let Some(claim) = self.0.get(usize::from(partition)) {
            // The sender lives as long as this value.
            let _ = claim.subscribe().wait_for(|c| c.wanted == wanted).await;
        }
    }

    /// Another one has it.
    pub(super) fn forgo(&self, partition: u16) {
        self.change(partition, |claim| claim.wanted = false);
    }

    /// Its lease was acquired; dropped, it is not held any more.
    pub(super) fn hold(self: &Arc<Self>, partition: u16, report: &Report) -> Holding {
        report.held(true);
        self.change(partition, |claim| claim.held = true);
        Holding(self.clone(), partition, report.clone())
    }

    /// Whether it changed anything.
    fn change(&self, partition: u16, change: impl FnOnce(&mut Claim)) -> bool {
        let claim = self.0.get(usize::from(partition));
        claim.is_some_and(|claim| {
            claim.send_if_modified(|claim| {
                let before = *claim;
                change(claim);
                *claim != before
            })
        })
    }

    /// What follows from a look: takes what is free up to the share, gives back what is beyond it.
    fn follow(&self, share: usize, free: &[u16], give_back: bool) {
        let claims: Vec<Claim> = self.0.iter().map(|claim| *claim.borrow()).collect();
        let mine = claims.iter().filter(|claim| claim.wanted).count();
        if give_back {
            let all: Vec<(u16, &Claim)> = (0..).zip(&claims).collect();
            let wanted = all.into_iter().rev().filter(|(_, claim)| claim.wanted);
            // First what was not even acquired.
            let (held, others): (Vec<_>, Vec<_>) = wanted.partition(|(_, claim)| claim.held);
            let beyond = others.into_iter().chain(held);
            for (partition, _) in beyond.take(mine.saturating_sub(share)) {
                self.forgo(partition);
            }
        }
        let mut room = share.saturating_sub(mine);
        for partition in free {
            if room > 0 && self.take(*partition) {
                room -= 1;
            }
        }
    }

    /// False if it is not to be had: still draining, or wanted already.
    fn take(&self, partition: u16) -> bool {
        self.change(partition, |claim| claim.wanted |= !claim.held)
    }
}

/// A partition that is held, until it is dropped.
pub(super) struct Holding(Arc<Claims>, u16, Report);

impl Drop for Holding {
    fn drop(&mut self) {
        self.0.change(self.1, |claim| claim.held = false);
        self.2.held(false);
    }
}

/// How many partitions the relay in the `place`-th seat of `relays` takes. All shares together are all partitions.
fn share(partitions: u16, relays: usize, place: usize) -> usize {
    let (partitions, relays) = (usize::from(partitions), relays.max(1));
    partitions / relays + usize::from(place < partitions % relays)
}

/// Looks and follows, until `stop`. `resized` is told when the log has another number of partitions by now.
pub(super) async fn run(
    core: Core,
    claims: Arc<Claims>,
    partitions: u16,
    stop: CancellationToken,
    resized: CancellationToken,
) -> Result<()> {
    let term = core.settings.lease;
    let mut balance = Balance {
        core: &core,
        claims,
        partitions,
        seat: None,
        free_since: BTreeMap::new(),
        keep_until: None,
    };
    let mut backoff = Backoff::connection();
    while !stop.is_cancelled() {
        let looked = balance.look().await;
        let wait = match looked {
            Ok(now) if now != partitions => {
                resized.cancel();
                break;
            }
            Ok(_) => {
                backoff.reset();
                core.goes_on(SHARES);
                LOOK.min(term.renewal() / 2)
            }
            Err(e) if e.is_temporary() || e.kind() == Kind::Database => {
                core.waits(SHARES, &e.to_string());
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
    // Before the partitions are drained: the others take each as soon as it is free.
    if let Some((lease, keeper)) = balance.seat.take() {
        drop(keeper);
        let _ = core.store.release(&lease).await;
    }
    Ok(())
}

struct Balance<'a> {
    core: &'a Core,
    claims: Arc<Claims>,
    partitions: u16,
    seat: Option<(Lease, Keeper)>,
    /// Since when this relay has seen a partition without owner.
    free_since: BTreeMap<u16, Instant>,
    /// What was taken beyond the share is kept for so long: it must not go to and fro.
    keep_until: Option<Instant>,
}

impl Balance<'_> {
    /// Answers the number of the log's partitions.
    async fn look(&mut self) -> Result<u16> {
        let store = &self.core.store;
        let mut relays = store.relays(&self.core.destination).await?;
        if relays.partitions != self.partitions {
            return Ok(relays.partitions);
        }
        // One partition cannot be shared: whoever finds it free takes it.
        if self.partitions > 1 && !self.sits(&relays).await? {
            self.sit_down(&relays).await?;
            relays = self.core.store.relays(&self.core.destination).await?;
        }
        self.follow(&relays);
        Ok(relays.partitions)
    }

    /// Whether the seat is still this relay's, as it was seen too.
    async fn sits(&mut self, relays: &Relays) -> Result<bool> {
        let Some((lease, keeper)) = &self.seat else {
            return Ok(false);
        };
        if !keeper.lost().is_cancelled() && relays.seats.contains(&shard(lease)) {
            return Ok(true);
        }
        let lease = lease.clone();
        self.seat = None;
        self.core.store.release(&lease).await?;
        Ok(false)
    }

    async fn sit_down(&mut self, relays: &Relays) -> Result<()> {
        let (store, term) = (&self.core.store, self.core.settings.lease);
        let behind = relays.seats.last().map_or(0, |last| last + 1);
        let seats = (0..SEATS).map(|n| (behind + n) % SEATS);
        for shard in seats.filter(|seat| !relays.seats.contains(seat)).take(8) {
            let key = LeaseKey::Duty {
                kind: RELAYS,
                scope: self.core.destination.to_string(),
                shard,
            };
            let sent = Instant::now();
            if let Some(acquired) = store.acquire(&key, term).await? {
                let lease = acquired.lease;
                let keeper = Keeper::start(store.clone(), lease.clone(), term, sent);
                self.seat = Some((lease, keeper));
                return Ok(());
            }
        }
        Ok(())
    }

    fn follow(&mut self, relays: &Relays) {
        let now = Instant::now();
        let term = self.core.settings.lease;
        let share = match &self.seat {
            Some((lease, _)) => {
                let before = relays.seats.iter().filter(|seat| **seat < shard(lease));
                share(self.partitions, relays.seats.len(), before.count())
            }
            None if self.partitions == 1 => 1,
            // No seat was free: what the others leave.
            None => 0,
        };
        let give_back = self.keep_until.is_none_or(|until| until <= now);
        let mut free = relays.free.clone();
        // Those who look at the same time reach for different ones.
        if let (Some((lease, _)), false) = (&self.seat, free.is_empty()) {
            let turn = usize::from(shard(lease)) * share % free.len();
            free.rotate_left(turn);
        }
        self.claims.follow(share, &free, give_back);
        self.free_since
            .retain(|partition, _| free.contains(partition));
        for partition in free {
            let since = *self.free_since.entry(partition).or_insert(now);
            // Whoever it belongs to has looked several times since: it died right after it sat down, or cannot.
            let left = now.duration_since(since) > term.renewal().max(2 * LOOK);
            if left && self.claims.take(partition) {
                self.keep_until = Some(now + term.term());
            }
        }
    }
}

fn shard(seat: &Lease) -> u16 {
    match &seat.key {
        LeaseKey::Duty { shard, .. } => *shard,
        LeaseKey::Relay { .. } | LeaseKey::Source { .. } => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_fair_and_together_they_are_all_partitions() {
        for partitions in [1, 2, 4, 8, 16, 32, 64] {
            for relays in 1..=70 {
                let shares = (0..relays).map(|place| share(partitions, relays, place));
                let shares: Vec<usize> = shares.collect();
                assert_eq!(shares.iter().sum::<usize>(), usize::from(partitions));
                let most = usize::from(partitions).div_ceil(relays);
                let least = usize::from(partitions) / relays;
                assert!(shares.iter().all(|n| (least..=most).contains(n)));
            }
        }
    }

    fn wanted(claims: &Claims) -> Vec<usize> {
        let claims = claims.0.iter().enumerate();
        let wanted = claims.filter(|(_, claim)| claim.borrow().wanted);
        wanted.map(|(partition, _)| partition).collect()
    }

    #[test]
    fn takes_up_to_its_share_and_gives_back_what_is_beyond_it() {
        let claims = Arc::new(Claims::new(4));
        let (report, health) = Report::new();
        claims.follow(4, &[0, 1, 2, 3], true);
        assert_eq!(wanted(&claims), [0, 1, 2, 3]);
        let mut held: Vec<Holding> = (0..3).map(|p| claims.hold(p, &report)).collect();
        assert_eq!(health.borrow().held, 3);
        // Rather what it has not got yet.
        claims.follow(3, &[], true);
        assert_eq!(wanted(&claims), [0, 1, 2]);
        claims.follow(2, &[], false);
        assert_eq!(wanted(&claims), [0, 1, 2], "it keeps them for now");
        claims.follow(2, &[], true);
        assert_eq!(wanted(&claims), [0, 1]);
        // Still draining: it is not taken again before it is given back.
        claims.follow(4, &[2, 3], true);
        assert_eq!(wanted(&claims), [0, 1, 3]);
        assert!(!claims.take(2));
        held.pop();
        assert_eq!(health.borrow().held, 2);
        assert!(claims.take(2));
        claims.forgo(2);
        assert_eq!(wanted(&claims), [0, 1, 3]);
    }
}
