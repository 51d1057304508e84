//! The log, cursors, leases, exceptions and inbox in PostgreSQL.
//!
//! Everything runs on a few connections of the engine's own, in tasks of their own. Not here: what the engine decides. The
//! store knows no broker and counts no attempts.

mod anchor;
mod destination;
mod engine;
mod failure;
mod lease;
mod letters;
mod log;
mod pause;
mod repartition;
mod retention;
mod row;
mod schedule;
mod schema;
mod status;
mod unit;

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use pillarbox_transport::Message;
use sqlx::PgPool;

use self::{
    engine::{Commit, DEADLINE, Engine, to_its_end},
    unit::Work,
};
use super::{
    Added, Cleaned, Counted, Due, Extent, Gate, Letters, NewDestination, Paused, Registered,
    Relays, Slice, Standing, Standings, Store, Trimmed, Unit, Unserved, Waiting,
};
use crate::{
    admin::{DryRun, Filter, Installation, Letter, LetterId, Removed, Selection, Shown},
    backpressure::Backlog,
    connection::Pool,
    cursor::Progress,
    destination::Reanchored,
    error::Result,
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Line, LineId, Resolution, Side},
    lease::{Acquired, Lease, LeaseKey, LeaseTerm},
    pause::{NewPause, Target},
};

pub(crate) use schema::script;

/// The store over a PostgreSQL pool.
pub(crate) struct Postgres(Arc<Inner>);

struct Inner {
    name: String,
    engine: Engine,
    schema: schema::Statements,
    lease: lease::Statements,
    log: log::Statements,
    failure: failure::Statements,
    letters: letters::Statements,
    schedule: schedule::Statements,
    status: status::Statements,
    unit: unit::Statements,
    retention: retention::Statements,
    pause: pause::Statements,
    destination: destination::Statements,
    anchor: anchor::Statements,
}

impl Postgres {
    /// The schema's name is checked by the caller. Does not connect.
    pub(crate) fn new(pool: PgPool, schema: &str) -> Self {
        Self(Arc::new(Inner {
            name: schema.to_owned(),
            engine: Engine::new(pool, schema),
            schema: schema::Statements::new(schema),
            lease: lease::Statements::new(schema),
            log: log::Statements::new(schema),
            failure: failure::Statements::new(schema),
            letters: letters::Statements::new(schema),
            schedule: schedule::Statements::new(schema),
            status: status::Statements::new(schema),
            unit: unit::Statements::new(schema),
            retention: retention::Statements::new(schema),
            pause: pause::Statements::new(schema),
            destination: destination::Statements::new(schema),
            anchor: anchor::Statements::new(schema),
        }))
    }

    fn inner(&self) -> Arc<Inner> {
        Arc::clone(&self.0)
    }

    /// Work under a lease: of no use after its term.
    async fn held<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        to_its_end(operation, self.0.engine.term().term(), work).await
    }
}

#[async_trait]
impl Store for Postgres {
    fn pool(&self) -> Option<Pool> {
        Some(Pool::Postgres(self.0.engine.host().clone()))
    }

    async fn close(&self) {
        self.0.engine.close().await;
    }

    fn schema(&self) -> &str {
        &self.0.name
    }

    async fn migrate(&self, partitions: u16) -> Result<()> {
        let inner = self.inner();
        let work = async move { inner.migrate(partitions).await };
        to_its_end("migrate", schema::PATIENCE, work).await
    }

    async fn partitions(&self) -> Result<u16> {
        let inner = self.inner();
        let work = async move { inner.partitions().await };
        to_its_end("look at the schema", DEADLINE, work).await
    }

    async fn installation(&self) -> Result<Installation> {
        let inner = self.inner();
        let work = async move { inner.installation().await };
        to_its_end("look at the schema", DEADLINE, work).await
    }

    async fn repartition(&self, partitions: u16) -> Result<()> {
        let inner = self.inner();
        let work = async move { inner.repartition(partitions).await };
        to_its_end("repartition", repartition::PATIENCE, work).await
    }

