//! Destinations: where they begin, who waits for them, and what is left when they are gone.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use pillarbox_core::{
    Admin, Database, Outbox, Relay, RetentionSettings, Running, Start,
    admin::{Destination, Filter, ReplayRequest, Selection},
    error::Kind,
    failure::Side,
    lease::LeaseKey,
    store::Store,
    transport::memory::Memory,
};

use super::{
    Bench, acquire, deferral, drain, enqueue, ids, ids_of, letter, lost, message, migrated, relay,
    retention::{HOUR, NONE, cleaner},
    term,
};

pub(crate) fn destination(name: &str) -> LeaseKey {
    LeaseKey::Relay {
        destination: name.to_owned(),
        partition: 0,
    }
}

async fn found(store: &dyn Store, name: &str) -> Vec<String> {
    let acquired = acquire(store, &destination(name)).await;
    let (events, _) = drain(store, acquired.progress, 100).await;
    store.release(&acquired.lease).await.unwrap();
    ids(&events).into_iter().map(str::to_owned).collect()
}

async fn settle_all(store: &dyn Store, key: &LeaseKey) {
    let acquired = acquire(store, key).await;
    let (_, end) = drain(store, acquired.progress, 100).await;
    let settled = store.settle(&acquired.lease, &end, term(), true);
    settled.await.unwrap();
    store.release(&acquired.lease).await.unwrap();
}

async fn named(admin: &Admin, name: &str) -> Destination {
    let all = admin.destinations().await.unwrap();
    let found = all.into_iter().find(|d| d.name == name);
    found.unwrap_or_else(|| panic!("no destination {name}"))
}

pub(crate) async fn each_begins_where_it_was_told(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let (store, admin) = (&**database.store(), Admin::new(&database, "ada"));
    let (old, new) = ([message(None), message(None)], [message(None)]);
    enqueue(&database, &old).await;
    assert!(admin.add_destination("all", Start::Earliest).await.unwrap());
    assert!(admin.add_destination("new", Start::Now).await.unwrap());
    let at = SystemTime::now() + HOUR;
    assert!(admin.add_destination("later", Start::At(at)).await.unwrap());
    enqueue(&database, &new).await;
    assert_eq!(
        found(store, "all").await,
        ids_of(&[old.clone().as_slice(), &new].concat())
    );
    assert_eq!(found(store, "new").await, ids_of(&new));
    // From the start of the log: the relay passes over what is older.
    assert_eq!(found(store, "later").await.len(), 3);
    let since = acquire(store, &destination("later")).await.since.unwrap();
    assert!(at.duration_since(since).unwrap() < Duration::from_millis(1));
    assert_eq!(acquire(store, &destination("all")).await.since, None);
}

pub(crate) async fn a_destination_is_added_once(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let admin = Admin::new(&database, "ada");
    let at = Start::At(SystemTime::now());
    assert!(admin.add_destination("audit", at).await.unwrap());
    assert!(!admin.add_destination("audit", at).await.unwrap());
    assert!(
        !admin
            .add_destination("main", Start::Earliest)
            .await
            .unwrap()
    );
    let other = admin
        .add_destination("audit", Start::Now)
        .await
        .unwrap_err();
    assert_eq!(other.kind(), Kind::Exists, "{other}");
    for name in ["", "a b", "replay:x", &"x".repeat(65)] {
        let refused = admin.add_destination(name, Start::Now).await.unwrap_err();
        assert_eq!(refused.kind(), Kind::Invalid, "{name}: {refused}");
    }
    let names: Vec<_> = admin.destinations().await.unwrap();
    let names: Vec<_> = names.into_iter().map(|d| d.name).collect();
    assert_eq!(names, ["audit", "main"]);
}

