//! Noticing that the database is in another cluster, or that another server has taken over.
//!
//! Not here: what a new cluster means for log and cursors. That is `reanchor` in `destinations.sql`.

use std::time::Duration;

use sqlx::Row;

use super::{
    Inner,
    engine::{Commit, Text, query},
    row,
};
use crate::{
    destination::{Cause, Reanchored},
    error::Result,
};

/// The longest that anchoring takes: it writes every event of the log once.
pub(super) const PATIENCE: Duration = Duration::from_secs(1_800);

const OPERATION: &str = "anchor the log in this cluster";

pub(super) struct Statements {
    at_home: Text,
    lock: String,
    here: Text,
    move_in: Text,
    reanchor: Text,
    told: Text,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let schema = format!("\"{schema}\"");
        Self {
            at_home: format!("SELECT {schema}.at_home() AS at_home").into(),
            // Taken before the transaction's snapshot: whoever waited here sees what the other one did.
            lock: format!("LOCK TABLE {schema}.installation IN SHARE ROW EXCLUSIVE MODE"),
            here: format!(
                "SELECT {schema}.at_home() AS at_home, i.system_identifier = s.system_identifier \
                   AND coalesce(i.timeline <> {schema}.timeline(), false) AS took_over \
                 FROM {schema}.installation i, pg_control_system() s"
            )
            .into(),
            move_in: format!(
                "WITH was AS (SELECT timeline FROM {schema}.installation), \
                 moved AS (UPDATE {schema}.installation SET timeline = {schema}.timeline()) \
                 INSERT INTO {schema}.anchoring (cause, before, now) \
                 SELECT 'failover', was.timeline::text, {schema}.timeline()::text FROM was"
            )
            .into(),
            reanchor: format!("SELECT {schema}.reanchor()").into(),
            told: format!(
                "SELECT a.at, a.cause, a.destination, a.unsettled FROM {schema}.anchoring a \
                 WHERE a.at = (SELECT max(l.at) FROM {schema}.anchoring l) ORDER BY a.destination"
            )
            .into(),
        }
    }
}

impl Inner {
    /// Anchors log and cursors where the database is now, if that is another place than before.
    pub(super) async fn anchor(&self) -> Result<Option<Reanchored>> {
        let rows = self
            .engine
            .fetch(OPERATION, || query(&self.anchor.at_home))
            .await?;
        let at_home = rows.first().map(|row| row.try_get("at_home"));
        let at_home: bool = at_home
            .transpose()
            .map_err(|e| self.engine.failed(OPERATION, e))?
            .unwrap_or(true);
        if at_home {
            return Ok(None);
        }
        // A failover first: it changes no transaction id, so that a snapshot of the log is not needed for it.
        let mut tx = self
            .engine
            .begin(OPERATION, PATIENCE, Commit::Durable)
            .await?;
        let outcome = self.note_failover(&mut tx).await;
        let noted = tx.end(outcome).await?;
        let anchored = noted || self.reanchor().await?;
        if anchored {
            self.told().await.map(Some)
        } else {
            Ok(None)
        }
    }

    async fn note_failover(&self, tx: &mut super::engine::Tx<'_>) -> Result<bool> {
        tx.script(self.anchor.lock.clone()).await?;
        let row = tx.fetch_one(query(&self.anchor.here)).await?;
        let took_over = row.map(|row| row.try_get::<bool, _>("took_over"));
        let took_over = took_over.transpose();
        if took_over.map_err(|e| self.engine.failed(OPERATION, e))? != Some(true) {
            return Ok(false);
        }
        tx.run(query(&self.anchor.move_in)).await?;
        // Of the same cluster, and all the same not anchored in it: a repair has set its transaction ids back.
        let row = tx.fetch_one(query(&self.anchor.at_home)).await?;
        let at_home = row.map(|row| row.try_get::<bool, _>("at_home")).transpose();
        at_home
            .map(|at_home| at_home == Some(true))
            .map_err(|e| self.engine.failed(OPERATION, e))
    }

    async fn reanchor(&self) -> Result<bool> {
        let mut tx = self
            .engine
            .begin_repeatable(OPERATION, PATIENCE, &self.anchor.lock)
            .await?;
        let outcome = async {
            let row = tx.fetch_one(query(&self.anchor.at_home)).await?;
            let at_home = row.map(|row| row.try_get::<bool, _>("at_home")).transpose();
            if at_home.map_err(|e| self.engine.failed(OPERATION, e))? == Some(true) {
                return Ok(false);
            }
            tx.run(query(&self.anchor.reanchor)).await?;
            Ok(true)
        };
        let outcome = outcome.await;
        tx.end(outcome).await
    }

    async fn told(&self) -> Result<Reanchored> {
        let rows = self
            .engine
            .fetch(OPERATION, || query(&self.anchor.told))
            .await?;
        let mut told = Reanchored {
            cause: Cause::Cluster,
            at: std::time::SystemTime::now(),
            unsettled: Vec::new(),
        };
        let read = |e| self.engine.failed(OPERATION, e);
        for row in &rows {
            told.at = row::time(row, "at").map_err(read)?;
            if row.try_get::<String, _>("cause").map_err(read)? == "failover" {
                told.cause = Cause::Failover;
            }
            let destination: Option<String> = row.try_get("destination").map_err(read)?;
            let unsettled: i64 = row.try_get("unsettled").map_err(read)?;
            told.unsettled
                .extend(destination.map(|d| (d, unsettled.unsigned_abs())));
        }
        Ok(told)
    }
}
