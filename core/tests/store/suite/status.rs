//! How everything stands, as any program can tell.

use std::time::Duration;

use pillarbox_core::{
    Admin, Database, Kind,
    admin::{Exceptions, Filter, Page},
    failure::Hold,
    store::SCHEMA_VERSION,
    transport::Message,
};

use super::{
    Bench, GROUP, acquire, deferral, enqueue, group, letter, message, migrated, pump, relay,
    retention::Log,
};

pub(crate) async fn owners_and_lag_are_what_leases_and_cursors_say(bench: &dyn Bench) {
    let log = Log::new(bench).await;
    let admin = Admin::new(&log.database, "ada");
    let status = admin.status().await.unwrap();
    assert_eq!(status.installation.version, SCHEMA_VERSION.unsigned_abs());
    assert!(status.installation.is_complete());
    assert_eq!(status.groups, []);
    let [main] = &status.destinations[..] else {
        panic!("{status:?}")
    };
    assert_eq!((main.name.as_str(), main.lag()), ("main", Duration::ZERO));
    assert_eq!(main.partitions[0].owner, None);

    log.write(7).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let store = log.database.store();
    let lease = acquire(&**store, &relay()).await.lease;
    let status = admin.status().await.unwrap();
    let partition = &status.destinations[0].partitions[0];
    let owner = partition.owner.as_ref().unwrap();
    assert_eq!(owner.id, lease.owner.to_string());
    assert!(owner.expires_in > Duration::from_secs(30), "{owner:?}");
    assert_eq!((partition.epoch, partition.behind), (lease.epoch, 7));
    assert!(partition.lag >= Duration::from_millis(10), "{partition:?}");
    // Over, or from a clock that was set back: free, both.
    for seconds in [-1, 100_000] {
        bench.expire(&relay(), seconds).await;
        let status = admin.status().await.unwrap();
        assert_eq!(
            status.destinations[0].partitions[0].owner, None,
            "{seconds}"
        );
    }
    bench.expire(&relay(), 60).await;
    store.release(&lease).await.unwrap();
    log.settle_all(&relay()).await;
    let status = admin.status().await.unwrap();
    let partition = &status.destinations[0].partitions[0];
    assert_eq!((partition.lag, partition.behind), (Duration::ZERO, 0));
    assert!(partition.settled >= 7, "{partition:?}");

    let source = acquire(&**store, &group()).await.lease;
    let pump = acquire(&**store, &pump()).await.lease;
    let status = admin.status().await.unwrap();
    let [orders] = &status.groups[..] else {
        panic!("{status:?}")
    };
    assert_eq!(orders.name, GROUP);
    let read = &orders.sources[0];
    assert_eq!(read.owner.as_ref().unwrap().id, source.owner.to_string());
    assert_eq!((read.transport.as_str(), read.position), ("memory", None));
    // Beside the cleaner's.
    let duty = status.duties.iter().find(|d| d.kind == "pump").unwrap();
    assert_eq!(duty.scope, GROUP);
    assert_eq!(duty.owner.as_ref().unwrap().id, pump.owner.to_string());
}

pub(crate) async fn what_waits_and_was_given_up_is_counted_where_it_is(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let events: Vec<Message> = (0..5).map(|_| message(Some("k"))).collect();
    enqueue(&database, &events).await;
    let lease = acquire(&**store, &relay()).await.lease;
    let mut rows: Vec<_> = events[..3].iter().map(deferral).collect();
    rows[0].hold = Hold::Parked;
    (rows[0].attempts, rows[0].reason) = (4, Some("no queue".to_owned()));
    store.defer(&lease, &rows).await.unwrap();
    store.bury(&lease, &[letter(&events[3])]).await.unwrap();
    // Of a group that reads nothing any more.
    let pump = acquire(&**store, &pump()).await.lease;
    store.bury(&pump, &[letter(&events[3])]).await.unwrap();

    let admin = Admin::new(&database, "ada");
    let status = admin.status().await.unwrap();
    let expected = Exceptions {
        deferred: 3,
        parked: 1,
        longest_line: 3,
        scheduled: 0,
        dead_letters: 1,
    };
    assert_eq!(status.destinations[0].exceptions, expected);
    assert_eq!(status.groups[0].name, GROUP);
    assert_eq!(status.groups[0].exceptions.dead_letters, 1);

    // By its id, an event is found wherever it was given up.
    let found = async |id: &str, parked: bool| {
        let filter = Filter {
            id: Some(id.to_owned()),
            ..Filter::default()
        };
        let page = Page::default();
        let letters = if parked {
            admin.parked(&filter, &page).await
        } else {
            admin.dead_letters(&filter, &page).await
        };
        letters.unwrap().len()
    };
    assert_eq!(found(&events[3].id, false).await, 2);
    assert_eq!(found(&events[0].id, true).await, 1);
    assert_eq!(found(&events[1].id, true).await, 0);
    assert_eq!(found(&events[4].id, false).await, 0);
}

pub(crate) async fn a_status_needs_a_schema_that_is_complete(bench: &dyn Bench) {
    let database: Database = bench.database().await;
    let admin = Admin::new(&database, "ada");
    let error = admin.status().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotMigrated, "{error}");
    let error = admin.installation().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotMigrated, "{error}");
    let database = migrated(bench).await;
    bench.outdate().await;
    let error = Admin::new(&database, "ada").status().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Incompatible, "{error}");
}
