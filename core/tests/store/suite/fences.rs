//! Who lost the lease writes nothing, whatever he calls.

use pillarbox_core::{
    Database, Result,
    failure::Resolution,
    lease::{Lease, LeaseKey},
    store::Store,
};

use super::{
    Bench, EFFECT, GROUP, acquire, deferral, drain, effects, enqueue, group, handle, ids_of,
    impostor, letter, line_id, lost, message, migrated, pump, relay, term,
};

/// A lease that another owner has taken meanwhile, and the same epoch under another name.
async fn lost_leases(
    bench: &dyn Bench,
    one: &Database,
    two: &Database,
    key: &LeaseKey,
) -> [Lease; 2] {
    let old = acquire(&**one.store(), key).await.lease;
    match key {
        LeaseKey::Duty { .. } => one.store().release(&old).await.unwrap(),
        _ => bench.expire(key, -1).await,
    }
    let new = acquire(&**two.store(), key).await.lease;
    [old, impostor(&new)]
}

async fn rows(bench: &dyn Bench) -> [i64; 3] {
    [
        bench.number("SELECT count(*) FROM {deferred}").await,
        bench.number("SELECT count(*) FROM {dead_letter}").await,
        bench.number("SELECT count(*) FROM {inbox}").await,
    ]
}

async fn resolve_each(store: &dyn Store, lease: &Lease, id: &(String, String)) -> Vec<Result<()>> {
    let again = Resolution::Again {
        attempts: 9,
        reason: "zombie".to_owned(),
        delay: term().term(),
    };
    let dead = Resolution::Dead {
        attempts: 9,
        reason: "zombie".to_owned(),
    };
    let mut answers = Vec::new();
    for resolution in [Resolution::Done, again, dead] {
        answers.push(store.resolve(lease, id, &resolution).await);
    }
    answers
}

pub(crate) async fn a_lost_lease_writes_nothing_at_the_relay(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    let events = [message(Some("k")), message(None)];
    enqueue(&one, &events).await;
    let waiting = message(Some("w"));
    let before = acquire(&**one.store(), &relay()).await.lease;
    one.store()
        .defer(&before, &[deferral(&waiting)])
        .await
        .unwrap();
    one.store().release(&before).await.unwrap();
    for zombie in lost_leases(bench, &one, &two, &relay()).await {
        let store = one.store();
        let (_, end) = drain(&**store, Default::default(), 10).await;
        lost(store.renew(&zombie, term()).await);
        lost(store.settle(&zombie, &end, term(), false).await);
        lost(store.settle(&zombie, &end, term(), true).await);
        lost(store.defer(&zombie, &[deferral(&events[0])]).await);
        lost(store.bury(&zombie, &[letter(&events[1])]).await);
        for answer in resolve_each(&**store, &zombie, &line_id(&waiting)).await {
            lost(answer);
        }
        assert_eq!(rows(bench).await, [1, 0, 0]);
    }
    // The cursor has not moved, the line is as it was.
    bench.expire(&relay(), -1).await;
    let third = acquire(&**two.store(), &relay()).await;
    let (read, _) = drain(&**two.store(), third.progress, 10).await;
    assert_eq!(super::ids(&read), ids_of(&events));
    let line = two
        .store()
        .line(&third.lease, None, &line_id(&waiting), 5)
        .await
        .unwrap();
    assert_eq!(line[0].attempts, 0);
    assert!(line[0].due_in.is_zero());
}

pub(crate) async fn a_lost_lease_writes_nothing_at_the_consumer(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    let (waiting, dead) = (message(Some("w")), message(Some("d")));
    let first = acquire(&**one.store(), &pump()).await.lease;
    one.store()
        .defer(&first, &[deferral(&waiting)])
        .await
        .unwrap();
    one.store().bury(&first, &[letter(&dead)]).await.unwrap();
    one.store().release(&first).await.unwrap();
    for zombie in lost_leases(bench, &one, &two, &pump()).await {
        let store = one.store();
        lost(store.renew(&zombie, term()).await);
        lost(store.copied(&zombie, &[line_id(&dead)]).await);
        for answer in resolve_each(&**store, &zombie, &line_id(&waiting)).await {
            lost(answer);
        }
        assert_eq!(rows(bench).await, [1, 1, 0]);
        assert_eq!(store.uncopied(GROUP, 5).await.unwrap().len(), 1);
    }
    for zombie in lost_leases(bench, &one, &two, &group()).await {
        lost(one.store().settle_source(&zombie, 99, term()).await);
        lost(
            one.store()
                .defer(&zombie, &[deferral(&message(None))])
                .await,
        );
        lost(one.store().bury(&zombie, &[letter(&message(None))]).await);
        assert_eq!(rows(bench).await, [1, 1, 0]);
    }
    bench.expire(&group(), -1).await;
    assert_eq!(acquire(&**two.store(), &group()).await.position, None);
}

pub(crate) async fn a_unit_of_a_lost_lease_commits_nothing(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    for key in [group(), pump()] {
        for zombie in lost_leases(bench, &one, &two, &key).await {
            let mut unit = one.store().begin(GROUP, term(), true).await.unwrap();
            unit.savepoint().await.unwrap();
            assert!(unit.remember(&message(None)).await.unwrap());
            handle(&mut *unit, EFFECT).await.unwrap();
            unit.keep().await.unwrap();
            unit.defer(&deferral(&message(Some("x")))).await.unwrap();
            unit.bury(&letter(&message(Some("y")))).await.unwrap();
            lost(unit.commit(&zombie, term()).await);
            assert_eq!(rows(bench).await, [0, 0, 0]);
            assert_eq!(effects(bench).await, 0);
        }
        // The next round starts with a free lease.
        if let LeaseKey::Source { .. } = key {
            bench.expire(&key, -1).await;
        }
    }
}

pub(crate) async fn a_unit_renews_its_lease(bench: &dyn Bench) {
    let (one, two) = (migrated(bench).await, bench.database().await);
    let held = acquire(&**one.store(), &group()).await.lease;
    bench.expire(&group(), -1).await;
    let mut unit = one.store().begin(GROUP, term(), true).await.unwrap();
    handle(&mut *unit, EFFECT).await.unwrap();
    unit.commit(&held, term()).await.unwrap();
    assert_eq!(effects(bench).await, 1);
    let taken = two.store().acquire(&group(), term()).await.unwrap();
    assert!(taken.is_none(), "the commit has renewed it");
}
