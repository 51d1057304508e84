//! Events that wait and events that were given up.

use std::time::Duration;

use bytes::Bytes;
use pillarbox_transport::Message;
use sqlx::{Row, postgres::PgRow};

use super::{
    Inner,
    engine::{Commit, Query, Text, query},
    lease::small,
    row,
};
use crate::{
    error::Result,
    event::Key,
    failure::{DeadLetter, Deferral, Deferred, Hold, Line, LineId, PARKED, Resolution, Side},
    lease::{Lease, LeaseKey},
    store::{Waiting, millis},
};

/// Events written by one statement.
const AT_ONCE: usize = 500;
/// Payload bytes read at a time, beside which one more payload may come.
const BYTES: usize = 32 * 1_024 * 1_024;
/// The longest wait that is written, ten years: a time beyond what PostgreSQL can say would fail the transaction.
const LONGEST_WAIT: Duration = Duration::from_secs(315_360_000);

pub(super) struct Statements {
    defer: Text,
    bury: Text,
    lines: Text,
    line: Text,
    alone: Text,
    done: Text,
    again: Text,
    unsure: Text,
    park: Text,
    dead: Text,
    counts: Text,
    uncopied: Text,
    copied: Text,
}

/// What a message's row holds, in the order of [`Columns::bind`].
pub(super) const MESSAGE: &str = "time, source, id, topic, type, key, attributes, headers, payload";
pub(super) const WAITS: &str =
    "greatest(0, ceil(extract(epoch FROM due - clock_timestamp()) * 1000))::bigint AS due_in";

/// Messages as arrays, $4 to $15, and those that [`Statements::defer`] and [`Statements::bury`] add.
const ROWS: &str = "unnest($4::bigint[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[], \
                    $11::text[], $12::bytea[], $13::bigint[], $14::int[], $15::text[], {more}) WITH ORDINALITY \
                    AS r (time, source, id, topic, type, key, attributes, headers, payload, position, attempts, reason, \
                    {names}, n) ORDER BY r.n ON CONFLICT DO NOTHING";
