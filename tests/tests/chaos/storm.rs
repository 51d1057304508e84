//! Several relays as processes, writers of every kind, and all that can befall processes, networks and servers, from one
//! seed. What happened is judged by the application's own table and a raw client's queue: the engine is not asked.

mod application;
mod strikes;
mod verdict;

use pillarbox_testkit::servers::{self, Postgres, RabbitMq};
use pillarbox_tests::{Kind, World, is_soak, node::Task, one_world, seed};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::tap;
use application::Application;
use strikes::Storm;

/// The most that one partition may repeat after one fault.
const WINDOW: usize = 50;
/// Of the log, as it is made.
const PARTITIONS: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_storm_of_faults_breaks_a_promise() {
    one_world::assert_listed("no_storm_of_faults_breaks_a_promise", Kind::Servers);
    let (postgres, rabbitmq) = tokio::join!(Postgres::start(), RabbitMq::start());
    let (Some(mut postgres), Some(mut rabbitmq)) =
        (servers::required(postgres), servers::required(rabbitmq))
    else {
        return;
    };
    let first = seed();
    let again = std::env::var_os("PILLARBOX_SEED").is_some();
    let seeds = if is_soak() && !again { 10 } else { 1 };
    for seed in (0..seeds).map(|n| first.wrapping_add(n)) {
        eprintln!("PILLARBOX_SEED={seed} runs this storm again");
        one(seed, &mut postgres, &mut rabbitmq).await;
    }
}

async fn one(seed: u64, postgres: &mut Postgres, rabbitmq: &mut RabbitMq) {
    let mut rng = StdRng::seed_from_u64(seed);
    let urls = (
        postgres.create_database().await.expect("a database"),
        postgres.create_database().await.expect("a database"),
    );
    let vhost = rabbitmq.create_vhost().await.expect("a vhost");
    let world = World::at(urls, &vhost).await;
    tap(&world).await;
    let application = Application::start(&world, seed).await;
    let mut storm = Storm::start(&world, postgres, rabbitmq, rng.random_range(2..=3)).await;
    let faults = storm.rage(&mut rng).await;
    let record = application.stop().await;
    verdict::until_drained(&world).await;
    storm.end().await;
    let summary = verdict::judge(&world, &record, faults).await;
    eprintln!("seed {seed}: {summary}");
}

/// A relay whose window is small, behind these addresses.
fn relay(world: &World, producer: String, amqp: String) -> Task {
    Task {
        producer: Some(producer),
        amqp: Some(amqp),
        window: WINDOW,
        ..Task::relay(world)
    }
}
