//! What operators do with events that were given up, while newer ones of the same keys are on their way.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use pillarbox_core::{
    Admin, Context, Delivery, Event, Failure, Handler, Kind,
    admin::{Filter, Pace, Page},
    failure::RETRIED,
};
use pillarbox_tests::{
    TOPIC, Tick, TickHandler, World, in_both_worlds,
    tables::{dead_letters, deferred},
    until,
};
use pillarbox_transport::{
    Binding, Error, Message, Outcome, Publisher, Result, Source, Subscription, Transport,
};
use serde::{Deserialize, Serialize};

use crate::retry;

in_both_worlds!(
    a_relays_letter_goes_through_once_somebody_wants_it,
    letters_of_a_key_go_through_in_order_beside_newer_ones,
    a_consumers_letter_is_applied_once_and_newer_ones_wait_behind_it,
    a_line_waits_for_a_program_that_has_its_handler,
    a_letter_remembers_an_answer_that_was_lost,
);

/// An event whose consumer comes late.
#[derive(Serialize, Deserialize)]
struct Late {
    key: String,
    n: u32,
}

impl Event for Late {
    const TYPE: &'static str = "test.late";
    const TOPIC: &'static str = TOPIC;
    fn key(&self) -> Option<Cow<'_, str>> {
        Some(self.key.as_str().into())
    }
}

/// What another version of a program handles.
#[derive(Serialize, Deserialize)]
struct Other {}

impl Event for Other {
    const TYPE: &'static str = "test.handled.other";
    const TOPIC: &'static str = TOPIC;
}

impl Handler<Other> for Seen {
    async fn handle(&self, _: Delivery<Other>, _: &mut Context<'_>) -> Result<(), Failure> {
        Ok(())
    }
}

/// Numbers as they came, and what each said of having been retried.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Came>>>);

type Came = (u32, Option<String>);

