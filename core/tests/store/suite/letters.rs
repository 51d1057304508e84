//! The operators' commands on dead letters.

use std::time::{Duration, Instant, SystemTime};

use pillarbox_core::{
    Admin, Database,
    admin::{Ended, Filter, LetterId, Pace, Page, Side},
    error::Kind,
    failure::{DeadLetter, RETRIED, Resolution},
    lease::Lease,
    store::Store,
    transport::Message,
};

use super::{
    Bench, GROUP, acquire, deferral, drain, enqueue, group, ids_of, letter, line_id, message,
    migrated, pump, relay, term,
};

fn at(message: &Message, position: i64) -> DeadLetter {
    DeadLetter {
        position,
        ..letter(message)
    }
}

fn of_group(m: &Message) -> LetterId {
    name(Side::Consumer, GROUP, m)
}

fn of_main(m: &Message) -> LetterId {
    name(Side::Relay, "main", m)
}

fn name(side: Side, scope: &str, m: &Message) -> LetterId {
    let (source, id) = line_id(m);
    LetterId {
        side,
        scope: scope.to_owned(),
        source,
        id,
    }
}

fn fast() -> Pace {
    Pace {
        per_second: 10_000.0,
        ..Pace::default()
    }
}

/// Gives events up as the group's consumer does, with their inbox rows.
async fn give_up(database: &Database, messages: &[&Message]) -> Lease {
    let store = database.store();
    let lease = acquire(&**store, &group()).await.lease;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    for m in messages {
        unit.bury(&letter(m)).await.unwrap();
    }
    unit.commit(&lease, term()).await.unwrap();
    lease
}

async fn listed(admin: &Admin, filter: &Filter, page: &Page) -> Vec<String> {
    let letters = admin.dead_letters(filter, page).await.unwrap();
    letters.into_iter().map(|l| l.id.id).collect()
}

/// The ids of a key's line, in order, and how each is due.
async fn line(
    store: &dyn Store,
    lease: &Lease,
    m: &Message,
) -> Vec<pillarbox_core::failure::Deferred> {
    let key = pillarbox_core::Key::of(m);
    store
        .line(lease, key.as_ref(), &line_id(m), 100)
        .await
        .unwrap()
}

fn ids(line: &[pillarbox_core::failure::Deferred]) -> Vec<&str> {
    line.iter().map(|d| d.message.id.as_str()).collect()
}

pub(crate) async fn a_list_shows_what_its_filter_names(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let (a, b, keyless) = (message(Some("a")), message(Some("b")), message(None));
    let c = Message {
        kind: "shop.order.gone".to_owned(),
        ..message(Some("a"))
    };
    let main = acquire(&**store, &relay()).await.lease;
    let mut strange = at(&b, 3);
    strange.reason = "no % route_ for 'it'".to_owned();
    store.bury(&main, &[at(&a, 2), strange]).await.unwrap();
    give_up(&database, &[&c, &keyless]).await;

    let admin = Admin::new(&database, "ada");
    let all = Filter::default();
    let page = Page::default();
    let newest = listed(&admin, &all, &page).await;
    assert_eq!(
        newest,
        ids_of(&[keyless.clone(), c.clone(), b.clone(), a.clone()])
    );
    let oldest = Page {
        newest_first: false,
        limit: 3,
        ..page
    };
    assert_eq!(
        listed(&admin, &all, &oldest).await,
        ids_of(&[a.clone(), b.clone(), c.clone()])
    );
    let third = admin.dead_letters(&all, &oldest).await.unwrap()[2].number;
    let rest = Page {
        after: Some(third),
        ..oldest
    };
    assert_eq!(listed(&admin, &all, &rest).await, [keyless.id.as_str()]);

    let hour = Duration::from_secs(3_600);
    let now = SystemTime::now();
    let cases = [
        (Filter::of_destination("main"), vec![&b, &a]),
        (Filter::of_destination("audit"), vec![]),
        (Filter::of_group(GROUP), vec![&keyless, &c]),
        (Filter::default().key("shop.events", "a"), vec![&c, &a]),
        (
            Filter {
                kind: Some(c.kind.clone()),
                ..all.clone()
            },
            vec![&c],
        ),
        (
            Filter {
                reason: Some("% route_ for '".to_owned()),
                ..all.clone()
            },
            vec![&b],
        ),
        (
            Filter {
                reason: Some("ROUTE".to_owned()),
                ..all.clone()
            },
            vec![],
        ),
        (
            Filter {
                since: Some(now + hour),
                ..all.clone()
            },
            vec![],
        ),
        (
            Filter {
                before: Some(now - hour),
                ..all.clone()
            },
            vec![],
        ),
        (
            Filter {
                since: Some(now - hour),
                before: Some(now + hour),
                ..Filter::of_destination("main")
            },
            vec![&b, &a],
        ),
    ];
    for (filter, expected) in cases {
        let expected: Vec<_> = expected.into_iter().map(|m| m.id.as_str()).collect();
        assert_eq!(listed(&admin, &filter, &page).await, expected, "{filter:?}");
    }
    for limit in [0, 1_001] {
        let refused = admin.dead_letters(&all, &Page { limit, ..page }).await;
        assert_eq!(refused.unwrap_err().kind(), Kind::Invalid);
    }
}

