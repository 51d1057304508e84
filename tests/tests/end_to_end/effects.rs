//! Effects without a transaction: at least once, remembered, in order, and as patient as handlers.

use std::{
    borrow::Cow,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use pillarbox_core::{
    Connection, Consumer, ConsumerSettings, Context, Delivery, Effect, Event, Failure, Handler,
    Kind, Outbox,
};
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, in_both_worlds, numbers_by_key,
    tables::{self, count, dead_letters, deferred, rewind},
    until,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::retry;

in_both_worlds!(
    one_is_remembered_when_its_event_comes_again,
    one_holds_no_transaction_open,
    one_that_fails_is_tried_again_in_order_and_then_a_dead_letter,
    one_that_takes_too_long_or_panics_has_failed,
    one_whose_service_is_away_waits_and_what_ran_before_it_is_remembered,
    one_that_its_owner_did_not_outlive_runs_again,
    one_waits_for_the_handler_before_it,
    one_behind_a_full_waiting_room_runs_once,
    what_one_enqueues_names_its_cause,
    a_type_has_a_handler_or_an_effect,
);

type Run = dyn for<'a> Fn(&'a Delivery<Tick>) -> BoxFuture<'a, Result<(), Failure>> + Send + Sync;

/// Counts its runs: key, number, attempts.
#[derive(Clone)]
struct Mail {
    runs: Arc<Mutex<Vec<(String, u32, u32)>>>,
    run: Arc<Run>,
}

impl Mail {
    fn new() -> Self {
        Self::judging(|_| Ok(()))
    }

    fn judging(
        judge: impl Fn(&Delivery<Tick>) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        Self::acting(move |d| {
            let verdict = judge(d);
            Box::pin(async move { verdict })
        })
    }

    fn acting(
        run: impl for<'a> Fn(&'a Delivery<Tick>) -> BoxFuture<'a, Result<(), Failure>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self {
            runs: Arc::default(),
            run: Arc::new(run),
        }
    }

    fn note(&self, key: String, d: &Delivery<Tick>) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.push((key, d.event.n, d.attempts));
    }

    fn runs(&self) -> Vec<(String, u32, u32)> {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.clone()
    }

    fn runs_of(&self, key: &str) -> Vec<(u32, u32)> {
        let of = self.runs().into_iter().filter(|(k, ..)| k == key);
        of.map(|(_, n, attempts)| (n, attempts)).collect()
    }

    async fn until_runs(&self, runs: usize) {
        until(&format!("{runs} runs"), async || self.runs().len() >= runs).await;
    }
}

impl Effect<Tick> for Mail {
    async fn run(&self, d: &Delivery<Tick>) -> Result<(), Failure> {
        let key = d.event.key.clone().unwrap_or_default();
        self.note(key, d);
        (self.run)(d).await
    }
}

fn mails(world: &World, mail: &Mail) -> Consumer {
    world.group_of(&world.group).on_effect::<Tick>(mail.clone())
}

fn ticks(keys: &[&str], numbers: u32) -> Vec<Tick> {
    let of = |n| keys.iter().map(move |key| Tick::new(*key, n));
    (1..=numbers).flat_map(of).collect()
}

/// Events that the inbox has.
async fn remembered(world: &World) -> usize {
    count(&world.consumer, "{t}inbox").await
}

async fn until_remembered(world: &World, events: usize) {
    until(&format!("{events} are remembered"), async || {
        remembered(world).await >= events
    })
    .await;
}

async fn one_is_remembered_when_its_event_comes_again(world: World) {
    let outbox = world.outbox();
    let mail = Mail::new();
    for n in 1..=2 {
        let way = world.start(&outbox, mails(&world, &mail)).await;
        let again = ["a", "b", "c"].map(|key| Tick::new(key, n));
        world.commit(&outbox, &again).await;
        until_remembered(&world, 3 * n as usize).await;
        way.stop().await;
        rewind(&world.producer).await;
    }
    for key in ["a", "b", "c"] {
        assert_eq!(mail.runs_of(key), [(1, 0), (2, 0)], "{key}");
    }
}

