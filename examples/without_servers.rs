//! The whole way of an event in one process, without any server: a SQLite file and the `memory` broker. For tests, and
//! for programs that need no more.
//!
//! ```text
//! cargo run --example without_servers --features sqlite
//! ```

#![allow(clippy::print_stdout)]

#[cfg(feature = "sqlite")]
mod whole_way {
    use std::sync::Arc;

    use pillarbox::{
        Consumer, Context, Delivery, Event, Failure, Handler, Outbox, Pool, Relay,
        config::StoreSettings, transport::memory::Memory,
    };
    use tokio::sync::mpsc;

    #[derive(serde::Serialize, serde::Deserialize)]
    struct OrderPlaced {
        order: i64,
    }

    impl Event for OrderPlaced {
        const TYPE: &'static str = "shop.order.placed";
        const TOPIC: &'static str = "shop.events";
    }

    struct Tell(mpsc::Sender<i64>);

    impl Handler<OrderPlaced> for Tell {
        async fn handle(
            &self,
            delivery: Delivery<OrderPlaced>,
            _: &mut Context<'_>,
        ) -> Result<(), Failure> {
            // A test waits for the signal; it never sleeps.
            self.0.send(delivery.event.order).await?;
            Ok(())
        }
    }

    pub(crate) async fn run() -> Result<(), Box<dyn std::error::Error>> {
        let file = std::env::temp_dir().join(format!("pillarbox-{}.db", std::process::id()));
        let url = format!("sqlite://{}", file.display());
        let database = StoreSettings::new(url).open().await?;
        let Some(Pool::Sqlite(pool)) = database.pool() else {
            return Err("a SQLite database has a SQLite pool".into());
        };
        pillarbox::migrate(&database).await?;
        let outbox = Outbox::new(&database);
        let broker = Memory::new();

        let (told, mut heard) = mpsc::channel(1);
        let mut consumer = Consumer::new(&database, Arc::new(broker.clone()), "billing")
            .on::<OrderPlaced>(Tell(told));
        // Before the relay starts: an event without a group that wants it has nowhere to go.
        consumer.bind().await?;
        let consumer = consumer.spawn();
        let relay = Relay::new(&outbox, Arc::new(broker)).spawn();

        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
        outbox.enqueue(&mut tx, &OrderPlaced { order: 7 }).await?;
        tx.commit().await?;
        outbox.wake();

        println!("heard of order {:?}", heard.recv().await);
        relay.shutdown().await?;
        consumer.shutdown().await?;
        pool.close().await;
        Ok(std::fs::remove_file(file)?)
    }
}

#[cfg(feature = "sqlite")]
#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    whole_way::run().await
}

#[cfg(not(feature = "sqlite"))]
fn main() {
    println!("run it with --features sqlite");
}
