//! The store on SQLite: one writer, one partition, positions in commit order.
//!
//! Every write of the engine is one `BEGIN IMMEDIATE` transaction in a task of its own, which runs to its end whatever
//! becomes of the caller. It never writes on a connection whose `synchronous` is below FULL.

mod destination;
mod failure;
mod lease;
mod letters;
mod log;
mod pause;
mod pool;
mod retention;
mod row;
mod schedule;
mod schema;
mod status;
mod unit;

use std::time::Duration;

use async_trait::async_trait;
use pillarbox_transport::Message;
use sqlx::SqlitePool;

use crate::{
    admin::{DryRun, Filter, Installation, Letter, LetterId, Removed, Selection, Shown},
    backpressure::Backlog,
    connection::Pool,
    cursor::Progress,
    error::{Error, Kind, Result},
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Line, LineId, Resolution, Side},
    lease::{Acquired, Lease, LeaseKey, LeaseTerm},
    pause::{NewPause, Target},
    store::{
        Added, Cleaned, Counted, Due, Extent, Gate, Letters, NewDestination, Paused, Registered,
        Relays, Slice, Standing, Standings, Store, Trimmed, Unit, Unserved, Waiting,
    },
};
use pool::Engine;

/// A SQLite database, tables behind a prefix.
pub(crate) struct Sqlite {
    host: SqlitePool,
    schema: String,
    engine: Engine,
}

impl Sqlite {
    /// Over the host's pool; `schema` is a checked identifier, without the `_` that follows it.
    pub(crate) fn new(pool: SqlitePool, schema: &str) -> Self {
        Self {
            engine: Engine::new(pool.clone(), schema),
            host: pool,
            schema: schema.to_owned(),
        }
    }
}

#[async_trait]
impl Store for Sqlite {
    fn pool(&self) -> Option<Pool> {
        Some(Pool::Sqlite(self.host.clone()))
    }

    async fn close(&self) {
        self.engine.close().await;
    }

    fn schema(&self) -> &str {
        &self.schema
    }

    async fn migrate(&self, _partitions: u16) -> Result<()> {
        self.engine
            .write("migrate", |tx| Box::pin(schema::migrate(tx)))
            .await
    }

    async fn partitions(&self) -> Result<u16> {
        let partitions = schema::partitions(&self.engine).await?;
        self.engine.warn_if_unsafe().await;
        Ok(partitions)
    }

    async fn installation(&self) -> Result<Installation> {
        schema::installation(&self.engine).await
    }

    async fn repartition(&self, partitions: u16) -> Result<()> {
        if partitions == 1 {
            return Ok(());
        }
        let text = "on SQLite the log has one partition: there is one writer, and one relay keeps up with it";
        Err(Error::new(Kind::Invalid, "repartition", text))
    }

    async fn alone(&self, lease: &Lease, event: Option<&LineId>) -> Result<()> {
        let (lease, event) = (lease.clone(), event.cloned());
        self.engine
            .write("note an event", move |tx| {
                Box::pin(async move { lease::alone(tx, &lease, event).await })
            })
            .await
    }

    async fn acquire(&self, key: &LeaseKey, term: LeaseTerm) -> Result<Option<Acquired>> {
        let key = key.clone();
        self.engine
            .write("acquire lease", move |tx| {
                Box::pin(async move { lease::acquire(tx, &key, term).await })
            })
            .await
    }

    async fn renew(&self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        let lease = lease.clone();
        self.engine
            .write("renew lease", move |tx| {
                Box::pin(async move { lease::renew(tx, &lease, term).await })
            })
            .await
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let lease = lease.clone();
        self.engine
            .write("release lease", move |tx| {
                Box::pin(async move { lease::release(tx, &lease).await })
            })
            .await
    }

    async fn relays(&self, destination: &str) -> Result<Relays> {
        lease::relays(&self.engine, destination).await
    }

    async fn read(&self, _partition: u16, from: &Progress, limit: u32) -> Result<Slice> {
        log::read(&self.engine, from, limit).await
    }

    async fn flush(&self, lease: &Lease, _gate: &Gate) -> Result<()> {
        let lease = lease.clone();
        self.engine
            .write("flush", move |tx| {
                Box::pin(async move { lease::touch(tx, &lease).await })
            })
            .await
    }