/// One of them, in the order of [`MESSAGE`].
const ROW: &str = "timestamptz 'epoch' + r.time * interval '1 microsecond', r.source, r.id, r.topic, r.type, r.key, \
                   r.attributes::jsonb, r.headers::jsonb, r.payload, r.position, r.attempts, r.reason";

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let schema = format!("\"{schema}\"");
        let text = |template: String| Text::from(template.replace("{schema}", &schema));
        let deferred = "{schema}.deferred";
        let lined = format!(
            "SELECT {MESSAGE}, position, attempts, maybe_sent, {WAITS} FROM {deferred} d \
             WHERE d.side = $1 AND d.scope = $2 AND NOT d.scheduled AND"
        );
        Self {
            defer: text(defer()),
            bury: text(bury()),
            dead: text(dead()),
            lines: text(format!(
                "SELECT topic, key, source, id, {WAITS} FROM ( \
                   SELECT DISTINCT ON (d.line, d.topic, d.key) d.line, d.topic, d.key, d.source, d.id, d.due \
                   FROM {deferred} d WHERE d.side = $1 AND d.scope = $2 AND d.shard = $3 AND NOT d.scheduled \
                   ORDER BY d.line, d.topic, d.key, d.position, d.seq) head ORDER BY due, line LIMIT $4"
            )),
            line: text(within_budget(&format!(
                "{lined} d.line = hashtextextended($3 || chr(31) || $4, 0) AND d.topic = $3 AND d.key = $4 \
                 ORDER BY d.position, d.seq LIMIT $5"
            ))),
            alone: text(format!("{lined} d.source = $3 AND d.id = $4")),
            done: text("SELECT FROM {schema}.leave_line($1, $2, $3, $4)".to_owned()),
            again: text(format!(
                "UPDATE {deferred} SET attempts = $5, reason = $6, last_failure = clock_timestamp(), \
                   due = clock_timestamp() + $7 * interval '1 millisecond', \
                   first_failure = coalesce(first_failure, clock_timestamp()) \
                 WHERE side = $1 AND scope = $2 AND source = $3 AND id = $4"
            )),
            unsure: text(format!(
                "UPDATE {deferred} SET maybe_sent = true WHERE side = $1 AND scope = $2 AND source = $3 AND id = $4"
            )),
            park: text(format!(
                "UPDATE {deferred} SET parked = true, attempts = $5, reason = $6, last_failure = clock_timestamp(), \
                   due = clock_timestamp() + $7 * interval '1 millisecond', \
                   first_failure = coalesce(first_failure, clock_timestamp()) \
                 WHERE side = $1 AND scope = $2 AND source = $3 AND id = $4"
            )),
            counts: text(format!(
                "SELECT coalesce(sum(n), 0)::bigint AS total, coalesce(max(n), 0) AS longest, \
                   coalesce(sum(p), 0)::bigint AS parked, coalesce(sum(s), 0)::bigint AS scheduled FROM ( \
                   SELECT count(*) FILTER (WHERE NOT scheduled) AS n, count(*) FILTER (WHERE parked) AS p, \
                     count(*) FILTER (WHERE scheduled) AS s FROM {deferred} WHERE side = $1 AND scope = $2 \
                   GROUP BY line, topic, key) lines"
            )),
            uncopied: text(within_budget(&format!(
                "SELECT {MESSAGE}, position, attempts, reason, maybe_sent FROM {{schema}}.dead_letter \
                 WHERE side = 'consumer' AND scope = $1 AND copied_at IS NULL ORDER BY seq LIMIT $2"
            ))),
            copied: text(
                "UPDATE {schema}.dead_letter d SET copied_at = clock_timestamp() \
                 FROM unnest($2::text[], $3::text[]) AS r (source, id) \
                 WHERE d.side = 'consumer' AND d.scope = $1 AND d.source = r.source AND d.id = r.id \
                   AND d.copied_at IS NULL"
                    .to_owned(),
            ),
        }
    }

    /// Events to `deferred`, as one statement. Nothing happens to one that waits already.
    pub(super) fn defer(&self, place: &Place, events: &[Deferral]) -> Query<'static> {
        let mut columns = Columns::default();
        let mut delays = Vec::new();
        let (mut maybe_sent, mut parked, mut at) = (Vec::new(), Vec::new(), Vec::new());
        for e in events {
            let reason = e.reason.as_deref().map(row::reason);
            columns.push(&e.message, e.position, e.attempts, reason);
            let is_parked = e.hold == Hold::Parked;
            delays.push(wait(if is_parked { PARKED } else { e.delay }));
            maybe_sent.push(e.maybe_sent);
            parked.push(is_parked);
            at.push(match e.hold {
                Hold::Scheduled(at) => Some(row::micros(at)),
                Hold::None | Hold::Parked => None,
            });
        }
        columns
            .bind(place.bind(query(&self.defer)))
            .bind(delays)
            .bind(maybe_sent)
            .bind(parked)
            .bind(at)
    }

    /// Events to `dead_letter`, as one statement, out of their lines if they have waited.
    pub(super) fn bury(&self, place: &Place, events: &[DeadLetter]) -> Query<'static> {
        let mut columns = Columns::default();
        let mut maybe_sent = Vec::new();
        for e in events {
            let reason = Some(row::reason(&e.reason));
            columns.push(&e.message, e.position, e.attempts, reason);
            maybe_sent.push(e.maybe_sent);
        }
        columns.bind(place.bind(query(&self.bury))).bind(maybe_sent)
    }

    /// The end of one attempt of a line's head, as one statement.
    pub(super) fn resolve(
        &self,
        place: &Place,
        id: &LineId,
        resolution: &Resolution,
    ) -> Query<'static> {
        let named = |text| place.bind_id(query(text), id);
        match resolution {
            Resolution::Done => named(&self.done),
            Resolution::Again {
                attempts,
                reason,
                delay,
            } => named(&self.again)
                .bind(count(*attempts))
                .bind(row::reason(reason))
                .bind(wait(*delay)),
            Resolution::Unsure => named(&self.unsure),
            Resolution::Park { attempts, reason } => named(&self.park)
                .bind(count(*attempts))
                .bind(row::reason(reason))
                .bind(wait(PARKED)),
            Resolution::Dead { attempts, reason } => named(&self.dead)
                .bind(count(*attempts))
                .bind(row::reason(reason)),
        }
    }

    /// One waiting event.
    pub(super) fn alone(&self, place: &Place, id: &LineId) -> Query<'static> {
        place.bind_id(query(&self.alone), id)
    }
}

