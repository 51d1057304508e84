use std::time::SystemTime;

use clap::Args;
use pillarbox::{
    Admin,
    admin::{Filter, Letter, Page, Side},
};

use crate::{
    failure::{Failure, Result},
    place::{time, unknown},
};

/// Which dead letters: those that satisfy all that is given.
#[derive(Args)]
pub(crate) struct Selection {
    /// Those that the relays of this destination gave up; `main` is the default one
    #[arg(long, value_name = "NAME", conflicts_with = "group")]
    destination: Option<String>,
    /// Those that this consumer group gave up
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Of this topic
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    /// Of this key; with --topic, the letters of one key
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Of this type
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Whose reason has this in it
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Given up at this time or later: 2026-11-24T12:00:00Z, or how long ago, as in 90m
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<SystemTime>,
    /// Given up before this time
    #[arg(long, value_name = "TIME", value_parser = time)]
    before: Option<SystemTime>,
}

impl Selection {
    pub(crate) fn filter(&self) -> Filter {
        let (side, scope) = match (&self.destination, &self.group) {
            (Some(name), _) => (Some(Side::Relay), Some(name.clone())),
            (None, Some(name)) => (Some(Side::Consumer), Some(name.clone())),
            (None, None) => (None, None),
        };
        Filter {
            side,
            scope,
            topic: self.topic.clone(),
            key: self.key.clone(),
            kind: self.kind.clone(),
            id: None,
            reason: self.reason.clone(),
            since: self.since,
            before: self.before,
        }
    }

    /// Refuses a destination or group that nobody knows: a misspelt one would just have no dead letters.
    pub(crate) async fn check(&self, admin: &Admin) -> Result<()> {
        let status = admin.status().await?;
        let destinations = || status.destinations.iter().map(|d| d.name.as_str());
        let groups = || status.groups.iter().map(|g| g.name.as_str());
        match (&self.destination, &self.group) {
            (Some(name), _) if !destinations().any(|d| d == name) => {
                Err(unknown("destination", name, destinations()))
            }
            (_, Some(name)) if !groups().any(|g| g == name) => {
                Err(unknown("group", name, groups()))
            }
            _ => Ok(()),
        }
    }

    /// The one dead letter, or parked event, of this id.
    pub(crate) async fn one(&self, admin: &Admin, id: &str) -> Result<Letter> {
        self.check(admin).await?;
        let filter = Filter {
            id: Some(id.to_owned()),
            ..self.filter()
        };
        let page = Page {
            limit: 10,
            ..Page::default()
        };
        let mut found = admin.dead_letters(&filter, &page).await?;
        found.extend(admin.parked(&filter, &page).await?);
        match (found.pop(), found.as_slice()) {
            (Some(letter), []) => Ok(letter),
            (Some(last), others) => {
                let places: Vec<String> = others
                    .iter()
                    .chain([&last])
                    .map(|l| l.id.to_string())
                    .collect();
                Err(Failure::Usage(format!(
                    "the event {id} was given up in several places: {}; name one by --destination or --group",
                    places.join("; ")
                )))
            }
            (None, _) => Err(Failure::Finding(format!(
                "there is no dead letter of the event {id:?}: it may have been retried or discarded; \
                 `pillarbox dead-letters list` shows what there is"
            ))),
        }
    }
}