    async fn alone(&self, lease: &Lease, event: Option<&LineId>) -> Result<()> {
        let (inner, lease, event) = (self.inner(), lease.clone(), event.cloned());
        self.held(
            "note an event",
            async move { inner.alone(&lease, event).await },
        )
        .await
    }

    async fn acquire(&self, key: &LeaseKey, term: LeaseTerm) -> Result<Option<Acquired>> {
        let (inner, key) = (self.inner(), key.clone());
        let work = async move { inner.acquire(&key, term).await };
        to_its_end("acquire lease", term.term(), work).await
    }

    async fn renew(&self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        let (inner, lease) = (self.inner(), lease.clone());
        let work = async move { inner.renew(&lease, term).await };
        to_its_end("renew lease", term.term(), work).await
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let (inner, lease) = (self.inner(), lease.clone());
        self.held("release lease", async move { inner.release(&lease).await })
            .await
    }

    async fn relays(&self, destination: &str) -> Result<Relays> {
        let (inner, destination) = (self.inner(), destination.to_owned());
        let work = async move { inner.relays(&destination).await };
        to_its_end("look at the relays", DEADLINE, work).await
    }

    async fn read(&self, partition: u16, from: &Progress, limit: u32) -> Result<Slice> {
        let (inner, from) = (self.inner(), from.clone());
        let work = async move { inner.read(partition, &from, limit).await };
        to_its_end("read the log", DEADLINE, work).await
    }

    async fn flush(&self, lease: &Lease, gate: &Gate) -> Result<()> {
        let (inner, lease, gate) = (self.inner(), lease.clone(), gate.clone());
        let work = async move { inner.flush(&lease, &gate).await };
        self.held("wait for the disk", work).await
    }