fn defer() -> String {
    let failed = "CASE WHEN r.attempts > 0 THEN clock_timestamp() END";
    format!(
        "INSERT INTO {{schema}}.deferred (side, scope, shard, {MESSAGE}, position, attempts, reason, due, \
           first_failure, last_failure, maybe_sent, parked, scheduled) \
         SELECT $1, $2, $3, {ROW}, coalesce(timestamptz 'epoch' + r.at * interval '1 microsecond', \
             clock_timestamp() + r.delay * interval '1 millisecond'), \
           {failed}, {failed}, r.maybe_sent, r.parked, r.at IS NOT NULL FROM {}",
        ROWS.replace(
            "{more}",
            "$16::bigint[], $17::bool[], $18::bool[], $19::bigint[]"
        )
        .replace("{names}", "delay, maybe_sent, parked, at")
    )
}

/// Out of their lines, if they have waited.
fn bury() -> String {
    format!(
        "INSERT INTO {{schema}}.dead_letter (side, scope, shard, {MESSAGE}, position, attempts, reason, maybe_sent, \
           first_failure, last_failure) \
         SELECT $1, $2, $3, {ROW}, r.maybe_sent, \
           coalesce((SELECT d.first_failure FROM {{schema}}.leave_line($1, $2, r.source, r.id) d), clock_timestamp()), \
           clock_timestamp() \
         FROM {}",
        ROWS.replace("{more}", "$16::bool[]")
            .replace("{names}", "maybe_sent")
    )
}

/// A line's head as it stands.
fn dead() -> String {
    format!(
        "INSERT INTO {{schema}}.dead_letter (side, scope, shard, {MESSAGE}, position, attempts, reason, maybe_sent, \
           first_failure, last_failure) \
         SELECT side, scope, shard, {MESSAGE}, position, $5, $6, maybe_sent, \
           coalesce(first_failure, clock_timestamp()), clock_timestamp() \
         FROM {{schema}}.leave_line($1, $2, $3, $4) ON CONFLICT DO NOTHING"
    )
}

/// The first of these rows, while those before them stay below the budget.
fn within_budget(rows: &str) -> String {
    format!(
        "SELECT b.* FROM (SELECT b.*, sum(coalesce(octet_length(b.payload), 0)) OVER (ROWS UNBOUNDED PRECEDING) AS bytes \
         FROM ({rows}) b) b WHERE b.bytes - coalesce(octet_length(b.payload), 0) < {BYTES}"
    )
}

/// Whose exceptions: side, scope and shard of the rows.
#[derive(Debug, Clone)]
pub(super) struct Place {
    side: Side,
    scope: String,
    shard: i16,
}

impl Place {
    /// Of a lease: a relay partition's own, else the group's.
    pub(super) fn of(key: &LeaseKey) -> Self {
        match key {
            LeaseKey::Relay {
                destination,
                partition,
            } => Self {
                side: Side::Relay,
                scope: destination.clone(),
                shard: small(*partition),
            },
            LeaseKey::Source { group, .. } => Self::group(group),
            LeaseKey::Duty { scope, .. } => Self::group(scope),
        }
    }

    /// Of a consumer group, whose lines lie in one shard for now.
    pub(super) fn group(group: &str) -> Self {
        Self {
            side: Side::Consumer,
            scope: group.to_owned(),
            shard: 0,
        }
    }

    pub(super) fn bind<'q>(&self, q: Query<'q>) -> Query<'q> {
        self.bind_scope(q).bind(self.shard)
    }

    fn bind_scope<'q>(&self, q: Query<'q>) -> Query<'q> {
        q.bind(self.side.as_str()).bind(self.scope.clone())
    }

    fn bind_id<'q>(&self, q: Query<'q>, (source, id): &LineId) -> Query<'q> {
        self.bind_scope(q)
            .bind(row::named(source))
            .bind(row::named(id))
    }
}

/// Messages as arrays, one for each column.
#[derive(Default)]
struct Columns {
    times: Vec<i64>,
    sources: Vec<String>,
    ids: Vec<String>,
    topics: Vec<String>,
    kinds: Vec<String>,
    keys: Vec<Option<String>>,
    attributes: Vec<String>,
    headers: Vec<String>,
    payloads: Vec<Option<Bytes>>,
    positions: Vec<i64>,
    attempts: Vec<i32>,
    reasons: Vec<Option<String>>,
}

