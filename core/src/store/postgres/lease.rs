//! Who may move a cursor or commit an effect.
//!
//! Every fence compares owner, epoch and the memory token. Without the owner, the epoch that a lossy failover hands out twice
//! lets the old owner's statement match the new owner's row. Without the token, an owner goes on with what it read before a
//! crash of the database: positions and transaction ids were handed out again since, and commits that were visible are gone.

use sqlx::{Row, postgres::PgRow};
use uuid::Uuid;

use super::{
    Inner,
    engine::{Commit, Query, Text, Tx, query},
    log::seen,
    row,
};
use crate::{
    cursor::Progress,
    error::{Error, Kind, Result},
    failure::LineId,
    lease::{Acquired, Lease, LeaseKey, LeaseTerm, RELAYS},
    store::{Relays, millis},
};

/// A renewal inside a consumer's commit is left out while this much of the term is left, in tenths: more than
/// [`LeaseTerm::trusted`], so that the owner may count from the commit.
const FRESH: i64 = 9;

/// The statements for the three tables that hold leases.
pub(super) struct Statements {
    relay: Table,
    source: Table,
    duty: Table,
    settle: Text,
    settle_source: Text,
    relays: Text,
    died: Text,
    alone: Text,
    progress: Text,
}

/// The statements for one of them.
struct Table {
    peek: Text,
    create: Text,
    take: Text,
    grant: Text,
    renew: Text,
    release: Text,
    fence: Text,
    prove: Text,
}

/// What the texts are made of.
struct Shape<'a> {
    schema: &'a str,
    table: &'static str,
    key: &'static [&'static str],
    create: &'static str,
    /// What [`Table::take`] also answers.
    found: &'static str,
    /// What [`Table::grant`] also sets, from its parameters after the term.
    set: &'static str,
    /// What [`Table::grant`] also answers.
    granted: &'static str,
}

const RELAY: &[&str] = &["destination", "partition"];
const SOURCE: &[&str] = &["grp", "transport", "cluster", "name", "partition"];
const DUTY: &[&str] = &["kind", "scope", "shard"];

/// Whether the lease in row `c` is free.
fn free() -> String {
    format!(
        "(c.expires_at < clock_timestamp() OR c.expires_at > clock_timestamp() + interval '{} s')",
        LeaseTerm::LONGEST.as_secs()
    )
}

/// A partition that has no row yet is free.
fn relays(schema: &str) -> Text {
    format!(
        "SELECT i.partitions, \
           ARRAY(SELECT c.shard FROM \"{schema}\".lease c WHERE c.kind = '{RELAYS}' AND c.scope = $1 AND NOT {free} \
                 ORDER BY c.shard) AS seats, \
           ARRAY(SELECT p FROM generate_series(0, i.partitions - 1) p \
                 LEFT JOIN \"{schema}\".cursor c ON c.destination = $1 AND c.partition = p \
                 WHERE c.destination IS NULL OR {free} ORDER BY p) AS free \
         FROM \"{schema}\".installation i",
        free = free()
    )
    .into()
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let relay = Shape {
            schema,
            table: "cursor",
            key: RELAY,
            // For every partition: a slot of the log is settled only when every destination has a row for each.
            create: "(destination, partition) SELECT $1, p FROM {schema}.installation i, \
                     generate_series(0, i.partitions - 1) p WHERE $2 < i.partitions \
                     AND NOT EXISTS (SELECT FROM {schema}.destination d WHERE d.name = $1 AND d.removed_at IS NOT NULL)",
            found: ", {schema}.at_home() AS at_home",
            set: "",
            granted: ", c.seen::text AS seen, c.base, c.upto::text AS upto, c.last, \
                      (SELECT d.since FROM {schema}.destination d WHERE d.name = c.destination) AS since",
        };
        let source = Shape {
            schema,
            table: "source_cursor",
            key: SOURCE,
            create: "(grp, transport, cluster, name, partition, identity) VALUES ($1, $2, $3, $4, $5, $6)",
            found: ", c.identity <> $6 AS reset",
            set: ", position = CASE WHEN c.identity = $10 THEN c.position END, identity = $10",
            granted: ", c.position",
        };
        let duty = Shape {
            schema,
            table: "lease",
            key: DUTY,
            create: "(kind, scope, shard) VALUES ($1, $2, $3)",
            found: "",
            set: "",
            granted: "",
        };
        let settled =
            "UPDATE {table} c SET expires_at = clock_timestamp() + {term}, {set} WHERE {held}";
        Self {
            settle: relay
                .text(settled)
                .replace(
                    "{set}",
                    "seen = $6::pg_snapshot, base = $7, upto = $8::pg_snapshot, last = $9",
                )
                .into(),
            settle_source: source
                .text(settled)
                .replace("{set}", "position = $9")
                .into(),
            relay: relay.table(),
            source: source.table(),
            duty: duty.table(),
            relays: relays(schema),
            died: format!(
                "INSERT INTO \"{schema}\".suspicion AS s (lease, deaths) VALUES ($1, 1) \
                 ON CONFLICT (lease) DO UPDATE SET deaths = s.deaths + 1, changed_at = clock_timestamp() \
                 RETURNING deaths, source, id"
            )
            .into(),
            alone: format!(
                "INSERT INTO \"{schema}\".suspicion (lease, deaths, source, id) VALUES ($1, 0, $2, $3) \
                 ON CONFLICT (lease) DO UPDATE SET source = $2, id = $3, changed_at = clock_timestamp()"
            )
            .into(),
            progress: format!("DELETE FROM \"{schema}\".suspicion WHERE lease = $1").into(),
        }
    }

    fn of(&self, key: &LeaseKey) -> &Table {
        match key {
            LeaseKey::Relay { .. } => &self.relay,
            LeaseKey::Source { .. } => &self.source,
            LeaseKey::Duty { .. } => &self.duty,
        }
    }
}