    async fn settle(
        &self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        _durable: bool,
    ) -> Result<()> {
        let (lease, progress) = (lease.clone(), progress.clone());
        self.engine
            .write("settle", move |tx| {
                Box::pin(async move { log::settle(tx, &lease, &progress, term).await })
            })
            .await
    }

    async fn settle_source(&self, lease: &Lease, position: u64, term: LeaseTerm) -> Result<()> {
        let lease = lease.clone();
        self.engine
            .write("settle source", move |tx| {
                Box::pin(async move { log::settle_source(tx, &lease, position, term).await })
            })
            .await
    }

    async fn defer(&self, lease: &Lease, events: &[Deferral]) -> Result<()> {
        let (lease, events) = (lease.clone(), events.to_vec());
        self.engine
            .write("defer", move |tx| {
                Box::pin(async move {
                    lease::fence(tx, &lease).await?;
                    let place = failure::Place::of(&lease.key);
                    for event in &events {
                        failure::defer(tx, &place, event).await?;
                    }
                    Ok(())
                })
            })
            .await
    }

    async fn bury(&self, lease: &Lease, events: &[DeadLetter]) -> Result<()> {
        let (lease, events) = (lease.clone(), events.to_vec());
        self.engine
            .write("bury", move |tx| {
                Box::pin(async move {
                    lease::fence(tx, &lease).await?;
                    let place = failure::Place::of(&lease.key);
                    for event in &events {
                        failure::bury(tx, &place, event).await?;
                    }
                    Ok(())
                })
            })
            .await
    }

    async fn lines(&self, lease: &Lease, limit: u32) -> Result<Vec<Line>> {
        failure::lines(&self.engine, lease, limit).await
    }

    async fn line(
        &self,
        lease: &Lease,
        key: Option<&Key>,
        id: &LineId,
        limit: u32,
    ) -> Result<Vec<Deferred>> {
        failure::line(&self.engine, lease, key, id, limit).await
    }

    async fn resolve(&self, lease: &Lease, id: &LineId, resolution: &Resolution) -> Result<()> {
        let (lease, id, resolution) = (lease.clone(), id.clone(), resolution.clone());
        self.engine
            .write("resolve", move |tx| {
                Box::pin(async move {
                    lease::fence(tx, &lease).await?;
                    let place = failure::Place::of(&lease.key);
                    failure::resolve(tx, &place, &id, &resolution).await
                })
            })
            .await
    }

    async fn fall_due(&self, lease: &Lease, position: i64, limit: u32) -> Result<Due> {
        let lease = lease.clone();
        self.engine
            .write("let events fall due", move |tx| {
                Box::pin(async move {
                    lease::fence(tx, &lease).await?;
                    let place = failure::Place::of(&lease.key);
                    schedule::fall_due(tx, &place, position, limit).await
                })
            })
            .await
    }

    async fn deferred(&self, side: Side, scope: &str) -> Result<Waiting> {
        failure::waiting(&self.engine, side, scope).await
    }

    async fn standing(&self, group: &str, messages: &[&Message]) -> Result<Vec<Standing>> {
        unit::standing(&self.engine, group, messages).await
    }

    async fn backlog(&self) -> Result<Backlog> {
        retention::backlog(&self.engine).await
    }

    async fn begin(&self, group: &str, term: LeaseTerm, _durable: bool) -> Result<Box<dyn Unit>> {
        let tx = self
            .engine
            .begin_uncancelled("begin", term.statement())
            .await?;
        Ok(Box::new(unit::SqliteUnit::new(tx, group)))
    }

    fn writers(&self) -> usize {
        1
    }

    async fn uncopied(&self, group: &str, limit: u32) -> Result<Vec<DeadLetter>> {
        failure::uncopied(&self.engine, group, limit).await
    }

    async fn copied(&self, lease: &Lease, ids: &[LineId]) -> Result<()> {
        let (lease, ids) = (lease.clone(), ids.to_vec());
        self.engine
            .write("note copies", move |tx| {
                Box::pin(async move {
                    lease::fence(tx, &lease).await?;
                    failure::copied(tx, &failure::Place::of(&lease.key), &ids).await
                })
            })
            .await
    }

    async fn clean_log(&self, lease: &Lease, keep: Duration) -> Result<Cleaned> {
        retention::clean_log(&self.engine, lease, keep).await
    }

