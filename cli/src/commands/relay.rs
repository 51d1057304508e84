use std::time::Duration;

use clap::Args;
use pillarbox::{Database, Settings};
use serde_json::json;
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

/// Publish what was committed, until SIGTERM or Ctrl-C.
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
        let transport = pillarbox::connect(&settings.transport).await?;
        if transport.kind() == "memory" {
            let text = "[transport] kind is \"memory\", whose broker lives in one process with its consumers: a relay without \
                        them would wait for ever. Let the program that has the consumers run its own, or name another kind";
            return Err(Failure::Usage(text.to_owned()));
        }
        let stop = signals::stop()?;
        let Some(database) = open(&settings, &stop).await? else {
            return self.ended();
        };
        tracing::info!(transport = transport.kind(), "relay starts");
        let outbox = settings.new_outbox(&database);
        let relay = settings.new_relay(&outbox, transport);
        relay.run_until(stop.cancelled()).await?;
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
