//! The model database's log as it is read: slices between two snapshots.

use std::{collections::BTreeSet, fmt};

use super::database::{Database, Row};
use crate::{
    cursor::Progress,
    store::{Gate, Logged, Slice},
};

/// What a transaction id is to a statement: everything below `xmax` has ended, but for those listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Snapshot {
    xmax: u64,
    running: BTreeSet<u64>,
}

impl Snapshot {
    fn parse(text: &str) -> Self {
        let mut parts = text.split([':', ',']).filter_map(|n| n.parse().ok());
        Self {
            xmax: parts.next().unwrap_or_default(),
            running: parts.collect(),
        }
    }

    fn shows(&self, xid: u64) -> bool {
        xid < self.xmax && !self.running.contains(&xid)
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.xmax)?;
        for (i, xid) in self.running.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{xid}")?;
        }
        Ok(())
    }
}

impl Database {
    /// An own transaction id stands for the end: each that was handed out before has either ended or is listed.
    fn snapshot(&mut self) -> Snapshot {
        self.next_xid += 1;
        Snapshot {
            xmax: self.next_xid,
            running: self.running.clone(),
        }
    }

    pub(super) fn read(&mut self, partition: u16, from: &Progress, limit: usize) -> Slice {
        let Some(upto) = &from.upto else {
            return self.open(partition, from, limit);
        };
        let rows = self.between(
            partition,
            &from.seen,
            &Snapshot::parse(upto),
            from.last,
            limit,
        );
        if rows.is_empty() {
            let closed = closed(from, from.last);
            let mut next = self.open(partition, &closed, limit);
            if next.events.is_empty() {
                next.end = Some(closed);
            }
            return next;
        }
        self.slice(rows, from.clone(), limit)
    }

    fn open(&mut self, partition: u16, from: &Progress, limit: usize) -> Slice {
        let now = self.snapshot();
        let rows = self.between(partition, &from.seen, &now, 0, limit);
        if rows.is_empty() {
            return Slice {
                within: from.clone(),
                ..Slice::default()
            };
        }
        let within = Progress {
            upto: Some(now.to_string()),
            last: 0,
            ..from.clone()
        };
        self.slice(rows, within, limit)
    }

    fn between(
        &self,
        partition: u16,
        seen: &str,
        upto: &Snapshot,
        last: i64,
        limit: usize,
    ) -> Vec<Logged> {
        let seen = Snapshot::parse(seen);
        let rows = self.state.log.range(last + 1..).map(|(_, row)| row);
        rows.filter(|r| r.partition == partition && !seen.shows(r.xid) && upto.shows(r.xid))
            .take(limit)
            .map(|r| Logged {
                position: r.position,
                message: r.message.clone().into(),
                deliver_at: None,
                defect: r.defect.clone(),
            })
            .collect()
    }

    fn slice(&self, events: Vec<Logged>, within: Progress, limit: usize) -> Slice {
        let last = events.last().map_or(0, |e| e.position);
        let end = (events.len() < limit).then(|| closed(&within, last));
        Slice {
            events,
            within,
            end,
            // Always: it also proves that what was read is of the lease's own incarnation.
            gate: Some(Gate(self.end().to_string())),
        }
    }

    /// Whether a progress says that this row is settled.
    pub(super) fn covers(progress: &Progress, row: &Row) -> bool {
        let upto = progress.upto.as_deref().map(Snapshot::parse);
        Snapshot::parse(&progress.seen).shows(row.xid)
            || upto.is_some_and(|upto| upto.shows(row.xid) && row.position <= progress.last)
    }

    /// Whether everything up to a gate is on disk.
    pub(super) fn is_flushed(&self, gate: &Gate) -> bool {
        gate.0.parse::<usize>().is_ok_and(|lsn| lsn <= self.flushed)
    }
}

/// Where a partition stands behind the last event of a slice.
fn closed(within: &Progress, last: i64) -> Progress {
    Progress {
        seen: within.upto.clone().unwrap_or_default(),
        base: within.base.max(last),
        upto: None,
        last: 0,
    }
}
