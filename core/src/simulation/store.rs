//! The model database as the engine's store.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{
    database::{Change, DeadRow, millis, partition_of},
    exceptions::{message_id, row_id},
    unit,
    world::{Inner, World},
};
use crate::{
    admin::{DryRun, Filter, Installation, Letter, LetterId, Shown},
    backpressure::Backlog,
    connection::Pool,
    cursor::Progress,
    error::{Error, Kind, Result},
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Line, LineId, Resolution, Side},
    lease::{Acquired, Lease, LeaseKey, LeaseTerm, RELAYS},
    store::{
        Cleaned, Due, Gate, Letters, Relays, SCHEMA_VERSION, Slice, Standing, Standings, Store,
        Trimmed, Unit, Waiting,
    },
};

/// One process's way to the database.
pub(super) struct ModelStore {
    pub(super) world: Arc<World>,
    pub(super) process: usize,
}

impl Inner {
    fn relays(&self, destination: &str) -> Relays {
        let is_free = |key: &LeaseKey| {
            let row = self.database.state.leases.get(&key.to_string());
            row.is_none_or(|row| row.is_free(self.now()))
        };
        let seat = |shard| LeaseKey::Duty {
            kind: RELAYS,
            scope: destination.to_owned(),
            shard,
        };
        let partition = |partition| LeaseKey::Relay {
            destination: destination.to_owned(),
            partition,
        };
        let partitions = self.plan.partitions;
        Relays {
            partitions,
            seats: (0..256).filter(|n| !is_free(&seat(*n))).collect(),
            free: (0..partitions)
                .filter(|n| is_free(&partition(*n)))
                .collect(),
        }
    }

    fn settle(
        &mut self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<()> {
        let mut row = self.database.held(lease)?;
        self.check_settle(lease, progress);
        row.progress = progress.clone();
        row.expires_at = self.now() + millis(term.term());
        let change = Change::Lease(lease.key.to_string(), row);
        self.database.commit(None, vec![change], durable);
        Ok(())
    }

    fn flush(&mut self, lease: &Lease, gate: &Gate) -> Result<()> {
        self.database.held(lease)?;
        if !self.database.is_flushed(gate) {
            self.database.flush_all();
        }
        Ok(())
    }

    fn renew(&mut self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        let mut row = self.database.held(lease)?;
        row.expires_at = self.now() + millis(term.term());
        let change = Change::Lease(lease.key.to_string(), row);
        self.database.commit(None, vec![change], true);
        Ok(())
    }
}

#[async_trait]
impl Store for ModelStore {
    fn pool(&self) -> Option<Pool> {
        None
    }

    async fn close(&self) {}

    fn schema(&self) -> &str {
        "simulation"
    }

    async fn migrate(&self, _partitions: u16) -> Result<()> {
        Ok(())
    }

    async fn partitions(&self) -> Result<u16> {
        self.call("partitions", |w| Ok(w.plan.partitions)).await
    }

    async fn installation(&self) -> Result<Installation> {
        Ok(Installation {
            schema: self.schema().to_owned(),
            version: SCHEMA_VERSION.unsigned_abs(),
            needed: SCHEMA_VERSION.unsigned_abs(),
            partitions: self.partitions().await?,
        })
    }

    async fn repartition(&self, _partitions: u16) -> Result<()> {
        Err(not_simulated("repartition"))
    }

    async fn alone(&self, lease: &Lease, event: Option<&LineId>) -> Result<()> {
        let (lease, event) = (lease.clone(), event.cloned());
        self.call("alone", move |w| {
            let mut row = w.database.held(&lease)?;
            w.tell(|| format!("alone for {}: {event:?}", lease.key));
            if event.is_none() {
                row.deaths = 0;
            }
            let durable = event.is_some();
            row.alone = event;
            let change = Change::Lease(lease.key.to_string(), row);
            w.database.commit(None, vec![change], durable);
            Ok(())
        })
        .await
    }

    async fn acquire(&self, key: &LeaseKey, term: LeaseTerm) -> Result<Option<Acquired>> {
        let key = key.clone();
        let process = self.process;
        self.call("acquire", move |w| {
            let (owner, now) = (w.chance.uuid(), w.now());
            let acquired = w.database.acquire(&key, term, now, owner);
            if let Some(acquired) = &acquired {
                w.check_acquire(process, &acquired.lease);
                let number = acquired
                    .alone
                    .as_ref()
                    .and_then(|id| id.1.parse::<usize>().ok());
                let accused = number.and_then(|n| w.consumption.events.get_mut(n));
                accused.into_iter().for_each(|event| event.accused += 1);
                let epoch = acquired.lease.epoch;
                w.tell(|| {
                    format!(
                        "relay {process} has {key} in epoch {epoch}, {:?}",
                        acquired.progress
                    )
                });
            }
            Ok(acquired)
        })
        .await
    }

