//! A source's cursor is bound to the identity of what it counts.

use pillarbox_core::{lease::LeaseKey, transport::Source};

use super::{Bench, GROUP, acquire, group, migrated, source, term};

pub(crate) async fn a_source_keeps_its_position(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let first = acquire(&**store, &group()).await;
    assert_eq!((first.position, first.reset), (None, false));
    for position in [0, 5, 4_000_000_000, u64::from(u32::MAX) << 20] {
        store
            .settle_source(&first.lease, position, term())
            .await
            .unwrap();
    }
    store.release(&first.lease).await.unwrap();
    let second = acquire(&**store, &group()).await;
    let last = Some(u64::from(u32::MAX) << 20);
    assert_eq!((second.position, second.reset), (last, false));
    // Position 0 is one, and no other source shares it.
    store.settle_source(&second.lease, 0, term()).await.unwrap();
    store.release(&second.lease).await.unwrap();
    assert_eq!(acquire(&**store, &group()).await.position, Some(0));
    let others = [
        Source {
            partition: 1,
            ..source()
        },
        Source {
            cluster: "d".to_owned(),
            ..source()
        },
        Source {
            name: "n".to_owned(),
            ..source()
        },
    ];
    for source in others {
        let group = GROUP.to_owned();
        let other = acquire(&**store, &LeaseKey::Source { group, source }).await;
        assert_eq!((other.position, other.reset), (None, false));
    }
}

pub(crate) async fn a_source_made_anew_is_read_from_its_start(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let first = acquire(&**store, &group()).await.lease;
    store.settle_source(&first, 70, term()).await.unwrap();
    store.release(&first).await.unwrap();
    let anew = LeaseKey::Source {
        group: GROUP.to_owned(),
        source: Source {
            identity: "second".to_owned(),
            ..source()
        },
    };
    let reset = acquire(&**store, &anew).await;
    assert_eq!((reset.position, reset.reset), (None, true));
    assert!(reset.lease.epoch > first.epoch);
    store.release(&reset.lease).await.unwrap();
    let next = acquire(&**store, &anew).await;
    assert_eq!((next.position, next.reset), (None, false));
    store.settle_source(&next.lease, 3, term()).await.unwrap();
    store.release(&next.lease).await.unwrap();
    assert_eq!(acquire(&**store, &anew).await.position, Some(3));
}
