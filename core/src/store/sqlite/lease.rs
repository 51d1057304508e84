//! Leases: rows with owner, epoch and expiry. All of this runs inside a transaction that holds the writer's lock, so
//! what a fence has compared stays true until COMMIT.

use sqlx::{Row as _, sqlite::SqliteArguments};
use uuid::Uuid;

use crate::{
    cursor::Progress,
    error::{Error, Kind, Result},
    failure::LineId,
    lease::{Acquired, Lease, LeaseKey, LeaseTerm, RELAYS},
    store::Relays,
};

use super::{
    destination,
    pool::{Engine, Transaction},
    row::{micros, time},
};

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Takes the lease if it is free.
pub(super) async fn acquire(
    tx: &mut Transaction,
    key: &LeaseKey,
    term: LeaseTerm,
) -> Result<Option<Acquired>> {
    if let LeaseKey::Relay { destination, .. } = key {
        destination::check_removed(tx, destination).await?;
    }
    make(tx, key).await?;
    let died = key.runs_handlers() && is_owned(tx, key).await?;
    let owner = Uuid::new_v4();
    let statement = format!(
        "UPDATE {{p}}{} SET owner = ?1, epoch = epoch + 1, expires_at = {{now}} + ?2 \
         WHERE (expires_at <= {{now}} OR expires_at > {{now}} + ?3) AND {} RETURNING epoch, {}",
        table(key),
        clause(key),
        match key {
            LeaseKey::Relay { .. } =>
                "last, '', upto, (SELECT since FROM {p}destination WHERE name = destination)",
            LeaseKey::Source { .. } => "position, identity, NULL, NULL",
            LeaseKey::Duty { .. } => "NULL, '', NULL, NULL",
        }
    );
    let values = [micros(term.term()), micros(LeaseTerm::LONGEST), 0];
    let query = bind(tx.names().sql(&statement), owner, values, key);
    let row = query.fetch_optional(tx.connection()).await;
    let Some(row) = row.map_err(|e| tx.failed(e))? else {
        return Ok(None);
    };
    let epoch = row.try_get(0).map_err(|e| tx.failed(e))?;
    let place: Option<i64> = row.try_get(1).map_err(|e| tx.failed(e))?;
    let identity: String = row.try_get(2).map_err(|e| tx.failed(e))?;
    let upto: Option<i64> = row.try_get(3).map_err(|e| tx.failed(e))?;
    let since: Option<i64> = row.try_get(4).map_err(|e| tx.failed(e))?;
    let mut acquired = Acquired {
        lease: Lease {
            key: key.clone(),
            owner,
            epoch,
        },
        progress: Progress::default(),
        since: since.map(time),
        position: None,
        reset: false,
        deaths: 0,
        alone: None,
    };
    if key.runs_handlers() {
        note_death(tx, &mut acquired, died).await?;
    }
    match key {
        LeaseKey::Relay { .. } => {
            acquired.progress.last = place.unwrap_or(0);
            acquired.progress.upto = upto.map(|upto| upto.to_string());
        }
        LeaseKey::Source { source, .. } if source.identity != identity => {
            forget(tx, key, &source.identity).await?;
            acquired.reset = true;
        }
        LeaseKey::Source { .. } => acquired.position = place.and_then(|p| u64::try_from(p).ok()),
        LeaseKey::Duty { .. } => {}
    }
    Ok(Some(acquired))
}

async fn is_owned(tx: &mut Transaction, key: &LeaseKey) -> Result<bool> {
    let statement = format!(
        "SELECT owner IS NOT NULL FROM {{p}}{} WHERE {}",
        table(key),
        clause(key)
    );
    let query = bind(tx.names().sql(&statement), Uuid::nil(), [0; 3], key);
    let row = query.fetch_one(tx.connection()).await;
    row.and_then(|row| row.try_get(0)).map_err(|e| tx.failed(e))
}