pub(crate) async fn a_list_tells_how_each_stands(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let (store, admin) = (&**database.store(), Admin::new(&database, "ada"));
    let events = [message(None), message(None), message(None)];
    enqueue(&database, &events).await;
    bench.grow_old(3_600).await;
    admin
        .add_destination("audit", Start::Earliest)
        .await
        .unwrap();
    settle_all(store, &relay()).await;
    let lease = acquire(store, &destination("audit")).await.lease;
    store.defer(&lease, &[deferral(&events[0])]).await.unwrap();
    store.bury(&lease, &[letter(&events[1])]).await.unwrap();
    let (main, audit) = (named(&admin, "main").await, named(&admin, "audit").await);
    assert_eq!((main.behind, main.lag), (0, Duration::ZERO));
    assert!(!main.is_served() && audit.is_served());
    assert_eq!(
        (audit.behind, audit.deferred, audit.dead_letters),
        (3, 1, 1)
    );
    assert!(audit.lag >= HOUR && audit.lag < 2 * HOUR, "{:?}", audit.lag);
    assert!(main.cursors[0].position > 0 && audit.cursors[0].position == 0);
}

pub(crate) async fn a_removed_destination_leaves_its_loss(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let (store, admin) = (&**database.store(), Admin::new(&database, "ada"));
    let events = [message(None), message(None), message(None)];
    admin
        .add_destination("audit", Start::Earliest)
        .await
        .unwrap();
    enqueue(&database, &events).await;
    settle_all(store, &relay()).await;
    let lease = acquire(store, &destination("audit")).await.lease;
    store.defer(&lease, &[deferral(&events[0])]).await.unwrap();
    store.bury(&lease, &[letter(&events[1])]).await.unwrap();
    let unknown = admin.remove_destination("audti", "typo").await.unwrap_err();
    assert_eq!(unknown.kind(), Kind::NotFound);
    assert!(unknown.to_string().contains("audit, main"), "{unknown}");

    let removed = admin
        .remove_destination("audit", "not needed")
        .await
        .unwrap();
    assert_eq!(
        (removed.unpublished, removed.deferred, removed.dead_letters),
        (3, 1, 1)
    );
    assert!(removed.why.contains("ada: not needed"), "{}", removed.why);
    assert_eq!(admin.removed_destinations().await.unwrap(), [removed]);
    assert_eq!(store.deferred(Side::Relay, "audit").await.unwrap().total, 0);
    let letters = Filter::of_destination("audit");
    assert_eq!(store.count_letters(&letters).await.unwrap().letters, 0);
    // Its relay does not make it anew, and knows why.
    lost(store.renew(&lease, term()).await);
    let refused = store.acquire(&destination("audit"), term()).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind(), Kind::NotFound, "{refused}");
    assert!(refused.to_string().contains("not needed"), "{refused}");

    // The log waits for it no more.
    bench.age_log().await;
    let cleaner = acquire(store, &cleaner("log")).await.lease;
    assert!(store.clean_log(&cleaner, NONE).await.unwrap().removed > 0);
    // Added anew, it begins anew.
    assert!(
        admin
            .add_destination("audit", Start::Earliest)
            .await
            .unwrap()
    );
    assert!(admin.removed_destinations().await.unwrap().is_empty());
    assert!(found(store, "audit").await.is_empty());
}

pub(crate) async fn the_last_destination_stays(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let admin = Admin::new(&database, "ada");
    let last = admin
        .remove_destination("main", "why not")
        .await
        .unwrap_err();
    assert_eq!(last.kind(), Kind::Invalid, "{last}");
    assert_eq!(named(&admin, "main").await.cursors.len(), 1);
    admin
        .add_destination("next", Start::Earliest)
        .await
        .unwrap();
    let removed = admin.remove_destination("main", "moved").await.unwrap();
    assert!(removed.is_clean());
    let last = admin
        .remove_destination("next", "why not")
        .await
        .unwrap_err();
    assert_eq!(last.kind(), Kind::Invalid, "{last}");
    // It does not come back by itself.
    pillarbox_core::migrate(&database).await.unwrap();
    let outbox = Outbox::new(&database);
    let relay = Relay::new(&outbox, Arc::new(Memory::new()));
    let ended = relay.run_until(std::future::pending()).await.unwrap_err();
    assert_eq!(ended.kind(), Kind::NotFound, "{ended}");
}

