//! Events that are sent at a time of their own, and keys that wait for an operator.

use std::time::{Duration, SystemTime};

use pillarbox_core::{
    Admin, Connection, Database, Outbox, Pool, Scheduled,
    admin::{Ended, Filter, LetterId, Pace, Page, Side},
    error::Kind,
    failure::{Deferral, Hold, Resolution},
    lease::Lease,
    store::{Due, Store, Waiting},
    transport::Message,
};

use super::{
    Bench, GROUP, acquire, deferral, drain, group, ids_of, line_id, message, migrated, pump, relay,
    term,
};

const HOUR: Duration = Duration::from_secs(3_600);

fn scheduled(message: &Message, position: i64, at: SystemTime) -> Deferral {
    Deferral {
        position,
        hold: Hold::Scheduled(at),
        ..deferral(message)
    }
}

fn parked(message: &Message) -> Deferral {
    Deferral {
        attempts: 4,
        reason: Some("no such account".to_owned()),
        hold: Hold::Parked,
        ..deferral(message)
    }
}

fn receipt(message: &Message, at: SystemTime) -> Scheduled {
    Scheduled {
        id: message.id.parse().unwrap(),
        at,
    }
}

async fn ids(store: &dyn Store, lease: &Lease, m: &Message) -> Vec<String> {
    let key = pillarbox_core::Key::of(m);
    let line = store
        .line(lease, key.as_ref(), &line_id(m), 100)
        .await
        .unwrap();
    line.into_iter().map(|d| d.message.id).collect()
}

/// Runs `work` in a host's transaction that is committed.
async fn transact<T>(database: &Database, work: impl AsyncFnOnce(Connection<'_>) -> T) -> T {
    match database.pool().expect("a real database") {
        #[cfg(feature = "postgres")]
        Pool::Postgres(pool) => {
            let mut tx = pool.begin().await.unwrap();
            let answer = work(Connection::Postgres(&mut tx)).await;
            tx.commit().await.unwrap();
            answer
        }
        #[cfg(feature = "sqlite")]
        Pool::Sqlite(pool) => {
            let mut tx = pool.begin().await.unwrap();
            let answer = work(Connection::Sqlite(&mut tx)).await;
            tx.commit().await.unwrap();
            answer
        }
    }
}

async fn cancel(database: &Database, event: &Scheduled) -> bool {
    let outbox = Outbox::new(database);
    transact(database, async |c| outbox.cancel(c, event).await.unwrap()).await
}

pub(crate) async fn a_time_travels_through_the_log(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let outbox = Outbox::new(&database);
    let acquired = acquire(&**store, &relay()).await;
    let (plain, later) = (message(Some("k")), message(Some("k")));
    let at = SystemTime::now() + HOUR;
    let event = transact(&database, async |mut c| {
        let far = at + 4_000 * 24 * HOUR;
        let far = outbox
            .enqueue_message_at(c.reborrow(), plain.clone(), far)
            .await;
        assert_eq!(far.unwrap_err().kind(), Kind::Invalid);
        outbox
            .enqueue_message(c.reborrow(), plain.clone())
            .await
            .unwrap();
        outbox
            .enqueue_message_at(c, later.clone(), at)
            .await
            .unwrap()
    })
    .await;
    assert_eq!(event.id.to_string(), later.id);
    let (events, _) = drain(&**store, acquired.progress, 10).await;
    assert_eq!(events[0].deliver_at, None);
    assert_eq!(events[1].deliver_at, Some(event.at));
    assert!(event.at >= at && event.at < at + Duration::from_millis(1));
}

pub(crate) async fn what_is_scheduled_stands_in_no_line_until_its_time(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let m: Vec<_> = (0..5).map(|_| message(Some("k"))).collect();
    let now = SystemTime::now();
    let rows = [
        scheduled(&m[0], 1, now + HOUR),
        scheduled(&m[1], 2, now - Duration::from_secs(1)),
        scheduled(&m[2], 3, now - Duration::from_secs(2)),
        Deferral {
            position: 7,
            ..deferral(&m[3])
        },
    ];
    store.defer(&lease, &rows).await.unwrap();
    store.defer(&lease, &rows).await.unwrap();
    assert_eq!(ids(&**store, &lease, &m[0]).await, ids_of(&m[3..4]));
    let lines = store.lines(&lease, 10).await.unwrap();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].head, line_id(&m[3]));
    let room = Waiting {
        total: 1,
        longest: 1,
        scheduled: 3,
        ..Waiting::default()
    };
    assert_eq!(store.deferred(Side::Relay, "main").await.unwrap(), room);

    // Behind what stands there, in the order of their times.
    let due = store.fall_due(&lease, 5, 1).await.unwrap();
    assert_eq!(due.lines.len(), 1);
    assert_eq!(due.lines[0].head, line_id(&m[2]));
    assert_eq!(due.next, Some(Duration::ZERO));
    let due = store.fall_due(&lease, 5, 10).await.unwrap();
    assert_eq!(due.lines.len(), 1);
    let next = due.next.unwrap();
    assert!(
        next > HOUR - Duration::from_secs(60) && next <= HOUR,
        "{next:?}"
    );
    let order = [&m[3], &m[2], &m[1]].map(|m| m.id.clone());
    assert_eq!(ids(&**store, &lease, &m[0]).await, order);

    // And behind what was read by then, though it comes into the line later.
    let late = message(Some("other"));
    store
        .defer(&lease, &[scheduled(&late, 2, now)])
        .await
        .unwrap();
    store.fall_due(&lease, 20, 10).await.unwrap();
    let read = Message {
        id: m[4].id.clone(),
        ..message(Some("other"))
    };
    let read = Deferral {
        position: 19,
        ..deferral(&read)
    };
    store.defer(&lease, &[read]).await.unwrap();
    assert_eq!(
        ids(&**store, &lease, &late).await,
        [m[4].id.clone(), late.id.clone()]
    );
    assert!(
        store
            .fall_due(&lease, 20, 10)
            .await
            .unwrap()
            .lines
            .is_empty()
    );
}

