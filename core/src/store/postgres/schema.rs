//! Making and checking the schema.

use std::time::Duration;

use sqlx::Row;

use super::{
    Inner,
    engine::{Commit, Text, Tx, query},
};
use crate::{
    admin::Installation,
    error::{Error, Kind, Result},
    store::{PROGRAM, SCHEMA_VERSION},
};

/// The steps from each version to the next. A step only adds, and is never changed once released.
const STEPS: &[(i32, &str)] = &[
    (1, include_str!("schema.sql")),
    (2, include_str!("retention.sql")),
    (3, include_str!("schema_3.sql")),
    (4, include_str!("pause.sql")),
    (5, include_str!("destinations.sql")),
    (6, include_str!("schema_6.sql")),
];

/// The longest that making the schema takes, with the wait for another program that is making it.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Statements {
    pub(super) partitions: Text,
    exists: Text,
    installed: Text,
    pub(super) lock: Text,
    note: Text,
}

/// What the schema says about itself.
pub(super) struct Installed {
    version: i32,
    oldest_program: i32,
    pub(super) partitions: u16,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        Self {
            partitions: format!(
                "SELECT version, oldest_program, partitions FROM \"{schema}\".installation"
            )
            .into(),
            exists: "SELECT 1 FROM pg_namespace WHERE nspname = $1".into(),
            installed: "SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                        WHERE n.nspname = $1 AND c.relname = 'installation'"
                .into(),
            lock: "SELECT pg_advisory_xact_lock(hashtextextended('pillarbox migrate ' || $1, 0))"
                .into(),
            note: format!("UPDATE \"{schema}\".installation SET version = $1").into(),
        }
    }
}

/// A step with the schema's name and the number of partitions.
fn filled(step: &str, schema: &str, partitions: u16) -> String {
    step.replace("@schema@", &format!("\"{schema}\""))
        .replace("@mask@", &partitions.saturating_sub(1).to_string())
}

/// What [`Inner::migrate`] does, as one statement for any client: it makes or completes the schema, whatever its version, or
/// changes nothing. Its name is checked by the caller.
pub(crate) fn script(schema: &str, partitions: u16) -> String {
    let mut script = format!(
        "-- The tables of Pillarbox in the schema \"{schema}\", version {SCHEMA_VERSION}. One statement: it is done as a whole or not at all,\n\
         -- completes an older schema, and may be run again. Run it as the owner of the schema.\n\
         DO $pillarbox$\nBEGIN\n\
         PERFORM pg_advisory_xact_lock(hashtextextended('pillarbox migrate {schema}', 0));\n\
         IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = '{schema}') THEN\n  CREATE SCHEMA \"{schema}\";\nEND IF;\n\
         IF to_regclass('\"{schema}\".installation') IS NOT NULL THEN\n  \
         IF (SELECT oldest_program FROM \"{schema}\".installation) > {PROGRAM} THEN\n    \
         RAISE EXCEPTION 'the schema \"{schema}\" was made by a newer Pillarbox, which must print this script';\n  END IF;\n\
         END IF;\n"
    );
    for (to, step) in STEPS {
        let step = filled(step, schema, partitions);
        // Not planned together with the others: there may be no such table yet.
        let missing = match to {
            1 => format!("to_regclass('\"{schema}\".installation') IS NULL"),
            _ => format!("(SELECT version FROM \"{schema}\".installation) < {to}"),
        };
        script.push_str(&format!(
            "\n-- Version {to} {rule}\n\
             IF {missing} THEN\nEXECUTE $step_{to}$\n{step}$step_{to}$;\n\
             UPDATE \"{schema}\".installation SET version = {to};\nEND IF;\n",
            rule = "=".repeat(100)
        ));
    }
    script.push_str("END $pillarbox$;\n");
    script
}

impl Inner {
    /// Makes or completes the schema.
    pub(super) async fn migrate(&self, partitions: u16) -> Result<()> {
        const OPERATION: &str = "migrate";
        // A program that starts on a complete schema needs no right to change it.
        match self.installed(OPERATION).await {
            Ok(found) if found.version >= SCHEMA_VERSION => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == Kind::NotMigrated => {}
            Err(e) => return Err(e),
        }
        let mut tx = self
            .engine
            .begin(OPERATION, PATIENCE, Commit::Durable)
            .await?;
        let outcome = self.complete(&mut tx, partitions).await;
        tx.end(outcome).await
    }

    async fn complete(&self, tx: &mut Tx<'_>, partitions: u16) -> Result<()> {
        let name = self.name.as_str();
        // Programs that start at once go one after the other; each looks again once it is its turn.
        tx.run(query(&self.schema.lock).bind(name)).await?;
        // Not IF NOT EXISTS, which asks for the right to create even where there is nothing to create.
        if tx
            .fetch_one(query(&self.schema.exists).bind(name))
            .await?
            .is_none()
        {
            tx.script(format!("CREATE SCHEMA \"{name}\"")).await?;
        }
        let mut version = 0;
        if tx
            .fetch_one(query(&self.schema.installed).bind(name))
            .await?
            .is_some()
        {
            let row = tx.fetch_one(query(&self.schema.partitions)).await?;
            version = self.check("migrate", row)?.version;
        }
        for (to, step) in STEPS.iter().filter(|(to, _)| *to > version) {
            tx.script(filled(step, name, partitions)).await?;
            tx.run(query(&self.schema.note).bind(*to)).await?;
            tracing::info!(schema = name, version = to, "migrated");
        }
        Ok(())
    }

    /// The number of the log's partitions, if this program may use the schema.
    pub(super) async fn partitions(&self) -> Result<u16> {
        const OPERATION: &str = "look at the schema";
        let found = self.installed(OPERATION).await?;
        if found.version < SCHEMA_VERSION {
            let text = format!(
                "the schema \"{}\" has version {} and this program needs {SCHEMA_VERSION}: call pillarbox::migrate",
                self.name, found.version
            );
            return Err(Error::new(Kind::NotMigrated, OPERATION, text));
        }
        Ok(found.partitions)
    }

    pub(super) async fn installation(&self) -> Result<Installation> {
        let found = self.installed("look at the schema").await?;
        Ok(Installation {
            schema: self.name.clone(),
            version: found.version.unsigned_abs(),
            needed: SCHEMA_VERSION.unsigned_abs(),
            partitions: found.partitions,
        })
    }

    async fn installed(&self, operation: &'static str) -> Result<Installed> {
        let rows = self
            .engine
            .fetch(operation, || query(&self.schema.partitions))
            .await?;
        self.check(operation, rows.into_iter().next())
    }

    pub(super) fn check(
        &self,
        operation: &'static str,
        row: Option<sqlx::postgres::PgRow>,
    ) -> Result<Installed> {
        let Some(row) = row else {
            let text = self.engine.not_migrated();
            return Err(Error::new(Kind::NotMigrated, operation, text));
        };
        let read = |e| self.engine.failed(operation, e);
        let partitions: i16 = row.try_get("partitions").map_err(read)?;
        let found = Installed {
            version: row.try_get("version").map_err(read)?,
            oldest_program: row.try_get("oldest_program").map_err(read)?,
            partitions: partitions.unsigned_abs(),
        };
        if found.oldest_program > PROGRAM {
            let text = format!(
                "the schema \"{}\" (version {}) takes programs from {} on; this one is {PROGRAM}: update it",
                self.name, found.version, found.oldest_program
            );
            return Err(Error::new(Kind::Incompatible, operation, text));
        }
        Ok(found)
    }
}