impl Shape<'_> {
    /// Parameters: the key, then owner and epoch, then the term.
    fn text(&self, template: &str) -> String {
        let schema = format!("\"{}\"", self.schema);
        let n = self.key.len();
        let key: Vec<_> = (1..)
            .zip(self.key)
            .map(|(i, k)| format!("c.{k} = ${i}"))
            .collect();
        let free = free();
        let token = format!(
            "EXISTS (SELECT FROM {schema}.token t WHERE t.owner = ${}::uuid AND t.home = t.tableoid)",
            n + 1
        );
        template
            .replace(
                "{held}",
                "{key} AND c.owner = {owner}::uuid AND c.epoch = {epoch} AND {token}",
            )
            .replace("{key}", &key.join(" AND "))
            .replace("{free}", &free)
            .replace("{token}", &token)
            .replace("{owner}", &format!("${}", n + 1))
            .replace("{epoch}", &format!("${}", n + 2))
            .replace("{term}", &format!("${} * interval '1 millisecond'", n + 3))
            .replace("{table}", &format!("{schema}.{}", self.table))
            .replace("{schema}", &schema)
    }

    fn table(&self) -> Table {
        let text = |template: &str| Text::from(self.text(template));
        let renewed = "UPDATE {table} c SET expires_at = clock_timestamp() + {term} WHERE {held}";
        Table {
            peek: text("SELECT {free} AS free FROM {table} c WHERE {key}"),
            create: text(&format!(
                "INSERT INTO {{table}} {} ON CONFLICT DO NOTHING",
                self.create
            )),
            take: text(&format!(
                "SELECT c.owner::text AS owner{} FROM {{table}} c WHERE {{key}} AND {{free}} FOR NO KEY UPDATE",
                self.found
            )),
            // The row is locked by `take`. The token lives and dies with the lease; its predecessor's goes.
            grant: self.grant(),
            renew: text(renewed),
            release: text(
                "WITH gone AS (DELETE FROM {schema}.token WHERE owner = {owner}::uuid) \
                 UPDATE {table} c SET owner = NULL, expires_at = '-infinity' \
                 WHERE {key} AND c.owner = {owner}::uuid AND c.epoch = {epoch}",
            ),
            fence: text("SELECT 1 FROM {table} c WHERE {held} FOR SHARE"),
            prove: text(&format!(
                "WITH renewed AS (\
                   {renewed} AND c.expires_at < clock_timestamp() + {{term}} * {FRESH} / 10 RETURNING 1), \
                 held AS (SELECT 1 FROM {{table}} c WHERE {{held}} FOR SHARE) \
                 SELECT coalesce(current_setting('pillarbox.unit', true), '') = ${} AS own \
                 FROM (SELECT FROM renewed UNION ALL SELECT FROM held) proof LIMIT 1",
                self.key.len() + 4
            )),
        }
    }

    /// Parameters: key, owner, predecessor, term, name of the lease, what the table sets besides.
    fn grant(&self) -> Text {
        let n = self.key.len();
        let text = format!(
            "WITH granted AS (\
               UPDATE {{table}} c SET owner = {{owner}}::uuid, epoch = c.epoch + 1, \
               expires_at = clock_timestamp() + {{term}}{set} WHERE {{key}} RETURNING c.epoch{granted}), \
             gone AS (DELETE FROM {{schema}}.token WHERE owner = {{epoch}}::uuid), \
             noted AS (INSERT INTO {{schema}}.token (owner, home, lease) \
                       VALUES ({{owner}}::uuid, '{{schema}}.token'::regclass, ${label})) \
             SELECT * FROM granted",
            set = self.set,
            granted = self.granted,
            label = n + 4,
        );
        self.text(&text).into()
    }
}

