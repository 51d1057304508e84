//! What operators hold back for a while.

use std::time::Duration;

use sqlx::{Row, postgres::PgRow};

use super::{
    Inner,
    engine::{Commit, DEADLINE, Query, Text, query},
    row,
};
use crate::{
    error::Result,
    failure::Side,
    lease::Lease,
    pause::{Expiry, NewPause, Pause, Target},
    store::{Paused, millis},
};

const LOOK: &str = "look for pauses";
/// Names of destinations or groups told at most.
const NAMES: u32 = 100;

/// In the order of [`paused`].
const COLUMNS: &str = "side, scope, topic, keyed, key, begun_at, ends_at, reason, operator, \
                       greatest(0, ceil(extract(epoch FROM ends_at - clock_timestamp()) * 1000))::bigint AS left_ms";
/// $1 to $5.
const NAMED: &str = "side = $1 AND scope = $2 AND topic = $3 AND keyed = $4 AND key = $5";

pub(super) struct Statements {
    list: Text,
    pause: Text,
    resume: Text,
    destinations: Text,
    groups: Text,
    forget: Text,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let schema = format!("\"{schema}\"");
        let text = |template: &str| Text::from(template.replace("{schema}", &schema));
        Self {
            list: text(&format!(
                "SELECT {COLUMNS} FROM {{schema}}.pause WHERE ends_at > clock_timestamp() \
                 AND ($1::text IS NULL OR side = $1 AND scope = $2) ORDER BY side, scope, topic, keyed, key"
            )),
            pause: text(&format!(
                "INSERT INTO {{schema}}.pause (side, scope, topic, keyed, key, ends_at, reason, operator) \
                 SELECT $1, $2, $3, $4, $5, t.ends_at, $6, $7 FROM (SELECT coalesce( \
                   timestamptz 'epoch' + $8::bigint * interval '1 microsecond', \
                   clock_timestamp() + $9::bigint * interval '1 millisecond') AS ends_at) t \
                 WHERE t.ends_at > clock_timestamp() AND t.ends_at <= clock_timestamp() + interval '{} s' \
                 ON CONFLICT (side, scope, topic, keyed, key) DO UPDATE SET begun_at = clock_timestamp(), \
                   ends_at = excluded.ends_at, reason = excluded.reason, operator = excluded.operator \
                 RETURNING {COLUMNS}",
                Pause::LONGEST.as_secs()
            )),
            // One that is over has ended by itself.
            resume: text(&format!(
                "WITH gone AS (DELETE FROM {{schema}}.pause WHERE {NAMED} RETURNING *) \
                 SELECT {COLUMNS} FROM gone WHERE ends_at > clock_timestamp()"
            )),
            destinations: text(
                "SELECT DISTINCT destination AS name FROM {schema}.cursor ORDER BY 1 LIMIT $1",
            ),
            groups: text(
                "SELECT grp AS name FROM {schema}.source_cursor \
                 UNION SELECT scope FROM {schema}.lease WHERE kind = 'pump' ORDER BY 1 LIMIT $1",
            ),
            forget: text(
                "DELETE FROM {schema}.pause WHERE side = $1 AND ends_at < clock_timestamp()",
            ),
        }
    }
}

impl Inner {
    pub(super) async fn pauses(&self, of: Option<(Side, String)>) -> Result<Vec<Paused>> {
        let (side, scope) = of.map_or((None, None), |(side, scope)| {
            (Some(side.as_str()), Some(scope))
        });
        let list = || query(&self.pause.list).bind(side).bind(scope.clone());
        let rows = self.engine.fetch(LOOK, list).await?;
        let paused: sqlx::Result<Vec<_>> = rows.iter().map(paused).collect();
        paused.map_err(|e| self.engine.failed(LOOK, e))
    }

    /// None if the expiry is out of bounds.
    pub(super) async fn pause(&self, pause: &NewPause) -> Result<Option<Paused>> {
        let (at, wait) = match pause.expiry {
            Expiry::At(at) => (Some(row::micros(at)), 0),
            Expiry::In(d) => (None, millis(d)),
        };
        let q = name(query(&self.pause.pause), &pause.target)
            .bind(row::reason(&pause.reason))
            .bind(row::reason(&pause.operator))
            .bind(at)
            .bind(wait);
        self.change("pause", q).await
    }

    pub(super) async fn resume(&self, target: &Target) -> Result<Option<Paused>> {
        self.change("resume", name(query(&self.pause.resume), target))
            .await
    }

    async fn change(&self, operation: &'static str, q: Query<'_>) -> Result<Option<Paused>> {
        let mut tx = self
            .engine
            .begin(operation, DEADLINE, Commit::Durable)
            .await?;
        let row = tx.fetch_one(q).await;
        let row = tx.end(row).await?;
        let paused = row.as_ref().map(paused).transpose();
        paused.map_err(|e| self.engine.failed(operation, e))
    }

    /// The destinations or groups that have run here.
    pub(super) async fn scopes(&self, side: Side) -> Result<Vec<String>> {
        let text = match side {
            Side::Relay => &self.pause.destinations,
            Side::Consumer => &self.pause.groups,
        };
        let names = || query(text).bind(i64::from(NAMES));
        let rows = self.engine.fetch(LOOK, names).await?;
        let names: sqlx::Result<Vec<_>> = rows.iter().map(|row| row.try_get("name")).collect();
        names.map_err(|e| self.engine.failed(LOOK, e))
    }

    pub(super) async fn forget_pauses(&self, lease: &Lease, side: Side) -> Result<u64> {
        const OPERATION: &str = "remove pauses that are over";
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(OPERATION, bound, Commit::Soon).await?;
        let outcome = match self.fence(&mut tx, OPERATION, lease).await {
            Ok(()) => tx.run(query(&self.pause.forget).bind(side.as_str())).await,
            Err(e) => Err(e),
        };
        tx.end(outcome).await
    }
}

fn name<'q>(q: Query<'q>, target: &Target) -> Query<'q> {
    q.bind(target.side.as_str())
        .bind(row::storable(&target.scope).into_owned())
        .bind(target.topic.clone().unwrap_or_default())
        .bind(target.key.is_some())
        .bind(target.key.clone().unwrap_or_default())
}

fn paused(row: &PgRow) -> sqlx::Result<Paused> {
    let (side, topic): (String, String) = (row.try_get("side")?, row.try_get("topic")?);
    let keyed: bool = row.try_get("keyed")?;
    let key: String = row.try_get("key")?;
    let left: i64 = row.try_get("left_ms")?;
    Ok(Paused {
        pause: Pause {
            target: Target {
                side: Side::read(&side).unwrap_or(Side::Relay),
                scope: row.try_get("scope")?,
                topic: (!topic.is_empty()).then_some(topic),
                key: keyed.then_some(key),
            },
            until: row::time(row, "ends_at")?,
            reason: row.try_get("reason")?,
            operator: row.try_get("operator")?,
            since: row::time(row, "begun_at")?,
        },
        left: Duration::from_millis(u64::try_from(left).unwrap_or_default()),
    })
}
