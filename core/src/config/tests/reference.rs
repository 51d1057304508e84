//! `configs/reference.toml` is the page about every field: it names them all, and what it says is what holds.

use figment::{
    error::Kind,
    value::{Dict, Value},
};
use serde::Deserialize;

use super::super::{
    store::StoreTable,
    tables::{
        ConsumerTable, DestinationTable, OutboxTable, RelayTable, RetentionTable, RetryTable,
        TopicTable, TypeTable,
    },
};
use crate::config::{Config, DestinationSettings, OutboxSettings, TABLES, Unrouted};

fn reference() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/reference.toml");
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn what_it_says_is_what_holds() {
    let said = Config::parse(&reference()).unwrap().settings().unwrap();
    let held = Config::parse("").unwrap().settings().unwrap();
    assert_eq!(said.relay, held.relay);
    assert_eq!(said.consumer, held.consumer);
    assert_eq!(said.retry, held.retry);
    assert_eq!(said.retention, held.retention);
    assert_eq!(said.outbox, OutboxSettings::default());
    assert_eq!(format!("{:?}", said.store), format!("{:?}", held.store));
    assert_eq!(
        said.types["orders.order.created"].unrouted,
        Unrouted::default()
    );
    assert_eq!(said.topics["orders.events"].in_flight_per_key, 1);
    let main = format!("{:?}", said.destinations["main"]);
    assert_eq!(main, format!("{:?}", DestinationSettings::default()));
}

/// The fields that a table may have, as serde knows them.
fn fields<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    let unknown = Value::from(Dict::from([("?".to_owned(), Value::from(1))]));
    match T::deserialize(&unknown).map(drop).map_err(|e| e.kind) {
        Err(Kind::UnknownField(_, fields)) => fields,
        other => panic!("{other:?}"),
    }
}

#[test]
fn it_names_every_field_and_no_other() {
    let text = reference();
    for (table, fields) in [
        ("[store]", fields::<StoreTable>()),
        ("[relay]", fields::<RelayTable>()),
        ("[consumer]", fields::<ConsumerTable>()),
        ("[retry]", fields::<RetryTable>()),
        ("[retention]", fields::<RetentionTable>()),
        ("[outbox]", fields::<OutboxTable>()),
        ("[types.\"orders.order.created\"]", fields::<TypeTable>()),
        ("[topics.\"orders.events\"]", fields::<TopicTable>()),
        ("[destinations.main]", fields::<DestinationTable>()),
    ] {
        let (_, rest) = text.split_once(&format!("\n{table}\n")).expect(table);
        let body = rest.split("\n[").next().unwrap();
        for field in fields {
            let named = body.lines().any(|l| {
                l.trim_start_matches("# ")
                    .starts_with(&format!("{field} = "))
            });
            assert!(named, "{table} lacks {field}");
        }
    }
}

#[test]
fn it_has_every_table_of_this_version() {
    let text = reference();
    for table in TABLES
        .iter()
        .filter(|t| !["console", "telemetry"].contains(t))
    {
        assert!(
            text.contains(&format!("\n[{table}]")) || text.contains(&format!("\n[{table}.")),
            "{table}"
        );
    }
}