/// Somebody else can write meanwhile, and no session of the engine stands open.
async fn one_holds_no_transaction_open(world: World) {
    let outbox = world.outbox();
    let (began, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let mail = Mail::acting({
        let (began, go_on) = (began.clone(), go_on.clone());
        move |_| {
            let (began, go_on) = (began.clone(), go_on.clone());
            Box::pin(async move {
                began.notify_one();
                go_on.notified().await;
                Ok(())
            })
        }
    });
    let way = world.start(&outbox, mails(&world, &mail)).await;
    world.commit(&outbox, &ticks(&["a"], 1)).await;
    began.notified().await;
    tables::query(
        &world.consumer,
        "INSERT INTO effect (key, n) VALUES ('other', 1)",
    )
    .await;
    if tables::is_postgres(&world.consumer) {
        // What renews the lease is open for a moment only.
        until("none is open", async || {
            let sql = "SELECT CAST(count(*) AS TEXT) FROM pg_stat_activity \
                       WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()";
            tables::number(&world.consumer, sql).await == 0
        })
        .await;
    }
    assert_eq!(remembered(&world).await, 0);
    go_on.notify_one();
    until_remembered(&world, 1).await;
    way.stop().await;
    assert_eq!(mail.runs().len(), 1);
}

async fn one_that_fails_is_tried_again_in_order_and_then_a_dead_letter(world: World) {
    let outbox = world.outbox();
    let mail = Mail::judging(|d| match (d.event.key.as_deref(), d.event.n) {
        (Some("dead"), 1) => Err(std::io::Error::other("no such mailbox").into()),
        (Some("later"), 1) if d.attempts < 2 => Err(std::io::Error::other("greylisted").into()),
        (Some("refused"), 1) => Err(Failure::reject("not for us")),
        (Some("skipped"), 1) => Err(Failure::skip()),
        _ => Ok(()),
    });
    let consumer = mails(&world, &mail).retry(retry(&[50, 50]));
    world
        .commit(
            &outbox,
            &ticks(&["dead", "later", "refused", "skipped", "good"], 2),
        )
        .await;
    let way = world.start(&outbox, consumer).await;
    until_remembered(&world, 10).await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    way.stop().await;
    assert_eq!(mail.runs_of("dead"), [(1, 0), (1, 1), (1, 2), (2, 0)]);
    assert_eq!(mail.runs_of("later"), [(1, 0), (1, 1), (1, 2), (2, 0)]);
    for key in ["refused", "skipped", "good"] {
        assert_eq!(mail.runs_of(key), [(1, 0), (2, 0)], "{key}");
    }
    let mut dead = dead_letters(&world.consumer).await;
    dead.sort_by(|a, b| a.key.cmp(&b.key));
    let found: Vec<_> = dead
        .iter()
        .map(|d| (d.key.as_deref(), d.attempts, d.reason.as_str()))
        .collect();
    let expected = [
        (Some("dead"), 3, "no such mailbox"),
        (Some("refused"), 1, "not for us"),
    ];
    assert_eq!(found, expected);
}

async fn one_that_takes_too_long_or_panics_has_failed(world: World) {
    let outbox = world.outbox();
    let mail = Mail::acting(|d| {
        let key = d.event.key.clone();
        Box::pin(async move {
            match key.as_deref() {
                Some("slow") => std::future::pending().await,
                Some("panics") => panic!("on purpose"),
                _ => Ok(()),
            }
        })
    });
    let consumer = mails(&world, &mail)
        .retry(retry(&[50]))
        .settings(ConsumerSettings {
            effect_timeout: Duration::from_millis(200),
            ..World::consumer_settings()
        });
    let way = world.start(&outbox, consumer).await;
    world
        .commit(&outbox, &ticks(&["slow", "panics", "good"], 1))
        .await;
    until("two dead letters", async || {
        dead_letters(&world.consumer).await.len() == 2
    })
    .await;
    until_remembered(&world, 3).await;
    way.stop().await;
    let mut dead = dead_letters(&world.consumer).await;
    dead.sort_by(|a, b| a.key.cmp(&b.key));
    assert_eq!(dead[0].reason, "the effect panicked");
    assert_eq!(dead[1].reason, "the effect took longer than 200ms");
    assert!(dead.iter().all(|d| d.attempts == 2), "{dead:?}");
    assert_eq!(mail.runs().len(), 5);
}

async fn one_whose_service_is_away_waits_and_what_ran_before_it_is_remembered(world: World) {
    let outbox = world.outbox();
    let healed = Arc::new(AtomicBool::new(false));
    let is_healed = healed.clone();
    let tries = AtomicUsize::new(0);
    let mail = Mail::judging(move |d| {
        if d.event.key.as_deref() != Some("away") || is_healed.load(Relaxed) {
            return Ok(());
        }
        // Both are nobody's fault.
        match tries.fetch_add(1, Relaxed) % 2 {
            0 => Err(Failure::unavailable("the mail server is away")),
            _ => Err(sqlx::Error::PoolTimedOut.into()),
        }
    });
    let all = [ticks(&["a", "b"], 3), ticks(&["away"], 2), ticks(&["c"], 2)].concat();
    world.commit(&outbox, &all).await;
    let way = world.start(&outbox, mails(&world, &mail)).await;
    until("it was tried three times", async || {
        mail.runs_of("away").len() >= 3
    })
    .await;
    until("the trouble is told", async || {
        way.consumer.health().trouble.is_some()
    })
    .await;
    healed.store(true, Relaxed);
    until_remembered(&world, 10).await;
    until("the trouble is over", async || {
        way.consumer.health().trouble.is_none()
    })
    .await;
    way.stop().await;
    for (key, runs) in [("a", 3), ("b", 3), ("c", 2)] {
        let expected: Vec<_> = (1..=runs).map(|n| (n, 0)).collect();
        assert_eq!(mail.runs_of(key), expected, "{key}");
    }
    assert!(
        mail.runs_of("away")
            .iter()
            .all(|(_, attempts)| *attempts == 0)
    );
    assert_eq!(mail.runs_of("away").last(), Some(&(2, 0)));
    assert_eq!(dead_letters(&world.consumer).await, []);
}

/// At least once: its owner ends in the middle of it, as in a crash, and the next one runs it again.
async fn one_that_its_owner_did_not_outlive_runs_again(world: World) {
    let outbox = world.outbox();
    let first = AtomicBool::new(true);
    let mail = Mail::acting(move |d| {
        let hangs = d.event.n == 2 && first.swap(false, Relaxed);
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            Ok(())
        })
    });
    let way = world.start(&outbox, mails(&world, &mail)).await;
    world.commit(&outbox, &ticks(&["a"], 3)).await;
    mail.until_runs(2).await;
    way.consumer.abort();
    let second = mails(&world, &mail).spawn();
    until_remembered(&world, 3).await;
    way.stop().await;
    second.shutdown().await.expect("the second consumer");
    let numbers: Vec<u32> = mail.runs_of("a").iter().map(|(n, _)| *n).collect();
    // What ran before it, and was not written down, runs again too.
    assert!(
        numbers == [1, 2, 2, 3] || numbers == [1, 2, 1, 2, 3],
        "{numbers:?}"
    );
    assert!(mail.runs().iter().all(|(.., attempts)| *attempts == 0));
}