/// Whoever stops in order gives its lease back: an owner that is found died, or could not.
async fn note_death(tx: &mut Transaction, acquired: &mut Acquired, died: bool) -> Result<()> {
    let name = acquired.lease.key.to_string();
    if !died {
        return progress(tx, name).await;
    }
    let sql = tx.names().sql(
        "INSERT INTO {p}suspicion (lease, deaths) VALUES (?1, 1) \
         ON CONFLICT (lease) DO UPDATE SET deaths = deaths + 1, changed_at = {now} RETURNING deaths, source, id",
    );
    let row: sqlx::Result<(u32, Option<String>, Option<String>)> = sqlx::query_as(sql)
        .bind(name)
        .fetch_one(tx.connection())
        .await;
    let (deaths, source, id) = row.map_err(|e| tx.failed(e))?;
    (acquired.deaths, acquired.alone) = (deaths, source.zip(id));
    Ok(())
}

async fn progress(tx: &mut Transaction, name: String) -> Result<()> {
    let sql = tx.names().sql("DELETE FROM {p}suspicion WHERE lease = ?1");
    tx.run(sqlx::query(sql).bind(name)).await.map(drop)
}

/// Notes what is alone under way, or that there is progress.
pub(super) async fn alone(
    tx: &mut Transaction,
    lease: &Lease,
    event: Option<LineId>,
) -> Result<()> {
    fence(tx, lease).await?;
    let name = lease.key.to_string();
    let Some((source, id)) = event else {
        return progress(tx, name).await;
    };
    let sql = tx.names().sql(
        "INSERT INTO {p}suspicion (lease, deaths, source, id) VALUES (?1, 0, ?2, ?3) \
         ON CONFLICT (lease) DO UPDATE SET source = ?2, id = ?3, changed_at = {now}",
    );
    tx.run(sqlx::query(sql).bind(name).bind(source).bind(id))
        .await
        .map(drop)
}

/// Who relays a destination, and what is free of it. Reads beside the writer.
pub(super) async fn relays(engine: &Engine, destination: &str) -> Result<Relays> {
    const OPERATION: &str = "look at the relays";
    const FREE: &str = "(expires_at <= {now} OR expires_at > {now} + ?2)";
    let names = engine.names();
    let text = format!(
        "SELECT 0, partition FROM {{p}}cursor WHERE destination = ?1 AND {FREE} \
         UNION ALL SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM {{p}}cursor WHERE destination = ?1) \
         UNION ALL SELECT 1, shard FROM {{p}}lease WHERE kind = '{RELAYS}' AND scope = ?1 AND NOT {FREE} ORDER BY 1, 2"
    );
    let mut reader = engine.reader(OPERATION).await?;
    let rows = sqlx::query_as(names.sql(&text))
        .bind(destination)
        .bind(micros(LeaseTerm::LONGEST))
        .fetch_all(&mut *reader)
        .await;
    let rows: Vec<(i64, u16)> = rows.map_err(|e| names.failed(OPERATION, e))?;
    let of = |kind| {
        let rows = rows.iter().filter(move |row| row.0 == kind);
        rows.map(|row| row.1).collect()
    };
    Ok(Relays {
        partitions: 1,
        seats: of(1),
        free: of(0),
    })
}

/// Prolongs the lease.
pub(super) async fn renew(tx: &mut Transaction, lease: &Lease, term: LeaseTerm) -> Result<()> {
    let set = "expires_at = {now} + ?3";
    update(tx, lease, set, [micros(term.term()), 0]).await
}

/// Gives the lease back, if it is still held.
pub(super) async fn release(tx: &mut Transaction, lease: &Lease) -> Result<()> {
    match update(tx, lease, "owner = NULL, expires_at = ?3", [0, 0]).await {
        Err(e) if e.kind() == Kind::LeaseLost => Ok(()),
        done => done,
    }
}

/// One small write that proves the lease, for the sake of its COMMIT, which brings to the disk what other connections
/// committed before. It must change a byte: an UPDATE that changes none touches no page and syncs nothing.
pub(super) async fn touch(tx: &mut Transaction, lease: &Lease) -> Result<()> {
    update(tx, lease, "flushes = flushes + ?3", [1, 0]).await
}

/// Proves the lease.
pub(super) async fn fence(tx: &mut Transaction, lease: &Lease) -> Result<()> {
    let statement = format!(
        "SELECT 1 FROM {{p}}{} WHERE owner = ?1 AND epoch = ?2 AND {}",
        table(&lease.key),
        clause(&lease.key)
    );
    let sql = tx.names().sql(&statement);
    let query = bind(sql, lease.owner, [lease.epoch, 0, 0], &lease.key);
    let row = query.fetch_optional(tx.connection()).await;
    match row.map_err(|e| tx.failed(e))? {
        Some(_) => Ok(()),
        None => Err(lost(tx, lease)),
    }
}