pub(crate) async fn a_lost_lease_lets_nothing_fall_due(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let m = message(Some("k"));
    let now = SystemTime::now();
    store.defer(&lease, &[scheduled(&m, 1, now)]).await.unwrap();
    super::lost(store.fall_due(&super::impostor(&lease), 1, 10).await);
    assert!(ids(&**store, &lease, &m).await.is_empty());
    assert_eq!(store.fall_due(&lease, 1, 10).await.unwrap().lines.len(), 1);
}

pub(crate) async fn what_is_cancelled_before_its_time_never_enters_a_line(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let now = SystemTime::now();
    let soon = now + Duration::from_millis(1_500);
    let m: Vec<_> = (0..3).map(|_| message(Some("k"))).collect();
    // One before the relay has read it, one after; the third is sent.
    assert!(cancel(&database, &receipt(&m[0], soon)).await);
    let rows: Vec<_> = m
        .iter()
        .zip(1..)
        .map(|(m, n)| scheduled(m, n, soon))
        .collect();
    store.defer(&lease, &rows).await.unwrap();
    assert!(cancel(&database, &receipt(&m[1], soon)).await);
    assert!(
        cancel(&database, &receipt(&m[1], soon)).await,
        "it may be repeated"
    );
    assert!(
        store
            .fall_due(&lease, 9, 10)
            .await
            .unwrap()
            .lines
            .is_empty()
    );
    tokio::time::sleep(Duration::from_millis(1_600)).await;
    // Its time has come: it cannot be cancelled any more, whether it has entered its line or not.
    assert!(!cancel(&database, &receipt(&m[2], soon)).await);
    let due = store.fall_due(&lease, 9, 10).await.unwrap();
    assert_eq!(due.lines.len(), 1);
    assert_eq!(due.next, None);
    assert!(!cancel(&database, &receipt(&m[2], soon)).await);
    assert_eq!(ids(&**store, &lease, &m[0]).await, ids_of(&m[2..]));
    assert_eq!(bench.number("SELECT count(*) FROM {deferred}").await, 1);
    let outbox = Outbox::new(&database);
    let bare = match database.pool().expect("a real database") {
        #[cfg(feature = "postgres")]
        Pool::Postgres(pool) => {
            let mut c = pool.acquire().await.unwrap();
            outbox.cancel(&mut *c, &receipt(&m[2], soon)).await
        }
        #[cfg(feature = "sqlite")]
        Pool::Sqlite(pool) => {
            let mut c = pool.acquire().await.unwrap();
            outbox.cancel(&mut *c, &receipt(&m[2], soon)).await
        }
    };
    assert_eq!(bare.unwrap_err().kind(), Kind::Invalid);
}