/// Handled in the transaction, where [`Tick`] has an effect.
#[derive(Debug, Serialize, Deserialize)]
struct Change {
    key: String,
    n: u32,
}

impl Event for Change {
    const TYPE: &'static str = "test.handled.change";
    const TOPIC: &'static str = TOPIC;
    fn key(&self) -> Option<Cow<'_, str>> {
        Some(self.key.as_str().into())
    }
}

/// Fails at first; what it did shows in the table of effects.
struct Changes(Arc<Mutex<Vec<(String, u32, u32)>>>);

impl Handler<Change> for Changes {
    async fn handle(&self, d: Delivery<Change>, cx: &mut Context<'_>) -> Result<(), Failure> {
        let sql = "INSERT INTO effect (key, n) VALUES ('change', 0)";
        match cx.tx() {
            Connection::Postgres(c) => sqlx::raw_sql(sql).execute(c).await.map(drop)?,
            Connection::Sqlite(c) => sqlx::raw_sql(sql).execute(c).await.map(drop)?,
        }
        if d.event.n == 1 && d.attempts < 2 {
            return Err(std::io::Error::other("not yet").into());
        }
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        runs.push((d.event.key, 10 + d.event.n, d.attempts));
        Ok(())
    }
}

async fn one_waits_for_the_handler_before_it(world: World) {
    let outbox = world.outbox();
    let mail = Mail::new();
    let changes = Changes(mail.runs.clone());
    let consumer = mails(&world, &mail)
        .on::<Change>(changes)
        .retry(retry(&[100, 100]));
    let message = |n: u32| {
        let change = serde_json::json!({"key": "a", "n": n}).to_string();
        let mut message = Tick::new("a", n).message(Change::TYPE);
        message.payload = Some(change.into());
        message
    };
    let tick = |n: u32| Tick::new("a", n).message(Tick::TYPE);
    let all = vec![message(1), tick(1), message(2), tick(2)];
    world.commit_messages(&outbox, all).await;
    let way = world.start(&outbox, consumer).await;
    until_remembered(&world, 4).await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    way.stop().await;
    let numbers: Vec<u32> = mail.runs_of("a").iter().map(|(n, _)| *n).collect();
    assert_eq!(numbers, [11, 1, 12, 2]);
    // What a failed handler wrote is undone.
    assert_eq!(world.count_effects().await, 2);
}

