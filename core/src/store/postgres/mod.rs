//! The log, cursors, leases, exceptions and inbox in PostgreSQL.

use std::time::Duration;

use async_trait::async_trait;
use pillarbox_transport::Message;
use sqlx::PgPool;

use super::{Gate, Slice, Store, Unit, Waiting};
use crate::{
    connection::{Connection, Pool},
    cursor::Progress,
    error::Result,
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Line, LineId, Resolution, Side},
    lease::{Acquired, Lease, LeaseKey, LeaseTerm},
};

/// The store over a PostgreSQL pool.
pub(crate) struct Postgres {
    pool: PgPool,
    schema: String,
}

impl Postgres {
    /// The schema's name is checked by the caller.
    pub(crate) fn new(pool: PgPool, schema: &str) -> Self {
        Self {
            pool,
            schema: schema.to_owned(),
        }
    }
}

#[async_trait]
#[allow(clippy::unimplemented, unused_variables)]
impl Store for Postgres {
    fn pool(&self) -> Option<Pool> {
        Some(Pool::Postgres(self.pool.clone()))
    }
    fn schema(&self) -> &str {
        &self.schema
    }
    async fn migrate(&self, partitions: u16) -> Result<()> {
        unimplemented!()
    }
    async fn partitions(&self) -> Result<u16> {
        unimplemented!()
    }
    async fn acquire(&self, key: &LeaseKey, term: LeaseTerm) -> Result<Option<Acquired>> {
        unimplemented!()
    }
    async fn renew(&self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        unimplemented!()
    }
    async fn release(&self, lease: &Lease) -> Result<()> {
        unimplemented!()
    }
    async fn read(&self, partition: u16, from: &Progress, limit: u32) -> Result<Slice> {
        unimplemented!()
    }
    async fn flush(&self, lease: &Lease, gate: &Gate) -> Result<()> {
        unimplemented!()
    }
    async fn settle(
        &self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<()> {
        unimplemented!()
    }
    async fn settle_source(&self, lease: &Lease, position: u64, term: LeaseTerm) -> Result<()> {
        unimplemented!()
    }
    async fn defer(&self, lease: &Lease, events: &[Deferral]) -> Result<()> {
        unimplemented!()
    }
    async fn bury(&self, lease: &Lease, events: &[DeadLetter]) -> Result<()> {
        unimplemented!()
    }
    async fn lines(&self, lease: &Lease, limit: u32) -> Result<Vec<Line>> {
        unimplemented!()
    }
    async fn line(
        &self,
        lease: &Lease,
        key: Option<&Key>,
        id: &LineId,
        limit: u32,
    ) -> Result<Vec<Deferred>> {
        unimplemented!()
    }
    async fn resolve(&self, lease: &Lease, id: &LineId, resolution: &Resolution) -> Result<()> {
        unimplemented!()
    }
    async fn deferred(&self, side: Side, scope: &str) -> Result<Waiting> {
        unimplemented!()
    }
    async fn begin(&self, group: &str, term: LeaseTerm, durable: bool) -> Result<Box<dyn Unit>> {
        unimplemented!()
    }
    async fn uncopied(&self, group: &str, limit: u32) -> Result<Vec<DeadLetter>> {
        unimplemented!()
    }
    async fn copied(&self, lease: &Lease, ids: &[LineId]) -> Result<()> {
        unimplemented!()
    }
}
