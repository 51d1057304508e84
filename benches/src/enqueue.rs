use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use clap::Args;
use pillarbox::{Outbox, transport::Message};
use pillarbox_testkit::servers;
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::{
    Measured,
    stage::{self, KIND, TOPIC, median, spread},
};

/// The application's rows of each writer: writers meet nowhere but in the log.
const ROWS: i64 = 1_000;
/// Between two looks at who waits.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Args)]
pub(crate) struct Enqueue {
    /// Slices with the log and with the plain table, in turn.
    #[arg(long, default_value_t = 12)]
    slices: u32,
    /// Seconds of each slice.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Transactions at the same time.
    #[arg(long, default_value_t = 16)]
    writers: u32,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 450)]
    bytes: usize,
}

/// What a transaction does beside its UPDATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Nothing,
    Plain,
    Log,
}

/// Figures of one slice.
#[derive(Default)]
struct Slice {
    rate: f64,
    /// Bytes of WAL for each transaction.
    wal: f64,
    /// Sightings of a writer that waits for a heavyweight lock, by what it waits for.
    waits: BTreeMap<String, u32>,
}

/// The log's columns, a key from a sequence, and no other index.
const TABLES: &str = "
    CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 50);
    CREATE TABLE plain (
      position bigserial PRIMARY KEY, xact_id xid8 NOT NULL DEFAULT '1', partition smallint NOT NULL DEFAULT 1,
      slot smallint NOT NULL DEFAULT 1, created_at timestamptz NOT NULL DEFAULT clock_timestamp(), id uuid NOT NULL,
      topic text NOT NULL, type text NOT NULL, key text, version integer NOT NULL DEFAULT 1, content_type text,
      deliver_at timestamptz, attributes jsonb, headers jsonb, payload bytea)";
const PLAIN: &str = "INSERT INTO plain (topic, type, key, payload, content_type, id) \
                     VALUES ($1, $2, $3, $4, $5, $6::text::uuid)";

impl Enqueue {
    pub(crate) async fn run(&self) -> Measured<()> {
        let (url, pool) = stage::database(servers::postgres().await?).await?;
        sqlx::raw_sql(TABLES).execute(&pool).await?;
        sqlx::query("INSERT INTO account SELECT n, 0 FROM generate_series(0, $1 - 1) n")
            .bind(ROWS * i64::from(self.writers))
            .execute(&pool)
            .await?;
        let writers = PgPoolOptions::new()
            .min_connections(self.writers)
            .max_connections(self.writers)
            .connect(&url)
            .await?;
        println!(
            "{} writers, {} bytes, slices of {} s; transactions a second (bytes of WAL each)",
            self.writers, self.bytes, self.seconds
        );
        println!(
            "{:>18} {:>18} {:>18} {:>12} {:>12}",
            "no outbox", "plain table", "outbox", "to plain", "to none"
        );
        let mut pairs = Vec::new();
        for round in 0..(self.slices / 2).max(1) {
            let mut order = [Side::Nothing, Side::Plain, Side::Log];
            if round % 2 == 1 {
                order.reverse();
            }
            let mut of = BTreeMap::new();
            for side in order {
                of.insert(side, self.slice(side, &pool, &writers).await?);
            }
            pairs.push(self.tell(of));
        }
        Self::sum_up(&pairs);
        Ok(())
    }

    /// Prints a round, and answers it in the order of [`Side`].
    fn tell(&self, of: BTreeMap<Side, Slice>) -> Vec<Slice> {
        let all: Vec<Slice> = of.into_values().collect();
        let cell = |s: &Slice| format!("{:.0} ({:.0})", s.rate, s.wal);
        if let [nothing, plain, log] = all.as_slice() {
            println!(
                "{:>18} {:>18} {:>18} {:>12.3} {:>12.3}",
                cell(nothing),
                cell(plain),
                cell(log),
                log.rate / plain.rate,
                log.rate / nothing.rate
            );
        }
        all
    }

