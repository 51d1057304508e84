//! Futures that are dropped half-way leave nothing behind: no open transaction, no half of a write.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use pillarbox_core::{
    failure::Resolution,
    lease::{Lease, LeaseKey},
    store::Store,
};

use super::{
    Bench, EFFECT, GROUP, acquire, deferral, drain, effects, enqueue, group, handle, letter,
    line_id, message, migrated, pump, relay, term,
};

/// Polls a future at most so often, then drops it. Every poll but the first follows a real wake-up, so the drop falls on
/// each await in turn.
struct Dropped<F> {
    inner: Option<Pin<Box<F>>>,
    polls: u32,
}

impl<F: Future> Future for Dropped<F> {
    type Output = bool;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<bool> {
        if self.polls == 0 {
            self.inner = None;
            return Poll::Ready(false);
        }
        self.polls -= 1;
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(false);
        };
        match inner.as_mut().poll(cx) {
            Poll::Ready(_) => Poll::Ready(true),
            Poll::Pending if self.polls == 0 => {
                self.inner = None;
                Poll::Ready(false)
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Whether it came to its end.
async fn dropped<F: Future>(after: u32, f: F) -> bool {
    Dropped {
        inner: Some(Box::pin(f)),
        polls: after,
    }
    .await
}

/// Waits until the tasks that were left alone have ended.
async fn quiet(bench: &dyn Bench) {
    let started = Instant::now();
    while bench.open_transactions().await > 0 {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "a transaction stays open"
        );
        tokio::task::yield_now().await;
    }
}

pub(crate) async fn dropped_calls_do_no_harm(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store: Arc<dyn Store> = database.store().clone();
    enqueue(&database, &[message(Some("k")), message(None)]).await;
    let lease = acquire(&*store, &relay()).await.lease;
    let pump = acquire(&*store, &pump()).await.lease;
    let (_, end) = drain(&*store, Default::default(), 10).await;
    let mut ended = 0;
    for round in 0..220_u32 {
        let after = round % 5;
        let m = message(Some("dropped"));
        let duty = LeaseKey::Duty {
            kind: "pump",
            scope: format!("g{round}"),
            shard: 0,
        };
        let deferred = [deferral(&m)];
        let letters = [letter(&m)];
        let id = line_id(&m);
        let again = Resolution::Done;
        ended += u32::from(match round / 5 % 11 {
            0 => dropped(after, store.acquire(&duty, term())).await,
            1 => dropped(after, store.renew(&lease, term())).await,
            2 => dropped(after, store.settle(&lease, &end, term(), true)).await,
            3 => dropped(after, store.defer(&lease, &deferred)).await,
            4 => dropped(after, store.bury(&pump, &letters)).await,
            5 => dropped(after, store.resolve(&lease, &id, &again)).await,
            6 => dropped(after, store.read(0, &Default::default(), 10)).await,
            7 => dropped(after, store.lines(&lease, 10)).await,
            8 => dropped(after, store.begin(GROUP, term(), true)).await,
            9 => dropped(after, store.copied(&pump, std::slice::from_ref(&id))).await,
            _ => dropped(after, store.migrate(1)).await,
        });
    }
    quiet(bench).await;
    assert!(ended < 200, "hardly anything was dropped: {ended} ended");
    later_writes_are_seen(bench, &*store, &lease).await;
}

/// Each connection of the engine's pool is tried: several at once, and one after the other.
async fn later_writes_are_seen(bench: &dyn Bench, store: &dyn Store, lease: &Lease) {
    let before = bench.number("SELECT count(*) FROM {deferred}").await;
    for n in 1..=12 {
        let one = [deferral(&message(None))];
        let two = [deferral(&message(None))];
        let (a, b) = tokio::join!(store.defer(lease, &one), store.defer(lease, &two));
        a.unwrap();
        b.unwrap();
        let now = bench.number("SELECT count(*) FROM {deferred}").await;
        assert_eq!(
            now,
            before + 2 * n,
            "a write sits in somebody's transaction"
        );
    }
}

pub(crate) async fn a_dropped_write_still_comes_to_its_end(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store: Arc<dyn Store> = database.store().clone();
    let lease = acquire(&*store, &relay()).await.lease;
    for n in 1..=10 {
        let event = [deferral(&message(None))];
        dropped(1, store.defer(&lease, &event)).await;
        let started = Instant::now();
        while bench.number("SELECT count(*) FROM {deferred}").await < n {
            assert!(started.elapsed() < Duration::from_secs(20), "it stopped");
            tokio::task::yield_now().await;
        }
    }
}

pub(crate) async fn dropped_units_do_no_harm(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store: Arc<dyn Store> = database.store().clone();
    let lease = acquire(&*store, &group()).await.lease;
    let relay = acquire(&*store, &relay()).await.lease;
    let mut applied = 0;
    for round in 0..200_u32 {
        let m = message(Some("k"));
        let work = async {
            let mut unit = store.begin(GROUP, term(), true).await.unwrap();
            unit.savepoint().await.unwrap();
            assert!(unit.remember(&m).await.unwrap());
            handle(&mut *unit, EFFECT).await.unwrap();
            unit.keep().await.unwrap();
            unit.blocked(&[&m]).await.unwrap();
            unit.commit(&lease, term()).await.unwrap();
        };
        let ended = dropped(round % 25, pin!(work)).await;
        quiet(bench).await;
        // Both or neither, whether the commit had begun or not.
        let n = effects(bench).await;
        let inbox = bench.number("SELECT count(*) FROM {inbox}").await;
        assert_eq!(n, inbox);
        assert!(n >= applied + i64::from(ended));
        applied = n;
    }
    assert!(applied > 0, "no round came to its end");
    assert!(applied < 200, "no round was dropped");
    later_writes_are_seen(bench, &*store, &relay).await;
}
