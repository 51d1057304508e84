//! Traps of PostgreSQL that lose events in silence. Each test first shows the trap, so that it cannot pass by accident.

use pillarbox_core::store::Store;
use sqlx::{PgConnection, Row};

use super::{Bench, Db, names, number, pool, run, start, text, write};

const XID: &str = "SELECT pg_current_xact_id()";

async fn begin(db: &Db) -> PgConnection {
    let mut connection = db.raw().await;
    run(&mut connection, "BEGIN").await;
    connection
}

/// PostgreSQL's xmax is "latest completed xid + 1". A transaction with a higher xid may run already, hold a low position, and
/// stand in no list of the snapshot.
#[tokio::test]
async fn a_transaction_above_xmax_is_not_lost() {
    // Alone on its server: the trap is there only while no other transaction completes.
    let Some((server, db, database)) = super::alone(&[]).await else {
        return;
    };
    let store = database.store();
    let start = start(&**store).await;
    let (mut low, mut high, mut eye) = (begin(&db).await, begin(&db).await, db.raw().await);
    run(&mut low, XID).await;
    run(&mut high, XID).await;
    write(&mut high, "first").await;
    write(&mut low, "second").await;
    run(&mut low, "COMMIT").await;

    let naive = text(&mut eye, "SELECT pg_current_snapshot()::text").await;
    let slice = store.read(0, &start, 10).await.unwrap();
    assert_eq!(slice.events.len(), 1);
    run(&mut high, "COMMIT").await;
    let end = slice.end.unwrap();
    let (late, _) = names(&**store, end, 10).await;
    assert_eq!(late, ["first"]);

    // As it was before restating: not listed, and below base.
    let batch = format!(
        "SELECT count(*) FROM pillarbox.batch(0::smallint, '{naive}', 2, pg_current_snapshot(), 0, 10)"
    );
    assert_eq!(number(&mut eye, &batch).await, 0, "there was no trap");
    server.end().await;
}

/// The same on restate alone, whatever else happens on the server.
#[tokio::test]
async fn restating_lists_what_lies_above_xmax() {
    let Some((db, _)) = Db::migrated().await else {
        return;
    };
    let mut raw = db.raw().await;
    let restated = text(
        &mut raw,
        "SELECT pillarbox.restate('10:20:12,15', '23')::text",
    )
    .await;
    assert_eq!(restated, "10:23:12,15,20,21,22");
    let restated = text(&mut raw, "SELECT pillarbox.restate('20:20:', '20')::text").await;
    assert_eq!(restated, "20:20:");
    // A cut lists everything that runs.
    let mut open = begin(&db).await;
    let xid = text(&mut open, "SELECT pg_current_xact_id()::text").await;
    let listed =
        format!("SELECT count(*) FROM pg_snapshot_xip(pillarbox.cut()) x WHERE x::text = '{xid}'");
    assert_eq!(number(&mut raw, &listed).await, 1);
    let late = super::refused(&mut open, "SELECT pillarbox.cut()").await;
    assert!(late.contains("first write"), "{late}");
}

/// Defaults run in column order. With position first, a writer that pauses between the two has a position below the cursor and
/// an xid above it.
#[tokio::test]
async fn the_xid_is_drawn_before_the_position() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let store = database.store();
    let mut keeper = db.raw().await;
    run(
        &mut keeper,
        "CREATE FUNCTION slow() RETURNS xid8 LANGUAGE plpgsql AS $$ BEGIN \
           IF current_setting('application_name') = 'slow' THEN PERFORM pg_advisory_xact_lock(1); END IF; \
           RETURN pg_current_xact_id(); END $$; \
         ALTER TABLE {outbox} ALTER xact_id SET DEFAULT slow(); \
         SELECT pg_advisory_lock(1)",
    )
    .await;
    // Each 32nd position draws an xid of its own accord, the first one too.
    write(&mut keeper, "before").await;
    let mut slow = db.raw().await;
    run(&mut slow, "SET application_name = 'slow'").await;
    let paused = tokio::spawn(async move { write(&mut slow, "paused").await });
    super::until("the writer pauses", async || {
        number(
            &mut keeper,
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = \
             (SELECT oid FROM pg_database WHERE datname = current_database())",
        )
        .await
            == 1
    })
    .await;
    write(&mut keeper, "quick").await;
    let (read, end) = names(&**store, start(&**store).await, 10).await;
    assert_eq!(read, ["before", "quick"]);
    run(&mut keeper, "SELECT pg_advisory_unlock(1)").await;
    paused.await.unwrap();
    let (read, _) = names(&**store, end, 10).await;
    assert_eq!(read, ["paused"]);
}

