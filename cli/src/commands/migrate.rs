use clap::{Args, ValueEnum};
use pillarbox::{
    Admin,
    debezium::{DebeziumTable, Payload},
};
use serde_json::json;

use crate::{
    answer,
    failure::{Failure, Result},
    place::Place,
};

/// Partitions of a log that is made without a word about them; SQLite's has one.
const PARTITIONS: u16 = 4;

/// Make or complete the tables.
///
/// Idempotent, and safe when many do it at once. Makes nothing but the schema of `[store] schema` (PostgreSQL) or tables with
/// that prefix (SQLite), apart from your own migrations.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox migrate --config shop.toml
  pillarbox migrate --config shop.toml --partitions 8
  pillarbox migrate --config shop.toml --print | psql -d shop
  pillarbox migrate --config shop.toml --compat debezium --compat-table shop.outboxevent")]
pub(crate) struct Migrate {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Print the SQL for PostgreSQL instead, and connect to nothing
    #[arg(long, conflicts_with = "json")]
    print: bool,
    /// Partitions of the log, as many relays can share it: a power of two, 1 to 64. Only counts when the log is made [default: 4]
    #[arg(long, value_name = "N", value_parser = partitions)]
    partitions: Option<u16>,
    /// Also make a view in the shape of another outbox table, whose writers need not change (PostgreSQL)
    #[arg(long, value_name = "SHAPE")]
    compat: Option<Compat>,
    /// The view's name
    #[arg(
        long,
        value_name = "[SCHEMA.]NAME",
        requires = "compat",
        default_value = "public.outboxevent"
    )]
    compat_table: String,
    /// The topic of its events; {aggregatetype} stands for the column
    #[arg(
        long,
        value_name = "TOPIC",
        requires = "compat",
        default_value = "outbox.event.{aggregatetype}"
    )]
    compat_topic: String,
    /// The type of its column `payload`
    #[arg(
        long,
        value_name = "TYPE",
        requires = "compat",
        default_value = "jsonb"
    )]
    compat_payload: CompatPayload,
}

#[derive(Clone, Copy, ValueEnum)]
enum Compat {
    /// Debezium's: id, aggregatetype, aggregateid, type, payload
    Debezium,
}

#[derive(Clone, Copy, ValueEnum)]
enum CompatPayload {
    /// JSON, as in Debezium's documentation
    Jsonb,
    /// JSON as a text
    Text,
    /// Any bytes
    Bytea,
}

impl Migrate {
    pub(crate) async fn run(self) -> Result<()> {
        let view = self.view()?;
        if self.print {
            return self.print(view.as_ref());
        }
        let database = self.place.database().await?;
        pillarbox::migrate_with(&database, self.partitions.unwrap_or(PARTITIONS)).await?;
        if let Some(view) = &view {
            view.create(&database).await?;
        }
        let made = Admin::new(&database, "migrate").installation().await?;
        let name = view.as_ref().map(DebeziumTable::name);
        let shape = json!({
            "schema": made.schema, "version": made.version, "partitions": made.partitions, "compat": name,
        });
        self.place.answer().give(&shape, || {
            let compat =
                name.map(|n| format!("\nthe view {n} takes what Debezium's outbox table took"));
            format!(
                "schema {} is complete: version {}, {} partitions{}",
                made.schema,
                made.version,
                made.partitions,
                compat.unwrap_or_default()
            )
        })?;
        match self.partitions {
            Some(asked) if asked != made.partitions => Err(Failure::Finding(format!(
                "the log has {} partitions and keeps them; --partitions {asked} only counts when it is made",
                made.partitions
            ))),
            _ => Ok(()),
        }
    }

    fn print(&self, view: Option<&DebeziumTable>) -> Result<()> {
        let settings = self.place.settings()?;
        let partitions = self.partitions.unwrap_or(PARTITIONS);
        let mut script = settings.store.migration_script(partitions)?;
        if let Some(view) = view {
            script.push('\n');
            script.push_str(&view.script(&settings.store.schema)?);
        }
        answer::write(&script)
    }

    fn view(&self) -> Result<Option<DebeziumTable>> {
        let Some(Compat::Debezium) = self.compat else {
            return Ok(None);
        };
        let payload = match self.compat_payload {
            CompatPayload::Jsonb => Payload::Jsonb,
            CompatPayload::Text => Payload::Text,
            CompatPayload::Bytea => Payload::Bytea,
        };
        let view = DebeziumTable::named(&self.compat_table);
        let view = view.and_then(|view| view.topic(&self.compat_topic));
        // What is wrong here are the arguments.
        let view = view.map_err(|e| Failure::Usage(e.to_string()))?;
        Ok(Some(view.payload(payload)))
    }
}

fn partitions(text: &str) -> Result<u16, String> {
    let found = text.parse::<u16>().ok();
    let good = found.filter(|n| n.is_power_of_two() && *n <= 64);
    good.ok_or_else(|| "expected a power of two from 1 to 64: 1, 2, 4, 8, 16, 32 or 64".to_owned())
}
