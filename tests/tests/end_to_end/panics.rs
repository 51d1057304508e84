//! Faults in the middle of the engine's tasks: a transport that panics. The tasks go on, and every promise holds.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use pillarbox_tests::{
    TickHandler, World, counts, in_both_worlds,
    ledger::{Plan, Writers, assert_arrived, assert_effects},
    seed,
    tables::{dead_letters, deferred},
    until,
    wire::Client,
};
use pillarbox_transport::{
    Binding, Delivery, Message, Outcome, Publisher, Result, Source, Subscription, Transport,
};

in_both_worlds!(a_task_that_panics_is_started_again_and_loses_nothing);

/// A real transport, but for calls that panic.
struct Panicking {
    inner: Arc<dyn Transport>,
    calls: Arc<Calls>,
}

#[derive(Default)]
struct Calls {
    opened: AtomicU32,
    published: AtomicU32,
    answered: AtomicU32,
    received: AtomicU32,
}

fn panics(calls: &AtomicU32, at: &[u32], what: &str) {
    let call = calls.fetch_add(1, Relaxed);
    assert!(!at.contains(&call), "{what} {call}, as it was told");
}

#[async_trait]
impl Transport for Panicking {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        panics(&self.calls.opened, &[0], "open");
        let inner = self.inner.publisher().await?;
        let calls = self.calls.clone();
        Ok(Box::new(PanickingPublisher { inner, calls }))
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
        let inner = self.inner.subscribe(source, group, from).await?;
        let calls = self.calls.clone();
        Ok(Box::new(PanickingSubscription { inner, calls }))
    }

    async fn dead_letters(&self, topic: &str, group: &str) -> Result<Box<dyn Publisher>> {
        self.inner.dead_letters(topic, group).await
    }
}

struct PanickingPublisher {
    inner: Box<dyn Publisher>,
    calls: Arc<Calls>,
}

impl Publisher for PanickingPublisher {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        panics(&self.calls.published, &[5, 20], "publish");
        let (answer, calls) = (self.inner.publish(messages), self.calls.clone());
        Box::pin(async move {
            let outcomes = answer.await;
            // The broker has them, and nobody hears of it.
            panics(&calls.answered, &[10], "answer");
            outcomes
        })
    }
}

struct PanickingSubscription {
    inner: Box<dyn Subscription>,
    calls: Arc<Calls>,
}

#[async_trait]
impl Subscription for PanickingSubscription {
    async fn next(&mut self) -> Result<Delivery> {
        let delivery = self.inner.next().await?;
        panics(&self.calls.received, &[30, 200], "receive");
        Ok(delivery)
    }

    async fn close(self: Box<Self>) {
        self.inner.close().await;
    }
}

async fn a_task_that_panics_is_started_again_and_loses_nothing(mut world: World) {
    counts::start();
    let client = match &world.amqp_url {
        Some(url) => {
            let client = Client::connect(url).await;
            client.tap().await;
            Some(client)
        }
        None => None,
    };
    let calls = Arc::<Calls>::default();
    world.transport = Arc::new(Panicking {
        inner: world.transport.clone(),
        calls: calls.clone(),
    });
    let outbox = world.outbox();
    let way = world.start(&outbox, world.ticks(TickHandler::new())).await;
    let mut health = way.relay.watch();
    let told = health.wait_for(|h| h.trouble.as_ref().is_some_and(|t| t.contains("panicked")));
    let told = told.await.expect("the relay runs").trouble.clone();
    let told = told.unwrap_or_default();
    assert!(told.contains("open 0, as it was told"), "{told}");

    let plan = Plan {
        writers: 3,
        keys: 20,
        events: 1_200,
        pause: Duration::from_millis(2),
    };
    let ledger = Writers::start(&outbox, plan, seed()).await.done().await;
    world.until_effects(ledger.committed.len()).await;
    until("nothing waits", async || {
        deferred(&world.producer).await + deferred(&world.consumer).await == 0
    })
    .await;
    way.stop().await;
    assert!(calls.published.load(Relaxed) > 20, "all panics happened");
    assert!(calls.received.load(Relaxed) > 200);
    let restarts = |task| counts::count("pillarbox_task_restarts_total", &[("task", task)]);
    assert!(restarts("partition") >= 3, "{}", restarts("partition"));
    assert!(restarts("source") >= 2, "{}", restarts("source"));
    let log = ledger.log(&world.producer).await;
    assert_effects(&log, &world.effects().await);
    assert_eq!(dead_letters(&world.producer).await, []);
    assert_eq!(dead_letters(&world.consumer).await, []);
    if let Some(client) = client {
        assert_arrived(&log, &client.drain("tap").await);
    }
}
