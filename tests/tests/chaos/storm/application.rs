//! The application in the storm: writers that do to their transactions whatever PostgreSQL lets them do.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use pillarbox_core::{Connection, Event as _, Outbox};
use pillarbox_tests::{TOPIC, Tick, World, connect};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, postgres::PgPoolOptions};
use tokio::{sync::Semaphore, task::JoinSet, time::sleep};
use uuid::Uuid;

/// Transactions at the same time.
const WRITERS: u64 = 16;
const KEYS: u32 = 200;
/// Fewer than the server's `max_prepared_transactions`.
const PREPARED: usize = 8;
const PAUSE: Duration = Duration::from_millis(60);

/// What the writers know of their events, by id. Whatever is in neither set is in doubt: its COMMIT was not answered, or
/// it was not to be flushed, or it was prepared.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// A synchronous COMMIT was answered.
    pub(super) committed: HashSet<String>,
    /// Rolled back, as a whole or to a savepoint.
    pub(super) undone: HashSet<String>,
}

/// Writers at work.
pub(super) struct Application {
    tasks: JoinSet<Record>,
    stop: Arc<AtomicBool>,
}

impl Application {
    pub(super) async fn start(world: &World, seed: u64) -> Self {
        let pool = PgPoolOptions::new()
            .max_connections(24)
            .acquire_timeout(Duration::from_secs(5))
            .connect(&world.urls.0)
            .await
            .expect("the producer's database");
        let tables = "CREATE TABLE account (key text PRIMARY KEY, n bigint NOT NULL);
                      CREATE TABLE written (id text PRIMARY KEY, key text NOT NULL, n bigint NOT NULL)";
        sqlx::raw_sql(tables).execute(&pool).await.expect("tables");
        let stop = Arc::new(AtomicBool::new(false));
        let prepared = Arc::new(Semaphore::new(PREPARED));
        let mut tasks = JoinSet::new();
        for number in 0..WRITERS {
            let writer = Writer {
                outbox: Outbox::new(connect(&world.urls.0)),
                pool: pool.clone(),
                rng: StdRng::seed_from_u64(seed.wrapping_mul(31).wrapping_add(number)),
                // One of them keeps a transaction id for seconds.
                slow: number == 0,
                prepared: prepared.clone(),
                record: Record::default(),
            };
            tasks.spawn(writer.run(stop.clone()));
        }
        tasks.spawn(reader(pool, stop.clone()));
        Self { tasks, stop }
    }

    /// Ends when the last transaction is decided.
    pub(super) async fn stop(mut self) -> Record {
        self.stop.store(true, Relaxed);
        let mut all = Record::default();
        while let Some(record) = self.tasks.join_next().await {
            let record = record.expect("a writer");
            all.committed.extend(record.committed);
            all.undone.extend(record.undone);
        }
        all
    }
}

/// Holds the horizon of the database for seconds, again and again.
async fn reader(pool: PgPool, stop: Arc<AtomicBool>) -> Record {
    while !stop.load(Relaxed) {
        // A database that is away is asked again.
        let _ = read(&pool).await;
        sleep(PAUSE).await;
    }
    Record::default()
}

async fn read(pool: &PgPool) -> sqlx::Result<()> {
    let mut tx = pool.begin().await?;
    let sql = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM account";
    sqlx::raw_sql(sql).execute(&mut *tx).await?;
    sleep(Duration::from_secs(5)).await;
    tx.commit().await
}

struct Writer {
    outbox: Outbox,
    pool: PgPool,
    rng: StdRng,
    slow: bool,
    prepared: Arc<Semaphore>,
    record: Record,
}

/// One transaction's events.
#[derive(Default)]
struct Events {
    kept: Vec<String>,
    undone: Vec<String>,
}

impl Writer {
    async fn run(mut self, stop: Arc<AtomicBool>) -> Record {
        while !stop.load(Relaxed) {
            let mut events = Events::default();
            // Errors are those of a database that is away, and of a key that somebody holds for long. Before the COMMIT
            // nothing was promised, and all is rolled back.
            if self.transaction(&mut events).await.is_err() {
                events.undone.append(&mut events.kept);
            }
            self.record.undone.extend(events.undone);
            sleep(PAUSE).await;
        }
        self.record
    }

    /// Leaves in `events.kept` what was not committed.
    async fn transaction(&mut self, events: &mut Events) -> sqlx::Result<()> {
        let mut tx = self.pool.begin().await?;
        set(&mut tx, "lock_timeout = '300ms'").await?;
        let flushed = self.rng.random_bool(0.7);
        if !flushed {
            set(&mut tx, "synchronous_commit = off").await?;
        }
        let mut keys: Vec<u32> = (0..self.rng.random_range(1..=4))
            .map(|_| self.rng.random_range(0..KEYS))
            .collect();
        // In one order, so that writers wait for each other and never in a circle.
        keys.sort_unstable();
        for key in keys {
            if self.rng.random_bool(0.25) {
                self.aside(&mut tx, key, events).await?;
            }
            events.kept.push(self.write(&mut tx, key).await?);
            if self.slow {
                let held = Duration::from_millis(self.rng.random_range(500..3_000));
                sleep(held).await;
            }
        }
        match self.rng.random_range(0..10) {
            0 => tx.rollback().await?,
            1 => self.in_two_phases(tx, events).await?,
            _ => {
                let answer = tx.commit().await;
                let kept = std::mem::take(&mut events.kept);
                if answer.is_ok() && flushed {
                    self.record.committed.extend(kept);
                }
                return answer;
            }
        }
        events.undone.append(&mut events.kept);
        Ok(())
    }