    async fn settle(
        &self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<()> {
        let (inner, lease, progress) = (self.inner(), lease.clone(), progress.clone());
        let commit = Commit::durable(durable);
        let work = async move { inner.settle(&lease, &progress, term, commit).await };
        to_its_end("settle", term.term(), work).await
    }

    async fn settle_source(&self, lease: &Lease, position: u64, term: LeaseTerm) -> Result<()> {
        let (inner, lease) = (self.inner(), lease.clone());
        let work = async move { inner.settle_source(&lease, position, term).await };
        to_its_end("settle source", term.term(), work).await
    }

    async fn defer(&self, lease: &Lease, events: &[Deferral]) -> Result<()> {
        let (inner, lease, events) = (self.inner(), lease.clone(), events.to_vec());
        self.held("defer", async move { inner.defer(&lease, &events).await })
            .await
    }

    async fn bury(&self, lease: &Lease, events: &[DeadLetter]) -> Result<()> {
        let (inner, lease, events) = (self.inner(), lease.clone(), events.to_vec());
        self.held(
            "dead-letter",
            async move { inner.bury(&lease, &events).await },
        )
        .await
    }

    async fn lines(&self, lease: &Lease, limit: u32) -> Result<Vec<Line>> {
        let (inner, lease) = (self.inner(), lease.clone());
        self.held(
            "look for lines",
            async move { inner.lines(&lease, limit).await },
        )
        .await
    }

    async fn line(
        &self,
        lease: &Lease,
        key: Option<&Key>,
        id: &LineId,
        limit: u32,
    ) -> Result<Vec<Deferred>> {
        let (inner, lease, key, id) = (self.inner(), lease.clone(), key.cloned(), id.clone());
        let work = async move { inner.line(&lease, key.as_ref(), &id, limit).await };
        self.held("read a line", work).await
    }

    async fn resolve(&self, lease: &Lease, id: &LineId, resolution: &Resolution) -> Result<()> {
        let (inner, lease) = (self.inner(), lease.clone());
        let (id, resolution) = (id.clone(), resolution.clone());
        let work = async move { inner.resolve(&lease, &id, &resolution).await };
        self.held("end an attempt", work).await
    }

    async fn fall_due(&self, lease: &Lease, position: i64, limit: u32) -> Result<Due> {
        let (inner, lease) = (self.inner(), lease.clone());
        let work = async move { inner.fall_due(&lease, position, limit).await };
        self.held("let events fall due", work).await
    }

    async fn deferred(&self, side: Side, scope: &str) -> Result<Waiting> {
        let (inner, scope) = (self.inner(), scope.to_owned());
        let work = async move { inner.waiting(side, &scope).await };
        to_its_end("count what waits", DEADLINE, work).await
    }

    async fn standing(&self, group: &str, messages: &[&Message]) -> Result<Vec<Standing>> {
        let (inner, asked) = (self.inner(), unit::Asked::new(group, messages));
        let work = async move { inner.standing(asked).await };
        self.held("look at events", work).await
    }

    async fn backlog(&self) -> Result<Backlog> {
        let inner = self.inner();
        let work = async move { inner.backlog().await };
        to_its_end("look at the backlog", DEADLINE, work).await
    }

    async fn begin(&self, group: &str, term: LeaseTerm, durable: bool) -> Result<Box<dyn Unit>> {
        let (inner, group) = (self.inner(), group.to_owned());
        let work = async move { Work::begin(inner, &group, term, durable).await };
        let unit = to_its_end("begin", term.term(), work).await?;
        Ok(Box::new(unit))
    }

    fn widen(&self, more: usize) {
        self.0.engine.widen(more);
    }

    fn narrow(&self, less: usize) {
        self.0.engine.narrow(less);
    }

    async fn uncopied(&self, group: &str, limit: u32) -> Result<Vec<DeadLetter>> {
        let (inner, group) = (self.inner(), group.to_owned());
        let work = async move { inner.uncopied(&group, limit).await };
        to_its_end("look for dead letters to copy", DEADLINE, work).await
    }

    async fn copied(&self, lease: &Lease, ids: &[LineId]) -> Result<()> {
        let (inner, lease, ids) = (self.inner(), lease.clone(), ids.to_vec());
        self.held(
            "note copies",
            async move { inner.copied(&lease, &ids).await },
        )
        .await
    }

    async fn clean_log(&self, lease: &Lease, keep: Duration) -> Result<Cleaned> {
        let (inner, lease) = (self.inner(), lease.clone());
        let work = async move { inner.clean_log(&lease, keep).await };
        to_its_end("clean the log", retention::DEADLINE, work).await
    }

    async fn clean_inbox(&self, lease: &Lease, remember: Duration) -> Result<Cleaned> {
        let (inner, lease) = (self.inner(), lease.clone());
        let work = async move { inner.clean_inbox(&lease, remember).await };
        to_its_end("clean the inbox", retention::DEADLINE, work).await
    }

    async fn trim_dead_letters(
        &self,
        lease: &Lease,
        side: Side,
        keep: Duration,
        most: u64,
    ) -> Result<Vec<Trimmed>> {
        let (inner, lease) = (self.inner(), lease.clone());
        let work = async move { inner.trim_dead_letters(&lease, side, keep, most).await };
        to_its_end("trim dead letters", retention::DEADLINE, work).await
    }

    async fn standings(&self) -> Result<Standings> {
        let inner = self.inner();
        let work = async move { inner.standings().await };
        to_its_end("look at the status", DEADLINE, work).await
    }

    async fn letters(&self, letters: &Letters) -> Result<Vec<Letter>> {
        let (inner, letters) = (self.inner(), letters.clone());
        let work = async move { inner.letters(&letters).await };
        to_its_end("list dead letters", DEADLINE, work).await
    }

    async fn letter(&self, id: &LetterId) -> Result<Option<Shown>> {
        let (inner, id) = (self.inner(), id.clone());
        let work = async move { inner.letter(&id).await };
        to_its_end("show a dead letter", DEADLINE, work).await
    }

    async fn count_letters(&self, filter: &Filter) -> Result<DryRun> {
        let (inner, filter) = (self.inner(), filter.clone());
        let work = async move { inner.count_letters(&filter).await };
        to_its_end("count dead letters", DEADLINE, work).await
    }

    async fn newer(&self, id: &LetterId) -> Result<u64> {
        let (inner, id) = (self.inner(), id.clone());
        let work = async move { inner.newer(&id).await };
        to_its_end("count newer events", DEADLINE, work).await
    }

    async fn waits(&self, id: &LetterId) -> Result<bool> {
        let (inner, id) = (self.inner(), id.clone());
        let work = async move { inner.waits(&id).await };
        to_its_end("look for a waiting event", DEADLINE, work).await
    }

    async fn retry_letters(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64> {
        let (inner, scope, ids) = (self.inner(), scope.to_owned(), ids.to_vec());
        let work = async move { inner.retry(side, &scope, &ids).await };
        to_its_end("retry dead letters", DEADLINE, work).await
    }

    async fn discard_letters(&self, side: Side, scope: &str, ids: &[LineId]) -> Result<u64> {
        let (inner, scope, ids) = (self.inner(), scope.to_owned(), ids.to_vec());
        let work = async move { inner.discard(side, &scope, &ids).await };
        to_its_end("discard dead letters", DEADLINE, work).await
    }

    async fn pauses(&self, of: Option<(Side, &str)>) -> Result<Vec<Paused>> {
        let inner = self.inner();
        let of = of.map(|(side, scope)| (side, scope.to_owned()));
        let work = async move { inner.pauses(of).await };
        to_its_end("look for pauses", DEADLINE, work).await
    }

    async fn pause(&self, pause: &NewPause) -> Result<Option<Paused>> {
        let (inner, pause) = (self.inner(), pause.clone());
        let work = async move { inner.pause(&pause).await };
        to_its_end("pause", DEADLINE, work).await
    }

    async fn resume(&self, target: &Target) -> Result<Option<Paused>> {
        let (inner, target) = (self.inner(), target.clone());
        let work = async move { inner.resume(&target).await };
        to_its_end("resume", DEADLINE, work).await
    }

    async fn scopes(&self, side: Side) -> Result<Vec<String>> {
        let inner = self.inner();
        let work = async move { inner.scopes(side).await };
        to_its_end("look for what has run", DEADLINE, work).await
    }

    async fn forget_pauses(&self, lease: &Lease, side: Side) -> Result<u64> {
        let (inner, lease) = (self.inner(), lease.clone());
        let work = async move { inner.forget_pauses(&lease, side).await };
        self.held("remove pauses that are over", work).await
    }

    async fn anchor(&self) -> Result<Option<Reanchored>> {
        let inner = self.inner();
        let work = async move { inner.anchor().await };
        to_its_end("anchor the log", anchor::PATIENCE, work).await
    }

    async fn add_destination(&self, new: &NewDestination) -> Result<Added> {
        let (inner, new) = (self.inner(), new.clone());
        let work = async move { inner.add_destination(&new).await };
        to_its_end("add a destination", destination::DEADLINE, work).await
    }

    async fn destinations(&self) -> Result<Vec<Registered>> {
        let inner = self.inner();
        let work = async move { inner.destinations().await };
        to_its_end("list destinations", DEADLINE, work).await
    }

    async fn remove_destination(
        &self,
        name: &str,
        why: &str,
        heir: Option<&str>,
    ) -> Result<Option<Removed>> {
        let (inner, name, why) = (self.inner(), name.to_owned(), why.to_owned());
        let heir = heir.map(str::to_owned);
        let work = async move { inner.remove_destination(&name, &why, heir.as_deref()).await };
        to_its_end("remove a destination", destination::DEADLINE, work).await
    }

    async fn removed_destinations(&self) -> Result<Vec<Removed>> {
        let inner = self.inner();
        let work = async move { inner.removed_destinations().await };
        to_its_end("list removed destinations", DEADLINE, work).await
    }

    async fn watch_destinations(&self, lease: &Lease) -> Result<Vec<Unserved>> {
        let (inner, lease) = (self.inner(), lease.clone());
        let work = async move { inner.watch_destinations(&lease).await };
        self.held("watch destinations", work).await
    }

    async fn log_extent(&self) -> Result<Extent> {
        let inner = self.inner();
        let work = async move { inner.log_extent().await };
        to_its_end("look at the log", DEADLINE, work).await
    }

    async fn count_events(&self, selection: &Selection, remember: Duration) -> Result<Counted> {
        let (inner, selection) = (self.inner(), selection.clone());
        let work = async move { inner.count_events(&selection, remember).await };
        to_its_end("count events of the log", DEADLINE, work).await
    }
}