/// Changes columns of the lease's row, with two values as `?3` and `?4`, and proves the lease by it.
pub(super) async fn update(
    tx: &mut Transaction,
    lease: &Lease,
    set: &str,
    [a, b]: [i64; 2],
) -> Result<()> {
    let statement = format!(
        "UPDATE {{p}}{} SET {set} WHERE owner = ?1 AND epoch = ?2 AND {}",
        table(&lease.key),
        clause(&lease.key)
    );
    let sql = tx.names().sql(&statement);
    match tx
        .run(bind(sql, lease.owner, [lease.epoch, a, b], &lease.key))
        .await?
    {
        0 => Err(lost(tx, lease)),
        _ => Ok(()),
    }
}

fn lost(tx: &Transaction, lease: &Lease) -> Error {
    let text = format!("the lease {} has another owner", lease.key);
    Error::new(Kind::LeaseLost, tx.operation(), text)
}

/// Makes the lease's row, a relay's at the start of the log.
async fn make(tx: &mut Transaction, key: &LeaseKey) -> Result<()> {
    let (columns, values) = match key {
        LeaseKey::Relay { .. } => ("destination, partition", "?5, ?6"),
        LeaseKey::Source { .. } => (
            "grp, transport, cluster, name, partition, identity",
            "?5, ?6, ?7, ?8, ?9, ?10",
        ),
        LeaseKey::Duty { .. } => ("kind, scope, shard", "?5, ?6, ?7"),
    };
    let statement = format!(
        "INSERT INTO {{p}}{} ({columns}) VALUES ({values}) ON CONFLICT DO NOTHING",
        table(key)
    );
    let mut query = bind(tx.names().sql(&statement), Uuid::nil(), [0; 3], key);
    if let LeaseKey::Source { source, .. } = key {
        query = query.bind(source.identity.clone());
    }
    tx.run(query).await.map(drop)
}

/// The source was made anew: its old positions mean nothing.
async fn forget(tx: &mut Transaction, key: &LeaseKey, identity: &str) -> Result<()> {
    let statement = format!(
        "UPDATE {{p}}source_cursor SET position = NULL, identity = ?10 WHERE {}",
        clause(key)
    );
    let query =
        bind(tx.names().sql(&statement), Uuid::nil(), [0; 3], key).bind(identity.to_owned());
    tx.run(query).await.map(drop)
}

fn table(key: &LeaseKey) -> &'static str {
    match key {
        LeaseKey::Relay { .. } => "cursor",
        LeaseKey::Source { .. } => "source_cursor",
        LeaseKey::Duty { .. } => "lease",
    }
}

fn clause(key: &LeaseKey) -> &'static str {
    match key {
        LeaseKey::Relay { .. } => "destination = ?5 AND partition = ?6",
        LeaseKey::Source { .. } => {
            "grp = ?5 AND transport = ?6 AND cluster = ?7 AND name = ?8 AND partition = ?9"
        }
        LeaseKey::Duty { .. } => "kind = ?5 AND scope = ?6 AND shard = ?7",
    }
}

/// `?1` the owner, `?2` to `?4` numbers, then what [`clause`] compares.
fn bind(
    sql: sqlx::AssertSqlSafe<String>,
    owner: Uuid,
    numbers: [i64; 3],
    key: &LeaseKey,
) -> Query<'static> {
    let mut query = sqlx::query(sql).bind(owner.to_string());
    for n in numbers {
        query = query.bind(n);
    }
    match key {
        LeaseKey::Relay {
            destination,
            partition,
        } => query.bind(destination.clone()).bind(*partition),
        LeaseKey::Source { group, source } => query
            .bind(group.clone())
            .bind(source.transport)
            .bind(source.cluster.clone())
            .bind(source.name.clone())
            .bind(source.partition),
        LeaseKey::Duty { kind, scope, shard } => query.bind(*kind).bind(scope.clone()).bind(*shard),
    }
}