impl Columns {
    fn push(&mut self, m: &Message, position: i64, attempts: u32, reason: Option<String>) {
        self.times.push(row::micros(m.time));
        self.sources.push(row::named(m.source()));
        self.ids.push(row::named(&m.id));
        self.topics.push(row::storable(&m.topic).into_owned());
        self.kinds.push(row::storable(&m.kind).into_owned());
        self.keys
            .push(m.key.as_deref().map(|k| row::storable(k).into_owned()));
        self.attributes.push(row::json(&m.attributes));
        self.headers.push(row::json(&m.headers));
        self.payloads.push(m.payload.clone());
        self.positions.push(position);
        self.attempts.push(count(attempts));
        self.reasons.push(reason);
    }

    fn bind(self, q: Query<'static>) -> Query<'static> {
        let payloads: Vec<Option<&[u8]>> = self.payloads.iter().map(Option::as_deref).collect();
        q.bind(self.times)
            .bind(self.sources)
            .bind(self.ids)
            .bind(self.topics)
            .bind(self.kinds)
            .bind(self.keys)
            .bind(self.attributes)
            .bind(self.headers)
            .bind(payloads)
            .bind(self.positions)
            .bind(self.attempts)
            .bind(self.reasons)
    }
}

impl Inner {
    /// Lets events wait.
    pub(super) async fn defer(&self, lease: &Lease, events: &[Deferral]) -> Result<()> {
        let place = Place::of(&lease.key);
        let chunks = events.chunks(AT_ONCE);
        let statements = chunks
            .map(|some| self.failure.defer(&place, some))
            .collect();
        self.write("defer", lease, Commit::Durable, statements)
            .await
    }

    /// Gives events up.
    pub(super) async fn bury(&self, lease: &Lease, events: &[DeadLetter]) -> Result<()> {
        let place = Place::of(&lease.key);
        let chunks = events.chunks(AT_ONCE);
        let statements = chunks.map(|some| self.failure.bury(&place, some)).collect();
        self.write("dead-letter", lease, Commit::Durable, statements)
            .await
    }

    /// Ends one attempt of a line's head. What a crash undoes of it is done again: at least once.
    pub(super) async fn resolve(
        &self,
        lease: &Lease,
        id: &LineId,
        resolution: &Resolution,
    ) -> Result<()> {
        let given_up = matches!(
            resolution,
            Resolution::Dead { .. } | Resolution::Park { .. }
        );
        let commit = Commit::durable(given_up);
        let statement = self.failure.resolve(&Place::of(&lease.key), id, resolution);
        self.write("end an attempt", lease, commit, vec![statement])
            .await
    }

    /// Notes copies at the broker.
    pub(super) async fn copied(&self, lease: &Lease, ids: &[LineId]) -> Result<()> {
        let (sources, ids): (Vec<_>, Vec<_>) = ids
            .iter()
            .map(|(s, i)| (row::named(s), row::named(i)))
            .unzip();
        let statement = query(&self.failure.copied)
            .bind(Place::of(&lease.key).scope)
            .bind(sources)
            .bind(ids);
        self.write("note copies", lease, Commit::Soon, vec![statement])
            .await
    }

    async fn write(
        &self,
        operation: &'static str,
        lease: &Lease,
        commit: Commit,
        statements: Vec<Query<'static>>,
    ) -> Result<()> {
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(operation, bound, commit).await?;
        let outcome = async {
            for statement in statements {
                tx.run(statement).await?;
            }
            self.fence(&mut tx, operation, lease).await
        }
        .await;
        tx.end(outcome).await
    }

    /// The lines of a lease, each with its head.
    pub(super) async fn lines(&self, lease: &Lease, limit: u32) -> Result<Vec<Line>> {
        let place = Place::of(&lease.key);
        let q = place
            .bind(query(&self.failure.lines))
            .bind(i64::from(limit));
        self.fenced("look for lines", lease, q, line).await
    }