/// A cancelling transaction that is open past the event's time: neither sent nor lost meanwhile.
pub(crate) async fn an_open_cancel_decides(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let soon = SystemTime::now() + Duration::from_millis(1_000);
    let (kept, gone, other) = (message(Some("a")), message(Some("b")), message(Some("c")));
    let rows = [
        scheduled(&kept, 1, soon),
        scheduled(&gone, 2, soon),
        scheduled(&other, 3, soon),
    ];
    store.defer(&lease, &rows).await.unwrap();
    let outbox = Outbox::new(&database);
    macro_rules! race {
        ($pool:expr, $message:expr, $end:ident) => {{
            let mut tx = $pool.begin().await.unwrap();
            let event = receipt($message, soon);
            assert!(outbox.cancel(&mut tx, &event).await.unwrap());
            let fall = {
                let (store, lease) = (store.clone(), lease.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(1_100)).await;
                    store.fall_due(&lease, 9, 10).await
                })
            };
            tokio::time::sleep(Duration::from_millis(1_600)).await;
            let during = ids(&**store, &lease, $message).await;
            assert!(during.is_empty(), "it was not decided yet: {during:?}");
            tx.$end().await.unwrap();
            let due: Due = fall.await.unwrap().unwrap();
            (due, store.fall_due(&lease, 9, 10).await.unwrap())
        }};
    }
    // Of two events that are just being cancelled, one in each database's way: a second transaction cannot write beside the
    // first on SQLite.
    let (during, after) = match database.pool().expect("a real database") {
        #[cfg(feature = "postgres")]
        Pool::Postgres(pool) => {
            let mut back = pool.begin().await.unwrap();
            assert!(
                outbox
                    .cancel(&mut back, &receipt(&kept, soon))
                    .await
                    .unwrap()
            );
            let answer = race!(pool, &gone, commit);
            assert!(ids(&**store, &lease, &kept).await.is_empty());
            back.rollback().await.unwrap();
            answer
        }
        #[cfg(feature = "sqlite")]
        Pool::Sqlite(pool) => race!(pool, &gone, commit),
    };
    let entered = during.lines.len() + after.lines.len();
    let again = store.fall_due(&lease, 9, 10).await.unwrap();
    assert_eq!(
        entered + again.lines.len(),
        2,
        "{during:?} {after:?} {again:?}"
    );
    assert_eq!(ids(&**store, &lease, &kept).await, [kept.id.as_str()]);
    assert_eq!(ids(&**store, &lease, &other).await, [other.id.as_str()]);
    assert!(ids(&**store, &lease, &gone).await.is_empty());
    assert_eq!(again.next, None);
}

pub(crate) async fn a_parked_key_waits_for_an_operator(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &pump()).await.lease;
    let m: Vec<_> = (0..3).map(|_| message(Some("k"))).collect();
    let n: Vec<_> = (0..2).map(|_| message(Some("n"))).collect();
    // One is given up at its first failure, one at its last.
    store
        .defer(&lease, &[parked(&m[0]), deferral(&m[1]), deferral(&m[2])])
        .await
        .unwrap();
    store
        .defer(&lease, &[deferral(&n[0]), deferral(&n[1])])
        .await
        .unwrap();
    let park = Resolution::Park {
        attempts: 4,
        reason: "no such account".to_owned(),
    };
    store.resolve(&lease, &line_id(&n[0]), &park).await.unwrap();
    let lines = store.lines(&lease, 10).await.unwrap();
    assert!(lines.iter().all(|l| l.due_in > 1_000 * HOUR), "{lines:?}");
    let room = store.deferred(Side::Consumer, GROUP).await.unwrap();
    assert_eq!((room.total, room.parked), (5, 2));

    let admin = Admin::new(&database, "ada");
    let of_group = Filter::of_group(GROUP);
    let page = Page::default();
    let list = admin.parked(&of_group, &page).await.unwrap();
    let heads: Vec<_> = list
        .iter()
        .map(|l| (l.id.id.as_str(), l.attempts))
        .collect();
    assert_eq!(heads, [(n[0].id.as_str(), 4), (m[0].id.as_str(), 4)]);
    assert!(
        admin
            .dead_letters(&of_group, &page)
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        admin.dead_letter(&list[0].id).await.unwrap().message.id,
        n[0].id
    );

    // Back to its place, at once.
    assert!(
        admin
            .retry(&list[1].id, "the account is there")
            .await
            .unwrap()
    );
    assert!(!admin.retry(&list[1].id, "again").await.unwrap());
    assert_eq!(ids(&**store, &lease, &m[0]).await, ids_of(&m));
    let head = store.lines(&lease, 1).await.unwrap().remove(0);
    assert_eq!((head.head, head.due_in), (line_id(&m[0]), Duration::ZERO));
    assert_eq!(
        store
            .line(&lease, head.key.as_ref(), &line_id(&m[0]), 1)
            .await
            .unwrap()[0]
            .attempts,
        0
    );
    // What waits and is not parked is not an operator's.
    let waits = LetterId {
        id: m[1].id.clone(),
        ..list[1].id.clone()
    };
    assert_eq!(
        admin.discard(&waits, "why").await.unwrap_err().kind(),
        Kind::NotFound
    );

    // Its key goes on without it, and it is not applied if it comes again.
    let fast = Pace {
        per_second: 1_000.0,
        ..Pace::default()
    };
    let done = admin.discard_all(&of_group, &fast, "a test").await.unwrap();
    assert_eq!((done.done, done.ended), (1, Ended::Complete));
    assert_eq!(ids(&**store, &lease, &n[0]).await, ids_of(&n[1..]));
    let consumer = acquire(&**store, &group()).await.lease;
    let mut unit = store.begin(GROUP, term(), true).await.unwrap();
    assert!(!unit.remember(&n[0]).await.unwrap());
    unit.commit(&consumer, term()).await.unwrap();
}

