//! Lines, and where they end.

use std::time::Duration;

use pillarbox_core::{
    failure::{Deferral, Deferred, Line, Resolution, Side},
    lease::{Lease, LeaseKey},
    store::{Store, Waiting},
    transport::Message,
};

use super::{
    Bench, GROUP, acquire, deferral, ids_of, letter, line_id, message, migrated, pump, relay,
};

fn ids(line: &[Deferred]) -> Vec<&str> {
    line.iter().map(|d| d.message.id.as_str()).collect()
}

fn at(message: &Message, position: i64) -> Deferral {
    Deferral {
        position,
        ..deferral(message)
    }
}

fn failed(message: &Message, delay: u64) -> Deferral {
    Deferral {
        attempts: 1,
        reason: Some("no route".to_owned()),
        delay: Duration::from_secs(delay),
        ..deferral(message)
    }
}

async fn whole(store: &dyn Store, lease: &Lease, m: &Message) -> Vec<Deferred> {
    let key = pillarbox_core::Key::of(m);
    store
        .line(lease, key.as_ref(), &line_id(m), 100)
        .await
        .unwrap()
}

fn heads(lines: &[Line]) -> Vec<&str> {
    lines.iter().map(|l| l.head.1.as_str()).collect()
}

pub(crate) async fn deferring_twice_keeps_the_first(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let m = message(Some("k"));
    store.defer(&lease, &[failed(&m, 60)]).await.unwrap();
    let mut again = failed(&m, 0);
    again.attempts = 2;
    store.defer(&lease, &[again.clone(), again]).await.unwrap();
    let line = whole(&**store, &lease, &m).await;
    assert_eq!((line.len(), line[0].attempts), (1, 1));
    assert!(line[0].due_in > Duration::from_secs(50));
    assert!(line[0].due_in <= Duration::from_secs(60));
}

pub(crate) async fn a_line_is_in_order_and_its_head_leads(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    // The relay's lines run by position, whatever order they were deferred in; the consumer's by arrival.
    let lease = acquire(&**store, &relay()).await.lease;
    let m: Vec<_> = (0..4).map(|_| message(Some("k"))).collect();
    let order = [at(&m[2], 12), at(&m[0], 10), at(&m[3], 13), at(&m[1], 11)];
    store.defer(&lease, &order[..2]).await.unwrap();
    store.defer(&lease, &order[2..]).await.unwrap();
    assert_eq!(ids(&whole(&**store, &lease, &m[0]).await), ids_of(&m));
    let lines = store.lines(&lease, 10).await.unwrap();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].head, line_id(&m[0]));
    assert_eq!(lines[0].key, pillarbox_core::Key::of(&m[0]));
    let two = store
        .line(&lease, lines[0].key.as_ref(), &lines[0].head, 2)
        .await
        .unwrap();
    assert_eq!(ids(&two), ids_of(&m[..2]));
    assert_eq!(two[1].position, 11);

    let lease = acquire(&**store, &pump()).await.lease;
    let arrivals: Vec<_> = m.iter().rev().cloned().collect();
    for m in &arrivals {
        store.defer(&lease, &[deferral(m)]).await.unwrap();
    }
    let line = whole(&**store, &lease, &m[0]).await;
    assert_eq!(ids(&line), ids_of(&arrivals));
}

pub(crate) async fn lines_come_soonest_due_first(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let (late, soon, due) = (
        message(Some("late")),
        message(Some("soon")),
        message(Some("due")),
    );
    let behind = message(Some("late"));
    let all = [
        failed(&late, 90),
        failed(&soon, 30),
        failed(&due, 0),
        at(&behind, 5),
    ];
    store.defer(&lease, &all).await.unwrap();
    let lines = store.lines(&lease, 10).await.unwrap();
    assert_eq!(heads(&lines), [&due.id, &soon.id, &late.id]);
    assert!(lines[0].due_in.is_zero());
    assert!(lines[1].due_in > Duration::from_secs(20));
    assert_eq!(heads(&store.lines(&lease, 2).await.unwrap()).len(), 2);
    let waiting = store.deferred(Side::Relay, "main").await.unwrap();
    assert_eq!(
        waiting,
        Waiting {
            total: 4,
            longest: 2,
            ..Waiting::default()
        }
    );
}

pub(crate) async fn keyless_events_are_lines_of_their_own(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let m = [message(None), message(None), message(None)];
    let all: Vec<_> = m.iter().map(|m| failed(m, 0)).collect();
    store.defer(&lease, &all).await.unwrap();
    let lines = store.lines(&lease, 10).await.unwrap();
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|l| l.key.is_none()));
    assert_eq!(
        ids(&whole(&**store, &lease, &m[1]).await),
        [m[1].id.as_str()]
    );
    let waiting = store.deferred(Side::Relay, "main").await.unwrap();
    assert_eq!(
        waiting,
        Waiting {
            total: 3,
            longest: 1,
            ..Waiting::default()
        }
    );
}

pub(crate) async fn the_empty_key_is_a_key(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let (a, b, none) = (message(Some("")), message(Some("")), message(None));
    let all = [at(&a, 1), at(&none, 2), at(&b, 3)];
    store.defer(&lease, &all).await.unwrap();
    let lines = store.lines(&lease, 10).await.unwrap();
    assert_eq!(lines.len(), 2);
    let line = whole(&**store, &lease, &b).await;
    assert_eq!(ids(&line), [a.id.as_str(), b.id.as_str()]);
    assert_eq!(line[0].message.key.as_deref(), Some(""));
    assert_eq!(
        ids(&whole(&**store, &lease, &none).await),
        [none.id.as_str()]
    );
}

