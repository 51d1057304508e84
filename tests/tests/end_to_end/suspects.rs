//! Events that end what carries them, and that nobody names: the broker's connection, the transaction at its COMMIT.

use std::collections::HashMap;

use pillarbox_amqp::Amqp;
use pillarbox_core::Connection;
use pillarbox_tests::{
    Tick, TickHandler, World, amqp_config, in_both_worlds, on_servers_alone,
    tables::{dead_letters, deferred, query},
    until,
    wire::Client,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::retry;

in_both_worlds!(an_event_that_fails_the_commit_is_found_and_its_neighbours_are_applied);
on_servers_alone!(
    one_that_ends_the_connection_is_found_among_a_thousand,
    ten_that_end_the_connection_cost_their_neighbours_nothing,
);

/// What no network device lets pass that stands before the broker.
const POISON: &str = "poison";

/// A way to the broker that resets each connection over which the poison is sent.
async fn tripwire(url: &str) -> String {
    let (before, rest) = url.split_once('@').expect("credentials");
    let (address, vhost) = rest.split_once('/').expect("a vhost");
    let address = address.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let through = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let address = address.clone();
            tokio::spawn(async move {
                if let Ok(server) = TcpStream::connect(&address).await {
                    carry(client, server).await;
                }
            });
        }
    });
    format!("{before}@{through}/{vhost}")
}

async fn carry(mut client: TcpStream, mut server: TcpStream) {
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let forth = async {
        let (mut buffer, mut seen) = (vec![0; 1 << 16], Vec::new());
        while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
            // It may lie across two reads.
            seen.extend_from_slice(&buffer[..n]);
            if seen.windows(POISON.len()).any(|w| w == POISON.as_bytes()) {
                return;
            }
            seen.drain(..seen.len().saturating_sub(POISON.len()));
            if to_server.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    };
    let back = tokio::io::copy(&mut from_server, &mut to_client);
    tokio::select! {
        () = forth => {}
        _ = back => {}
    }
}

/// So many events, of which the ones at these places are poison, in one transaction.
fn events(count: u32, poison: &[u32]) -> Vec<Tick> {
    let tick = |n| match poison.contains(&n) {
        true => Tick::new(format!("{POISON}-{n}"), 1),
        // A few of each key.
        false => Tick::new(format!("key-{}", n % 250), n),
    };
    (0..count).map(tick).collect()
}

async fn one_that_ends_the_connection_is_found_among_a_thousand(world: World) {
    assert_found(world, &[500]).await;
}

async fn ten_that_end_the_connection_cost_their_neighbours_nothing(world: World) {
    let poison = [3, 4, 5, 170, 333, 480, 650, 801, 990, 999];
    assert_found(world, &poison).await;
}

async fn assert_found(mut world: World, poison: &[u32]) {
    let url = world.amqp_url.clone().expect("a broker");
    let client = Client::connect(&url).await;
    client.tap().await;
    let through = tripwire(&url).await;
    // The consumer goes past it.
    let consumer = world.ticks(TickHandler::new());
    let config = amqp_config(&through, &world.group);
    world.transport = std::sync::Arc::new(Amqp::new(config).expect("a valid config"));
    let outbox = world.outbox();
    let ticks = events(1_000, poison);
    world.commit(&outbox, &ticks).await;
    let relay = world.relay(&outbox).retry(retry(&[1_000, 1_000]));
    let way = world.start_with(relay, consumer).await;
    let neighbours = ticks.len() - poison.len();
    let mut most_waited = 0;
    until("all others have their effects", async || {
        most_waited = most_waited.max(deferred(&world.producer).await);
        world.count_effects().await == neighbours
    })
    .await;
    until("the poison is given up", async || {
        most_waited = most_waited.max(deferred(&world.producer).await);
        dead_letters(&world.producer).await.len() == poison.len()
    })
    .await;
    assert!(most_waited <= poison.len(), "a neighbour waited in a line");
    // And the relay goes on as ever.
    world.commit(&outbox, &[Tick::new("afterwards", 1)]).await;
    world.until_effects(neighbours + 1).await;
    way.stop().await;
    for dead in dead_letters(&world.producer).await {
        assert!(dead.key.unwrap_or_default().starts_with(POISON));
        assert_eq!(dead.attempts, 3);
        let reason = dead.reason;
        let told = reason.starts_with("the broker's session ends when it is sent, even alone: ");
        assert!(told, "{reason}");
    }
    let effects = world.effects().await;
    assert_eq!(effects.len(), neighbours + 1);
    let mut numbers = HashMap::<String, Vec<u32>>::new();
    for effect in effects {
        numbers.entry(effect.key).or_default().push(effect.n);
    }
    assert!(numbers.values().all(|n| n.is_sorted()), "out of order");
    // What was in flight when the connection ended first comes again; once it goes one by one, nothing does.
    let mut arrivals = HashMap::<String, u32>::new();
    for arrived in client.drain("tap").await {
        *arrivals.entry(arrived.id).or_default() += 1;
    }
    let most = arrivals.values().max().copied().unwrap_or_default();
    let again: u32 = arrivals.values().map(|n| n - 1).sum();
    println!(
        "{} poison: {again} arrivals again, one of them {most} times",
        poison.len()
    );
    assert!(most <= 6, "one arrived {most} times");
    assert!(again <= 2_500, "{again} arrivals again");
}

async fn an_event_that_fails_the_commit_is_found_and_its_neighbours_are_applied(world: World) {
    let tables = [
        "CREATE TABLE allowed (n bigint PRIMARY KEY)",
        "CREATE TABLE strict (n bigint REFERENCES allowed (n) DEFERRABLE INITIALLY DEFERRED)",
    ];
    for table in tables {
        query(&world.consumer, table).await;
    }
    // Nothing is said before the COMMIT.
    let handler = TickHandler::acting(|delivery, connection| {
        let is_poison = delivery.event.key.as_deref() == Some(POISON);
        Box::pin(async move {
            if !is_poison {
                return Ok(());
            }
            let sql = "INSERT INTO strict (n) VALUES (1)";
            match connection {
                Connection::Postgres(c) => drop(sqlx::query(sql).execute(c).await?),
                Connection::Sqlite(c) => drop(sqlx::query(sql).execute(c).await?),
            }
            Ok(())
        })
    });
    let outbox = world.outbox();
    let mut ticks: Vec<Tick> = (1..=60)
        .map(|n| Tick::new(format!("key-{}", n % 6), n))
        .collect();
    ticks.insert(30, Tick::new(POISON, 1));
    ticks.push(Tick::new(POISON, 2));
    world.commit(&outbox, &ticks).await;
    let consumer = world.ticks(handler.clone()).retry(retry(&[50, 50]));
    let way = world.start(&outbox, consumer).await;
    until("the poison is given up", async || {
        dead_letters(&world.consumer).await.len() == 2
    })
    .await;
    world.until_effects(60).await;
    way.stop().await;
    assert_eq!(world.effects().await.len(), 60);
    assert_eq!(deferred(&world.consumer).await, 0);
    let dead = dead_letters(&world.consumer).await;
    for dead in &dead {
        assert_eq!((dead.key.as_deref(), dead.attempts), (Some(POISON), 3));
        let told = dead.reason.to_lowercase();
        assert!(told.contains("foreign key"), "{told}");
    }
    let tries = handler.calls().len();
    assert!(tries < 300, "{tries} calls: the others ran again and again");
    let late = handler
        .calls()
        .iter()
        .any(|c| c.key != POISON && c.attempts > 0);
    assert!(!late, "a neighbour's attempt was burned");
}
