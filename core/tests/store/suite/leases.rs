//! One owner at a time, by owner and epoch, on the database's clock.

use std::time::{Duration, Instant};

use pillarbox_core::lease::{LeaseKey, LeaseTerm};

use super::{Bench, acquire, group, impostor, lost, migrated, pump, relay, term};

pub(crate) async fn a_lease_has_one_owner(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    for key in [relay(), group(), pump()] {
        let held = acquire(&**one.store(), &key).await.lease;
        assert!(two.store().acquire(&key, term()).await.unwrap().is_none());
        assert!(one.store().acquire(&key, term()).await.unwrap().is_none());
        one.store().renew(&held, term()).await.unwrap();
    }
}

pub(crate) async fn a_lease_that_is_given_back_is_free(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    for key in [relay(), group(), pump()] {
        let first = acquire(&**one.store(), &key).await.lease;
        one.store().release(&first).await.unwrap();
        lost(one.store().renew(&first, term()).await);
        let second = acquire(&**two.store(), &key).await.lease;
        assert!(second.epoch > first.epoch);
        // Too late to give back: the second owner keeps it.
        one.store().release(&first).await.unwrap();
        two.store().renew(&second, term()).await.unwrap();
    }
}

pub(crate) async fn a_lease_expires_and_is_taken_over(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    let short = LeaseTerm::new(Duration::from_secs(1));
    let started = Instant::now();
    let first = one.store().acquire(&relay(), short).await.unwrap();
    let first = first.unwrap().lease;
    let second = loop {
        if let Some(taken) = two.store().acquire(&relay(), term()).await.unwrap() {
            break taken.lease;
        }
        assert!(started.elapsed() < Duration::from_secs(5), "never free");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(started.elapsed() >= Duration::from_millis(990), "too early");
    assert!(second.epoch > first.epoch);
    lost(one.store().renew(&first, term()).await);
    two.store().renew(&second, term()).await.unwrap();
}

pub(crate) async fn a_renewed_lease_does_not_expire(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    for key in [relay(), group()] {
        let held = acquire(&**one.store(), &key).await.lease;
        bench.expire(&key, -5).await;
        // Expired, but nobody took it.
        one.store().renew(&held, term()).await.unwrap();
        assert!(two.store().acquire(&key, term()).await.unwrap().is_none());
    }
}

pub(crate) async fn the_same_epoch_of_another_owner_is_lost(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    for key in [relay(), group(), pump()] {
        let held = acquire(&**store, &key).await.lease;
        let other = impostor(&held);
        lost(store.renew(&other, term()).await);
        store.release(&other).await.unwrap();
        store.renew(&held, term()).await.unwrap();
    }
}

pub(crate) async fn a_clock_set_back_does_not_lock_a_lease(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    for key in [relay(), group()] {
        let first = acquire(&**one.store(), &key).await.lease;
        let longest = i64::try_from(LeaseTerm::LONGEST.as_secs()).unwrap();
        bench.expire(&key, longest - 5).await;
        assert!(two.store().acquire(&key, term()).await.unwrap().is_none());
        bench.expire(&key, longest + 3600).await;
        acquire(&**two.store(), &key).await;
        lost(one.store().renew(&first, term()).await);
    }
}

pub(crate) async fn many_compete_and_one_wins(bench: &dyn Bench) {
    migrated(bench).await;
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let database = bench.database().await;
        all.spawn(async move { database.store().acquire(&relay(), term()).await });
    }
    let mut winners = 0;
    while let Some(done) = all.join_next().await {
        winners += usize::from(done.unwrap().unwrap().is_some());
    }
    assert_eq!(winners, 1);
}

pub(crate) async fn epochs_grow_for_ever(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let mut last = None;
    for _ in 0..3 {
        let lease = acquire(&**database.store(), &pump()).await.lease;
        assert!(last < Some(lease.epoch));
        last = Some(lease.epoch);
        database.store().release(&lease).await.unwrap();
    }
}

pub(crate) async fn whoever_lives_has_a_seat(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let seat = |shard| LeaseKey::Duty {
        kind: "relays",
        scope: "main".to_owned(),
        shard,
    };
    let seen = async || store.relays("main").await.unwrap();
    assert_eq!(
        (seen().await.seats, seen().await.free),
        (vec![], vec![0]),
        "nobody is there"
    );
    assert_eq!(store.relays("other").await.unwrap().free, [0]);
    let third = acquire(&**store, &seat(3)).await.lease;
    let first = acquire(&**store, &seat(1)).await.lease;
    let held = acquire(&**store, &relay()).await.lease;
    assert_eq!(
        (seen().await.seats, seen().await.free),
        (vec![1, 3], vec![])
    );
    assert_eq!(store.relays("other").await.unwrap().seats, [0; 0]);
    store.release(&third).await.unwrap();
    store.release(&held).await.unwrap();
    assert_eq!((seen().await.seats, seen().await.free), (vec![1], vec![0]));
    // Killed: forgotten when it expires.
    bench.expire(&first.key, -1).await;
    assert_eq!(seen().await.seats, [0; 0]);
}

/// Whoever dies gives nothing back.
pub(crate) async fn deaths_are_counted_until_there_is_progress(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let name = ("source".to_owned(), "id".to_owned());
    for key in [group(), pump()] {
        let dies = async || {
            bench.expire(&key, -1).await;
            let next = acquire(&**store, &key).await;
            (next.lease.clone(), next.deaths, next.alone.clone())
        };
        let first = acquire(&**store, &key).await;
        assert_eq!((first.deaths, first.alone), (0, None));
        let (second, deaths, alone) = dies().await;
        assert_eq!((deaths, alone), (1, None));
        lost(store.alone(&first.lease, Some(&name)).await);
        store.alone(&second, Some(&name)).await.unwrap();
        let (third, deaths, alone) = dies().await;
        assert_eq!((deaths, alone.as_ref()), (2, Some(&name)));
        lost(store.alone(&second, None).await);
        store.alone(&third, None).await.unwrap();
        let (fourth, deaths, alone) = dies().await;
        assert_eq!((deaths, alone), (1, None));
        store.release(&fourth).await.unwrap();
        let fifth = acquire(&**store, &key).await;
        assert_eq!(fifth.deaths, 0, "it stopped in order");
    }
}
