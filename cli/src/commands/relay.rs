use std::time::Duration;

use clap::Args;
use pillarbox::{Database, Settings};
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    failure::{Failure, Result},
    place::Place,
    signals,
};

/// How long the end waits for the database's connections.
const CLOSING: Duration = Duration::from_secs(5);
/// Between tries to open a database that is away.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Publish what was committed, to every destination of the configuration, until SIGTERM or Ctrl-C.
///
/// Then waits for the broker's confirms, for at most `[relay] drain`, and hands its partitions over; a second signal stops
/// at once. Any number may run on one database: they share its partitions out. Waits for a database or broker that is away.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox relay --config shop.toml
  pillarbox relay --config shop.toml --at inventory
  RUST_LOG=debug pillarbox relay --config shop.toml")]
pub(crate) struct Relay {
    #[command(flatten)]
    pub(crate) place: Place,
}

impl Relay {
    pub(crate) async fn run(self) -> Result<()> {
        let settings = self.place.settings()?;
        let destinations = settings.relayed();
        if destinations.is_empty() {
            let text = "every destination of this configuration says relay = false: there is nothing to do";
            return Err(Failure::Usage(text.to_owned()));
        }
        for name in &destinations {
            refuse_memory(&settings, name).await?;
        }
        let stop = signals::stop()?;
        let Some(database) = open(&settings, &stop).await? else {
            return self.ended();
        };
        tracing::info!(?destinations, "relay starts");
        let outbox = settings.new_outbox(&database);
        let broker = pillarbox::connect(&settings.transport).await?;
        let relays = pillarbox::relays(&settings, &outbox, broker).await?;
        all(relays, &stop).await?;
        // A connection that somebody still holds must not keep the program.
        let _ = tokio::time::timeout(CLOSING, database.close()).await;
        self.ended()
    }

    fn ended(&self) -> Result<()> {
        let ended = json!({ "ended": "stopped" });
        self.place.answer().give(&ended, || {
            "the relay has stopped and handed over".to_owned()
        })
    }
}

async fn refuse_memory(settings: &Settings, destination: &str) -> Result<()> {
    let transport = pillarbox::connect(settings.transport_of(destination)?).await?;
    if transport.kind() != "memory" {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "the transport of destination {destination:?} is \"memory\", whose broker lives in one process with its consumers: a relay \
         without them would wait for ever. Let the program that has the consumers run its own, or name another kind"
    )))
}

/// Runs them until `stop`; one that cannot go on stops all: a half-working relay looks healthy.
async fn all(relays: Vec<pillarbox::Relay>, stop: &CancellationToken) -> Result<()> {
    let mut running = JoinSet::new();
    for relay in relays {
        running.spawn(relay.run_until(stop.clone().cancelled_owned()));
    }
    let mut result = Ok(());
    while let Some(joined) = running.join_next().await {
        let ended = match joined {
            Ok(ended) => ended.map_err(Failure::from),
            Err(e) => Err(std::io::Error::other(e).into()),
        };
        if ended.is_err() && result.is_ok() {
            stop.cancel();
            result = ended;
        }
    }
    result
}

/// Waits for a database that is away; none if it is to stop meanwhile.
async fn open(settings: &Settings, stop: &CancellationToken) -> Result<Option<Database>> {
    let (mut wait, mut told) = (FIRST_WAIT, String::new());
    loop {
        let error = match settings.store.open().await {
            Ok(database) => return Ok(Some(database)),
            Err(e) if e.is_temporary() => e.to_string(),
            Err(e) => return Err(e.into()),
        };
        // One line at each change, none for each try.
        if error != told {
            tracing::warn!(error, "waiting for the database");
            told = error;
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(LONGEST_WAIT),
        }
    }
}