    async fn clean_inbox(&self, lease: &Lease, remember: Duration) -> Result<Cleaned> {
        retention::clean_inbox(&self.engine, lease, remember).await
    }

    async fn trim_dead_letters(
        &self,
        lease: &Lease,
        side: Side,
        keep: Duration,
        most: u64,
    ) -> Result<Vec<Trimmed>> {
        retention::trim_dead_letters(&self.engine, lease, side, keep, most).await
    }

    async fn standings(&self) -> Result<Standings> {
        status::standings(&self.engine).await
    }

    async fn letters(&self, letters: &Letters) -> Result<Vec<Letter>> {
        letters::list(&self.engine, letters).await
    }

    async fn letter(&self, id: &LetterId) -> Result<Option<Shown>> {
        letters::show(&self.engine, id).await
    }

    async fn count_letters(&self, filter: &Filter) -> Result<DryRun> {
        letters::count(&self.engine, filter).await
    }

    async fn newer(&self, id: &LetterId) -> Result<u64> {
        letters::newer(&self.engine, id).await
    }

    async fn waits(&self, id: &LetterId) -> Result<bool> {
        letters::waits(&self.engine, id).await
    }

    async fn retry_letters(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64> {
        let (place, ids) = (failure::Place::on(side, scope), ids.to_vec());
        self.engine
            .write("retry dead letters", move |tx| {
                Box::pin(async move { letters::retry(tx, &place, &ids).await })
            })
            .await
    }

    async fn discard_letters(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64> {
        let (place, ids) = (failure::Place::on(side, scope), ids.to_vec());
        self.engine
            .write("discard dead letters", move |tx| {
                Box::pin(async move { letters::discard(tx, &place, &ids).await })
            })
            .await
    }

    async fn pauses(&self, of: Option<(Side, &str)>) -> Result<Vec<Paused>> {
        pause::list(&self.engine, of).await
    }

    async fn pause(&self, new: &NewPause) -> Result<Option<Paused>> {
        let new = new.clone();
        self.engine
            .write("pause", move |tx| {
                Box::pin(async move { pause::pause(tx, &new).await })
            })
            .await
    }

    async fn resume(&self, target: &Target) -> Result<Option<Paused>> {
        let target = target.clone();
        self.engine
            .write("resume", move |tx| {
                Box::pin(async move { pause::resume(tx, &target).await })
            })
            .await
    }

    async fn scopes(&self, side: Side) -> Result<Vec<String>> {
        pause::scopes(&self.engine, side).await
    }

    async fn forget_pauses(&self, lease: &Lease, side: Side) -> Result<u64> {
        let lease = lease.clone();
        self.engine
            .write("remove pauses that are over", move |tx| {
                Box::pin(async move { pause::forget(tx, &lease, side).await })
            })
            .await
    }

    async fn add_destination(&self, new: &NewDestination) -> Result<Added> {
        let new = new.clone();
        self.engine
            .write("add a destination", move |tx| {
                Box::pin(async move { destination::add(tx, &new).await })
            })
            .await
    }

    async fn destinations(&self) -> Result<Vec<Registered>> {
        destination::list(&self.engine).await
    }

    async fn remove_destination(
        &self,
        name: &str,
        why: &str,
        heir: Option<&str>,
    ) -> Result<Option<Removed>> {
        let (name, why) = (name.to_owned(), why.to_owned());
        let heir = heir.map(str::to_owned);
        self.engine
            .write("remove a destination", move |tx| {
                Box::pin(async move { destination::remove(tx, &name, &why, heir.as_deref()).await })
            })
            .await
    }

    async fn removed_destinations(&self) -> Result<Vec<Removed>> {
        destination::list_removed(&self.engine).await
    }

    async fn watch_destinations(&self, lease: &Lease) -> Result<Vec<Unserved>> {
        let lease = lease.clone();
        self.engine
            .write("watch destinations", move |tx| {
                Box::pin(async move { destination::watch(tx, &lease).await })
            })
            .await
    }

    async fn log_extent(&self) -> Result<Extent> {
        destination::extent(&self.engine).await
    }

    async fn count_events(&self, selection: &Selection, remember: Duration) -> Result<Counted> {
        destination::count(&self.engine, selection, remember).await
    }
}
