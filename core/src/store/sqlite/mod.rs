//! SQLite.

use async_trait::async_trait;
use sqlx::SqlitePool;

use crate::{
    connection::Pool,
    cursor::Progress,
    error::Result,
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Line, LineId, Resolution, Side},
    lease::{Acquired, Lease, LeaseKey, LeaseTerm},
    store::{Gate, Slice, Store, Unit, Waiting},
};

pub(crate) struct Sqlite {
    host: SqlitePool,
    schema: String,
}

impl Sqlite {
    pub(crate) fn new(pool: SqlitePool, schema: &str) -> Self {
        Self {
            host: pool,
            schema: schema.to_owned(),
        }
    }
}

#[async_trait]
#[allow(unused_variables, clippy::unimplemented)]
impl Store for Sqlite {
    fn pool(&self) -> Option<Pool> {
        Some(Pool::Sqlite(self.host.clone()))
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