impl Inner {
    /// Takes a lease if it is free.
    pub(super) async fn acquire(
        &self,
        key: &LeaseKey,
        term: LeaseTerm,
    ) -> Result<Option<Acquired>> {
        const OPERATION: &str = "acquire lease";
        self.engine.heed(term);
        let table = self.lease.of(key);
        // Most tries meet a lease that is held: they take no lock and no transaction.
        let seen = self
            .engine
            .fetch(OPERATION, || bind_key(query(&table.peek), key))
            .await?;
        let free = seen.first().map(|row| row.try_get::<bool, _>("free"));
        if let Some(Ok(false)) = free {
            return Ok(None);
        }
        let mut tx = self
            .engine
            .begin(OPERATION, term.statement(), Commit::Durable)
            .await?;
        let outcome = self.take(&mut tx, key, term, seen.is_empty()).await;
        tx.end(outcome).await
    }

    async fn take(
        &self,
        tx: &mut Tx<'_>,
        key: &LeaseKey,
        term: LeaseTerm,
        create: bool,
    ) -> Result<Option<Acquired>> {
        let table = self.lease.of(key);
        if create
            && tx
                .run(bind_more(bind_key(query(&table.create), key), key))
                .await?
                == 0
        {
            self.check_partition(tx, key).await?;
        }
        let row = tx
            .fetch_one(bind_more(bind_key(query(&table.take), key), key))
            .await?;
        let Some(row) = row else { return Ok(None) };
        let read = |e| self.engine.failed("acquire lease", e);
        let before: Option<String> = row.try_get("owner").map_err(read)?;
        let reset = match key {
            LeaseKey::Relay { .. } => {
                check_home(row.try_get("at_home").map_err(read)?)?;
                false
            }
            LeaseKey::Source { .. } => row.try_get("reset").map_err(read)?,
            LeaseKey::Duty { .. } => false,
        };
        let (owner, died) = (Uuid::new_v4(), before.is_some());
        let grant = bind_key(query(&table.grant), key)
            .bind(owner.to_string())
            .bind(before)
            .bind(millis(term.term()))
            .bind(key.to_string());
        let Some(row) = tx.fetch_one(bind_more(grant, key)).await? else {
            return Ok(None);
        };
        let mut acquired = acquired(&row, key, owner, reset).map_err(read)?;
        if key.runs_handlers() {
            self.note_death(tx, &mut acquired, died).await?;
        }
        Ok(Some(acquired))
    }

    /// Whoever stops in order gives its lease back: an owner that is found died, or could not.
    async fn note_death(&self, tx: &mut Tx<'_>, acquired: &mut Acquired, died: bool) -> Result<()> {
        let name = acquired.lease.key.to_string();
        if !died {
            return tx
                .run(query(&self.lease.progress).bind(name))
                .await
                .map(drop);
        }
        let Some(row) = tx.fetch_one(query(&self.lease.died).bind(name)).await? else {
            return Ok(());
        };
        let mut read = || -> sqlx::Result<()> {
            acquired.deaths = row.try_get::<i32, _>("deaths")?.unsigned_abs();
            let id: Option<String> = row.try_get("id")?;
            acquired.alone = row.try_get::<Option<String>, _>("source")?.zip(id);
            Ok(())
        };
        read().map_err(|e| self.engine.failed("acquire lease", e))
    }