pub(crate) async fn a_letter_is_shown_whole_and_a_missing_one_is_named(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let m = message(Some("a"));
    let main = acquire(&**store, &relay()).await.lease;
    store.bury(&main, &[at(&m, 2)]).await.unwrap();
    let admin = Admin::new(&database, "ada");
    let shown = admin.dead_letter(&of_main(&m)).await.unwrap();
    assert_eq!(shown.message.payload, m.payload);
    let l = shown.letter;
    assert_eq!(
        (l.position, l.attempts, l.reason.as_str()),
        (2, 3, "broken")
    );
    assert!(l.maybe_sent && !l.unreadable && l.retried == 0);
    assert_eq!(l.order(), pillarbox_core::Key::of(&m));

    let missing = of_group(&m);
    let errors = [
        admin.dead_letter(&missing).await.unwrap_err(),
        admin.retry(&missing, "why").await.unwrap_err(),
        admin.discard(&missing, "why").await.unwrap_err(),
    ];
    for e in errors {
        assert_eq!(e.kind(), Kind::NotFound);
        assert!(e.to_string().contains(&m.id), "{e}");
    }
}

pub(crate) async fn a_retry_moves_a_letter_once(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let m = message(Some("a"));
    let main = acquire(&**store, &relay()).await.lease;
    store.bury(&main, &[at(&m, 2)]).await.unwrap();
    let admin = Admin::new(&database, "ada");
    let id = of_main(&m);
    assert!(admin.retry(&id, "the queue is there").await.unwrap());
    // As after an answer that was lost.
    assert!(!admin.retry(&id, "again").await.unwrap());
    assert_eq!(bench.number("SELECT count(*) FROM {dead_letter}").await, 0);
    let waiting = line(&**store, &main, &m).await;
    assert_eq!(ids(&waiting), [m.id.as_str()]);
    let head = &waiting[0];
    assert_eq!((head.attempts, head.position), (0, 2));
    assert!(head.due_in.is_zero());
    assert_eq!(head.message.payload, m.payload);
    assert_eq!(head.message.attribute(RETRIED), Some("1"));

    // Given up again, and put back again.
    let dead = Resolution::Dead {
        attempts: 4,
        reason: "never".to_owned(),
    };
    store.resolve(&main, &line_id(&m), &dead).await.unwrap();
    assert_eq!(admin.dead_letter(&id).await.unwrap().letter.retried, 1);
    assert!(admin.retry(&id, "once more").await.unwrap());
    let waiting = line(&**store, &main, &m).await;
    assert_eq!(waiting[0].message.attribute(RETRIED), Some("2"));
    store
        .resolve(&main, &line_id(&m), &Resolution::Done)
        .await
        .unwrap();
    assert_eq!(
        admin.retry(&id, "late").await.unwrap_err().kind(),
        Kind::NotFound
    );
}

