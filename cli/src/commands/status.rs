use std::{fmt::Write as _, time::Duration};

use clap::Args;
use humantime_serde::re::humantime;
use pillarbox::admin::{self, Exceptions, Owner};

use crate::{
    answer::{lasting, plain, rfc3339, table},
    failure::{Failure, Result},
    place::Place,
    shape,
};

/// Show who relays and reads what, how far it has come, and what waits or was given up.
///
/// Any process that may read the tables can tell, whether it relays or not; nothing is counted in the log.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox status --config shop.toml
  pillarbox status --config shop.toml --max-lag 5m || alert
  pillarbox status --config shop.toml --json | jq '.destinations[] | {name, lag_seconds}'")]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Exit with 1 if an event has waited longer for its relay, as in 30s or 5m
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    max_lag: Option<Duration>,
}

impl Status {
    pub(crate) async fn run(self) -> Result<()> {
        let admin = self.place.admin("status").await?;
        let (status, pauses) = (admin.status().await?, admin.pauses().await?);
        let findings = self.findings(&status);
        let shape = shape::Status::new(&status, &pauses, &findings);
        self.place
            .answer()
            .give(&shape, || text(&status, &pauses))?;
        match findings.as_slice() {
            [] => Ok(()),
            findings => Err(Failure::Finding(findings.join("; "))),
        }
    }

    fn findings(&self, status: &admin::Status) -> Vec<String> {
        let Some(most) = self.max_lag else {
            return Vec::new();
        };
        let late = status.destinations.iter().filter(|d| d.lag() > most);
        late.map(|d| {
            let (lag, most) = (lasting(d.lag()), lasting(most));
            format!(
                "destination {}: the oldest event has waited for {lag}, more than {most}",
                d.name
            )
        })
        .collect()
    }
}

fn text(status: &admin::Status, pauses: &[admin::Pause]) -> String {
    let schema = &status.installation;
    let mut text = format!(
        "schema {}, version {}, {} partitions; seen {}\n",
        schema.schema,
        schema.version,
        schema.partitions,
        rfc3339(status.seen)
    );
    for destination in &status.destinations {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\ndestination {}: lag {}{}\n",
            plain(&destination.name, 80),
            lasting(destination.lag()),
            exceptions(&destination.exceptions)
        );
        let rows: Vec<_> = destination.partitions.iter().map(partition).collect();
        let heads = [
            "partition",
            "owner",
            "lease",
            "epoch",
            "settled",
            "lag",
            "behind",
        ];
        text.push_str(&table(2, &heads, &rows));
    }
    for group in &status.groups {
        let _ = write!(
            text,
            "\ngroup {}{}\n",
            plain(&group.name, 80),
            exceptions(&group.exceptions)
        );
        let rows: Vec<_> = group.sources.iter().map(source).collect();
        let heads = ["source", "partition", "owner", "lease", "epoch", "position"];
        text.push_str(&table(2, &heads, &rows));
    }
    for pause in pauses {
        let _ = write!(text, "\n{}\n", plain(&pause.to_string(), 2_000));
    }
    text
}

fn exceptions(e: &Exceptions) -> String {
    let mut text = format!(", {} dead letters, {} deferred", e.dead_letters, e.deferred);
    if e.deferred > 0 {
        let _ = write!(
            text,
            " (longest line {}, {} parked)",
            e.longest_line, e.parked
        );
    }
    if e.scheduled > 0 {
        let _ = write!(text, ", {} scheduled", e.scheduled);
    }
    text
}

fn owner(owner: Option<&Owner>) -> [String; 2] {
    match owner {
        Some(owner) => [owner.id.clone(), lasting(owner.expires_in)],
        None => ["nobody".to_owned(), "-".to_owned()],
    }
}

fn partition(p: &admin::PartitionStatus) -> Vec<String> {
    let [owner, lease] = owner(p.owner.as_ref());
    let number = p.partition.to_string();
    let (epoch, settled, behind) = (
        p.epoch.to_string(),
        p.settled.to_string(),
        p.behind.to_string(),
    );
    vec![number, owner, lease, epoch, settled, lasting(p.lag), behind]
}

fn source(s: &admin::SourceStatus) -> Vec<String> {
    let [owner, lease] = owner(s.owner.as_ref());
    let name = format!("{} {}", plain(&s.transport, 20), plain(&s.name, 120));
    let position = s.position.map_or_else(|| "-".to_owned(), |p| p.to_string());
    vec![
        name,
        s.partition.to_string(),
        owner,
        lease,
        s.epoch.to_string(),
        position,
    ]
}