pub(crate) async fn a_key_belongs_to_its_topic(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let here = message(Some("k"));
    let there = Message {
        topic: "other.events".to_owned(),
        ..message(Some("k"))
    };
    let all = [at(&here, 1), at(&there, 2)];
    store.defer(&lease, &all).await.unwrap();
    assert_eq!(store.lines(&lease, 10).await.unwrap().len(), 2);
    assert_eq!(
        ids(&whole(&**store, &lease, &there).await),
        [there.id.as_str()]
    );
}

pub(crate) async fn sides_and_scopes_are_apart(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let audit = LeaseKey::Relay {
        destination: "audit".to_owned(),
        partition: 0,
    };
    // A group may have a destination's name.
    let namesake = LeaseKey::Duty {
        kind: "pump",
        scope: "main".to_owned(),
        shard: 0,
    };
    let m = message(Some("k"));
    let mut leases = Vec::new();
    for key in [relay(), audit, namesake, pump()] {
        let lease = acquire(&**store, &key).await.lease;
        assert!(store.lines(&lease, 10).await.unwrap().is_empty());
        store.defer(&lease, &[deferral(&m)]).await.unwrap();
        leases.push(lease);
    }
    let id = line_id(&m);
    store
        .resolve(&leases[0], &id, &Resolution::Done)
        .await
        .unwrap();
    let left: Vec<_> = [
        (Side::Relay, "main"),
        (Side::Relay, "audit"),
        (Side::Consumer, "main"),
        (Side::Consumer, GROUP),
    ]
    .into();
    let mut totals = Vec::new();
    for (side, scope) in left {
        totals.push(store.deferred(side, scope).await.unwrap().total);
    }
    assert_eq!(totals, [0, 1, 1, 1]);
}

pub(crate) async fn done_leaves_the_line(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let (a, b) = (message(Some("k")), message(Some("k")));
    store.defer(&lease, &[at(&a, 1), at(&b, 2)]).await.unwrap();
    for _ in 0..2 {
        // The second time as after an answer that was lost.
        store
            .resolve(&lease, &line_id(&a), &Resolution::Done)
            .await
            .unwrap();
        assert_eq!(ids(&whole(&**store, &lease, &b).await), [b.id.as_str()]);
    }
    store
        .resolve(&lease, &line_id(&b), &Resolution::Done)
        .await
        .unwrap();
    assert!(whole(&**store, &lease, &b).await.is_empty());
    assert!(store.lines(&lease, 10).await.unwrap().is_empty());
    assert_eq!(bench.number("SELECT count(*) FROM {dead_letter}").await, 0);
}

pub(crate) async fn again_stays_the_head(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let (a, b) = (message(Some("k")), message(Some("k")));
    store.defer(&lease, &[at(&a, 1), at(&b, 2)]).await.unwrap();
    let again = Resolution::Again {
        attempts: 2,
        reason: "still no route".to_owned(),
        delay: Duration::from_secs(40),
    };
    store.resolve(&lease, &line_id(&a), &again).await.unwrap();
    let line = whole(&**store, &lease, &a).await;
    assert_eq!(ids(&line), [a.id.as_str(), b.id.as_str()]);
    assert_eq!(line[0].attempts, 2);
    let lines = store.lines(&lease, 10).await.unwrap();
    assert_eq!(lines[0].head, line_id(&a));
    assert!(lines[0].due_in > Duration::from_secs(30));
}

pub(crate) async fn dead_becomes_a_dead_letter(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &pump()).await.lease;
    let (a, b) = (message(Some("k")), message(Some("k")));
    store
        .defer(&lease, &[deferral(&a), deferral(&b)])
        .await
        .unwrap();
    let dead = Resolution::Dead {
        attempts: 4,
        reason: "never".to_owned(),
    };
    for _ in 0..2 {
        store.resolve(&lease, &line_id(&a), &dead).await.unwrap();
        assert_eq!(ids(&whole(&**store, &lease, &b).await), [b.id.as_str()]);
        let letters = store.uncopied(GROUP, 10).await.unwrap();
        assert_eq!(letters.len(), 1);
        assert_eq!(letters[0].message.id, a.id);
        assert_eq!(letters[0].message.payload, a.payload);
        assert_eq!(
            (letters[0].attempts, letters[0].reason.as_str()),
            (4, "never")
        );
    }
}

pub(crate) async fn burying_twice_keeps_the_first(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &pump()).await.lease;
    let m = message(None);
    let mut second = letter(&m);
    second.reason = "another".to_owned();
    store.bury(&lease, &[letter(&m)]).await.unwrap();
    store.bury(&lease, &[second]).await.unwrap();
    let letters = store.uncopied(GROUP, 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    let l = &letters[0];
    assert_eq!((l.reason.as_str(), l.attempts), ("broken", 3));
    assert_eq!((l.position, l.maybe_sent), (7, true));
}

pub(crate) async fn a_copy_is_noted_once(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &pump()).await.lease;
    let m = [message(None), message(None), message(None)];
    store.bury(&lease, &m.each_ref().map(letter)).await.unwrap();
    // Another group and the relay have none.
    let main = acquire(&**store, &relay()).await.lease;
    store.bury(&main, &[letter(&message(None))]).await.unwrap();
    let left = |n: u32| async move {
        let letters = store.uncopied(GROUP, n).await.unwrap();
        letters
            .into_iter()
            .map(|l| l.message.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(left(2).await, ids_of(&m[..2]));
    for _ in 0..2 {
        let ids = [line_id(&m[0]), line_id(&m[2])];
        store.copied(&lease, &ids).await.unwrap();
        assert_eq!(left(10).await, ids_of(&m[1..2]));
    }
    assert!(store.uncopied("others", 10).await.unwrap().is_empty());
}