pub(crate) async fn a_lost_answer_is_remembered(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let m: Vec<_> = (0..3).map(|_| message(None)).collect();
    let unsure = Deferral {
        maybe_sent: true,
        ..deferral(&m[0])
    };
    store
        .defer(&lease, &[unsure, deferral(&m[1]), deferral(&m[2])])
        .await
        .unwrap();
    store
        .resolve(&lease, &line_id(&m[1]), &Resolution::Unsure)
        .await
        .unwrap();
    let dead = Resolution::Dead {
        attempts: 4,
        reason: "never".to_owned(),
    };
    for m in &m {
        let line = store.line(&lease, None, &line_id(m), 1).await.unwrap();
        let expected = line[0].maybe_sent;
        store.resolve(&lease, &line_id(m), &dead).await.unwrap();
        let admin = Admin::new(&database, "ada");
        let letters = admin
            .dead_letters(&Filter::default(), &Page::default())
            .await
            .unwrap();
        assert_eq!(letters[0].maybe_sent, expected);
    }
    let admin = Admin::new(&database, "ada");
    let dry = admin
        .dry_run(&Filter::of_destination("main"))
        .await
        .unwrap();
    assert_eq!((dry.letters, dry.maybe_sent), (3, 2));
    // And through a retry.
    let (source, id) = line_id(&m[1]);
    let id = LetterId {
        side: Side::Relay,
        scope: "main".to_owned(),
        source,
        id,
    };
    admin.retry(&id, "why").await.unwrap();
    assert!(store.line(&lease, None, &line_id(&m[1]), 1).await.unwrap()[0].maybe_sent);
}

/// Of the release before: without a place for times, parked keys and lost answers.
async fn version_1(bench: &dyn Bench, database: &Database) {
    let script = match database.pool().expect("a real database") {
        #[cfg(feature = "postgres")]
        Pool::Postgres(_) => {
            let script = include_str!("../../../src/store/postgres/schema.sql");
            let script = script
                .replace("@schema@", "pillarbox")
                .replace("@mask@", "0");
            format!("CREATE SCHEMA pillarbox; {script}")
        }
        #[cfg(feature = "sqlite")]
        Pool::Sqlite(_) => {
            let script = include_str!("../../../src/store/sqlite/schema.sql");
            let script = script
                .replace("{p}", "pillarbox_")
                .replace("{now}", "1000000");
            format!(
                "{script}; INSERT INTO pillarbox_installation (one, version, oldest_program, partitions) VALUES (1, 1, 1, 1); \
                 INSERT INTO pillarbox_cursor (destination, partition) VALUES ('main', 0)"
            )
        }
    };
    bench.execute(&script).await;
}

pub(crate) async fn a_schema_of_version_1_is_completed(bench: &dyn Bench) {
    let database = bench.database().await;
    version_1(bench, &database).await;
    let old: Vec<_> = (0..3).map(|_| message(Some("k"))).collect();
    super::enqueue(&database, &old).await;
    bench
        .execute("DELETE FROM {outbox} WHERE position = 3")
        .await;
    bench
        .execute(
            "INSERT INTO {deferred} (side, scope, source, id, shard, position, topic, type, key, headers, attributes, time, \
             attempts, due) SELECT 'relay', 'main', 's', 'waits', 0, 1, 't', 'y', 'k', '{}', '{\"source\":\"s\"}', \
             min(created_at), 1, min(created_at) FROM {outbox}",
        )
        .await;
    for _ in 0..2 {
        pillarbox_core::migrate(&database).await.unwrap();
    }
    let store = database.store();
    let acquired = acquire(&**store, &relay()).await;
    let new = message(Some("k"));
    let at = SystemTime::now() + HOUR;
    let outbox = Outbox::new(&database);
    transact(&database, async |c| {
        outbox.enqueue_message_at(c, new.clone(), at).await.unwrap()
    })
    .await;
    let (events, _) = drain(&**store, acquired.progress, 10).await;
    let places: Vec<_> = events
        .iter()
        .map(|e| (e.message.id.as_str(), e.position))
        .collect();
    assert_eq!(
        places,
        [
            (old[0].id.as_str(), 1),
            (old[1].id.as_str(), 2),
            (new.id.as_str(), 4)
        ]
    );
    let lines = store.lines(&acquired.lease, 10).await.unwrap();
    assert_eq!(lines.len(), 1);
    let waiting = store
        .line(&acquired.lease, lines[0].key.as_ref(), &lines[0].head, 1)
        .await
        .unwrap();
    assert!(!waiting[0].maybe_sent);
}
