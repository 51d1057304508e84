//! Writers of Debezium's outbox table, as they are, on the view that takes its place.

use pillarbox_tests::World;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::{
    migrate::database,
    program::{Config, psql},
};

/// As Debezium's documentation has it: columns, types and statements; and as writers that delete their row at once.
const WRITERS: &str = "
INSERT INTO outboxevent (id, aggregatetype, aggregateid, type, payload)
VALUES ('406c07f3-26f0-4eea-a50c-109940064b8f', 'Order', '1', 'OrderCreated',
        '{\"id\": 1, \"lineItems\": [{\"id\": 1, \"item\": \"Debezium in Action\"}], \"orderDate\": \"2019-01-31T12:13:01\"}');
BEGIN;
INSERT INTO public.outboxevent VALUES ('cbd8e7a6-3b17-4c2b-9b0c-000000000002', 'Order', '1', 'OrderPaid', NULL);
DELETE FROM outboxevent WHERE id = 'cbd8e7a6-3b17-4c2b-9b0c-000000000002';
COMMIT;
BEGIN;
INSERT INTO outboxevent (id, aggregatetype, aggregateid, type, payload)
VALUES ('cbd8e7a6-3b17-4c2b-9b0c-000000000003', 'Order', '1', 'OrderLost', '{}');
ROLLBACK;
PREPARE insert (uuid, varchar, varchar, varchar, jsonb) AS
  INSERT INTO outboxevent (id, aggregatetype, aggregateid, type, payload) VALUES ($1, $2, $3, $4, $5);
EXECUTE insert ('cbd8e7a6-3b17-4c2b-9b0c-000000000004', 'Customer', '7', 'CustomerMoved', '{\"b\":1,\"a\":2}');
";

async fn rows(url: &str, sql: &str) -> Vec<String> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let rows = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
    rows.fetch_all(&mut connection).await.unwrap()
}

const LOG: &str = "SELECT concat_ws(' ', topic, key, type, coalesce(convert_from(payload, 'UTF8'), 'NULL'), content_type) \
     FROM pillarbox.outbox ORDER BY position";

#[tokio::test]
async fn writers_of_debeziums_table_go_on_as_they_are() {
    let Some(url) = database().await else { return };
    let config = Config::of(&url);
    let migrate = ["migrate", "--compat", "debezium"];
    // What is there stays there.
    assert_eq!(
        psql(&url, "CREATE TABLE outboxevent (id uuid)").await.code,
        0
    );
    config.run(&migrate).await.refused(1, &["RENAME TO"]);
    assert_eq!(
        psql(
            &url,
            "ALTER TABLE outboxevent RENAME TO outboxevent_before_pillarbox"
        )
        .await
        .code,
        0
    );
    let made = config
        .run(&["migrate", "--compat", "debezium", "--json"])
        .await
        .json(0);
    assert_eq!(made["compat"], "public.outboxevent");

    let role = format!("writer_{}", std::process::id());
    let grants = format!(
        "DROP ROLE IF EXISTS {role}; CREATE ROLE {role}; GRANT INSERT, SELECT, DELETE ON outboxevent TO {role};"
    );
    assert_eq!(psql(&url, &grants).await.code, 0);
    // Again: the grants stay.
    assert_eq!(config.run(&migrate).await.code, 0);
    let ran = psql(&url, &format!("SET ROLE {role}; {WRITERS}")).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert_eq!(
        rows(&url, LOG).await,
        [
            "outbox.event.Order 1 OrderCreated {\"id\": 1, \"lineItems\": [{\"id\": 1, \"item\": \"Debezium in Action\"}], \
             \"orderDate\": \"2019-01-31T12:13:01\"} application/json",
            "outbox.event.Order 1 OrderPaid NULL",
            "outbox.event.Customer 7 CustomerMoved {\"a\": 2, \"b\": 1} application/json",
        ]
    );
    let first = "SELECT id::text FROM pillarbox.outbox ORDER BY position LIMIT 1";
    assert_eq!(
        rows(&url, first).await,
        ["406c07f3-26f0-4eea-a50c-109940064b8f"]
    );

    // Tags say what Hibernate and the like count.
    let tags = psql(
        &url,
        "\\set QUIET off\nBEGIN;\nINSERT INTO outboxevent VALUES (gen_random_uuid(), 'A', '1', 'T', '{}');\n\
         SELECT aggregatetype, aggregateid, type FROM outboxevent;\nDELETE FROM outboxevent;\nCOMMIT;\nDELETE FROM outboxevent;\n",
    )
    .await;
    assert_eq!(
        tags.out
            .lines()
            .filter(|l| !l.is_empty())
            .collect::<Vec<_>>(),
        [
            "BEGIN",
            "INSERT 0 1",
            "A|1|T",
            "DELETE 1",
            "COMMIT",
            "DELETE 0"
        ],
        "{tags:?}"
    );
    for (statement, says) in [
        (
            "BEGIN; INSERT INTO outboxevent VALUES (gen_random_uuid(), 'A', '1', 'T', '{}'); UPDATE outboxevent SET type = 'x'",
            "never changed",
        ),
        (
            "INSERT INTO outboxevent VALUES (gen_random_uuid(), NULL, '1', 'T', '{}')",
            "aggregatetype is NULL",
        ),
        (
            "INSERT INTO outboxevent VALUES (gen_random_uuid(), 'A', '1', NULL, '{}')",
            "null value in column \"type\"",
        ),
    ] {
        let ran = psql(&url, statement).await;
        assert!(
            ran.code != 0 && ran.err.contains(says),
            "{statement}: {ran:?}"
        );
    }
    // No way around the view.
    let ran = psql(
        &url,
        &format!("SET ROLE {role}; INSERT INTO pillarbox.outbox (topic, type) VALUES ('t', 'a')"),
    )
    .await;
    assert!(ran.err.contains("permission denied"), "{ran:?}");
    let ran = psql(&url, &format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    assert_eq!(ran.code, 0, "{ran:?}");
}

#[tokio::test]
async fn the_view_takes_other_names_topics_and_payloads() {
    let Some(world) = World::servers().await else {
        return;
    };
    let url = &world.urls.0;
    let config = Config::producer(&world);
    assert_eq!(psql(url, "CREATE SCHEMA shop").await.code, 0);
    for (payload, value) in [
        ("text", "'{\"b\":1,\"a\":2}'"),
        ("bytea", "'\\x7b7d'::bytea"),
    ] {
        let arguments = [
            "migrate",
            "--compat",
            "debezium",
            "--compat-table",
            "shop.events",
            "--compat-topic",
            "shop.{aggregatetype}.events",
            "--compat-payload",
            payload,
        ];
        let ran = config.run(&arguments).await;
        assert_eq!(ran.code, 0, "{ran:?}");
        let insert = format!(
            "BEGIN; INSERT INTO shop.events VALUES (gen_random_uuid(), 'order', 'k', 'T', {value}); \
             SELECT aggregatetype FROM shop.events; COMMIT"
        );
        let ran = psql(url, &insert).await;
        assert_eq!((ran.code, ran.out.trim()), (0, "order"), "{ran:?}");
    }
    assert_eq!(
        rows(url, LOG).await,
        [
            "shop.order.events k T {\"b\":1,\"a\":2} application/json",
            "shop.order.events k T {}"
        ]
    );
}