    /// The first events of a line.
    pub(super) async fn line(
        &self,
        lease: &Lease,
        key: Option<&Key>,
        id: &LineId,
        limit: u32,
    ) -> Result<Vec<Deferred>> {
        let place = Place::of(&lease.key);
        let q = match key {
            Some(key) => place
                .bind_scope(query(&self.failure.line))
                .bind(row::storable(&key.topic).into_owned())
                .bind(row::storable(&key.key).into_owned())
                .bind(i64::from(limit)),
            None => self.failure.alone(&place, id),
        };
        self.fenced("read a line", lease, q, deferred).await
    }

    /// A read that only the owner's word follows from: whoever finds a line empty unblocks its key.
    async fn fenced<T>(
        &self,
        operation: &'static str,
        lease: &Lease,
        q: Query<'_>,
        read: impl Fn(&PgRow) -> sqlx::Result<T>,
    ) -> Result<Vec<T>> {
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(operation, bound, Commit::Soon).await?;
        let rows = tx.fetch(q).await;
        let outcome = match rows {
            Ok(rows) => self.fence(&mut tx, operation, lease).await.map(|()| rows),
            Err(e) => Err(e),
        };
        let rows = tx.end(outcome).await?;
        rows.iter()
            .map(read)
            .collect::<sqlx::Result<_>>()
            .map_err(|e| self.engine.failed(operation, e))
    }

    /// How many events wait.
    pub(super) async fn waiting(&self, side: Side, scope: &str) -> Result<Waiting> {
        const OPERATION: &str = "count what waits";
        let q = || {
            query(&self.failure.counts)
                .bind(side.as_str())
                .bind(scope.to_owned())
        };
        let rows = self.engine.fetch(OPERATION, q).await?;
        let read = |column| -> Result<u64> {
            let row = rows.first().ok_or(sqlx::Error::RowNotFound);
            let count: sqlx::Result<i64> = row.and_then(|r| r.try_get(column));
            let count = count.map_err(|e| self.engine.failed(OPERATION, e))?;
            Ok(count.unsigned_abs())
        };
        Ok(Waiting {
            total: read("total")?,
            longest: read("longest")?,
            parked: read("parked")?,
            scheduled: read("scheduled")?,
        })
    }

    /// The oldest dead letters of a group without a copy at the broker.
    pub(super) async fn uncopied(&self, group: &str, limit: u32) -> Result<Vec<DeadLetter>> {
        const OPERATION: &str = "look for dead letters to copy";
        let q = || {
            query(&self.failure.uncopied)
                .bind(group.to_owned())
                .bind(i64::from(limit))
        };
        let rows = self.engine.fetch(OPERATION, q).await?;
        let letters: sqlx::Result<_> = rows.iter().map(dead_letter).collect();
        letters.map_err(|e| self.engine.failed(OPERATION, e))
    }
}

pub(super) fn line(row: &PgRow) -> sqlx::Result<Line> {
    let topic: String = row.try_get("topic")?;
    let key: Option<String> = row.try_get("key")?;
    Ok(Line {
        key: key.map(|key| Key {
            topic: topic.into(),
            key: key.into(),
        }),
        head: (row.try_get("source")?, row.try_get("id")?),
        due_in: due_in(row)?,
    })
}

fn deferred(row: &PgRow) -> sqlx::Result<Deferred> {
    Ok(Deferred {
        message: row::message(row)?,
        position: row.try_get("position")?,
        attempts: attempts(row)?,
        due_in: due_in(row)?,
        maybe_sent: row.try_get("maybe_sent")?,
    })
}

fn dead_letter(row: &PgRow) -> sqlx::Result<DeadLetter> {
    Ok(DeadLetter {
        message: row::message(row)?,
        position: row.try_get("position")?,
        attempts: attempts(row)?,
        reason: row.try_get("reason")?,
        maybe_sent: row.try_get("maybe_sent")?,
    })
}

fn attempts(row: &PgRow) -> sqlx::Result<u32> {
    Ok(row.try_get::<i32, _>("attempts")?.unsigned_abs())
}

fn due_in(row: &PgRow) -> sqlx::Result<Duration> {
    Ok(Duration::from_millis(
        row.try_get::<i64, _>("due_in")?.unsigned_abs(),
    ))
}

fn wait(delay: Duration) -> i64 {
    millis(delay.min(LONGEST_WAIT))
}

fn count(attempts: u32) -> i32 {
    i32::try_from(attempts).unwrap_or(i32::MAX)
}