    /// Notes what is alone under way, or that there is progress.
    pub(super) async fn alone(&self, lease: &Lease, event: Option<LineId>) -> Result<()> {
        const OPERATION: &str = "note an event";
        let bound = self.engine.term().statement();
        let commit = Commit::durable(event.is_some());
        let mut tx = self.engine.begin(OPERATION, bound, commit).await?;
        let name = lease.key.to_string();
        let q = match event {
            Some((source, id)) => query(&self.lease.alone)
                .bind(name)
                .bind(row::named(&source))
                .bind(row::named(&id)),
            None => query(&self.lease.progress).bind(name),
        };
        let outcome = match tx.run(q).await {
            Ok(_) => self.fence(&mut tx, OPERATION, lease).await,
            Err(e) => Err(e),
        };
        tx.end(outcome).await
    }

    /// Nothing was created: somebody else was faster, the destination was removed, or there is no such partition.
    async fn check_partition(&self, tx: &mut Tx<'_>, key: &LeaseKey) -> Result<()> {
        let LeaseKey::Relay {
            partition,
            destination,
        } = key
        else {
            return Ok(());
        };
        self.check_removed(tx, destination).await?;
        let found = tx.fetch_one(query(&self.schema.partitions)).await?;
        let partitions = found.and_then(|row| row.try_get::<i16, _>("partitions").ok());
        if partitions.is_some_and(|n| i32::from(n) > i32::from(*partition)) {
            return Ok(());
        }
        let text = format!("the log has no partition {partition}");
        Err(Error::new(Kind::Invalid, "acquire lease", text))
    }

    /// Who relays a destination, and what is free of it.
    pub(super) async fn relays(&self, destination: &str) -> Result<Relays> {
        const OPERATION: &str = "look at the relays";
        let look = || query(&self.lease.relays).bind(destination.to_owned());
        let rows = self.engine.fetch(OPERATION, look).await?;
        let Some(row) = rows.first() else {
            let text = self.engine.not_migrated();
            return Err(Error::new(Kind::NotMigrated, OPERATION, text));
        };
        let read = || -> sqlx::Result<Relays> {
            let numbers = |name| -> sqlx::Result<Vec<u16>> {
                let numbers: Vec<i32> = row.try_get(name)?;
                Ok(numbers.into_iter().flat_map(u16::try_from).collect())
            };
            Ok(Relays {
                partitions: row.try_get::<i16, _>("partitions")?.unsigned_abs(),
                seats: numbers("seats")?,
                free: numbers("free")?,
            })
        };
        read().map_err(|e| self.engine.failed(OPERATION, e))
    }

    /// Prolongs a lease.
    pub(super) async fn renew(&self, lease: &Lease, term: LeaseTerm) -> Result<()> {
        let q = bind_lease(query(&self.lease.of(&lease.key).renew), lease);
        self.move_held(
            "renew lease",
            lease,
            term,
            Commit::Soon,
            q.bind(millis(term.term())),
        )
        .await
    }

    /// Moves a relay's cursor and renews its lease.
    pub(super) async fn settle(
        &self,
        lease: &Lease,
        progress: &Progress,
        term: LeaseTerm,
        commit: Commit,
    ) -> Result<()> {
        let q = bind_lease(query(&self.lease.settle), lease)
            .bind(millis(term.term()))
            .bind(seen(progress))
            .bind(progress.base)
            .bind(progress.upto.as_deref())
            .bind(progress.last);
        self.move_held("settle", lease, term, commit, q).await
    }

    /// Moves a source's cursor and renews its lease. What it stands behind was committed earlier, and so cannot be lost
    /// without it.
    pub(super) async fn settle_source(
        &self,
        lease: &Lease,
        position: u64,
        term: LeaseTerm,
    ) -> Result<()> {
        let position = i64::try_from(position).map_err(|e| {
            let text = format!("position {position} is larger than the database's numbers");
            Error::new(Kind::Invalid, "settle source", text).caused_by(e)
        })?;
        let q = bind_lease(query(&self.lease.settle_source), lease)
            .bind(millis(term.term()))
            .bind(position);
        self.move_held("settle source", lease, term, Commit::Soon, q)
            .await
    }

    async fn move_held(
        &self,
        operation: &'static str,
        lease: &Lease,
        term: LeaseTerm,
        commit: Commit,
        q: Query<'_>,
    ) -> Result<()> {
        self.engine.heed(term);
        let mut tx = self
            .engine
            .begin(operation, term.statement(), commit)
            .await?;
        let outcome = match tx.run(q).await {
            Ok(0) => Err(lost(operation, lease)),
            Ok(_) => Ok(()),
            Err(e) => Err(e),
        };
        tx.end(outcome).await
    }

