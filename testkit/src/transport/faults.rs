//! Lost connections, silence, crashes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pillarbox_transport::{Kind, Message, Outcome};

use super::{CONFIRM_TIMEOUT, Corner, GROUP, PATIENCE, assert_all, send, set, soon, word};
use crate::proxy::{Direction, Proxy};

impl dyn Corner + '_ {
    fn wire(&self) -> &Proxy {
        self.proxy()
            .expect("a proxy, or an exception for this case")
    }

    /// About a kilobyte each.
    fn large_events(&self, ids: std::ops::Range<usize>) -> Vec<Message> {
        let body = "x".repeat(1_000);
        let large = |id| Message {
            payload: Some(body.clone().into()),
            ..self.event(id)
        };
        ids.map(large).collect()
    }
}

/// Publishes as a relay does: one unconfirmed event of each key, and again what is not known to be stored.
pub(super) async fn key_order(mut corner: Box<dyn Corner>) {
    const KEYS: usize = 16;
    const EACH: usize = 15;
    let (transport, mut publisher) = corner.open().await;
    let mut next = [0; KEYS];
    let mut round = 0;
    while next.iter().any(|n| *n < EACH) {
        if let Some(proxy) = corner.proxy()
            && round % 3 == 1
        {
            // In the middle of the batch, or of its answers.
            let way = [Direction::ToServer, Direction::ToClient][round / 3 % 2];
            proxy.cut_after_bytes(way, 300 + 700 * (round as u64 % 5));
        }
        let open: Vec<usize> = (0..KEYS).filter(|key| next[*key] < EACH).collect();
        // Two batches of different keys, open at the same time.
        let (one, two) = open.split_at(open.len() / 2);
        let batch = |keys: &[usize]| {
            let event = |key: &usize| {
                let id = format!("{key}-{}", next[*key]);
                corner.event(id).with_key(format!("key-{key}"))
            };
            send(&*publisher, keys.iter().map(event).collect())
        };
        let (first, second) = (batch(one), batch(two));
        let (first, second) = soon(async { (first.await, second.await) }).await;
        let mut lost = false;
        for (key, outcome) in open.iter().zip(first.into_iter().chain(second)) {
            match outcome {
                Outcome::Stored => next[*key] += 1,
                Outcome::Unknown(_) | Outcome::Unavailable(_) => lost = true,
                other => panic!("key {key}: {other:?}"),
            }
        }
        if lost {
            publisher = corner.publisher_again(&*transport).await;
        }
        round += 1;
    }
    let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for stored in corner.stored().await {
        let line = seen.entry(stored.key.expect("a key")).or_default();
        // Repeats are the inbox's business; first arrivals are in order.
        if !line.contains(&stored.id) {
            line.push(stored.id);
        }
    }
    assert_eq!(seen.len(), KEYS);
    for key in 0..KEYS {
        let expected: Vec<String> = (0..EACH).map(|n| corner.id(format!("{key}-{n}"))).collect();
        assert_eq!(seen[&format!("key-{key}")], expected);
    }
}

pub(super) async fn cut(mut corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    assert_all(
        &soon(send(&*publisher, corner.events(0..10))).await,
        "stored",
    );
    // No confirm comes any more, and the broker has a part of the window.
    let proxy = corner.wire();
    proxy.hold(Direction::ToClient);
    let sent = proxy.counters().to_server;
    let window = send(&*publisher, corner.large_events(10..210));
    soon(proxy.wait_for(|c| c.to_server > sent + 100_000)).await;
    let before = Instant::now();
    proxy.cut();
    let outcomes = soon(window).await;
    assert_all(&outcomes, "unknown");
    assert!(before.elapsed() < CONFIRM_TIMEOUT, "it is known at once");
    assert!(
        outcomes
            .iter()
            .all(|o| o.error().is_some_and(|e| e.is_temporary()))
    );
    proxy.release();
    // The session is over, at once and for good.
    let before = Instant::now();
    assert_all(
        &soon(send(&*publisher, corner.events(0..1))).await,
        "unknown",
    );
    assert!(before.elapsed() < CONFIRM_TIMEOUT);
    let again = corner.publisher_again(&*transport).await;
    assert_all(
        &soon(send(&*again, corner.large_events(10..210))).await,
        "stored",
    );
    assert_eq!(set(corner.stored_ids().await), set(corner.ids(0..210)));
}

pub(super) async fn silence(mut corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    assert_all(
        &soon(send(&*publisher, corner.events(0..10))).await,
        "stored",
    );
    corner.wire().black_hole(true);
    let before = Instant::now();
    let (one, two) = (
        send(&*publisher, corner.events(10..20)),
        // More than a client may hold back for later.
        send(&*publisher, corner.large_events(20..220)),
    );
    let (one, two) = soon(async { (one.await, two.await) }).await;
    assert_all(&one, "unknown");
    assert_all(&two, "unknown");
    let waited = before.elapsed();
    assert!(waited < CONFIRM_TIMEOUT * 6, "{waited:?}");
    drop(publisher);
    // To open a session in the silence ends too, and an engine tries again.
    let error = soon(transport.publisher()).await.err().expect("no session");
    assert!(error.is_temporary(), "{error}");
    corner.wire().black_hole(false);
    let again = corner.publisher_again(&*transport).await;
    assert_all(&soon(send(&*again, corner.events(10..20))).await, "stored");
    assert_all(
        &soon(send(&*again, corner.large_events(20..220))).await,
        "stored",
    );
    let stored = corner.stored_ids().await;
    assert_eq!(set(stored), set(corner.ids(0..220)));
}

