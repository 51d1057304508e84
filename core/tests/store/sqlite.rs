//! SQLite under the suite, and what only SQLite promises.

use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;
use pillarbox_core::{Database, lease::LeaseKey};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteSynchronous},
};

use crate::suite::{self, Bench};

/// A file in a folder of its own.
struct File {
    folder: tempfile::TempDir,
}

impl File {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("test.db")
    }

    fn options(&self) -> SqliteConnectOptions {
        SqliteConnectOptions::new()
            .filename(self.path())
            .create_if_missing(true)
    }

    async fn raw(&self) -> SqliteConnection {
        self.options().connect().await.unwrap()
    }
}

fn tables(sql: &str) -> AssertSqlSafe<String> {
    let mut sql = sql.to_owned();
    for table in [
        "outbox",
        "cursor",
        "deferred",
        "dead_letter",
        "inbox",
        "inbox_clock",
    ] {
        sql = sql.replace(&format!("{{{table}}}"), &format!("pillarbox_{table}"));
    }
    AssertSqlSafe(sql)
}

#[async_trait]
impl Bench for File {
    async fn database(&self) -> Database {
        // As a host may well have it: two connections, and less durable than the engine's.
        let options = self.options().synchronous(SqliteSynchronous::Normal);
        let pool = SqlitePoolOptions::new().max_connections(2);
        Database::from(&pool.connect_with(options).await.unwrap())
    }

    async fn execute(&self, sql: &str) {
        let mut raw = self.raw().await;
        sqlx::raw_sql(tables(sql)).execute(&mut raw).await.unwrap();
    }

    async fn number(&self, sql: &str) -> i64 {
        let mut raw = self.raw().await;
        let query = sqlx::query_scalar(tables(sql));
        query.fetch_one(&mut raw).await.unwrap()
    }

    async fn outdate(&self) {
        self.execute("UPDATE pillarbox_installation SET oldest_program = 1000, version = 1000")
            .await;
    }

    async fn expire(&self, key: &LeaseKey, seconds: i64) {
        let table = match key {
            LeaseKey::Relay { .. } => "cursor",
            LeaseKey::Source { .. } => "source_cursor",
            LeaseKey::Duty { .. } => "lease",
        };
        let statement = format!(
            "UPDATE pillarbox_{table} SET expires_at = (unixepoch('now') + {seconds}) * 1000000"
        );
        self.execute(&statement).await;
    }

    async fn open_transactions(&self) -> i64 {
        let options = self.options().busy_timeout(Duration::ZERO);
        let mut raw = options.connect().await.unwrap();
        // Only with no reader and no writer at work can the whole write-ahead log be moved and cut.
        let checkpoint = sqlx::query_scalar("PRAGMA wal_checkpoint(TRUNCATE)");
        let open: i64 = checkpoint.fetch_one(&mut raw).await.unwrap_or(1);
        raw.close().await.unwrap();
        open
    }

    async fn age_log(&self) {}

    async fn short_slots(&self) {}

