//! Making the tables, by the program and by whoever may change the database.

use std::collections::BTreeSet;

use pillarbox_testkit::servers;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::program::{Config, psql};

#[tokio::test]
async fn migrating_again_changes_nothing_and_partitions_stay() {
    let config = Config::sqlite();
    config
        .run(&["status"])
        .await
        .refused(1, &["pillarbox migrate"]);
    let made =
        json!({ "schema": "pillarbox", "version": version(), "partitions": 1, "compat": null });
    assert_eq!(config.run(&["migrate", "--json"]).await.json(0), made);
    assert_eq!(config.run(&["migrate", "--json"]).await.json(0), made);
    let other = config
        .run(&["migrate", "--json", "--partitions", "8"])
        .await;
    assert_eq!(other.json(1), made);
    other.refused(1, &["the log has 1 partitions"]);
    config
        .run(&["migrate", "--print"])
        .await
        .refused(2, &["SQLite"]);
    let view = config.run(&["migrate", "--compat", "debezium"]).await;
    view.refused(1, &["SQLite"]);
}

#[tokio::test]
async fn many_at_once_make_one_schema() {
    let Some(url) = database().await else { return };
    let config = Config::of(&url);
    let migrate = || config.run(&["migrate", "--partitions", "2", "--json"]);
    let (a, b, c, d) = tokio::join!(migrate(), migrate(), migrate(), migrate());
    for ran in [a, b, c, d] {
        assert_eq!(ran.json(0)["partitions"], 2);
    }
}

/// Whoever runs it may run it on nothing, twice, or on what an older version left.
#[tokio::test]
async fn what_is_printed_makes_what_migrate_makes() {
    let (Some(migrated), Some(printed), Some(old)) =
        (database().await, database().await, database().await)
    else {
        return;
    };
    let compat = ["--compat", "debezium", "--compat-table", "shop.outboxevent"];
    let migrate =
        |more: &[&'static str]| [&["migrate", "--partitions", "8"][..], &compat, more].concat();
    for url in [&migrated, &printed, &old] {
        assert_eq!(psql(url, "CREATE SCHEMA shop").await.code, 0);
    }
    let ran = Config::of(&migrated).run(&migrate(&[])).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    // Connects to nothing: the address is nobody's.
    let elsewhere = Config::of("postgres://shop@127.0.0.1:1/shop");
    let script = elsewhere.run(&migrate(&["--print"])).await;
    assert_eq!((script.code, script.err.as_str()), (0, ""));
    let wanted = catalog(&migrated).await;
    assert!(wanted.len() > 200, "{}", wanted.len());

    for _ in 0..2 {
        let ran = psql(&printed, &script.out).await;
        assert_eq!((ran.code, ran.err.as_str()), (0, ""));
        assert_same(&wanted, &catalog(&printed).await);
    }
    let first = include_str!("../../../core/src/store/postgres/schema.sql")
        .replace("@schema@", "\"pillarbox\"")
        .replace("@mask@", "7");
    let ran = psql(&old, &format!("CREATE SCHEMA pillarbox; {first}")).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let ran = psql(&old, &script.out).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert_same(&wanted, &catalog(&old).await);

    // A newer program's schema is left alone.
    let newer = "UPDATE pillarbox.installation SET oldest_program = 99, version = 1";
    assert_eq!(psql(&old, newer).await.code, 0);
    let ran = psql(&old, &script.out).await;
    assert!(
        ran.code != 0 && ran.err.contains("newer Pillarbox"),
        "{ran:?}"
    );
    Config::of(&old)
        .run(&["migrate"])
        .await
        .refused(1, &["update this program"]);
}

#[tokio::test]
async fn a_schema_of_another_name_is_printed_under_that_name() {
    let Some(url) = database().await else { return };
    let config = Config::new(&format!(
        "[store]\nurl = '{url}'\nschema = 'select'\n[transport]\nkind = 'memory'\n"
    ));
    let script = config.run(&["migrate", "--print"]).await;
    let ran = psql(&url, &script.out).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let status = config.run(&["status", "--json"]).await.json(0);
    assert_eq!(
        status["schema"],
        json!({ "name": "select", "version": version(), "partitions": 4 })
    );
}

pub(crate) fn version() -> i32 {
    pillarbox::store::SCHEMA_VERSION
}

pub(crate) async fn database() -> Option<String> {
    let postgres = servers::required(servers::postgres().await)?;
    Some(postgres.create_database().await.unwrap())
}

#[track_caller]
fn assert_same(wanted: &BTreeSet<String>, found: &BTreeSet<String>) {
    let missing: Vec<_> = wanted.difference(found).collect();
    let more: Vec<_> = found.difference(wanted).collect();
    assert!(
        missing.is_empty() && more.is_empty(),
        "missing: {missing:#?}\nmore: {more:#?}"
    );
}

/// Everything that a schema consists of, one line each, and the rows that a migration makes.
async fn catalog(url: &str) -> BTreeSet<String> {
    const OURS: &str = "n.nspname IN ('pillarbox', 'shop')";
    let statements = [
        format!(
            "SELECT concat_ws(' | ', 'relation', c.oid::regclass, c.relkind, c.relpersistence, c.reloptions, \
               pg_get_expr(c.relpartbound, c.oid), pg_get_partkeydef(c.oid), obj_description(c.oid, 'pg_class'), \
               CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END, \
               CASE WHEN c.relkind = 'i' THEN pg_get_indexdef(c.oid) END) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {OURS}"
        ),
        format!(
            "SELECT concat_ws(' | ', 'column', c.oid::regclass, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), \
               a.attnotnull, a.attidentity, a.attgenerated, a.attstorage, pg_get_expr(d.adbin, d.adrelid), \
               col_description(c.oid, a.attnum)) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
             LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum WHERE {OURS}"
        ),
        format!(
            "SELECT concat_ws(' | ', 'constraint', k.conrelid::regclass, k.conname, k.convalidated, pg_get_constraintdef(k.oid)) \
             FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace WHERE {OURS}"
        ),
        format!(
            "SELECT concat_ws(' | ', 'function', pg_get_functiondef(p.oid), obj_description(p.oid, 'pg_proc')) \
             FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE {OURS}"
        ),
        format!(
            "SELECT concat_ws(' | ', 'trigger', pg_get_triggerdef(t.oid)) FROM pg_trigger t \
             JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {OURS}"
        ),
        "SELECT concat_ws(' | ', 'installed', version, oldest_program, partitions, slot_seconds, system_identifier) \
         FROM pillarbox.installation"
            .to_owned(),
        "SELECT concat_ws(' | ', 'cursor', destination, partition, owner, epoch, expires_at, seen, base, upto, last) \
         FROM pillarbox.cursor"
            .to_owned(),
        "SELECT concat_ws(' | ', 'sequence', s.schemaname, s.sequencename, s.start_value, s.increment_by, s.cache_size, s.cycle, \
           s.last_value) FROM pg_sequences s WHERE s.schemaname IN ('pillarbox', 'shop')"
            .to_owned(),
    ];
    let mut connection = PgConnection::connect(url).await.unwrap();
    let mut all = BTreeSet::new();
    for statement in statements {
        let lines: Vec<String> = sqlx::query_scalar(AssertSqlSafe(statement))
            .fetch_all(&mut connection)
            .await
            .unwrap();
        assert!(!lines.is_empty());
        all.extend(lines);
    }
    all
}