pub(crate) async fn a_relay_serves_what_is_there_or_begins_it(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let (outbox, admin) = (Outbox::new(&database), Admin::new(&database, "ada"));
    let to = |name: &str| Relay::new(&outbox, Arc::new(Memory::new())).destination(name);
    let unknown = to("audit")
        .run_until(std::future::pending())
        .await
        .unwrap_err();
    assert_eq!(unknown.kind(), Kind::NotFound, "{unknown}");
    let running = to("audit").start(Start::Now).spawn();
    until_held(&running).await;
    running.shutdown().await.unwrap();
    // Where it says to start means nothing any more.
    let running = to("audit").start(Start::Earliest).spawn();
    until_held(&running).await;
    assert_eq!(named(&admin, "audit").await.start, Start::Now);
    admin.remove_destination("audit", "moved").await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), running).await;
    let ended = ended.unwrap().unwrap_err();
    assert_eq!(ended.kind(), Kind::NotFound, "{ended}");
    let again = to("audit").start(Start::Now);
    let refused = again.run_until(std::future::pending()).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::NotFound, "{refused}");
}

async fn until_held(running: &Running) {
    let mut health = running.watch();
    let held = health.wait_for(|h| h.held == h.of && h.of > 0);
    let held = tokio::time::timeout(Duration::from_secs(60), held).await;
    held.unwrap().unwrap();
}

/// A relay beside whose work the cleaner looks often.
fn cleaning(outbox: &Outbox, abandon_after: Duration) -> Relay {
    Relay::new(outbox, Arc::new(Memory::new()))
        .topics(["none"])
        .retention(RetentionSettings {
            log: NONE,
            abandon_after,
            interval: Duration::from_millis(20),
            ..RetentionSettings::default()
        })
}

pub(crate) async fn an_abandoned_destination_is_removed_with_its_loss(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let (outbox, admin) = (Outbox::new(&database), Admin::new(&database, "ada"));
    admin
        .add_destination("audit", Start::Earliest)
        .await
        .unwrap();
    let events = [message(None), message(None)];
    enqueue(&database, &events).await;
    bench.age_log().await;

    let running = cleaning(&outbox, HOUR).spawn();
    until(&database, async || named(&admin, "main").await.behind == 0).await;
    // Served by nobody, and not for long enough.
    until(&database, async || {
        named(&admin, "audit").await.unserved > Duration::ZERO
    })
    .await;
    assert_eq!(bench.number("SELECT count(*) FROM {outbox}").await, 2);
    assert_eq!(named(&admin, "main").await.unserved, Duration::ZERO);
    running.shutdown().await.unwrap();

    let running = cleaning(&outbox, Duration::from_millis(1)).spawn();
    until(&database, async || {
        !admin.removed_destinations().await.unwrap().is_empty()
    })
    .await;
    let removed = admin.removed_destinations().await.unwrap();
    assert_eq!(
        (removed[0].name.as_str(), removed[0].unpublished),
        ("audit", 2)
    );
    assert!(removed[0].why.contains("abandoned"), "{}", removed[0].why);
    until(&database, async || {
        bench.number("SELECT count(*) FROM {outbox}").await == 0
    })
    .await;
    running.shutdown().await.unwrap();
}

pub(crate) async fn main_is_never_abandoned(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let (outbox, admin) = (Outbox::new(&database), Admin::new(&database, "ada"));
    enqueue(&database, &[message(None)]).await;
    let running = cleaning(&outbox, Duration::from_millis(1))
        .destination("audit")
        .start(Start::Earliest)
        .spawn();
    until(&database, async || {
        named(&admin, "main").await.unserved > Duration::from_millis(100)
    })
    .await;
    running.shutdown().await.unwrap();
    assert_eq!(named(&admin, "main").await.behind, 1);
}

async fn until(database: &Database, mut done: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    waited.unwrap_or_else(|_| panic!("never, in {database:?}"));
}