/// A session that draws positions in advance would use low ones late.
#[tokio::test]
async fn positions_are_not_drawn_in_advance() {
    let Some((db, _)) = Db::migrated().await else {
        return;
    };
    let cached = "SELECT s.seqcache FROM pg_sequence s WHERE s.seqrelid = \
                  pg_get_serial_sequence('pillarbox.outbox', 'position')::regclass";
    assert_eq!(db.number(cached).await, 1);
}

async fn buffers(connection: &mut PgConnection, query: &str) -> i64 {
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}");
    let row = sqlx::query(sqlx::AssertSqlSafe(explain))
        .fetch_one(connection)
        .await
        .unwrap();
    // jsonb's text form, without the driver's own JSON type.
    let plan = row.try_get_raw(0).unwrap().as_bytes().unwrap().to_vec();
    let plan: serde_json::Value = serde_json::from_slice(&plan).unwrap();
    let plan = &plan[0]["Plan"];
    ["Shared Hit Blocks", "Shared Read Blocks"]
        .iter()
        .map(|name| plan[name].as_i64().unwrap())
        .sum()
}

/// A plan that was made while the log was empty, or that statistics of another time suggest, reads the whole log at each poll.
#[tokio::test]
async fn plans_made_on_an_empty_log_go_by_the_index() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let mut raw = db.raw().await;
    run(&mut raw, "VACUUM ANALYZE {outbox}").await;
    let poll = |seen: &str, base: i64| {
        format!(
            "SELECT * FROM pillarbox.batch(0::smallint, '{seen}', {base}, pg_current_snapshot(), 0, 10)"
        )
    };
    for _ in 0..10 {
        run(&mut raw, &poll("1:1:", 0)).await;
    }
    // Twenty transactions that run at the cut, then a backlog.
    let mut open = Vec::new();
    for _ in 0..20 {
        let mut connection = begin(&db).await;
        run(&mut connection, XID).await;
        open.push(connection);
    }
    let load = "INSERT INTO {outbox} (topic, type, key, payload) \
                SELECT 't', 'a', 'k' || i, convert_to(repeat('x', 300), 'UTF8') FROM generate_series(1, 20000) i";
    run(&mut pool(&database).acquire().await.unwrap(), load).await;

    let from_the_start = buffers(&mut raw, &poll("1:1:", 0)).await;
    assert!(from_the_start < 100, "{from_the_start} blocks for ten rows");
    let cut = text(&mut raw, "SELECT pillarbox.cut()::text").await;
    let empty = buffers(&mut raw, &poll(&cut, 20_000)).await;
    // For each running transaction one descent in each of four children.
    assert!(empty < 400, "{empty} blocks for nothing");
    assert!(!open.is_empty());
}

/// An idle relay must not use up transaction ids.
#[tokio::test]
async fn an_empty_poll_draws_no_xid() {
    let Some((server, db, database)) = super::alone(&[("autovacuum", "off")]).await else {
        return;
    };
    let store: &dyn Store = &**database.store();
    let mut raw = db.raw().await;
    write(&mut raw, "one").await;
    let (_, end) = names(store, start(store).await, 10).await;
    let next = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
    let before = number(&mut raw, next).await;
    for _ in 0..50 {
        assert!(store.read(0, &end, 10).await.unwrap().events.is_empty());
    }
    assert_eq!(number(&mut raw, next).await, before);
    server.end().await;
}
