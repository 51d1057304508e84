//! A process with a relay, a consumer or both, for tests that kill it. Says on stdout what it does, and logs on stderr.

use std::{io::Write as _, process::ExitCode, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::future::{pending, select_all};
use pillarbox_amqp::{Amqp, QUIET_TARGETS};
use pillarbox_core::{
    Consumer, ConsumerSettings, Database, Health, Outbox, Relay, RelaySettings, Result, Running,
    failure::Retry,
    lease::LeaseTerm,
    memory::{self, Held},
};
use pillarbox_tests::{Tick, TickHandler, amqp_config, connect, node::Task};
use pillarbox_transport::{
    self as transport, Ack, Binding, Delivery, Publisher, Source, Subscription, Transport,
    memory::Memory,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::EnvFilter;

fn say(line: &str) {
    // The parent may be gone.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let quiet: Vec<String> = QUIET_TARGETS.iter().map(|t| format!("{t}=off")).collect();
    // Each statement would be a line.
    let filter = format!("debug,sqlx::query=off,{}", quiet.join(","));
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let task = std::env::args().nth(1).unwrap_or_default();
    let task: Task = match serde_json::from_str(&task) {
        Ok(task) => task,
        Err(e) => {
            say(&format!("no task: {e}"));
            return ExitCode::from(2);
        }
    };
    match run(&task).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&format!("failed: {e}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(task: &Task) -> Result<()> {
    let mut stop = signal(SignalKind::terminate()).map_err(|e| {
        pillarbox_core::Error::new(pillarbox_core::Kind::Configuration, "start", "no signals")
            .caused_by(e)
    })?;
    let node = Node::new(task)?;
    say("ready");
    loop {
        let held = tokio::select! {
            held = node.hold() => held?,
            _ = stop.recv() => return Ok(()),
        };
        let mut running = node.start().await?;
        say("works");
        tokio::select! {
            _ = stop.recv() => {
                for one in running {
                    one.shutdown().await?;
                }
                if let Some(held) = held {
                    held.release().await?;
                }
                say("stopped");
                return Ok(());
            }
            () = lost(held.as_ref()) => {
                running.iter().for_each(Running::abort);
                say("lost the lease");
            }
            (ended, _, _) = select_all(&mut running) => return ended,
        }
    }
}

async fn lost(held: Option<&Held>) {
    match held {
        Some(held) => held.lost().await,
        None => pending().await,
    }
}

struct Node {
    producer: Option<Database>,
    consumer: Option<Database>,
    transport: Arc<dyn Transport>,
    group: String,
    term: LeaseTerm,
    work: Duration,
    fails_each: u32,
    window: usize,
    aborts_on: Option<String>,
}

impl Node {
    fn new(task: &Task) -> Result<Self> {
        let mut transport: Arc<dyn Transport> = match &task.amqp {
            Some(url) => Arc::new(Amqp::new(amqp_config(url, &task.group))?),
            None => Arc::new(Memory::new()),
        };
        if task.hold_acks {
            transport = Arc::new(HeldAcks(transport));
        }
        Ok(Self {
            producer: task.producer.as_deref().map(connect),
            consumer: task.consumer.as_deref().map(connect),
            transport,
            group: task.group.clone(),
            term: LeaseTerm::new(Duration::from_millis(task.lease_ms)),
            work: Duration::from_millis(task.work_ms),
            fails_each: task.fails_each,
            window: task.window,
            aborts_on: task.aborts_on.clone(),
        })
    }

    /// Where the transport lives in the process, one process at a time.
    async fn hold(&self) -> Result<Option<Held>> {
        if self.transport.kind() != "memory" {
            return Ok(None);
        }
        let databases: Vec<&Database> = self.producer.iter().chain(&self.consumer).collect();
        memory::hold(&databases, self.term).await.map(Some)
    }

    async fn start(&self) -> Result<Vec<Running>> {
        let mut running = Vec::new();
        let consumer = self.consumer.as_ref().map(|db| self.consumer(db));
        let relay = self.producer.as_ref().map(|db| self.relay(db));
        if let Some(mut consumer) = consumer {
            if self.transport.kind() == "memory" {
                consumer.bind().await?;
            }
            running.push(consumer.spawn());
        }
        // The relay ends first: what it has in flight is still applied.
        running.splice(0..0, relay.map(Relay::spawn));
        for one in &running {
            tokio::spawn(tell(one.watch()));
        }
        Ok(running)
    }

    fn relay(&self, database: &Database) -> Relay {
        let mut settings = RelaySettings {
            lease: self.term,
            ..RelaySettings::default()
        };
        if self.window > 0 {
            settings.window.unsettled = self.window;
        }
        Relay::new(&Outbox::new(database), self.transport.clone())
            .source("producer")
            .settings(settings)
    }

    fn consumer(&self, database: &Database) -> Consumer {
        let settings = ConsumerSettings {
            lease: self.term,
            ..ConsumerSettings::default()
        };
        let (work, fails_each, aborts_on) = (self.work, self.fails_each, self.aborts_on.clone());
        let handler = TickHandler::acting(move |delivery, _| {
            let key = delivery.event.key.clone().unwrap_or_default();
            say(&format!("handles {key} {}", delivery.event.n));
            if aborts_on.as_ref() == Some(&key) {
                std::process::abort();
            }
            let fails =
                fails_each > 0 && delivery.event.n % fails_each == 0 && delivery.attempts == 0;
            Box::pin(async move {
                // Time is what the handler is asked to take.
                tokio::time::sleep(work).await;
                if fails {
                    return Err(std::io::Error::other("as it was told").into());
                }
                Ok(())
            })
        });
        Consumer::new(database, self.transport.clone(), self.group.as_str())
            .settings(settings)
            .retry(Retry {
                delays: vec![Duration::from_millis(200); 3],
                jitter: 0.1,
                ..Retry::default()
            })
            .on::<Tick>(handler)
    }
}

/// Says how many partitions or sources are held, whenever that changes.
async fn tell(mut health: watch::Receiver<Health>) {
    let mut told = 0;
    while health.changed().await.is_ok() {
        let Health { held, of, .. } = health.borrow_and_update().clone();
        if held != told {
            told = held;
            say(&format!("holds {held} of {of}"));
        }
    }
}

/// A transport whose acknowledgements are announced and never sent: a process that hangs between COMMIT and them.
struct HeldAcks(Arc<dyn Transport>);

#[async_trait]
impl Transport for HeldAcks {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    async fn publisher(&self) -> transport::Result<Box<dyn Publisher>> {
        self.0.publisher().await
    }

    async fn bind(&self, binding: &Binding) -> transport::Result<Vec<Source>> {
        self.0.bind(binding).await
    }

    async fn subscribe(
        &self,
        source: &Source,
        group: &str,
        from: Option<u64>,
    ) -> transport::Result<Box<dyn Subscription>> {
        let inner = self.0.subscribe(source, group, from).await?;
        Ok(Box::new(HeldSubscription(inner)))
    }

    async fn dead_letters(
        &self,
        topic: &str,
        group: &str,
    ) -> transport::Result<Box<dyn Publisher>> {
        self.0.dead_letters(topic, group).await
    }
}

struct HeldSubscription(Box<dyn Subscription>);

#[async_trait]
impl Subscription for HeldSubscription {
    async fn next(&mut self) -> transport::Result<Delivery> {
        let delivery = self.0.next().await?;
        let (id, ack) = (delivery.message.id.clone(), delivery.ack);
        let held = Ack::new(move || {
            Box::pin(async move {
                say(&format!("keeps the ack of {id}"));
                let () = pending().await;
                ack.ack().await
            })
        });
        Ok(Delivery {
            ack: held,
            ..delivery
        })
    }

    async fn close(self: Box<Self>) {
        self.0.close().await;
    }
}