    async fn renew(&self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        let lease = lease.clone();
        self.call("renew", move |w| w.renew(&lease, term)).await
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let lease = lease.clone();
        self.call("release", move |w| {
            w.database.release(&lease);
            Ok(())
        })
        .await
    }

    async fn relays(&self, destination: &str) -> Result<Relays> {
        let destination = destination.to_owned();
        self.call("relays", move |w| Ok(w.relays(&destination)))
            .await
    }

    async fn read(&self, partition: u16, from: &Progress, limit: u32) -> Result<Slice> {
        let from = from.clone();
        self.call("read", move |w| {
            let limit = usize::try_from(limit).unwrap_or(usize::MAX).max(1);
            w.check_read(limit);
            let slice = w.database.read(partition, &from, limit);
            w.tell(|| {
                format!(
                    "read {partition}: {:?}",
                    slice.events.iter().map(|e| e.position).collect::<Vec<_>>()
                )
            });
            Ok(slice)
        })
        .await
    }

    async fn flush(&self, lease: &Lease, gate: &Gate) -> Result<()> {
        let (lease, gate) = (lease.clone(), gate.clone());
        self.call("flush", move |w| w.flush(&lease, &gate)).await
    }

    async fn settle(
        &self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        durable: bool,
    ) -> Result<()> {
        let (lease, progress) = (lease.clone(), progress.clone());
        self.call("settle", move |w| {
            w.tell(|| format!("settle {} at {progress:?}", lease.key));
            w.settle(&lease, &progress, term, durable)
        })
        .await
    }

    async fn settle_source(&self, lease: &Lease, position: u64, term: LeaseTerm) -> Result<()> {
        let lease = lease.clone();
        self.call("settle the source", move |w| {
            let mut row = w.database.held(&lease)?;
            w.tell(|| format!("the source is settled up to {position}"));
            w.check_settle_source(position);
            row.position = Some(position);
            row.expires_at = w.now() + millis(term.term());
            let change = Change::Lease(lease.key.to_string(), row);
            w.database.commit(None, vec![change], false);
            Ok(())
        })
        .await
    }

    async fn defer(&self, lease: &Lease, events: &[Deferral]) -> Result<()> {
        let (lease, events) = (lease.clone(), events.to_vec());
        self.call("defer", move |w| {
            w.tell(|| {
                format!(
                    "defer {:?}",
                    events
                        .iter()
                        .map(|e| (e.position, e.attempts))
                        .collect::<Vec<_>>()
                )
            });
            w.defer(&lease, &events)
        })
        .await
    }

    async fn bury(&self, lease: &Lease, events: &[DeadLetter]) -> Result<()> {
        let (lease, events) = (lease.clone(), events.to_vec());
        self.call("bury", move |w| {
            w.tell(|| {
                format!(
                    "bury {:?}",
                    events.iter().map(|e| e.position).collect::<Vec<_>>()
                )
            });
            w.bury(&lease, &events)
        })
        .await
    }

    async fn lines(&self, lease: &Lease, limit: u32) -> Result<Vec<Line>> {
        let lease = lease.clone();
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        self.call("lines", move |w| w.lines(&lease, limit)).await
    }

    async fn line(
        &self,
        lease: &Lease,
        key: Option<&Key>,
        id: &LineId,
        limit: u32,
    ) -> Result<Vec<Deferred>> {
        let (lease, key, id) = (lease.clone(), key.cloned(), id.clone());
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        self.call("line", move |w| w.line(&lease, key.as_ref(), &id, limit))
            .await
    }

    async fn resolve(&self, lease: &Lease, id: &LineId, resolution: &Resolution) -> Result<()> {
        let (lease, id, resolution) = (lease.clone(), id.clone(), resolution.clone());
        self.call("resolve", move |w| {
            w.tell(|| format!("resolve {} {resolution:?}", id.1));
            w.database.held(&lease)?;
            let changes = w.resolution(&lease.key, &id, &resolution);
            w.database.commit(None, changes, true);
            Ok(())
        })
        .await
    }

    async fn fall_due(&self, _lease: &Lease, _position: i64, _limit: u32) -> Result<Due> {
        // Its writers schedule nothing.
        Ok(Due::default())
    }