pub(crate) async fn what_is_put_back_stands_first_in_its_line(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let m: Vec<_> = (0..4).map(|_| message(Some("k"))).collect();
    let admin = Admin::new(&database, "ada");
    give_up(&database, &[&m[0], &m[1]]).await;
    let pump = acquire(&**store, &pump()).await.lease;
    store
        .defer(&pump, &[deferral(&m[2]), deferral(&m[3])])
        .await
        .unwrap();
    let all = Filter::of_group(GROUP).key("shop.events", "k");
    let done = admin.retry_all(&all, &fast(), "mended").await.unwrap();
    assert_eq!((done.done, done.ended), (2, Ended::Complete));
    assert_eq!(ids(&line(&**store, &pump, &m[0]).await), ids_of(&m));

    // The relay's by position, whichever was given up first.
    let main = acquire(&**store, &relay()).await.lease;
    store
        .bury(&main, &[at(&m[1], 11), at(&m[0], 10), at(&m[3], 13)])
        .await
        .unwrap();
    let wait = pillarbox_core::failure::Deferral {
        position: 12,
        ..deferral(&m[2])
    };
    store.defer(&main, &[wait]).await.unwrap();
    let done = admin
        .retry_all(&Filter::of_destination("main"), &fast(), "mended")
        .await;
    assert_eq!(done.unwrap().done, 3);
    assert_eq!(ids(&line(&**store, &main, &m[0]).await), ids_of(&m));
}

pub(crate) async fn a_discarded_event_is_not_applied_if_it_comes_again(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let (m, other) = (message(Some("k")), message(Some("k")));
    let lease = give_up(&database, &[&m, &other]).await;
    // Forgotten since.
    bench.execute("DELETE FROM {inbox}").await;
    let admin = Admin::new(&database, "ada");
    admin.discard(&of_group(&m), "a test order").await.unwrap();
    let left = listed(&admin, &Filter::default(), &Page::default()).await;
    assert_eq!(left, [other.id.as_str()]);
    let again = admin.discard(&of_group(&m), "again").await.unwrap_err();
    assert_eq!(again.kind(), Kind::NotFound);
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    assert!(!unit.remember(&m).await.unwrap());
    unit.commit(&lease, term()).await.unwrap();
    let done = admin
        .discard_all(&Filter::of_group(GROUP), &fast(), "all")
        .await;
    assert_eq!(done.unwrap().done, 1);
    assert_eq!(bench.number("SELECT count(*) FROM {deferred}").await, 0);
}