    /// An event in a savepoint, which is released or rolled back.
    async fn aside(
        &mut self,
        tx: &mut PgConnection,
        key: u32,
        events: &mut Events,
    ) -> sqlx::Result<()> {
        sqlx::raw_sql("SAVEPOINT aside").execute(&mut *tx).await?;
        let id = self.write(tx, key).await?;
        let (end, list) = if self.rng.random() {
            ("RELEASE SAVEPOINT aside", &mut events.kept)
        } else {
            ("ROLLBACK TO SAVEPOINT aside", &mut events.undone)
        };
        list.push(id);
        sqlx::raw_sql(end).execute(tx).await?;
        Ok(())
    }

    /// Prepares, waits, and then commits or rolls back, however long the database is away meanwhile.
    async fn in_two_phases(
        &mut self,
        mut tx: sqlx::Transaction<'_, Postgres>,
        events: &mut Events,
    ) -> sqlx::Result<()> {
        let Ok(_permit) = self.prepared.clone().try_acquire_owned() else {
            return tx.rollback().await;
        };
        let name = Uuid::new_v4();
        let prepare = AssertSqlSafe(format!("PREPARE TRANSACTION '{name}'"));
        // An error leaves it in doubt: it is asked for below either way.
        let _ = sqlx::raw_sql(prepare).execute(&mut *tx).await;
        // There is no transaction on this connection any more: a warning.
        let _ = tx.commit().await;
        sleep(Duration::from_millis(self.rng.random_range(0..1_500))).await;
        let commit = self.rng.random_bool(0.7);
        let verb = if commit { "COMMIT" } else { "ROLLBACK" };
        while let Err(e) = sqlx::raw_sql(AssertSqlSafe(format!("{verb} PREPARED '{name}'")))
            .execute(&self.pool)
            .await
        {
            let code = e.as_database_error().and_then(|e| e.code());
            // Ended by an earlier try whose answer was lost, or never prepared.
            if code.is_some_and(|c| c == "42704") {
                break;
            }
            sleep(PAUSE).await;
        }
        if commit {
            // In doubt, perhaps: the application's own table will tell.
            events.kept.clear();
        }
        Ok(())
    }

    /// The key's lock, its next number, the application's own row and the event, in one of the ways that the contract
    /// allows. Answers the event's id.
    async fn write(&mut self, tx: &mut PgConnection, key: u32) -> sqlx::Result<String> {
        let key = format!("key-{key:03}");
        let count = "INSERT INTO account (key, n) VALUES ($1, 1)
                     ON CONFLICT (key) DO UPDATE SET n = account.n + 1 RETURNING n";
        let n: i64 = sqlx::query_scalar(count)
            .bind(&key)
            .fetch_one(&mut *tx)
            .await?;
        let id = self.enqueue(tx, &key, n).await?;
        sqlx::query("INSERT INTO written (id, key, n) VALUES ($1, $2, $3)")
            .bind(&id)
            .bind(&key)
            .bind(n)
            .execute(tx)
            .await?;
        Ok(id)
    }

    async fn enqueue(&mut self, tx: &mut PgConnection, key: &str, n: i64) -> sqlx::Result<String> {
        const FUNCTION: &str =
            "SELECT pillarbox.enqueue(topic => $1, type => $2, key => $3, id => $4::text::uuid,
            payload => jsonb_build_object('key', $3::text, 'n', $5::bigint))";
        const INSERT: &str = "INSERT INTO pillarbox.outbox (topic, type, key, id, payload, content_type) VALUES
            ($1, $2, $3::text, $4::text::uuid,
             convert_to(jsonb_build_object('key', $3::text, 'n', $5::bigint)::text, 'UTF8'), 'application/json')";
        let sql = match self.rng.random_range(0..3) {
            0 => {
                let tick = Tick::new(key, u32::try_from(n).unwrap_or(u32::MAX));
                let id = self.outbox.enqueue(Connection::Postgres(tx), &tick).await;
                let id = id.map_err(|e| sqlx::Error::Protocol(e.to_string()))?;
                return Ok(id.to_string());
            }
            1 => FUNCTION,
            _ => INSERT,
        };
        let id = Uuid::new_v4().to_string();
        sqlx::query(sql)
            .bind(TOPIC)
            .bind(Tick::TYPE)
            .bind(key)
            .bind(&id)
            .bind(n)
            .execute(tx)
            .await?;
        Ok(id)
    }
}

async fn set(tx: &mut PgConnection, what: &str) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(format!("SET LOCAL {what}")))
        .execute(tx)
        .await?;
    Ok(())
}