    fn sum_up(rounds: &[Vec<Slice>]) {
        let of = |figure: fn(&Slice, &Slice, &Slice) -> f64| -> Vec<f64> {
            let one = |round: &Vec<Slice>| match round.as_slice() {
                [nothing, plain, log] => figure(nothing, plain, log),
                _ => f64::NAN,
            };
            rounds.iter().map(one).collect()
        };
        let say = |what: &str, asked: &str, values: Vec<f64>| {
            let (least, most) = spread(&values);
            println!(
                "{what:<52} {:>6.3}  ({least:.3} to {most:.3}){asked}",
                median(&values)
            );
        };
        let rates = of(|_, plain, log| log.rate / plain.rate);
        say(
            "outbox to plain table, median of pairs",
            ", asked: 0.85",
            rates,
        );
        say(
            "outbox to no outbox",
            "",
            of(|nothing, _, log| log.rate / nothing.rate),
        );
        say(
            "plain table to no outbox",
            "",
            of(|nothing, plain, _| plain.rate / nothing.rate),
        );
        say(
            "WAL of an event, outbox to plain table",
            ", asked: at most 1.25",
            of(|nothing, plain, log| (log.wal - nothing.wal) / (plain.wal - nothing.wal)),
        );
        say(
            "WAL of the transaction, outbox to plain table",
            "",
            of(|_, plain, log| log.wal / plain.wal),
        );
        let mut waits = BTreeMap::new();
        for slice in rounds.iter().filter_map(|round| round.last()) {
            for (what, times) in &slice.waits {
                *waits.entry(what.as_str()).or_insert(0) += times;
            }
        }
        println!(
            "writers of the outbox seen waiting for a lock: {waits:?} (extend: for a longer file, as with any table)"
        );
    }

    async fn slice(&self, side: Side, pool: &PgPool, writers: &PgPool) -> Measured<Slice> {
        // Whole pages go into the WAL after a checkpoint: the same for each slice.
        sqlx::raw_sql("CHECKPOINT").execute(pool).await?;
        let wal = wal(pool).await?;
        let until = Instant::now() + Duration::from_secs(self.seconds);
        let watch = tokio::spawn(waits(pool.clone(), until));
        let mut tasks = JoinSet::new();
        let started = Instant::now();
        for writer in 0..self.writers {
            let writer = Writer {
                outbox: Outbox::new(writers),
                pool: writers.clone(),
                payload: vec![b'.'; self.bytes],
                first: i64::from(writer) * ROWS,
            };
            tasks.spawn(writer.run(side, until));
        }
        let mut count = 0;
        while let Some(written) = tasks.join_next().await {
            count += written??;
        }
        let took = started.elapsed();
        let wal = self::wal(pool).await? - wal;
        let count = f64::from(count);
        Ok(Slice {
            rate: count / took.as_secs_f64(),
            wal: wal / count,
            waits: watch.await??,
        })
    }
}

async fn wal(pool: &PgPool) -> Measured<f64> {
    let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
    Ok(sqlx::query_scalar(sql).fetch_one(pool).await?)
}

async fn waits(pool: PgPool, until: Instant) -> Measured<BTreeMap<String, u32>> {
    let sql = "SELECT wait_event FROM pg_stat_activity
               WHERE wait_event_type = 'Lock' AND datname = current_database()";
    let mut seen = BTreeMap::new();
    while Instant::now() < until {
        for what in sqlx::query_scalar::<_, String>(sql)
            .fetch_all(&pool)
            .await?
        {
            *seen.entry(what).or_insert(0) += 1;
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(seen)
}

struct Writer {
    outbox: Outbox,
    pool: PgPool,
    payload: Vec<u8>,
    first: i64,
}

impl Writer {
    async fn run(self, side: Side, until: Instant) -> Measured<u32> {
        let mut count = 0;
        while Instant::now() < until {
            let row = self.first + i64::from(count) % ROWS;
            let mut tx = self.pool.begin().await?;
            sqlx::query("UPDATE account SET balance = balance + 1 WHERE id = $1")
                .bind(row)
                .execute(&mut *tx)
                .await?;
            if side != Side::Nothing {
                let message = self.message(row);
                if side == Side::Log {
                    self.outbox.enqueue_message(&mut tx, message).await?;
                } else {
                    sqlx::query(PLAIN)
                        .bind(message.topic)
                        .bind(message.kind)
                        .bind(message.key)
                        .bind(self.payload.as_slice())
                        .bind("text/plain")
                        .bind(message.id)
                        .execute(&mut *tx)
                        .await?;
                }
            }
            tx.commit().await?;
            count += 1;
        }
        Ok(count)
    }

    fn message(&self, row: i64) -> Message {
        let id = Uuid::now_v7().to_string();
        let mut message = Message::new(id, TOPIC, KIND, self.payload.clone())
            .with_attribute("datacontenttype", "text/plain");
        message.key = Some(format!("key-{row}"));
        message
    }
}
