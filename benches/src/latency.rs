use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use clap::Args;
use futures_util::StreamExt;
use hdrhistogram::Histogram;
use lapin::{
    Connection, ConnectionProperties,
    options::{BasicAckOptions, BasicConsumeOptions},
    types::FieldTable,
};
use pillarbox::{
    Outbox,
    transport::{Message, Transport},
};
use pillarbox_amqp::QueueType;

use crate::{
    Measured, memory,
    stage::{KIND, QUEUE, Stage, TOPIC, amqp, relay},
};

#[derive(Args)]
pub(crate) struct Latency {
    /// Events a second.
    #[arg(long, default_value_t = 200)]
    rate: u32,
    /// Seconds of each run.
    #[arg(long, default_value_t = 20)]
    seconds: u32,
}

impl Latency {
    pub(crate) async fn run(&self) -> Measured<()> {
        println!(
            "{} events a second for {} s, quorum queue is not used: commit to raw consumer",
            self.rate, self.seconds
        );
        for apart in [false, true] {
            let histogram = self.measure(apart).await?;
            let ms = |q| histogram.value_at_quantile(q) as f64 / 1_000.0;
            let place = if apart {
                "writer apart"
            } else {
                "writer in the relay's process"
            };
            println!(
                "{place:<30} p50 {:>6.1} ms   p99 {:>6.1} ms   max {:>6.1} ms",
                ms(0.5),
                ms(0.99),
                ms(1.0)
            );
        }
        Ok(())
    }

    async fn measure(&self, apart: bool) -> Measured<Histogram<u64>> {
        let stage = Stage::new().await?;
        let transport = amqp(&stage.amqp_url, QueueType::Classic, 1)?;
        drop(transport.publisher().await?);
        let outbox = Outbox::new(&stage.pool);
        let mut child = None;
        let mut running = None;
        if apart {
            child = Some(memory::child(&stage, 0)?);
        } else {
            running = Some(relay(&outbox, Arc::new(transport), 1_024).spawn());
        }
        let committed = Arc::new(Mutex::new(HashMap::new()));
        let count = self.rate * self.seconds;
        let consumer = tokio::spawn(consume(stage.amqp_url.clone(), committed.clone(), count));
        self.write(&stage, &outbox, &committed).await?;
        let histogram = consumer.await??;
        if let Some(running) = running {
            running.shutdown().await?;
        }
        drop(child);
        Ok(histogram)
    }

    async fn write(&self, stage: &Stage, outbox: &Outbox, committed: &Commits) -> Measured<()> {
        let mut clock = tokio::time::interval(Duration::from_secs(1) / self.rate);
        for n in 0..self.rate * self.seconds {
            clock.tick().await;
            let id = uuid::Uuid::now_v7().to_string();
            let message = Message::new(&id, TOPIC, KIND, ".".repeat(450))
                .with_key(format!("key-{}", n % 1_000));
            let mut tx = stage.pool.begin().await?;
            outbox.enqueue_message(&mut tx, message).await?;
            tx.commit().await?;
            // The consumer may be faster than this line; it waits for it.
            committed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id, Instant::now());
        }
        Ok(())
    }
}

type Commits = Arc<Mutex<HashMap<String, Instant>>>;

async fn consume(url: String, committed: Commits, count: u32) -> Measured<Histogram<u64>> {
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let mut deliveries = channel
        .basic_consume(
            QUEUE.into(),
            "bench".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    let mut histogram = Histogram::new_with_bounds(1, 600_000_000, 3)?;
    // The first second is start-up: connections, leases, plans.
    let mut skip = count / 20;
    for _ in 0..count {
        let delivery = deliveries
            .next()
            .await
            .ok_or("the broker ended the consumer")??;
        let arrived = Instant::now();
        delivery.acker.ack(BasicAckOptions::default()).await?;
        let id = delivery
            .properties
            .message_id()
            .as_ref()
            .map(|id| id.as_str().to_owned())
            .unwrap_or_default();
        let at = loop {
            if let Some(at) = committed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&id)
            {
                break at;
            }
            tokio::task::yield_now().await;
        };
        if skip > 0 {
            skip -= 1;
            continue;
        }
        let micros = arrived.saturating_duration_since(at).as_micros();
        histogram.record(u64::try_from(micros)?.max(1))?;
    }
    Ok(histogram)
}
