use std::time::{Duration, SystemTime};

use clap::Args;
use humantime_serde::re::humantime;
use pillarbox::admin::{Expiry, Target};

use crate::{
    answer::rfc3339,
    failure::{Failure, Result},
    place::{By, Place, time},
    shape,
};

/// Hold a destination, a group, or one topic or key back for a while.
///
/// Stored in the database, with an end, a reason and a name: every relay and consumer obeys within about a second, also one that
/// starts later. No attempt is counted, and order holds. `pillarbox status` shows what is paused.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox pause --config shop.toml --destination main --why 'the broker is being moved' --for 30m
  pillarbox pause --config shop.toml --destination main --topic shop.events --why 'its consumer is down'
  pillarbox pause --config shop.toml --group billing --topic shop.events --key order-7 --why 'looked at by ada'
  pillarbox pause --config shop.toml --group billing --why 'tax service' --until 2026-11-24T18:00:00Z")]
pub(crate) struct Pause {
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(flatten)]
    what: What,
    /// How long, 7 days at most [default: 1h]
    #[arg(long = "for", value_name = "DURATION", conflicts_with = "until", value_parser = humantime::parse_duration)]
    lasting: Option<Duration>,
    /// Until this time in UTC
    #[arg(long, value_name = "TIME", value_parser = time)]
    until: Option<SystemTime>,
    #[command(flatten)]
    by: By,
}

/// What is paused.
#[derive(Args)]
pub(crate) struct What {
    /// This destination: nothing of it is sent
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "group",
        required_unless_present = "group"
    )]
    destination: Option<String>,
    /// This consumer group: none of its handlers runs
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// One topic of the destination; with --key, one key of the destination or group
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    /// One key of the topic
    #[arg(long, value_name = "KEY", requires = "topic")]
    key: Option<String>,
}

impl What {
    pub(crate) fn target(&self) -> Result<Target> {
        let whole = match (&self.destination, &self.group) {
            (Some(name), _) => Target::destination(name),
            (None, Some(name)) => Target::group(name),
            (None, None) => {
                return Err(Failure::Usage(
                    "name a --destination or a --group".to_owned(),
                ));
            }
        };
        Ok(match (&self.topic, &self.key) {
            (Some(topic), Some(key)) => whole.key(topic, key),
            (Some(topic), None) => whole.topic(topic),
            _ => whole,
        })
    }
}

impl Pause {
    pub(crate) async fn run(self) -> Result<()> {
        let target = self.what.target()?;
        let expiry = match (self.until, self.lasting) {
            (Some(until), _) => Expiry::At(until),
            (None, Some(lasting)) => Expiry::In(lasting),
            (None, None) => Expiry::default(),
        };
        let admin = self.place.admin(&self.by.operator()).await?;
        let paused = admin.pause(&target, expiry, &self.by.why).await?;
        let shape = shape::Pause::from(&paused);
        self.place.answer().give(&shape, || {
            format!("{target} is paused until {}", rfc3339(paused.until))
        })
    }
}
