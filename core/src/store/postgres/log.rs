//! Reading the log between two snapshots, and waiting until what was read is on disk.

use sqlx::{Row, postgres::PgRow};

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use pillarbox_transport::Message;

use super::{
    Inner,
    engine::{Commit, Text, query},
    lease::{lost, small},
    row,
};
use crate::{
    cursor::Progress,
    error::Result,
    lease::Lease,
    store::{Gate, Logged, Slice},
};

/// Payload bytes of one read, beside which one more payload may come.
const BYTES: usize = 32 * 1_024 * 1_024;

const FLUSH: &str = "wait for the disk";
/// Between looks at the disk, before the engine flushes by itself.
const FLUSH_WAITS: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(2)];

pub(super) struct Statements {
    open: Text,
    go_on: Text,
    flushed: Text,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let schema = format!("\"{schema}\"");
        // Rows are taken while those before them stay below the budget, so that a batch that was cut short shows by its sum.
        // The point of the log is taken after the statement's snapshot: every commit that the snapshot shows lies before it.
        // Also where it is on disk already: only behind the gate is it known that the reader's place is still one. After a
        // crash a dead connection is replaced in silence; where xids and positions were handed out anew, the old place skips
        // the first of them and shows the next ones of the same key.
        let rows = |from: &str, cut: &str| {
            format!(
                "SELECT b.position, b.id, b.created_at, b.topic, b.type, b.key, b.payload, b.version, b.content_type, \
                        b.attributes, b.headers, b.deliver_at, CASE WHEN b.n = 1 THEN {cut} END AS cut, \
                        CASE WHEN b.n = 1 THEN b.here::text END AS gate \
                 FROM (SELECT b.*, l.*, row_number() OVER whole AS n, \
                              sum(coalesce(octet_length(b.payload), 0)) OVER whole AS bytes \
                       FROM {from} b WINDOW whole AS (ROWS UNBOUNDED PRECEDING)) b \
                 WHERE b.bytes - coalesce(octet_length(b.payload), 0) < {BYTES}"
            )
        };
        let opened =
            format!("opened l, LATERAL {schema}.batch($1, $2::pg_snapshot, $3, l.now, 0, $4)");
        let within = format!(
            "(SELECT pg_current_wal_insert_lsn() AS here OFFSET 0) l, \
             LATERAL {schema}.batch($1, $2::pg_snapshot, $3, $4::pg_snapshot, $5, $6)"
        );
        Self {
            // In autocommit: an xid that the transaction had already would lie inside the snapshot. The xid is drawn before
            // the heavy part, so that the cut lists few transactions, and only where something is to be read, so that an
            // empty poll burns none.
            open: format!(
                "WITH opened AS MATERIALIZED (\
                   SELECT s.now, {schema}.restate(s.now, pg_current_xact_id())::text AS cut, \
                          pg_current_wal_insert_lsn() AS here \
                   FROM (SELECT pg_current_snapshot() AS now OFFSET 0) s \
                   WHERE EXISTS (SELECT FROM {schema}.batch($1, $2::pg_snapshot, $3, s.now, 0, 1))) {}",
                rows(&opened, "b.cut")
            )
            .into(),
            go_on: rows(&within, "NULL").into(),
            flushed: format!(
                "SELECT pg_current_wal_flush_lsn() >= $2::pg_lsn AS flushed, \
                 EXISTS (SELECT FROM {schema}.token t WHERE t.owner = $1::uuid AND t.home = t.tableoid) AS held"
            )
            .into(),
        }
    }
}

impl Inner {
    /// The next events of a partition.
    pub(super) async fn read(&self, partition: u16, from: &Progress, limit: u32) -> Result<Slice> {
        let Some(upto) = &from.upto else {
            return self.open(partition, from, limit).await;
        };
        let limit = limit.max(1);
        let q = || {
            query(&self.log.go_on)
                .bind(small(partition))
                .bind(seen(from))
                .bind(from.base)
                .bind(upto.as_str())
                .bind(from.last)
                .bind(one_more(limit))
        };
        let rows = self.engine.fetch("read the log", q).await?;
        if rows.is_empty() {
            // Nothing is left of the slice: what follows lies in the next one.
            let closed = closed(from, upto.clone(), from.last);
            let mut next = self.open(partition, &closed, limit).await?;
            if next.events.is_empty() {
                next.end = Some(closed);
            }
            return Ok(next);
        }
        self.slice(&rows, from.clone(), limit)
    }

    async fn open(&self, partition: u16, from: &Progress, limit: u32) -> Result<Slice> {
        let limit = limit.max(1);
        let q = || {
            query(&self.log.open)
                .bind(small(partition))
                .bind(seen(from))
                .bind(from.base)
                .bind(one_more(limit))
        };
        let rows = self.engine.fetch("read the log", q).await?;
        let within = match rows.first() {
            None => from.clone(),
            Some(row) => Progress {
                upto: row.try_get("cut").map_err(|e| self.unreadable(e))?,
                last: 0,
                ..from.clone()
            },
        };
        self.slice(&rows, within, limit)
    }

