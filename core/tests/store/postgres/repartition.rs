//! More partitions: every event stays settled or unsettled, every key in order.

use std::collections::HashMap;

use pillarbox_core::{error::Kind, lease::LeaseKey, repartition, store::Store};

use super::{Db, number, run};
use crate::suite::{acquire, term};

fn partition(partition: u16) -> LeaseKey {
    LeaseKey::Relay {
        destination: "main".to_owned(),
        partition,
    }
}

/// `key-3 7` for the seventh of the third key.
fn write(keys: u32, numbers: std::ops::Range<u32>) -> String {
    format!(
        "INSERT INTO {{outbox}} (topic, type, key, payload) SELECT 't', 'a', 'key-' || k, convert_to('key-' || k || ' ' || n, 'UTF8') \
         FROM generate_series({}, {}) n, generate_series(1, {keys}) k",
        numbers.start,
        numbers.end - 1
    )
}

/// Settles up to `most` events of a partition, and answers their names.
async fn relay(store: &dyn Store, number: u16, most: usize) -> Vec<String> {
    let acquired = acquire(store, &partition(number)).await;
    let (mut from, mut names) = (acquired.progress, Vec::new());
    while names.len() < most {
        let limit = u32::try_from(most - names.len()).unwrap();
        let slice = store.read(number, &from, limit).await.unwrap();
        let at = slice.events.last().map(|e| slice.within.at(e.position));
        match slice.end.or(at) {
            Some(end) => from = end,
            None => break,
        }
        let payloads = slice
            .events
            .iter()
            .filter_map(|e| e.message.payload.clone());
        names.extend(payloads.map(|p| String::from_utf8(p.to_vec()).unwrap()));
    }
    store
        .settle(&acquired.lease, &from, term(), true)
        .await
        .unwrap();
    store.release(&acquired.lease).await.unwrap();
    names
}

#[tokio::test]
async fn more_partitions_lose_and_repeat_nothing_and_keep_the_order() {
    let Some(db) = Db::new().await else { return };
    let database = super::over(db.options());
    pillarbox_core::migrate_with(&database, 2).await.unwrap();
    let (store, mut raw) = (database.store(), db.raw().await);
    // A transaction that commits late has drawn low positions, and is in the middle of its slice.
    let mut late = db.raw().await;
    run(&mut late, "BEGIN").await;
    run(&mut late, &write(3, 1..2).replace("'key-'", "'late-'")).await;
    run(&mut raw, &write(20, 1..6)).await;
    let mut sent = Vec::new();
    for number in 0..2 {
        // Not to the end: a slice stays open.
        sent.extend(relay(&**store, number, 30).await);
    }
    run(&mut late, "COMMIT").await;
    run(&mut raw, &write(20, 6..9)).await;

    repartition(&database, 8).await.unwrap();
    repartition(&database, 8).await.unwrap();
    run(&mut raw, &write(20, 9..11)).await;
    assert_eq!(store.partitions().await.unwrap(), 8);
    let mut used = 0;
    for number in 0..8 {
        let more = relay(&**store, number, 1_000).await;
        used += usize::from(!more.is_empty());
        sent.extend(more);
    }
    assert!(used > 2, "the new partitions have events");
    assert_eq!(sent.len(), 20 * 10 + 3);
    let mut next = HashMap::<String, u32>::new();
    for name in &sent {
        let (key, n) = name.split_once(' ').unwrap();
        let expected = next.entry(key.to_owned()).or_insert(1);
        assert_eq!(n, expected.to_string(), "{key}");
        *expected += 1;
    }
}

#[tokio::test]
async fn what_waits_goes_where_its_key_goes() {
    let Some(db) = Db::new().await else { return };
    let database = super::over(db.options());
    pillarbox_core::migrate_with(&database, 1).await.unwrap();
    let (store, mut raw) = (database.store(), db.raw().await);
    run(&mut raw, &write(20, 1..2)).await;
    let acquired = acquire(&**store, &partition(0)).await;
    let slice = store.read(0, &acquired.progress, 100).await.unwrap();
    let waits: Vec<_> = slice
        .events
        .iter()
        .map(|e| crate::suite::deferral(&e.message))
        .collect();
    store.defer(&acquired.lease, &waits).await.unwrap();
    store.release(&acquired.lease).await.unwrap();
    repartition(&database, 4).await.unwrap();
    let strays = "SELECT count(*) FROM {deferred} d JOIN {outbox} o ON o.id::text = d.id WHERE o.partition <> d.shard";
    assert_eq!(number(&mut raw, strays).await, 0);
    let used = "SELECT count(DISTINCT shard) FROM {deferred}";
    assert!(number(&mut raw, used).await > 1);
}

#[tokio::test]
async fn a_change_that_would_lose_something_is_refused() {
    let Some(db) = Db::new().await else { return };
    let database = super::over(db.options());
    pillarbox_core::migrate_with(&database, 4).await.unwrap();
    let refused = async |partitions: u16| {
        let error = repartition(&database, partitions).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
        error.to_string()
    };
    for wrong in [0, 3, 128] {
        let told = refused(wrong).await;
        let expected =
            format!("repartition: {wrong} partitions; a power of two from 1 to 64 is expected");
        assert_eq!(told, expected);
    }
    assert!(
        refused(2)
            .await
            .contains("has 4 partitions and can only get more")
    );
    let store = database.store();
    let held = acquire(&**store, &partition(3)).await.lease;
    assert!(refused(8).await.contains("relays of main run: stop all"));
    store.release(&held).await.unwrap();
    // One that holds nothing runs all the same.
    let seat = LeaseKey::Duty {
        kind: "relays",
        scope: "main".to_owned(),
        shard: 0,
    };
    let seat = acquire(&**store, &seat).await.lease;
    assert!(refused(8).await.contains("relays of main run"));
    store.release(&seat).await.unwrap();
    assert_eq!(store.partitions().await.unwrap(), 4);
    repartition(&database, 8).await.unwrap();
    assert_eq!(store.partitions().await.unwrap(), 8);
}
