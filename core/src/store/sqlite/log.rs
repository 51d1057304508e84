//! The log and its cursors. Writers are serial, so positions become visible in order and `last` says it all.

use futures_util::TryStreamExt as _;

use crate::{
    cursor::Progress,
    error::{Error, Kind, Result},
    lease::{Lease, LeaseTerm},
    store::{Gate, Slice},
};

use super::{
    lease,
    pool::{Engine, Transaction},
    row,
};

/// A slice ends early beyond this many bytes, so that large events do not fill the memory.
const SLICE_BYTES: usize = 16 * 1024 * 1024;

/// The next events.
pub(super) async fn read(engine: &Engine, from: &Progress, limit: u32) -> Result<Slice> {
    const OPERATION: &str = "read";
    let names = engine.names();
    let mut reader = engine.reader(OPERATION).await?;
    let statement = format!(
        "SELECT {} FROM {{p}}outbox WHERE position > ?1 AND (?2 IS NULL OR position <= ?2) ORDER BY position LIMIT ?3",
        row::LOGGED
    );
    // Where a replay ends.
    let upto: Option<i64> = from.upto.as_deref().and_then(|upto| upto.parse().ok());
    let mut rows = sqlx::query(names.sql(&statement))
        .bind(from.last)
        .bind(upto)
        .bind(limit)
        .fetch(&mut *reader);
    let mut events = Vec::new();
    let mut bytes = 0;
    while bytes < SLICE_BYTES
        && let Some(next) = rows
            .try_next()
            .await
            .map_err(|e| names.failed(OPERATION, e))?
    {
        let event = row::logged(&next).map_err(|e| names.failed(OPERATION, e))?;
        bytes += event.message.size();
        events.push(event);
    }
    let through =
        bytes < SLICE_BYTES && events.len() < usize::try_from(limit).unwrap_or(usize::MAX);
    let end = match upto.filter(|_| through) {
        Some(upto) => Some(Progress {
            upto: None,
            ..from.at(upto)
        }),
        None => events.last().map(|e| from.at(e.position)),
    };
    Ok(Slice {
        // Whoever wrote them may run with synchronous = NORMAL: seen, but not yet on the disk.
        gate: events.last().map(|e| Gate(e.position.to_string())),
        within: from.clone(),
        end,
        events,
    })
}

/// Moves a relay's cursor, never back: settles that overtake each other do no harm.
pub(super) async fn settle(
    tx: &mut Transaction,
    lease: &Lease,
    progress: &Progress,
    term: LeaseTerm,
) -> Result<()> {
    let set = match progress.upto {
        Some(_) => "last = max(last, ?4), expires_at = {now} + ?3",
        // Behind the end of a replay, if it had one.
        None => "last = max(last, ?4), expires_at = {now} + ?3, upto = NULL",
    };
    let values = [row::micros(term.term()), progress.last];
    lease::update(tx, lease, set, values).await
}

/// Moves a source's cursor. Also back: an end below the cursor starts it from the oldest.
pub(super) async fn settle_source(
    tx: &mut Transaction,
    lease: &Lease,
    position: u64,
    term: LeaseTerm,
) -> Result<()> {
    let Ok(position) = i64::try_from(position) else {
        let text = format!("position {position} is beyond what the database can hold");
        return Err(Error::new(Kind::Invalid, tx.operation(), text));
    };
    let set = "position = ?4, expires_at = {now} + ?3";
    lease::update(tx, lease, set, [row::micros(term.term()), position]).await
}