impl Seen {
    fn all(&self) -> Vec<Came> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Handler<Late> for Seen {
    async fn handle(&self, d: Delivery<Late>, _: &mut Context<'_>) -> Result<(), Failure> {
        let retried = d.message.attribute(RETRIED).map(ToOwned::to_owned);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push((d.event.n, retried));
        Ok(())
    }
}

fn late(n: u32) -> Message {
    Tick::new("a", n).message(Late::TYPE)
}

fn fast() -> Pace {
    Pace {
        per_second: 1_000.0,
        ..Pace::default()
    }
}

async fn a_relays_letter_goes_through_once_somebody_wants_it(world: World) {
    let outbox = world.outbox();
    let relay = world.relay(&outbox).retry(retry(&[]));
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    world.commit_messages(&outbox, vec![late(1)]).await;
    world
        .commit(&outbox, &[Tick::new("a", 2), Tick::new("a", 3)])
        .await;
    world.until_effects(2).await;

    let admin = Admin::new(&world.producer, "ada");
    let main = Filter::of_destination("main");
    until("the cursor has passed", async || {
        admin.dry_run(&main).await.expect("a dry run").newer == Some(2)
    })
    .await;
    let letters = admin.dead_letters(&main, &Page::default()).await;
    let letter = letters.expect("a list").remove(0);
    assert!(letter.reason.contains(Late::TYPE), "{}", letter.reason);

    let seen = Seen::default();
    let mut wants = world.group_of("late").on::<Late>(seen.clone());
    wants.bind().await.expect("bind");
    let wants = wants.spawn();
    until("it reads", async || wants.health().held > 0).await;
    assert!(
        admin
            .retry(&letter.id, "it has a consumer now")
            .await
            .expect("a retry")
    );
    until("it went through", async || !seen.all().is_empty()).await;
    until("its line is empty", async || {
        deferred(&world.producer).await == 0
    })
    .await;
    // The key goes on.
    world.commit(&outbox, &[Tick::new("a", 4)]).await;
    world.until_effects(3).await;
    let gone = admin
        .retry(&letter.id, "again")
        .await
        .expect_err("it is gone");
    assert_eq!(gone.kind(), Kind::NotFound);
    way.stop().await;
    wants.shutdown().await.expect("it ends well");
    assert_eq!(seen.all(), [(1, Some("1".to_owned()))]);
    assert_eq!(dead_letters(&world.producer).await, []);
}

async fn letters_of_a_key_go_through_in_order_beside_newer_ones(world: World) {
    const DEAD: u32 = 40;
    const ALL: u32 = 400;
    let outbox = world.outbox();
    let relay = world.relay(&outbox).retry(retry(&[]));
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    let dead = (1..=DEAD).map(late).collect();
    world.commit_messages(&outbox, dead).await;
    until("all are dead", async || {
        dead_letters(&world.producer).await.len() == DEAD as usize
    })
    .await;

    let seen = Seen::default();
    let mut wants = world.group_of("late").on::<Late>(seen.clone());
    wants.bind().await.expect("bind");
    let wants = wants.spawn();
    until("it reads", async || wants.health().held > 0).await;
    let admin = Admin::new(&world.producer, "ada");
    let main = Filter::of_destination("main").key(TOPIC, "a");
    let write = async {
        for n in DEAD + 1..=ALL {
            world.commit_messages(&outbox, vec![late(n)]).await;
            if n % 10 == 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    let pace = Pace {
        per_second: 100.0,
        ..fast()
    };
    let (done, ()) = tokio::join!(
        admin.retry_all(&main, &pace, "it has a consumer now"),
        write
    );
    assert_eq!(done.expect("a retry").done, u64::from(DEAD));
    until("all went through", async || {
        seen.all().len() >= ALL as usize
    })
    .await;
    until("nothing waits", async || {
        deferred(&world.producer).await == 0
    })
    .await;
    way.stop().await;
    wants.shutdown().await.expect("it ends well");
    let seen = seen.all();
    assert_eq!(seen.len(), ALL as usize, "each once");
    let of = |retried: bool| {
        let some = seen.iter().filter(|(_, r)| r.is_some() == retried);
        some.map(|(n, _)| *n).collect::<Vec<_>>()
    };
    assert_eq!(of(true), (1..=DEAD).collect::<Vec<_>>());
    assert_eq!(of(false), (DEAD + 1..=ALL).collect::<Vec<_>>());
}

async fn a_consumers_letter_is_applied_once_and_newer_ones_wait_behind_it(world: World) {
    let outbox = world.outbox();
    let mended = Arc::new(AtomicBool::new(false));
    let is_mended = mended.clone();
    let handler = TickHandler::judging(move |d| {
        if d.event.n == 1 && !is_mended.load(Relaxed) {
            return Err(Failure::reject("no such account"));
        }
        // Its first attempt after the retry fails: the newer ones must wait behind it.
        if d.event.n == 1 && d.attempts == 0 {
            return Err(Failure::retry_in(Duration::from_millis(1_500), "not yet"));
        }
        Ok(())
    });
    let way = world.start(&outbox, world.ticks(handler.clone())).await;
    world
        .commit(
            &outbox,
            &[Tick::new("a", 1), Tick::new("a", 2), Tick::new("b", 1)],
        )
        .await;
    until("two are dead", async || {
        dead_letters(&world.consumer).await.len() == 2
    })
    .await;
    world.until_effects(1).await;
    mended.store(true, Relaxed);
    let admin = Admin::new(&world.consumer, "ada");
    let of_a = Filter::of_group(&world.group).key(TOPIC, "a");
    let done = admin
        .retry_all(&of_a, &fast(), "the account is there")
        .await;
    assert_eq!(done.expect("a retry").done, 1);
    until("it was tried", async || handler.calls_of("a", 1).len() == 2).await;
    world
        .commit(&outbox, &[Tick::new("a", 3), Tick::new("b", 2)])
        .await;
    world.until_effects(4).await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    // What the other letter meant is not wanted any more.
    let of_b = Filter::of_group(&world.group).key(TOPIC, "b");
    let letters = admin.dead_letters(&of_b, &Page::default()).await;
    let letter = letters.expect("a list").remove(0);
    admin
        .discard(&letter.id, "a test")
        .await
        .expect("a discard");
    way.stop().await;
    let effects: Vec<(String, u32)> = world
        .effects()
        .await
        .into_iter()
        .map(|e| (e.key, e.n))
        .collect();
    let of = |key: &str| {
        let of_key = effects.iter().filter(|(k, _)| k == key);
        of_key.map(|(_, n)| *n).collect::<Vec<_>>()
    };
    assert_eq!(
        of("a"),
        [2, 1, 3],
        "what went past stays past, what came later waited"
    );
    assert_eq!(of("b"), [2]);
    assert_eq!(dead_letters(&world.consumer).await, []);
}

async fn a_line_waits_for_a_program_that_has_its_handler(world: World) {
    let outbox = world.outbox();
    let failing =
        TickHandler::judging(|_| Err(Failure::retry_in(Duration::from_millis(200), "not yet")));
    let way = world.start(&outbox, world.ticks(failing.clone())).await;
    world.commit(&outbox, &[Tick::new("a", 1)]).await;
    until("it waits", async || deferred(&world.consumer).await == 1).await;
    way.stop().await;
    // An older program of the group, as in a rolling deployment.
    let mut older = world.group_of(&world.group).on::<Other>(Seen::default());
    older.bind().await.expect("bind");
    let older = older.spawn();
    until("it reads", async || older.health().held > 0).await;
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(deferred(&world.consumer).await, 1);
    older.shutdown().await.expect("it ends well");
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    world.until_effects(1).await;
    until("nothing waits", async || {
        deferred(&world.consumer).await == 0
    })
    .await;
    way.stop().await;
}

/// Loses the answers to some attempts of a type that nobody wants.
struct Forgetful {
    inner: Arc<dyn Transport>,
    lost: Lost,
}

/// Which attempt of which key's event; and how many there were.
type Lost = Arc<Mutex<HashMap<&'static str, (u32, u32)>>>;

struct Loses {
    inner: Box<dyn Publisher>,
    lost: Lost,
}

#[async_trait]
impl Transport for Forgetful {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(Loses {
            inner: self.inner.publisher().await?,
            lost: self.lost.clone(),
        }))
    }

    async fn bind(&self, binding: &Binding) -> Result<Vec<Source>> {
        self.inner.bind(binding).await
    }

    async fn subscribe(
        &self,
        source: &Source,
        group: &str,
        from: Option<u64>,
    ) -> Result<Box<dyn Subscription>> {
        self.inner.subscribe(source, group, from).await
    }

    async fn dead_letters(&self, topic: &str, group: &str) -> Result<Box<dyn Publisher>> {
        self.inner.dead_letters(topic, group).await
    }
}

impl Publisher for Loses {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let is_lost = |m: &Arc<Message>| {
            let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
            let of_key = lost.get_mut(m.key.as_deref().unwrap_or_default());
            of_key.is_some_and(|(which, attempt)| {
                *attempt += 1;
                attempt == which
            })
        };
        let lost: Vec<bool> = messages.iter().map(is_lost).collect();
        let answers = self.inner.publish(messages);
        Box::pin(async move {
            let closed = || {
                let kind = pillarbox_transport::Kind::Closed;
                Outcome::Unknown(Error::new(kind, "publish", "the answer was lost"))
            };
            let answers = answers.await.into_iter().zip(lost);
            answers
                .map(|(o, lost)| if lost { closed() } else { o })
                .collect()
        })
    }
}

