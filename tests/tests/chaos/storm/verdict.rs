//! What must be true after the storm, by plain SQL on the application's own table and from a raw client's queue.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
};

use pillarbox_tests::{
    World,
    tables::{self, dead_letters, deferred, number, query},
    until,
    wire::{Arrived, Client},
};

use super::{PARTITIONS, WINDOW, application::Record};

/// Events of the log that no cursor has passed: neither visible where the cursor began, nor settled in the open slice.
const UNSETTLED: &str = "SELECT CAST(count(*) AS TEXT) FROM {t}outbox o
    JOIN {t}cursor c ON c.partition = o.partition AND c.destination = 'main'
    WHERE NOT pg_visible_in_snapshot(o.xact_id, c.seen)
      AND (c.upto IS NULL OR NOT pg_visible_in_snapshot(o.xact_id, c.upto) OR o.position > c.last)";

/// Figures of a storm, for the log.
pub(super) struct Summary {
    events: usize,
    undone: usize,
    faults: usize,
    repeated: usize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            events,
            undone,
            faults,
            repeated,
        } = self;
        write!(
            f,
            "{events} events, {undone} undone, {faults} faults, {repeated} sent again"
        )
    }
}

/// Waits until the log is settled and nobody waits.
pub(super) async fn until_drained(world: &World) {
    until("the log is settled", async || {
        number(&world.producer, UNSETTLED).await == 0
    })
    .await;
    until("nothing waits", async || {
        deferred(&world.producer).await == 0
    })
    .await;
}

/// Promises 1, 2 and 4, and the bounds.
///
/// # Panics
/// When one is broken.
pub(super) async fn judge(world: &World, record: &Record, faults: usize) -> Summary {
    let written = written(world).await;
    assert!(written.len() > 500, "{} events show nothing", written.len());
    for id in &record.committed {
        assert!(written.contains_key(id), "lost by the database: {id}");
    }
    for id in &record.undone {
        assert!(!written.contains_key(id), "undone, yet there: {id}");
    }
    let prepared =
        "SELECT CAST(count(*) AS TEXT) FROM pg_prepared_xacts WHERE database = current_database()";
    assert_eq!(number(&world.producer, prepared).await, 0);
    assert_eq!(dead_letters(&world.producer).await, []);
    assert_eq!(tables::log(&world.producer).await.len(), written.len());

    let url = world.amqp_url.as_deref().expect("a broker");
    let arrived = Client::connect(url).await.drain("tap").await;
    let repeated = assert_arrived(&written, &arrived);
    let most = faults * PARTITIONS * WINDOW;
    assert!(
        repeated <= most,
        "{repeated} events were sent again: {faults} faults allow {most}"
    );
    Summary {
        events: written.len(),
        undone: record.undone.len(),
        faults,
        repeated,
    }
}

/// What the application has committed: key and number by id.
async fn written(world: &World) -> HashMap<String, (String, u32)> {
    let rows = query(
        &world.producer,
        "SELECT id, key, CAST(n AS TEXT) FROM written",
    )
    .await;
    let text = |row: &[Option<String>], i: usize| row[i].clone().unwrap_or_default();
    rows.iter()
        .map(|row| {
            let n = text(row, 2).parse().expect("a number");
            (text(row, 0), (text(row, 1), n))
        })
        .collect()
}

/// All of it arrived, nothing else did, and the first arrivals of each key came in the order of the commits. Answers how
/// many came again.
fn assert_arrived(written: &HashMap<String, (String, u32)>, arrived: &[Arrived]) -> usize {
    let mut seen = HashSet::new();
    let mut last = BTreeMap::<&str, u32>::new();
    for event in arrived {
        let (key, n) = written
            .get(&event.id)
            .unwrap_or_else(|| panic!("a phantom: {} {:?} {:?}", event.id, event.key, event.n));
        assert_eq!(
            (event.key.as_deref(), event.n),
            (Some(key.as_str()), Some(*n)),
            "{} arrived as another event",
            event.id
        );
        if seen.insert(event.id.as_str()) {
            let last = last.entry(key).or_insert(0);
            assert_eq!(
                *n,
                *last + 1,
                "out of order: {key} {n} arrived after {last}"
            );
            *last = *n;
        }
    }
    let lost: Vec<_> = written
        .iter()
        .filter(|(id, _)| !seen.contains(id.as_str()))
        .collect();
    assert!(
        lost.is_empty(),
        "{} lost, among them {:?}",
        lost.len(),
        lost[0]
    );
    arrived.len() - seen.len()
}