    async fn deferred(&self, side: Side, scope: &str) -> Result<Waiting> {
        let scope = scope.to_owned();
        self.call("deferred", move |w| Ok(w.waiting_room(side, &scope)))
            .await
    }

    async fn standing(
        &self,
        group: &str,
        messages: &[&pillarbox_transport::Message],
    ) -> Result<Vec<Standing>> {
        let names = messages.iter().map(|m| (Key::of(m), message_id(m)));
        let (group, asked) = (group.to_owned(), names.collect::<Vec<_>>());
        self.call("standing", move |w| {
            let standings = asked.iter();
            Ok(standings
                .map(|(key, id)| w.standing(&group, key.as_ref(), id))
                .collect())
        })
        .await
    }

    async fn backlog(&self) -> Result<Backlog> {
        Ok(Backlog::default())
    }

    async fn begin(&self, group: &str, term: LeaseTerm, durable: bool) -> Result<Box<dyn Unit>> {
        unit::begin(&self.world, self.process, group, term, durable).await
    }

    async fn uncopied(&self, group: &str, limit: u32) -> Result<Vec<DeadLetter>> {
        let group = group.to_owned();
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        self.call("uncopied", move |w| {
            let dead = w.database.state.dead.iter();
            let of_group = dead.filter(|(id, row)| {
                id.0 == Side::Consumer.as_str() && id.1 == group && !row.copied
            });
            let letters = of_group.take(limit).map(|(_, row)| DeadLetter {
                message: row.message.clone(),
                position: 0,
                attempts: row.attempts,
                reason: "it failed".to_owned(),
                maybe_sent: false,
            });
            Ok(letters.collect())
        })
        .await
    }

    async fn copied(&self, lease: &Lease, ids: &[LineId]) -> Result<()> {
        let (lease, ids) = (lease.clone(), ids.to_vec());
        self.call("copied", move |w| {
            w.database.held(&lease)?;
            let ids = ids.iter().map(|id| row_id(&lease.key, id));
            let rows =
                ids.filter_map(|id| Some((id.clone(), w.database.state.dead.get(&id)?.clone())));
            let copied = |(id, row)| {
                Change::Dead(
                    id,
                    DeadRow {
                        copied: true,
                        ..row
                    },
                )
            };
            let changes = rows.map(copied).collect();
            w.database.commit(None, changes, false);
            Ok(())
        })
        .await
    }

    async fn clean_log(&self, _lease: &Lease, _keep: Duration) -> Result<Cleaned> {
        Ok(Cleaned::default())
    }

    async fn clean_inbox(&self, _lease: &Lease, _remember: Duration) -> Result<Cleaned> {
        Ok(Cleaned::default())
    }

    async fn trim_dead_letters(
        &self,
        _lease: &Lease,
        _side: Side,
        _keep: Duration,
        _most: u64,
    ) -> Result<Vec<Trimmed>> {
        Ok(Vec::new())
    }
    /// Nobody in the model looks.
    async fn standings(&self) -> Result<Standings> {
        Ok(Standings::new(std::time::UNIX_EPOCH))
    }

    async fn letters(&self, _letters: &Letters) -> Result<Vec<Letter>> {
        Err(not_simulated("letters"))
    }

    async fn letter(&self, _id: &LetterId) -> Result<Option<Shown>> {
        Err(not_simulated("letter"))
    }

    async fn count_letters(&self, _filter: &Filter) -> Result<DryRun> {
        Err(not_simulated("count letters"))
    }

    async fn newer(&self, _id: &LetterId) -> Result<u64> {
        Err(not_simulated("newer"))
    }

    async fn waits(&self, _id: &LetterId) -> Result<bool> {
        Err(not_simulated("waits"))
    }

    async fn retry_letters(&self, _side: Side, _scope: &str, _ids: &[LineId]) -> Result<u64> {
        Err(not_simulated("retry letters"))
    }

    async fn discard_letters(&self, _side: Side, _scope: &str, _ids: &[LineId]) -> Result<u64> {
        Err(not_simulated("discard letters"))
    }
}

fn not_simulated(operation: &'static str) -> Error {
    Error::new(Kind::Unavailable, operation, "not simulated")
}

impl ModelStore {
    async fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        effect: impl FnOnce(&mut Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.world.call(self.process, what, effect).await
    }
}

/// Where the database would put an event.
pub(super) fn place(w: &Inner, message: &pillarbox_transport::Message, number: usize) -> u16 {
    partition_of(Key::of(message).as_ref(), number, w.plan.partitions)
}
