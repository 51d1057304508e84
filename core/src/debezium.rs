//! Debezium's outbox table as a view: writers that fill it today go on as they are, and their rows become events of the log.
//!
//! For PostgreSQL. The view takes INSERTs (also COPY) of `id, aggregatetype, aggregateid, type, payload`, and answers the
//! DELETE that many writers send after it. `aggregateid` is the event's key. A trigger turns each row into one of the log, so
//! that this way costs more than [`Outbox::enqueue`](crate::Outbox::enqueue): it is for the time of a move.

use crate::{
    connection::{Database, Pool},
    error::{Error, Kind, Result},
};

const OPERATION: &str = "make Debezium's view";
const AGGREGATE: &str = "{aggregatetype}";
/// How a comment begins that says whose the view is.
const OURS: &str = "Pillarbox: ";

/// What the column `payload` is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Payload {
    /// `jsonb`, sent as `application/json`. PostgreSQL orders keys and drops spaces.
    #[default]
    Jsonb,
    /// `text` that holds JSON, sent byte by byte as `application/json`.
    Text,
    /// `bytea`, sent as it is, without a content type.
    Bytea,
}

impl Payload {
    fn sql(self) -> &'static str {
        match self {
            Self::Jsonb => "jsonb",
            Self::Text => "text",
            Self::Bytea => "bytea",
        }
    }
}

/// The view to be made. The default is `public.outboxevent` with topics `outbox.event.{aggregatetype}` and a `jsonb` payload,
/// as in Debezium's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebeziumTable {
    schema: String,
    table: String,
    topic: String,
    payload: Payload,
}

impl Default for DebeziumTable {
    fn default() -> Self {
        Self {
            schema: "public".to_owned(),
            table: "outboxevent".to_owned(),
            topic: format!("outbox.event.{AGGREGATE}"),
            payload: Payload::default(),
        }
    }
}

impl DebeziumTable {
    /// With this name, `table` or `schema.table`.
    ///
    /// # Errors
    /// [`Kind::Invalid`] unless both are lower-case letters, digits and `_`, 63 characters at most.
    pub fn named(name: &str) -> Result<Self> {
        let (schema, table) = name.split_once('.').unwrap_or(("public", name));
        let good = |part: &str| {
            let first = part.bytes().next();
            first.is_some_and(|b| b.is_ascii_lowercase() || b == b'_')
                && part.len() <= 63
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        if !good(schema) || !good(table) {
            let shown: String = name.chars().take(130).collect();
            let text = format!(
                "the name {shown:?} of the view; expected table or schema.table, of lower-case letters, digits and '_'"
            );
            return Err(Error::new(Kind::Invalid, OPERATION, text));
        }
        Ok(Self {
            schema: schema.to_owned(),
            table: table.to_owned(),
            ..Self::default()
        })
    }

    /// With events of this topic, in which `{aggregatetype}` stands for the column; Debezium's `route.topic.replacement`.
    ///
    /// # Errors
    /// [`Kind::Invalid`] unless it is letters, digits, `_` and `-`, in parts joined by `.`, with at most one `{aggregatetype}`.
    pub fn topic(mut self, topic: &str) -> Result<Self> {
        let filled = topic.replacen(AGGREGATE, "x", 1);
        let good = filled.len() <= 200
            && filled
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            && !filled.split('.').any(str::is_empty);
        if !good {
            let shown: String = topic.chars().take(130).collect();
            let text = format!(
                "the topic {shown:?} of the view; expected letters, digits, '_', '-', in parts joined by '.', and {AGGREGATE} at most once"
            );
            return Err(Error::new(Kind::Invalid, OPERATION, text));
        }
        topic.clone_into(&mut self.topic);
        Ok(self)
    }

    /// With a payload of this type.
    #[must_use]
    pub fn payload(mut self, payload: Payload) -> Self {
        self.payload = payload;
        self
    }

    /// `schema.table`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}.{}", self.schema, self.table)
    }

    /// The SQL for PostgreSQL, after [`migration_script`](crate::migration_script): one statement, which may be run again.
    ///
    /// Whoever runs it owns the view: its writers need INSERT on it, those that delete or read back also DELETE and SELECT, and
    /// no right on the log.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a schema of the engine's that [`Database::in_schema`] refuses.
    pub fn script(&self, engine: &str) -> Result<String> {
        crate::connection::check_identifier(engine)?;
        let (before, after) = self
            .topic
            .split_once(AGGREGATE)
            .unwrap_or((&self.topic, ""));
        let aggregate = if self.topic.contains(AGGREGATE) {
            format!(
                "substr(o.topic, {}, length(o.topic) - {})",
                before.len() + 1,
                before.len() + after.len()
            )
        } else {
            "NULL::text".to_owned()
        };
        Ok(include_str!("store/postgres/debezium.sql")
            .replace("@engine@", engine)
            .replace("@view_schema@", &self.schema)
            .replace("@view@", &self.table)
            .replace("@topic@", &self.topic)
            .replace("@before@", before)
            .replace("@aggregatetype@", &aggregate)
            .replace("@payload@", self.payload.sql())
            .replace("@ours@", OURS))
    }

    /// Makes the view in a database that is migrated, or brings it up to date.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for SQLite; the database's: also where a table of this name is in the way, which has to be renamed first.
    pub async fn create(&self, database: impl Into<Database>) -> Result<()> {
        let database = database.into();
        let script = self.script(database.store().schema())?;
        match database.pool() {
            Some(Pool::Postgres(pool)) => {
                let run = sqlx::raw_sql(sqlx::AssertSqlSafe(script)).execute(&pool);
                run.await.map(drop).map_err(|e| failed(&self.name(), e))
            }
            _ => {
                let text = "this database is SQLite; the view is for PostgreSQL, which Debezium's outbox is for";
                Err(Error::new(Kind::Invalid, OPERATION, text))
            }
        }
    }
}

fn failed(name: &str, e: sqlx::Error) -> Error {
    // What the script raises itself.
    let in_the_way = crate::error::sqlstate(&e).is_some_and(|state| state == "42P07");
    if in_the_way {
        let (table, kept) = (name.rsplit('.').next().unwrap_or(name), "before_pillarbox");
        let text = format!(
            "{name} exists and is not this view: let its writers finish, then ALTER TABLE {name} RENAME TO {table}_{kept}, \
             and run this again"
        );
        return Error::new(Kind::Invalid, OPERATION, text);
    }
    Error::database(OPERATION, e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_topics_that_do_not_fit_are_refused() {
        for name in ["", "A", "a b", "a.b.c", "a\"b", "a.", ".a", "é", "a;b"] {
            let error = DebeziumTable::named(name).expect_err(name);
            assert_eq!(error.kind(), Kind::Invalid);
        }
        for topic in [
            "",
            "a..b",
            "a b",
            "a'b",
            "{aggregatetype}{aggregatetype}",
            "{type}",
            "a.",
        ] {
            let error = DebeziumTable::default().topic(topic).expect_err(topic);
            assert_eq!(error.kind(), Kind::Invalid);
        }
        for topic in [
            "a",
            "{aggregatetype}",
            "a.{aggregatetype}",
            "a.{aggregatetype}.b",
        ] {
            let script = DebeziumTable::default().topic(topic).expect(topic);
            assert!(
                !script.script("pillarbox").expect(topic).contains('@'),
                "{topic}"
            );
        }
    }
}