async fn a_letter_remembers_an_answer_that_was_lost(world: World) {
    let outbox = world.outbox();
    let lost = HashMap::from([("first", (1, 0)), ("second", (2, 0)), ("none", (9, 0))]);
    let transport = Forgetful {
        inner: world.transport.clone(),
        lost: Arc::new(Mutex::new(lost)),
    };
    let relay = pillarbox_core::Relay::new(&outbox, Arc::new(transport))
        .source("producer")
        .settings(World::relay_settings())
        .retry(retry(&[100]));
    let way = world
        .start_with(relay, world.ticks(TickHandler::new()))
        .await;
    // One after the other: what is in flight with a lost answer is lost with it.
    for (n, key) in (1..).zip(["first", "second", "none"]) {
        let message = Tick::new(key, n).message("test.nowhere");
        world.commit_messages(&outbox, vec![message]).await;
        until("it was given up", async || {
            dead_letters(&world.producer).await.len() == n as usize
        })
        .await;
    }
    way.stop().await;
    let admin = Admin::new(&world.producer, "ada");
    let page = Page {
        newest_first: false,
        ..Page::default()
    };
    let letters = admin
        .dead_letters(&Filter::default(), &page)
        .await
        .expect("a list");
    let told: Vec<_> = letters
        .iter()
        .map(|l| (l.key.as_deref().unwrap_or_default(), l.maybe_sent))
        .collect();
    assert_eq!(told, [("first", true), ("second", true), ("none", false)]);
}