/// What runs behind an event that has no place to wait could not be written down.
async fn one_behind_a_full_waiting_room_runs_once(world: World) {
    let outbox = world.outbox();
    let healed = Arc::new(AtomicBool::new(false));
    let is_healed = healed.clone();
    let mail = Mail::judging(move |d| {
        let bad = d.event.key.as_deref().is_some_and(|k| k.starts_with("bad"));
        if bad && !is_healed.load(Relaxed) {
            return Err(std::io::Error::other("not yet").into());
        }
        Ok(())
    });
    let consumer = mails(&world, &mail)
        .retry(retry(&[1_000; 20]))
        .settings(ConsumerSettings {
            deferred: 1,
            ..World::consumer_settings()
        });
    let way = world.start(&outbox, consumer).await;
    world.commit(&outbox, &[Tick::new("bad-1", 1)]).await;
    until("the room is full", async || {
        deferred(&world.consumer).await == 1
    })
    .await;
    let keys = ["a", "bad-2", "b", "bad-1", "c"];
    let ticks: Vec<Tick> = (2..).zip(keys).map(|(n, key)| Tick::new(key, n)).collect();
    world.commit(&outbox, &ticks).await;
    until("it says that no more can wait", async || {
        let trouble = way.consumer.health().trouble;
        trouble.is_some_and(|t| t.contains("the maxima are 1"))
    })
    .await;
    healed.store(true, Relaxed);
    until_remembered(&world, 6).await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    way.stop().await;
    for key in ["a", "b", "c"] {
        assert_eq!(mail.runs_of(key).len(), 1, "{key}");
    }
    let runs = mail.runs();
    let numbers = numbers_by_key(runs.iter().map(|(key, n, _)| (key.as_str(), *n)));
    assert!(numbers["bad-1"].is_sorted(), "{numbers:?}");
}

async fn what_one_enqueues_names_its_cause(world: World) {
    let outbox = world.outbox().with_attribute("correlationid", "the-order");
    let answers = Outbox::new(&world.consumer);
    let mail = Mail::acting({
        let answers = answers.clone();
        move |d| {
            let answers = answers.caused_by(&d.message);
            Box::pin(async move {
                let tick = Tick::new("answer", d.event.n);
                match answers.database().pool().expect("a pool") {
                    pillarbox_core::Pool::Postgres(pool) => {
                        let mut tx = pool.begin().await?;
                        answers.enqueue(&mut tx, &tick).await?;
                        tx.commit().await?;
                    }
                    pillarbox_core::Pool::Sqlite(pool) => {
                        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
                        answers.enqueue(&mut tx, &tick).await?;
                        tx.commit().await?;
                    }
                }
                Ok(())
            })
        }
    });
    let way = world.start(&outbox, mails(&world, &mail)).await;
    world.commit(&outbox, &ticks(&["a"], 1)).await;
    until_remembered(&world, 1).await;
    way.stop().await;
    let asked = tables::log(&world.producer).await;
    let column = if tables::is_postgres(&world.consumer) {
        "CAST(attributes AS TEXT)"
    } else {
        "attributes"
    };
    let sql = format!("SELECT {column} FROM {{t}}outbox");
    let rows = tables::query(&world.consumer, &sql).await;
    let attributes: serde_json::Value =
        serde_json::from_str(rows[0][0].as_deref().expect("attributes")).expect("JSON");
    assert_eq!(attributes["correlationid"], "the-order");
    assert_eq!(attributes["causationid"], asked[0].id.as_str());
}

async fn a_type_has_a_handler_or_an_effect(world: World) {
    for mut consumer in [
        mails(&world, &Mail::new()).on::<Tick>(TickHandler::new()),
        world
            .ticks(TickHandler::new())
            .on_effect::<Tick>(Mail::new()),
    ] {
        let refused = consumer.bind().await.expect_err("it has both");
        assert_eq!(refused.kind(), Kind::Invalid);
        let text = refused.to_string();
        assert!(
            text.contains("a handler and an effect for \"test.tick\""),
            "{text}"
        );
    }
}
