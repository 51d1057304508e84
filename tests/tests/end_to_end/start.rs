//! Databases and brokers that are away at the start: whoever can wait does, says for what, and resumes by itself.

use std::path::{Path, PathBuf};

use pillarbox_core::{Outbox, Relay};
use pillarbox_testkit::proxy::Proxy;
use pillarbox_tests::{
    Tick, TickHandler, World, amqp_config, connect, in_both_worlds, on_servers_alone, until,
};

in_both_worlds!(a_database_that_is_away_at_the_start_is_waited_for);
on_servers_alone!(a_broker_that_is_away_at_the_start_is_waited_for);

/// Takes a database away and gives it back.
enum Away {
    Refused(Proxy),
    Moved { from: PathBuf, to: PathBuf },
}

impl Away {
    async fn of(url: &str) -> (Self, String) {
        if let Some(path) = url.strip_prefix("sqlite://") {
            let folder = Path::new(path).parent().expect("a folder");
            let name = Path::new(path).file_stem().expect("a name");
            let (from, to) = (
                folder.join("away").join(name),
                folder.join("back").join(name),
            );
            std::fs::create_dir_all(&from).expect("a folder");
            let url = format!("sqlite://{}", to.join("database").display());
            let away = from.join("database");
            let database = pillarbox_tests::open(&format!("sqlite://{}", away.display())).await;
            drop(database);
            return (Self::Moved { from, to }, url);
        }
        let (proxy, url) = Proxy::before(url).await.expect("a proxy");
        proxy.refuse(true);
        (Self::Refused(proxy), url)
    }

    fn come_back(&self) {
        match self {
            Self::Refused(proxy) => proxy.refuse(false),
            Self::Moved { from, to } => {
                std::fs::create_dir_all(to.parent().expect("a parent")).expect("a folder");
                std::fs::rename(from, to).expect("moved");
            }
        }
    }
}

async fn a_database_that_is_away_at_the_start_is_waited_for(mut world: World) {
    let (producer, url) = Away::of(&world.urls.0).await;
    world.producer = connect(&url);
    let (consumer, url) = Away::of(&world.urls.1).await;
    world.consumer = connect(&url);
    let outbox = world.outbox();
    let relay = world.relay(&outbox).spawn();
    let running = world.ticks(TickHandler::new()).spawn();
    until("both tell what they wait for", async || {
        relay.health().trouble.is_some() && running.health().trouble.is_some()
    })
    .await;
    for health in [relay.health(), running.health()] {
        let trouble = health.trouble.unwrap_or_default();
        assert!(trouble.starts_with("database: "), "{trouble}");
    }
    producer.come_back();
    consumer.come_back();
    until("the database is there", async || relay.health().held > 0).await;
    world.commit(&outbox, &[Tick::new("a", 1)]).await;
    world.until_effects(1).await;
    until("the trouble is over", async || {
        relay.health().trouble.is_none() && running.health().trouble.is_none()
    })
    .await;
    relay.shutdown().await.expect("relay");
    running.shutdown().await.expect("consumer");
}

async fn a_broker_that_is_away_at_the_start_is_waited_for(mut world: World) {
    let url = world.amqp_url.clone().expect("a broker");
    let (proxy, url) = Proxy::before(&url).await.expect("a proxy");
    proxy.refuse(true);
    let config = amqp_config(&url, &world.group);
    let amqp = pillarbox_amqp::Amqp::new(config).expect("a config");
    world.transport = std::sync::Arc::new(amqp);
    let outbox: Outbox = world.outbox();
    let relay: Relay = world.relay(&outbox);
    let relay = relay.spawn();
    let consumer = world.ticks(TickHandler::new()).spawn();
    // Enqueue does not know that there is a broker.
    for n in 1..=20 {
        world.commit(&outbox, &[Tick::new("a", n)]).await;
    }
    until("both tell what they wait for", async || {
        relay.health().trouble.is_some() && consumer.health().trouble.is_some()
    })
    .await;
    for health in [relay.health(), consumer.health()] {
        let trouble = health.trouble.unwrap_or_default();
        assert!(trouble.contains("broker"), "{trouble}");
        assert!(
            trouble.contains(&proxy.addr().to_string()),
            "which one: {trouble}"
        );
    }
    proxy.refuse(false);
    world.until_effects(20).await;
    until("the trouble is over", async || {
        relay.health().trouble.is_none() && consumer.health().trouble.is_none()
    })
    .await;
    relay.shutdown().await.expect("relay");
    consumer.shutdown().await.expect("consumer");
    assert_eq!(
        pillarbox_tests::tables::dead_letters(&world.producer).await,
        []
    );
    assert_eq!(world.effects().await.len(), 20);
}
