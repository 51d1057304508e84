//! Named sets of cursors over the log, each with a broker of its own.

use clap::{Args, Subcommand};
use pillarbox::{Start, admin};
use serde_json::json;

use crate::{
    answer::{lasting, plain, table},
    failure::Result,
    place::{By, Place},
    shape,
};

#[derive(Subcommand)]
pub(crate) enum Destinations {
    List(List),
    Add(Add),
    Remove(Remove),
}

impl Destinations {
    pub(crate) async fn run(self) -> Result<()> {
        match self {
            Self::List(list) => list.run().await,
            Self::Add(add) => add.run().await,
            Self::Remove(remove) => remove.run().await,
        }
    }

    pub(crate) fn place(&self) -> &Place {
        match self {
            Self::List(list) => &list.place,
            Self::Add(add) => &add.place,
            Self::Remove(remove) => &remove.place,
        }
    }
}

/// List the destinations, and what those that were removed have lost.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox destinations list --config shop.toml
  pillarbox destinations list --config shop.toml --json | jq '.removed'")]
pub(crate) struct List {
    #[command(flatten)]
    place: Place,
}

impl List {
    async fn run(self) -> Result<()> {
        let admin = self.place.admin("list").await?;
        let all = admin.destinations().await?;
        let removed = admin.removed_destinations().await?;
        let shapes: Vec<_> = all.iter().map(shape::KnownDestination::from).collect();
        let gone: Vec<_> = removed.iter().map(shape::Removed::from).collect();
        let shape = json!({ "destinations": shapes, "removed": gone });
        self.place.answer().give(&shape, || text(&all))
    }
}

fn text(all: &[admin::Destination]) -> String {
    let heads = [
        "name",
        "start",
        "relay",
        "lag",
        "behind",
        "deferred",
        "dead letters",
    ];
    let row = |d: &admin::Destination| {
        vec![
            plain(&d.name, 80),
            d.start.to_string(),
            if d.is_served() { "runs" } else { "nobody" }.to_owned(),
            lasting(d.lag),
            d.behind.to_string(),
            d.deferred.to_string(),
            d.dead_letters.to_string(),
        ]
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    table(0, &heads, &rows)
}

/// Add a destination: from now on the log keeps for it what it has not published.
///
/// Give it a broker in `[destinations.NAME]`, and a relay. A move from one broker to another never starts at `now`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox destinations add audit --config shop.toml
  pillarbox destinations add audit --config shop.toml --start 2026-11-24T12:00:00Z")]
pub(crate) struct Add {
    #[command(flatten)]
    place: Place,
    name: String,
    /// Where in the log it begins: earliest, now, or a time in UTC
    #[arg(long, value_name = "START", default_value = "earliest")]
    start: Start,
    #[command(flatten)]
    by: By,
}

impl Add {
    async fn run(self) -> Result<()> {
        let admin = self.place.admin(&self.by.operator()).await?;
        let is_new = admin.add_destination(&self.name, self.start).await?;
        let shape = json!({ "name": self.name, "start": self.start.to_string(), "added": is_new });
        self.place.answer().give(&shape, || {
            if is_new {
                format!("the destination {:?} begins at {}", self.name, self.start)
            } else {
                format!("the destination {:?} is there already", self.name)
            }
        })
    }
}

/// Remove a destination with its cursors, its waiting events and its dead letters.
///
/// What it has not published is not sent there; the answer says how much that is. Stop its relay first.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox destinations remove audit --config shop.toml --why 'the audit stream has moved' --yes")]
pub(crate) struct Remove {
    #[command(flatten)]
    place: Place,
    name: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    by: By,
}

impl Remove {
    async fn run(self) -> Result<()> {
        let admin = self.place.admin(&self.by.operator()).await?;
        let all = admin.destinations().await?;
        let Some(known) = all.iter().find(|d| d.name == self.name) else {
            let known = all.iter().map(|d| d.name.as_str());
            return Err(crate::place::unknown("destination", &self.name, known));
        };
        if !self.yes {
            crate::place::confirm(&format!(
                "would remove the destination {:?}, {} events behind, with {} waiting and {} dead letters",
                self.name, known.behind, known.deferred, known.dead_letters
            ))?;
        }
        let removed = admin.remove_destination(&self.name, &self.by.why).await?;
        self.place.answer().give(&shape::Removed::from(&removed), || {
            format!(
                "removed {:?}: {} events were not published, {} waited, {} dead letters are gone",
                removed.name, removed.unpublished, removed.deferred, removed.dead_letters
            )
        })?;
        Ok(())
    }
}