pub(crate) async fn a_command_for_many_keeps_its_bounds(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let m: Vec<_> = (0..6).map(|_| message(Some("k"))).collect();
    let main = acquire(&**store, &relay()).await.lease;
    let letters: Vec<_> = m.iter().zip(1..).map(|(m, n)| at(m, n)).collect();
    store.bury(&main, &letters).await.unwrap();
    let admin = Admin::new(&database, "ada");
    let all = Filter::of_destination("main");
    let two = Pace {
        per_second: 10.0,
        most: 2,
        ..fast()
    };
    let begun = Instant::now();
    let done = admin.retry_all(&all, &two, "slowly").await.unwrap();
    assert_eq!((done.done, done.ended), (2, Ended::Most));
    assert!(
        begun.elapsed() >= Duration::from_millis(190),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(ids(&line(&**store, &main, &m[0]).await), ids_of(&m[..2]));
    let full = Pace {
        waiting: 2,
        ..fast()
    };
    let done = admin
        .retry_all(&all, &full, "the room is full")
        .await
        .unwrap();
    assert_eq!((done.done, done.ended), (0, Ended::Waiting));
    let done = admin.retry_all(&all, &fast(), "the rest").await.unwrap();
    assert_eq!((done.done, done.ended), (4, Ended::Complete));
    assert_eq!(ids(&line(&**store, &main, &m[0]).await), ids_of(&m));
    assert_eq!(
        admin
            .retry_all(&all, &fast(), "nothing")
            .await
            .unwrap()
            .done,
        0
    );

    let everywhere = admin.retry_all(&Filter::default(), &fast(), "why").await;
    assert_eq!(everywhere.unwrap_err().kind(), Kind::Invalid);
    let standing = Pace {
        per_second: 0.0,
        ..fast()
    };
    let standing = admin.discard_all(&all, &standing, "why").await;
    assert_eq!(standing.unwrap_err().kind(), Kind::Invalid);
}

pub(crate) async fn a_dry_run_counts_and_changes_nothing(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let acquired = acquire(&**store, &relay()).await;
    let lease = acquired.lease;
    let log: Vec<_> = ["a", "a", "b", "a", "a", "a"]
        .map(|k| message(Some(k)))
        .into();
    enqueue(&database, &log[..5]).await;
    let (events, end) = drain(&**store, acquired.progress, 10).await;
    store.settle(&lease, &end, term(), true).await.unwrap();
    // Of key a, behind the first: one given up, one that waits, one through, and one that is not settled.
    enqueue(&database, &log[5..]).await;
    let letters = [
        at(&log[0], events[0].position),
        at(&log[1], events[1].position),
    ];
    store.bury(&lease, &letters).await.unwrap();
    let keyless = message(None);
    store.bury(&lease, &[at(&keyless, 1)]).await.unwrap();
    let mut waits = deferral(&log[3]);
    waits.position = events[3].position;
    store.defer(&lease, &[waits]).await.unwrap();
    let admin = Admin::new(&database, "ada");
    let dry = admin
        .dry_run(&Filter::of_destination("main"))
        .await
        .unwrap();
    assert_eq!((dry.letters, dry.keys, dry.keyless), (3, 1, 1));
    assert_eq!((dry.maybe_sent, dry.newer), (3, Some(1)));
    assert_eq!(bench.number("SELECT count(*) FROM {dead_letter}").await, 3);
    assert_eq!(bench.number("SELECT count(*) FROM {deferred}").await, 1);

    give_up(&database, &[&log[2]]).await;
    let dry = admin.dry_run(&Filter::of_group(GROUP)).await.unwrap();
    assert_eq!((dry.letters, dry.newer), (1, None));
}

pub(crate) async fn what_could_not_be_read_is_never_put_back(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let main = acquire(&**store, &relay()).await.lease;
    let whole = message(Some("a"));
    let torn = message(Some("a")).with_attribute("pillarboxunreadable", "true");
    store
        .bury(&main, &[at(&torn, 1), at(&whole, 2)])
        .await
        .unwrap();
    let admin = Admin::new(&database, "ada");
    let refused = admin.retry(&of_main(&torn), "why").await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Invalid);
    let done = admin
        .retry_all(&Filter::of_destination("main"), &fast(), "why")
        .await
        .unwrap();
    assert_eq!((done.done, done.unreadable), (1, 1));
    assert_eq!(
        listed(&admin, &Filter::default(), &Page::default()).await,
        [torn.id.as_str()]
    );
    admin
        .discard(&of_main(&torn), "enqueued anew")
        .await
        .unwrap();
}

/// A transaction of the group's has asked which keys wait, and applies an event of this one.
pub(crate) async fn nothing_is_put_back_under_an_open_transaction(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let (m, newer) = (message(Some("k")), message(Some("k")));
    let lease = give_up(&database, &[&m]).await;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    assert_eq!(unit.blocked(&[&newer]).await.unwrap(), [false]);
    // Another program's.
    let admin = Admin::new(&bench.database().await, "ada");
    let id = of_group(&m);
    let mut retry = tokio::spawn(async move { admin.retry(&id, "mended").await });
    let early = tokio::time::timeout(Duration::from_millis(1_200), &mut retry).await;
    assert!(early.is_err(), "{early:?}");
    assert_eq!(bench.number("SELECT count(*) FROM {deferred}").await, 0);
    unit.commit(&lease, term()).await.unwrap();
    assert!(retry.await.unwrap().unwrap());
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    assert_eq!(unit.blocked(&[&newer]).await.unwrap(), [true]);
    unit.rollback().await.unwrap();
}