pub(crate) async fn a_replay_says_what_it_would_send(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let (store, admin) = (&**database.store(), Admin::new(&database, "ada"));
    let mut events: Vec<_> = (0..4).map(|_| message(Some("a"))).collect();
    events.extend((0..2).map(|_| message(Some("b"))));
    enqueue(&database, &events).await;
    let plan = async |selection: Selection| {
        let request = ReplayRequest::new("r", "main").of(selection);
        admin.plan_replay(&request).await.unwrap()
    };
    let all = plan(Selection::default()).await;
    assert_eq!((all.events, all.forgotten, all.gone), (6, 0, None));
    let (first, last) = all.between.unwrap();
    assert_eq!(all.oldest.unwrap().1, first);
    let of_key = Selection {
        key: Some("b".to_owned()),
        ..Selection::default()
    };
    assert_eq!(plan(of_key).await.events, 2);
    let later = Selection {
        since: Some(last + Duration::from_millis(1)),
        ..Selection::default()
    };
    assert_eq!(plan(later).await.events, 0);
    let some = Selection {
        from: Some(2),
        to: Some(3),
        ..Selection::default()
    };
    assert_eq!(plan(some).await.events, 2);

    let refused = async |request: ReplayRequest, kind: Kind, text: &str| {
        let refused = admin.start_replay(&request, "test").await.unwrap_err();
        assert_eq!(refused.kind(), kind, "{refused}");
        assert!(refused.to_string().contains(text), "{refused}");
    };
    refused(ReplayRequest::new("r", "audit"), Kind::NotFound, "main").await;
    refused(ReplayRequest::new("a b", "main"), Kind::Invalid, "letters").await;
    let of = |selection: Selection| ReplayRequest::new("r", "main").of(selection);
    let nothing = Selection {
        kind: Some("no.such.type".to_owned()),
        ..Selection::default()
    };
    refused(of(nothing), Kind::Invalid, "names no event").await;
    let backwards = Selection {
        since: Some(last),
        before: Some(first),
        ..Selection::default()
    };
    refused(of(backwards), Kind::Invalid, "`since`").await;
    let mut slow = ReplayRequest::new("r", "main");
    slow.per_second = 0.0;
    refused(slow, Kind::Invalid, "0.01").await;
    let mut forgotten = ReplayRequest::new("r", "main");
    forgotten.remember = Duration::ZERO;
    refused(forgotten.clone(), Kind::Invalid, "duplicates").await;
    forgotten.allow_duplicates = true;
    assert!(admin.start_replay(&forgotten, "test").await.unwrap());
    assert!(!admin.start_replay(&forgotten, "again").await.unwrap());
    refused(
        ReplayRequest::new("r", "main").of(Selection {
            to: Some(2),
            ..Selection::default()
        }),
        Kind::Exists,
        "another replay",
    )
    .await;
    let replays = admin.replays().await.unwrap();
    assert_eq!((replays[0].name.as_str(), replays[0].events), ("r", 6));
    assert!(!replays[0].is_through && !replays[0].is_running);

    // It ends where the log ended, and holds the log until then.
    enqueue(&database, &[message(Some("a"))]).await;
    settle_all(store, &relay()).await;
    bench.age_log().await;
    let lease = acquire(store, &cleaner("log")).await.lease;
    store.clean_log(&lease, NONE).await.unwrap();
    assert_eq!(bench.number("SELECT count(*) FROM {outbox}").await, 7);
    let removed = admin.cancel_replay("r", "enough").await.unwrap();
    assert_eq!((removed.unpublished, removed.is_clean()), (6, false));
    assert!(admin.replays().await.unwrap().is_empty());
    let gone = admin.replay("r").await.unwrap_err();
    assert_eq!(gone.kind(), Kind::NotFound, "{gone}");

    // What retention has removed is known.
    while store.clean_log(&lease, NONE).await.unwrap().removed > 0 {}
    let beyond = Selection {
        since: Some(first),
        ..Selection::default()
    };
    assert!(plan(beyond.clone()).await.gone.unwrap().position >= 7);
    refused(of(beyond.clone()), Kind::Invalid, "beyond retention").await;
    enqueue(&database, &[message(Some("a"))]).await;
    let mut gaps = of(beyond);
    gaps.allow_gaps = true;
    assert!(admin.start_replay(&gaps, "what is left").await.unwrap());
}