pub(super) async fn slow(mut corner: Box<dyn Corner>) {
    let (_transport, publisher) = corner.open().await;
    for round in 0..3 {
        let proxy = corner.wire();
        proxy.hold(Direction::ToClient);
        let sent = proxy.counters().to_server;
        let open = send(&*publisher, corner.events(round * 10..(round + 1) * 10));
        // All of it has arrived; the answers come late.
        soon(proxy.wait_for(|c| c.to_server > sent + 1_000)).await;
        tokio::time::sleep(CONFIRM_TIMEOUT / 20).await;
        proxy.release();
        assert_all(&soon(open).await, "stored");
    }
    assert_eq!(corner.stored_ids().await, corner.ids(0..30), "each once");
}

pub(super) async fn away(corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    drop(publisher);
    let proxy = corner.wire();
    proxy.refuse(true);
    proxy.cut();
    for _ in 0..3 {
        let error = soon(transport.publisher()).await.err().expect("no session");
        assert!(error.is_temporary(), "{error}");
        assert!(
            matches!(error.kind(), Kind::Unreachable | Kind::Timeout),
            "{error}"
        );
        let error = soon(transport.bind(&corner.binding(GROUP))).await.err();
        assert!(error.is_some_and(|e| e.is_temporary()));
    }
    proxy.refuse(false);
    let again = corner.publisher_again(&*transport).await;
    assert_all(&soon(send(&*again, corner.events(0..10))).await, "stored");
}

pub(super) async fn credentials(corner: Box<dyn Corner>) {
    let stranger = corner
        .stranger()
        .expect("a stranger, or an exception for this case");
    let error = soon(stranger.publisher()).await.err().expect("no session");
    assert_eq!(error.kind(), Kind::Refused, "{error}");
    assert!(!error.is_temporary());
    let source = std::error::Error::source(&error).map(|s| format!("{s} {s:?}"));
    let shown = format!("{error} {error:?} {source:?}");
    assert!(!shown.contains("canary"), "{shown}");
}

pub(super) async fn crash(mut corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    assert_all(
        &soon(send(&*publisher, corner.events(0..100))).await,
        "stored",
    );
    let source = corner.bind(&*transport, "reader").await;
    let mut reader = soon(transport.subscribe(&source, "reader", None))
        .await
        .expect("a reader");
    corner.crash().await;
    // A session of before is over, or it tells the truth.
    let told = soon(send(&*publisher, corner.events(100..110))).await;
    assert!(
        told.iter().all(|o| matches!(word(o), "stored" | "unknown")),
        "{told:?}"
    );
    let ended = async { while reader.next().await.is_ok() {} };
    soon(ended).await;
    drop(reader);
    let again = corner.publisher_again(&*transport).await;
    // A broker that has just come back may still be looking for its queues.
    let publish = async {
        loop {
            let outcomes = send(&*again, corner.events(110..120)).await;
            if outcomes.iter().all(Outcome::is_stored) {
                return;
            }
            let waits = outcomes
                .iter()
                .all(|o| matches!(word(o), "stored" | "unavailable"));
            assert!(waits, "{outcomes:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    soon(publish).await;
    let stored = set(corner.stored_ids().await);
    let expected = corner.ids(0..100).into_iter().chain(corner.ids(110..120));
    for id in expected {
        assert!(stored.contains(&id), "{id} was told to be stored");
    }
}

pub(super) async fn no_leak(corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    let source = corner.bind(&*transport, GROUP).await;
    drop(publisher);
    let mut base = Counts::now();
    for round in 0..100 {
        let publisher = corner.publisher_again(&*transport).await;
        let open = send(&*publisher, corner.events(round..round + 1));
        let reader = soon(transport.subscribe(&source, GROUP, None)).await;
        if round.is_multiple_of(2) {
            assert_all(&soon(open).await, "stored");
        }
        if let Some(proxy) = corner.proxy() {
            proxy.cut();
        }
        drop((publisher, reader));
        if round == 9 {
            // What is made once and kept has been made by now.
            base = base.most(settled(None).await);
        }
    }
    let end = settled(Some(&base)).await;
    assert!(end.fits(&base), "grew from {base:?} to {end:?}");
}

/// What a process has open.
#[derive(Debug, Clone, Copy)]
struct Counts {
    tasks: usize,
    files: usize,
}

impl Counts {
    /// Room for a connection that is kept and one that is just ending.
    const SLACK: usize = 8;

    fn now() -> Self {
        let files = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let tasks = tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks();
        Self { tasks, files }
    }

    fn most(self, other: Self) -> Self {
        Self {
            tasks: self.tasks.max(other.tasks),
            files: self.files.max(other.files),
        }
    }

    fn fits(&self, base: &Self) -> bool {
        self.tasks <= base.tasks + Self::SLACK && self.files <= base.files + Self::SLACK
    }
}

/// Waits until what is ending has ended: until it fits, or no longer shrinks.
async fn settled(base: Option<&Counts>) -> Counts {
    let start = Instant::now();
    let mut last = Counts::now();
    let mut still = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = Counts::now();
        if base.is_some_and(|base| now.fits(base)) || start.elapsed() > PATIENCE / 2 {
            return now;
        }
        still = if now.tasks < last.tasks || now.files < last.files {
            0
        } else {
            still + 1
        };
        if base.is_none() && still >= 10 {
            return now;
        }
        last = now;
    }
}