    async fn log_bytes(&self) -> i64 {
        self.number("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
            .await
    }

    async fn write_impatiently(&self, events: usize) -> usize {
        let mut writer = self.raw().await;
        let one = "INSERT INTO {outbox} (topic, type, key, payload) VALUES ('t', 'a', 'k', zeroblob(300))";
        for _ in 0..events {
            sqlx::raw_sql(tables(one))
                .execute(&mut writer)
                .await
                .unwrap();
        }
        events
    }

    async fn grow_old(&self, seconds: i64) {
        let sql = format!("UPDATE {{outbox}} SET created_at = created_at - {seconds} * 1000000");
        self.execute(&sql).await;
    }

    async fn pass(&self, seconds: i64) {
        let sql = format!(
            "UPDATE {{inbox}} SET arrived = arrived - {seconds} * 1000000; \
             UPDATE {{inbox_clock}} SET at = at - {seconds} * 1000000"
        );
        self.execute(&sql).await;
    }
}

suite::exercise!(std::future::ready(Some(File::new())));

async fn synchronous(unit: &mut dyn pillarbox_core::store::Unit) -> i64 {
    match unit.connection().unwrap() {
        pillarbox_core::Connection::Sqlite(c) => sqlx::query_scalar("PRAGMA synchronous")
            .fetch_one(c)
            .await
            .unwrap(),
        #[cfg(feature = "postgres")]
        pillarbox_core::Connection::Postgres(_) => unreachable!("this is SQLite"),
    }
}

#[tokio::test]
async fn the_engine_writes_with_synchronous_full_whatever_the_host_does() {
    let file = File::new();
    let pool = SqlitePoolOptions::new()
        .after_connect(|c, _| {
            Box::pin(async move {
                sqlx::raw_sql("PRAGMA synchronous = OFF").execute(c).await?;
                Ok(())
            })
        })
        .connect_with(file.options())
        .await
        .unwrap();
    let database = Database::from(&pool);
    pillarbox_core::migrate(&database).await.unwrap();
    let store = database.store();
    for durable in [true, false] {
        let mut unit = store.begin("g", suite::term(), durable).await.unwrap();
        assert_eq!(synchronous(&mut *unit).await, 2);
        // Nor can a handler change it.
        let off = suite::handle(&mut *unit, "PRAGMA synchronous = OFF").await;
        assert!(off.is_err() || synchronous(&mut *unit).await == 2);
        unit.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn a_flush_reaches_the_write_ahead_log() {
    let file = File::new();
    let database = suite::migrated(&file).await;
    suite::enqueue(&database, &[suite::message(None)]).await;
    let store = database.store();
    let acquired = suite::acquire(&**store, &suite::relay()).await;
    let slice = store.read(0, &acquired.progress, 10).await.unwrap();
    let gate = slice.gate.expect("seen is not yet on the disk");
    for _ in 0..2 {
        assert_eq!(file.open_transactions().await, 0);
        let log = || std::fs::metadata(file.path().with_extension("db-wal")).unwrap();
        assert_eq!(log().len(), 0, "the checkpoint has cut it");
        store.flush(&acquired.lease, &gate).await.unwrap();
        assert!(
            log().len() > 0,
            "nothing was written, so nothing was synced"
        );
    }
}

#[tokio::test]
async fn positions_never_come_again() {
    let file = File::new();
    let database = suite::migrated(&file).await;
    let store = database.store();
    let acquired = suite::acquire(&**store, &suite::relay()).await;
    suite::enqueue(&database, &[suite::message(None), suite::message(None)]).await;
    let (read, end) = suite::drain(&**store, acquired.progress, 10).await;
    assert_eq!(read.len(), 2);
    file.execute("DELETE FROM {outbox}").await;
    let next = [suite::message(None)];
    suite::enqueue(&database, &next).await;
    let (read, _) = suite::drain(&**store, end, 10).await;
    assert_eq!(suite::ids(&read), suite::ids_of(&next));
}

/// Else two processes, each with a part of the databases, would wait for each other.
#[tokio::test]
async fn memory_is_held_whole_or_not_at_all() {
    let (one, two) = (File::new(), File::new());
    let (one, two) = (suite::migrated(&one).await, suite::migrated(&two).await);
    let term = pillarbox_core::lease::LeaseTerm::new(Duration::from_secs(1));
    let held = pillarbox_core::memory::hold(&[&two], term).await.unwrap();
    let waiting = tokio::spawn({
        let (one, two) = (one.clone(), two.clone());
        async move { pillarbox_core::memory::hold(&[&one, &two], term).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    // The one that waits for the second database leaves the first alone.
    let first = [&one];
    let free = pillarbox_core::memory::hold(&first, term);
    let free = tokio::time::timeout(Duration::from_secs(20), free).await;
    free.unwrap().unwrap().release().await.unwrap();
    held.release().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn bytes_that_are_no_text_are_a_defect() {
    let file = File::new();
    let database = suite::migrated(&file).await;
    for column in ["topic", "type", "key", "content_type", "headers", "id"] {
        let (mut topic, mut kind) = ("'t'", "'a'");
        let bad = "CAST(x'61ff62' AS TEXT)";
        match column {
            "topic" => topic = bad,
            "type" => kind = bad,
            _ => {}
        }
        let other = match column {
            "topic" | "type" => "key",
            other => other,
        };
        let value = if other == column { bad } else { "NULL" };
        let sql = format!(
            "INSERT INTO {{outbox}} (topic, type, {other}) VALUES ({topic}, {kind}, {value})"
        );
        file.execute(&sql).await;
    }
    file.execute("INSERT INTO {outbox} (topic, type, payload, version) VALUES (1, 2.5, 3, 'x')")
        .await;
    let start = pillarbox_core::cursor::Progress::default();
    let (read, _) = suite::drain(&**database.store(), start, 3).await;
    assert_eq!(read.len(), 7);
    for bad in &read[..6] {
        assert!(bad.defect.is_some(), "{bad:?}");
    }
    let odd = &read[6].message;
    assert_eq!((odd.topic.as_str(), odd.kind.as_str()), ("1", "2.5"));
    assert_eq!(odd.payload.as_deref(), Some(&b"3"[..]));
}

#[tokio::test]
async fn a_nul_in_a_foreign_key_blocks_like_any_other() {
    let file = File::new();
    let database = suite::migrated(&file).await;
    let store = database.store();
    let lease = suite::acquire(&**store, &suite::group()).await.lease;
    let m = suite::message(Some("a\0b"));
    let mut unit = store
        .begin(suite::GROUP, suite::term(), true)
        .await
        .unwrap();
    unit.defer(&suite::deferral(&m)).await.unwrap();
    let others = [Some("a\0b"), Some("a"), Some("a\0c"), Some("a\\u0000b")].map(suite::message);
    let blocked = unit.blocked(&others.each_ref()).await.unwrap();
    assert_eq!(blocked, [true, false, false, false]);
    unit.commit(&lease, suite::term()).await.unwrap();
    let key = pillarbox_core::Key::of(&m);
    let line = store
        .line(&lease, key.as_ref(), &suite::line_id(&m), 5)
        .await
        .unwrap();
    assert!(line[0].message == m.clone() || line[0].message.key == m.key);
}

#[tokio::test]
async fn a_database_that_somebody_locks_is_away_and_comes_back() {
    let file = File::new();
    let database = suite::migrated(&file).await;
    let store = database.store();
    let lease = suite::acquire(&**store, &suite::relay()).await.lease;
    let mut other = file.raw().await;
    let tx = other.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let short = pillarbox_core::lease::LeaseTerm::new(Duration::from_secs(1));
    let Err(error) = store.begin("g", short, true).await else {
        panic!("there is one writer")
    };
    assert_eq!(error.kind(), pillarbox_core::Kind::Unavailable, "{error}");
    assert!(error.is_temporary());
    // Readers do not wait for the writer.
    store.read(0, &Default::default(), 5).await.unwrap();
    tx.rollback().await.unwrap();
    store.renew(&lease, suite::term()).await.unwrap();
    store.begin("g", short, true).await.unwrap();
}

#[tokio::test]
async fn calls_beside_an_open_unit_take_their_turn() {
    let file = File::new();
    let database = suite::migrated(&file).await;
    let store = database.store().clone();
    let relay = suite::acquire(&*store, &suite::relay()).await.lease;
    let group = suite::acquire(&*store, &suite::group()).await.lease;
    let mut unit = store.begin("g", suite::term(), true).await.unwrap();
    suite::handle(&mut *unit, suite::EFFECT).await.unwrap();
    let renewal = tokio::spawn({
        let store = store.clone();
        async move { store.renew(&relay, suite::term()).await }
    });
    tokio::task::yield_now().await;
    assert!(!renewal.is_finished());
    unit.commit(&group, suite::term()).await.unwrap();
    renewal.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_memory_database_lives_in_the_hosts_pool() {
    let one = SqlitePoolOptions::new()
        .max_connections(1)
        .connect("sqlite::memory:")
        .await
        .unwrap();
    let shared = SqlitePoolOptions::new()
        .max_connections(3)
        .min_connections(1)
        .connect("sqlite::memory:")
        .await
        .unwrap();
    let private = SqlitePoolOptions::new()
        .max_connections(1)
        .connect_with(SqliteConnectOptions::new())
        .await
        .unwrap();
    for pool in [one, shared, private] {
        let database = Database::from(&pool);
        pillarbox_core::migrate(&database).await.unwrap();
        let events = [suite::message(Some("k"))];
        suite::enqueue(&database, &events).await;
        let store = database.store();
        let acquired = suite::acquire(&**store, &suite::relay()).await;
        let (read, end) = suite::drain(&**store, acquired.progress, 5).await;
        assert_eq!(suite::ids(&read), suite::ids_of(&events));
        let settled = store.settle(&acquired.lease, &end, suite::term(), true);
        settled.await.unwrap();
        let mut unit = store.begin("g", suite::term(), true).await.unwrap();
        assert!(unit.remember(&events[0]).await.unwrap());
        unit.rollback().await.unwrap();
        // There is no other connection that could replace one whose transaction a handler has ended.
        let mut unit = store.begin("g", suite::term(), true).await.unwrap();
        suite::handle(&mut *unit, "COMMIT").await.unwrap();
        unit.rollback().await.unwrap();
        let mut unit = store.begin("g", suite::term(), true).await.unwrap();
        suite::handle(&mut *unit, "SELECT 1").await.unwrap();
        unit.rollback().await.unwrap();
        let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM pillarbox_inbox")
            .fetch_one(&pool)
            .await
            .unwrap();
        assert_eq!(rows, 0);
    }
}

/// Positions are all there is: a copy goes on where the original was when it was made, and draws positions above its own.
#[tokio::test]
async fn a_copied_file_keeps_what_each_destination_has_settled() {
    let original = File::new();
    let database = suite::migrated(&original).await;
    let store = &**database.store();
    let admin = pillarbox_core::Admin::new(&database, "ada");
    let start = pillarbox_core::Start::Earliest;
    admin.add_destination("audit", start).await.unwrap();
    let events: Vec<_> = (0..4).map(|_| suite::message(Some("k"))).collect();
    suite::enqueue(&database, &events).await;
    let audit = suite::destinations::destination("audit");
    for (key, settled) in [(suite::relay(), 3), (audit.clone(), 1)] {
        let acquired = suite::acquire(store, &key).await;
        let slice = store.read(0, &acquired.progress, 10).await.unwrap();
        let at = slice.within.at(slice.events[settled - 1].position);
        let done = store.settle(&acquired.lease, &at, suite::term(), true);
        done.await.unwrap();
    }

    let copy = File::new();
    let into = format!("VACUUM INTO '{}'", copy.path().display());
    original.execute(&into).await;
    // The original goes on, and the copy knows nothing of it.
    suite::enqueue(&database, &[suite::message(Some("k"))]).await;
    let database = copy.database().await;
    let store = &**database.store();
    assert_eq!(store.anchor().await.unwrap(), None);
    let new = suite::message(Some("k"));
    suite::enqueue(&database, std::slice::from_ref(&new)).await;
    let all = [events.as_slice(), &[new]].concat();
    for (key, settled) in [(suite::relay(), 3), (audit, 1)] {
        // As it was held when it was copied.
        copy.expire(&key, -1).await;
        let acquired = suite::acquire(store, &key).await;
        let (left, _) = suite::drain(store, acquired.progress, 10).await;
        assert_eq!(suite::ids(&left), suite::ids_of(&all[settled..]));
    }
}