    fn slice(&self, rows: &[PgRow], within: Progress, limit: u32) -> Result<Slice> {
        let mut slice = Slice {
            events: Vec::with_capacity(rows.len()),
            within,
            ..Slice::default()
        };
        let Some(first) = rows.first() else {
            return Ok(slice);
        };
        let gate: Option<String> = first.try_get("gate").map_err(|e| self.unreadable(e))?;
        slice.gate = gate.map(Gate);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let (mut bytes, mut last) = (0, slice.within.last);
        for row in rows.iter().take(limit) {
            let event = logged(row).map_err(|e| self.unreadable(e))?;
            bytes += event.message.payload.as_ref().map_or(0, Bytes::len);
            last = event.position;
            slice.events.push(event);
        }
        let all = rows.len() <= limit && bytes < BYTES;
        slice.end = Some(match slice.within.upto.clone() {
            Some(upto) if all => closed(&slice.within, upto, last),
            _ => slice.within.at(last),
        });
        Ok(slice)
    }

    fn unreadable(&self, e: sqlx::Error) -> crate::error::Error {
        self.engine.failed("read the log", e)
    }

    /// Waits until everything before a gate is on disk, and proves that the database remembers the lease.
    pub(super) async fn flush(&self, lease: &Lease, gate: &Gate) -> Result<()> {
        // Where writers wait for the disk themselves, the next of their commits has it in a moment.
        for wait in FLUSH_WAITS {
            if self.flushed(lease, gate).await? {
                return Ok(());
            }
            tokio::time::sleep(wait).await;
        }
        if self.flushed(lease, gate).await? {
            return Ok(());
        }
        // A synchronous commit flushes all that came before it. The fence's row lock is its one small write.
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(FLUSH, bound, Commit::Durable).await?;
        let outcome = self.fence(&mut tx, FLUSH, lease).await;
        tx.end(outcome).await
    }

    /// Both in one statement: after a crash the log runs backwards, and an old gate would look passed.
    async fn flushed(&self, lease: &Lease, gate: &Gate) -> Result<bool> {
        let q = || {
            query(&self.log.flushed)
                .bind(lease.owner.to_string())
                .bind(gate.0.as_str())
        };
        let rows = self.engine.fetch(FLUSH, q).await?;
        let read = |e| self.engine.failed(FLUSH, e);
        let answer = rows.first().ok_or_else(|| read(sqlx::Error::RowNotFound))?;
        if !answer.try_get::<bool, _>("held").map_err(read)? {
            return Err(lost(FLUSH, lease));
        }
        answer.try_get("flushed").map_err(read)
    }
}

/// Before the start of the log where nothing was ever seen.
pub(super) fn seen(progress: &Progress) -> &str {
    match progress.seen.as_str() {
        "" => "1:1:",
        seen => seen,
    }
}

/// Where a partition stands behind the last event of a slice.
fn closed(within: &Progress, upto: String, last: i64) -> Progress {
    Progress {
        seen: upto,
        base: within.base.max(last),
        upto: None,
        last: 0,
    }
}

/// One more than is wanted says whether the slice ends here.
fn one_more(limit: u32) -> i32 {
    i32::try_from(limit.saturating_add(1)).unwrap_or(i32::MAX)
}

/// A row as a plain INSERT may have made it.
fn logged(row: &PgRow) -> sqlx::Result<Logged> {
    let (topic, bad_topic) = row::text(row, "topic")?;
    let (kind, bad_kind) = row::text(row, "type")?;
    let (key, bad_key) = row::text(row, "key")?;
    let (content_type, bad_content_type) = row::text(row, "content_type")?;
    let (mut attributes, bad_attributes) = row::map(row, "attributes")?;
    let (headers, bad_headers) = row::map(row, "headers")?;
    let version: i32 = row.try_get("version")?;
    attributes.insert("dataversion".to_owned(), version.to_string());
    if let Some(content_type) = content_type {
        attributes.insert("datacontenttype".to_owned(), content_type);
    }
    let defects = [
        bad_topic,
        bad_kind,
        bad_key,
        bad_content_type,
        bad_attributes,
        bad_headers,
        row::bad_version(version.into()),
    ];
    Ok(Logged {
        position: row.try_get("position")?,
        message: Arc::new(Message {
            id: row::uuid(row, "id")?,
            time: row::time(row, "created_at")?,
            topic: topic.unwrap_or_default(),
            kind: kind.unwrap_or_default(),
            key,
            payload: row::bytes(row, "payload")?,
            attributes,
            headers,
        }),
        deliver_at: row::deliver_at(row, "deliver_at")?,
        defect: defects.into_iter().flatten().next(),
    })
}
