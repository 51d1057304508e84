//! More partitions of the log, with every cursor and line where it belongs.
//!
//! Both numbers are powers of two, so that each new partition takes its keys from one old partition alone. Its cursor is a copy
//! of that one's: what is settled stays settled, nothing else is, and the order of each key goes on. Fewer partitions would
//! merge cursors that stand at different snapshots.

use std::time::Duration;

use sqlx::Row;

use super::{
    Inner,
    engine::{Commit, Tx, query},
};
use crate::error::{Error, Kind, Result};

/// The longest that it takes: the log is written anew, and its writers wait.
pub(super) const PATIENCE: Duration = Duration::from_secs(60 * 60);

const OPERATION: &str = "repartition";

impl Inner {
    pub(super) async fn repartition(&self, partitions: u16) -> Result<()> {
        let mut tx = self
            .engine
            .begin(OPERATION, PATIENCE, Commit::Durable)
            .await?;
        let outcome = self.split(&mut tx, partitions).await;
        tx.end(outcome).await
    }

    async fn split(&self, tx: &mut Tx<'_>, partitions: u16) -> Result<()> {
        // Beside no migration.
        tx.run(query(&self.schema.lock).bind(self.name.clone()))
            .await?;
        let row = tx.fetch_one(query(&self.schema.partitions)).await?;
        let now = self.check(OPERATION, row)?.partitions;
        if partitions == now {
            return Ok(());
        }
        if partitions < now {
            let text = format!(
                "the log has {now} partitions and can only get more of them: {partitions} would merge what stands at different places"
            );
            return Err(Error::new(Kind::Invalid, OPERATION, text));
        }
        let schema = format!("\"{}\"", self.name);
        // Whoever would acquire a lease waits, and then finds the new partitions. Rather than standing in the way of all
        // writers behind a long transaction, it gives up and is tried again.
        tx.script(format!(
            "SET LOCAL lock_timeout = '3s'; LOCK TABLE {schema}.cursor, {schema}.lease IN EXCLUSIVE MODE"
        ))
        .await?;
        self.check_at_rest(tx, &schema).await?;
        let (before, mask) = (now, partitions - 1);
        tx.script(format!(
            "LOCK TABLE {schema}.outbox IN ACCESS EXCLUSIVE MODE; SET LOCAL lock_timeout = 0; \
             ALTER TABLE {schema}.outbox DROP COLUMN partition, ADD COLUMN partition smallint NOT NULL GENERATED ALWAYS AS \
               ((hashtextextended(topic || chr(31) || coalesce(key, id::text), 0) & {mask})::smallint) STORED; \
             CREATE INDEX outbox_read ON {schema}.outbox (partition, position); \
             COMMENT ON COLUMN {schema}.outbox.partition IS 'From topic and key; each partition is relayed by one process at a time.'; \
             INSERT INTO {schema}.cursor (destination, partition, seen, base, upto, last) \
               SELECT c.destination, p, c.seen, c.base, c.upto, c.last \
               FROM {schema}.cursor c, generate_series({before}, {mask}) p WHERE c.partition = p % {before} \
               ON CONFLICT DO NOTHING; \
             UPDATE {schema}.deferred SET shard = (line & {mask})::smallint WHERE side = 'relay'; \
             UPDATE {schema}.dead_letter SET shard = \
               (hashtextextended(topic || chr(31) || coalesce(key, id), 0) & {mask})::smallint WHERE side = 'relay'; \
             UPDATE {schema}.installation SET partitions = {partitions}"
        ))
        .await?;
        tracing::info!(
            schema = self.name,
            before,
            partitions,
            "the log has more partitions"
        );
        Ok(())
    }

    /// A relay that runs holds memory of partitions that are about to be others.
    async fn check_at_rest(&self, tx: &mut Tx<'_>, schema: &str) -> Result<()> {
        let text = format!(
            "SELECT string_agg(DISTINCT held, ', ') AS held FROM ( \
               SELECT destination AS held FROM {schema}.cursor WHERE owner IS NOT NULL AND expires_at > clock_timestamp() \
               UNION ALL SELECT scope FROM {schema}.lease \
                 WHERE kind = 'relays' AND owner IS NOT NULL AND expires_at > clock_timestamp()) h"
        );
        let row = tx.fetch_one(query(&text.into())).await?;
        let held = row.map(|row| row.try_get::<Option<String>, _>("held"));
        match held {
            None | Some(Ok(None)) => Ok(()),
            Some(Ok(Some(held))) => {
                let text = format!(
                    "relays of {held} run: stop all of them first; one that was killed counts until its leases have expired"
                );
                Err(Error::new(Kind::Invalid, OPERATION, text))
            }
            Some(Err(e)) => Err(self.engine.failed(OPERATION, e)),
        }
    }
}