    /// Gives a lease back. Without asking for the token, so that an owner who lost only its memory need not wait either.
    pub(super) async fn release(&self, lease: &Lease) -> Result<()> {
        const OPERATION: &str = "release lease";
        let bound = self.engine.term().statement();
        let mut tx = self.engine.begin(OPERATION, bound, Commit::Soon).await?;
        let q = bind_lease(query(&self.lease.of(&lease.key).release), lease);
        let outcome = tx.run(q).await.map(drop);
        tx.end(outcome).await
    }

    /// The last statement before COMMIT: locks the lease's row, so that nobody can take it over in between. A plain SELECT
    /// lets a zombie commit.
    pub(super) async fn fence(
        &self,
        tx: &mut Tx<'_>,
        operation: &'static str,
        lease: &Lease,
    ) -> Result<()> {
        let q = bind_lease(query(&self.lease.of(&lease.key).fence), lease);
        match tx.fetch_one(q).await? {
            Some(_) => Ok(()),
            None => Err(lost(operation, lease)),
        }
    }

    /// The fence of a consumer's transaction, which also renews the lease now and then. Answers whether the transaction is
    /// still the one that `mark` was set in; nothing if the lease is lost.
    pub(super) fn prove(&self, lease: &Lease, term: LeaseTerm, mark: &str) -> Query<'static> {
        bind_lease(query(&self.lease.of(&lease.key).prove), lease)
            .bind(millis(term.term()))
            .bind(mark.to_owned())
    }
}

/// The error of a fence that found nothing.
pub(super) fn lost(operation: &'static str, lease: &Lease) -> Error {
    let text = format!(
        "{} is lost: another owner has it, or the database has crashed since it was taken",
        lease.key
    );
    Error::new(Kind::LeaseLost, operation, text)
}

/// In another cluster transaction ids start anew: cursors from the old one would skip events in silence.
fn check_home(at_home: Option<bool>) -> Result<()> {
    if at_home == Some(true) {
        return Ok(());
    }
    let text = "the database was restored into another cluster, or another server has taken over: the cursors must be \
                anchored first";
    Err(Error::new(Kind::Moved, "acquire lease", text))
}

fn acquired(row: &PgRow, key: &LeaseKey, owner: Uuid, reset: bool) -> sqlx::Result<Acquired> {
    let lease = Lease {
        key: key.clone(),
        owner,
        epoch: row.try_get("epoch")?,
    };
    let mut acquired = Acquired {
        lease,
        progress: Progress::default(),
        since: None,
        position: None,
        reset,
        deaths: 0,
        alone: None,
    };
    match key {
        LeaseKey::Relay { .. } => {
            acquired.progress = Progress {
                seen: row.try_get("seen")?,
                base: row.try_get("base")?,
                upto: row.try_get("upto")?,
                last: row.try_get("last")?,
            };
            acquired.since = super::row::deliver_at(row, "since")?;
        }
        LeaseKey::Source { .. } => {
            let position: Option<i64> = row.try_get("position")?;
            acquired.position = position.and_then(|p| u64::try_from(p).ok());
        }
        LeaseKey::Duty { .. } => {}
    }
    Ok(acquired)
}

fn bind_key<'q>(q: Query<'q>, key: &LeaseKey) -> Query<'q> {
    match key {
        LeaseKey::Relay {
            destination,
            partition,
        } => q.bind(destination.clone()).bind(small(*partition)),
        LeaseKey::Source { group, source } => q
            .bind(group.clone())
            .bind(source.transport)
            .bind(source.cluster.clone())
            .bind(source.name.clone())
            .bind(i32::try_from(source.partition).unwrap_or(i32::MAX)),
        LeaseKey::Duty { kind, scope, shard } => {
            q.bind(*kind).bind(scope.clone()).bind(i32::from(*shard))
        }
    }
}

/// A source's identity, which stands behind whatever else its statements take.
fn bind_more<'q>(q: Query<'q>, key: &LeaseKey) -> Query<'q> {
    match key {
        LeaseKey::Source { source, .. } => q.bind(source.identity.clone()),
        LeaseKey::Relay { .. } | LeaseKey::Duty { .. } => q,
    }
}

fn bind_lease<'q>(q: Query<'q>, lease: &Lease) -> Query<'q> {
    bind_key(q, &lease.key)
        .bind(lease.owner.to_string())
        .bind(lease.epoch)
}

/// A partition as its column takes it; one that does not fit exists nowhere.
pub(super) fn small(partition: u16) -> i16 {
    i16::try_from(partition).unwrap_or(i16::MAX)
}
