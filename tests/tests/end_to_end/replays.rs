//! Events of the log, sent once more.

use std::{
    future::{pending, ready},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pillarbox_core::{
    Admin, Kind, Outbox, Relay,
    admin::{REPLAYED, ReplayRequest, Selection},
};
use pillarbox_tests::{Tick, TickHandler, World, embedded_alone, in_both_worlds, until};
use pillarbox_transport::{
    Binding, Message, Outcome, Publisher, Result, Source, Subscription, Transport,
};
use tokio::sync::oneshot;

use futures_util::{FutureExt, future::BoxFuture};

in_both_worlds!(
    a_replay_brings_a_late_group_its_events_and_the_others_no_second_effect,
    a_replay_goes_on_where_it_stopped,
);

/// Handlers that note number and mark of what they are given.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Came>>>);

type Came = (u32, Option<String>);

impl Seen {
    fn handler(&self) -> TickHandler {
        let seen = self.0.clone();
        TickHandler::judging(move |d| {
            let mark = d.message.attributes.get(REPLAYED).cloned();
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.push((d.event.n, mark));
            Ok(())
        })
    }

    fn all(&self) -> Vec<Came> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn of_key(key: &str) -> Selection {
    Selection {
        key: Some(key.to_owned()),
        ..Selection::default()
    }
}

async fn a_replay_brings_a_late_group_its_events_and_the_others_no_second_effect(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let first = Seen::default();
    let way = world.start(&outbox, world.ticks(first.handler())).await;
    let ticks: Vec<_> = (0..6)
        .map(|n| Tick::new(format!("key-{}", n % 2), n))
        .collect();
    world.commit(&outbox, &ticks).await;
    world.until_effects(6).await;
    until("main is through", async || {
        let all = admin.destinations().await.expect("destinations");
        all.iter().all(|d| d.behind == 0)
    })
    .await;

    let request = ReplayRequest::new("again", "main").of(of_key("key-1"));
    assert_eq!(admin.plan_replay(&request).await.expect("a plan").events, 3);
    assert!(
        admin
            .start_replay(&request, "test")
            .await
            .expect("a replay")
    );
    // What comes later is no part of it.
    world.commit(&outbox, &[Tick::new("key-1", 6)]).await;
    world.until_effects(7).await;
    let mut told = Vec::new();
    let run = admin.run_replay("again", world.relay(&outbox), pending(), |at| {
        told.push(at.sent)
    });
    let done = tokio::time::timeout(Duration::from_secs(60), run).await;
    let done = done.expect("in time").expect("a replay");
    assert!(done.is_through && done.sent == 3, "{done:?}");
    assert_eq!(told.last(), Some(&3));
    assert!(admin.replays().await.expect("replays").is_empty());
    let gone = admin
        .run_replay("again", world.relay(&outbox), ready(()), |_| {})
        .await;
    let gone = gone.expect_err("it is through");
    assert_eq!(gone.kind(), Kind::NotFound);

    // Whoever has applied them does not apply them again.
    world.commit(&outbox, &[Tick::new("key-1", 7)]).await;
    world.until_effects(8).await;
    way.stop().await;
    assert_eq!(world.count_effects().await, 8);
    assert!(first.all().iter().all(|(_, mark)| mark.is_none()));

    // A group whose inbox has never seen them does, and sees that they are replayed.
    let late = Seen::default();
    let mut consumer = world.group_of("late").on::<Tick>(late.handler());
    consumer.bind().await.expect("bind");
    let consumer = consumer.spawn();
    let way_back = ReplayRequest::new("for-the-late", "main").of(of_key("key-1"));
    admin
        .start_replay(&way_back, "test")
        .await
        .expect("a replay");
    let others = world.ticks(first.handler()).spawn();
    let run = admin.run_replay("for-the-late", world.relay(&outbox), pending(), |_| {});
    let done = tokio::time::timeout(Duration::from_secs(60), run).await;
    assert_eq!(done.expect("in time").expect("a replay").sent, 5);
    until("the late group has them", async || late.all().len() >= 5).await;
    consumer.shutdown().await.expect("the consumer ends well");
    others.shutdown().await.expect("the consumer ends well");
    let mark = Some("for-the-late".to_owned());
    let expected: Vec<_> = [1, 3, 5, 6, 7].map(|n| (n, mark.clone())).into();
    assert_eq!(late.all(), expected);
}

/// Stopped in the middle by whoever runs it, and run again by another process.
async fn a_replay_goes_on_where_it_stopped(world: World) {
    let outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let ticks: Vec<_> = (0..40)
        .map(|n| Tick::new(format!("key-{}", n % 4), n))
        .collect();
    world.commit(&outbox, &ticks).await;
    world.until_effects(40).await;
    let mut request = ReplayRequest::new("slow", "main");
    request.per_second = 20.0;
    admin
        .start_replay(&request, "test")
        .await
        .expect("a replay");
    let (told, stop) = oneshot::channel();
    let mut told = Some(told);
    let begun = std::time::Instant::now();
    let stop = async { drop(stop.await) };
    let first = admin
        .run_replay("slow", world.relay(&outbox), stop, |at| {
            if at.sent >= 5
                && let Some(told) = told.take()
            {
                let _ = told.send(());
            }
        })
        .await
        .expect("a replay");
    assert!(!first.is_through && first.sent < 40, "{first:?}");
    let replays = admin.replays().await.expect("replays");
    assert_eq!(replays.len(), 1);
    let second = Admin::new(&world.producer, "bob");
    let run = second.run_replay("slow", world.relay(&outbox), pending(), |_| {});
    let done = tokio::time::timeout(Duration::from_secs(60), run).await;
    let done = done.expect("in time").expect("a replay");
    assert!(done.is_through);
    // What was in flight when it stopped was waited for: nothing is sent again.
    assert_eq!(first.sent + done.sent, 40, "{first:?}, {done:?}");
    assert!(
        begun.elapsed() >= Duration::from_millis(1_500),
        "{:?}",
        begun.elapsed()
    );
    way.stop().await;
    assert_eq!(world.count_effects().await, 40);
}

embedded_alone!(a_replay_ends_though_events_are_refused);

/// Refuses one key for good.
struct Refusing(Arc<dyn Transport>);

struct Publishing(Box<dyn Publisher>);

impl Publisher for Publishing {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let refused: Vec<bool> = messages
            .iter()
            .map(|m| m.key.as_deref() == Some("key-0"))
            .collect();
        let sent = self.0.publish(messages);
        async move {
            let outcomes = sent.await.into_iter().zip(refused);
            let judge = |(outcome, refused)| match refused {
                true => Outcome::Rejected(pillarbox_transport::Error::new(
                    pillarbox_transport::Kind::Invalid,
                    "publish",
                    "not this one",
                )),
                false => outcome,
            };
            outcomes.map(judge).collect()
        }
        .boxed()
    }
}

#[async_trait::async_trait]
impl Transport for Refusing {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(Publishing(self.0.publisher().await?)))
    }

    async fn bind(&self, binding: &Binding) -> Result<Vec<Source>> {
        self.0.bind(binding).await
    }

    async fn subscribe(
        &self,
        source: &Source,
        group: &str,
        from: Option<u64>,
    ) -> Result<Box<dyn Subscription>> {
        self.0.subscribe(source, group, from).await
    }

    async fn dead_letters(&self, topic: &str, group: &str) -> Result<Box<dyn Publisher>> {
        self.0.dead_letters(topic, group).await
    }
}

/// What the broker refuses becomes the destination's dead letters: somebody may look at them when the replay is gone.
async fn a_replay_ends_though_events_are_refused(world: World) {
    let outbox: Outbox = world.outbox();
    let admin = Admin::new(&world.producer, "ada");
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let ticks: Vec<_> = (0..4)
        .map(|n| Tick::new(format!("key-{}", n % 2), n))
        .collect();
    world.commit(&outbox, &ticks).await;
    world.until_effects(4).await;
    admin
        .start_replay(&ReplayRequest::new("r", "main"), "test")
        .await
        .expect("a replay");
    let relay = Relay::new(&outbox, Arc::new(Refusing(world.transport.clone())))
        .source("producer")
        .settings(World::relay_settings());
    let run = admin.run_replay("r", relay, pending(), |_| {});
    let done = tokio::time::timeout(Duration::from_secs(60), run).await;
    let done = done.expect("in time").expect("a replay");
    assert_eq!((done.sent, done.dead_letters, done.deferred), (2, 2, 0));
    way.stop().await;
    let main = admin.destinations().await.expect("destinations").remove(0);
    assert_eq!((main.name.as_str(), main.dead_letters), ("main", 2));
}
