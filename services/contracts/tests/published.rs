//! Holds the published schemas and their page equal to the types. `REWRITE_SCHEMAS=1` writes the schemas anew.
// Helpers of the tests stand outside them, where clippy does not know them for tests.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, fs, path::PathBuf};

use pillarbox::transport::Message;
use pillarbox_contracts::{Published, check, published};
use serde_json::Value;

fn reference() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference")
}

fn pretty(schema: &Value) -> String {
    format!("{schema:#}\n")
}

#[test]
fn the_published_schemas_are_those_of_the_types() {
    let folder = reference().join("schemas");
    let rewrite = std::env::var_os("REWRITE_SCHEMAS").is_some();
    let mut expected = Vec::new();
    for event in published() {
        let name = format!("{}.json", event.kind);
        let path = folder.join(&name);
        if rewrite {
            fs::write(&path, pretty(&event.schema)).unwrap();
        }
        // As values: the order of a schema's keys depends on features that other packages choose.
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            serde_json::from_str(&found).unwrap_or(Value::Null),
            event.schema,
            "{name} is not the schema of its type: run this test with REWRITE_SCHEMAS=1"
        );
        expected.push(name);
    }
    expected.sort();
    let mut found: Vec<String> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(
        found, expected,
        "a file without a type, or a type without a file"
    );
}

/// What the page says of one event.
#[derive(Default)]
struct Section {
    topic_and_version: String,
    fields: BTreeMap<String, String>,
    example: String,
}

#[test]
fn the_page_names_every_event_with_its_fields() {
    let page = fs::read_to_string(reference().join("event-schemas.md")).unwrap();
    let mut sections = read(&page);
    for event in published() {
        let section = sections
            .remove(event.kind)
            .unwrap_or_else(|| panic!("the page has no section {:?}", event.kind));
        assert_eq!(section.fields, fields(&event.schema), "{}", event.kind);
        let place = format!("Topic `{}`, version {}", event.topic, event.version);
        assert!(
            section.topic_and_version.starts_with(&place),
            "{}: {:?} should begin with {place:?}",
            event.kind,
            section.topic_and_version
        );
        the_example_passes(&event, &section.example);
    }
    assert!(
        sections.is_empty(),
        "sections without an event: {:?}",
        sections.keys()
    );
}

fn the_example_passes(event: &Published, example: &str) {
    let payload: Value = serde_json::from_str(example)
        .unwrap_or_else(|e| panic!("{}: the example is no JSON: {e}", event.kind));
    let message = Message::new("1", event.topic, event.kind, example.to_owned());
    check(&message).unwrap_or_else(|reason| panic!("{}: {reason}", event.kind));
    let documented = fields(&event.schema);
    for name in payload.as_object().unwrap().keys() {
        assert!(
            documented.contains_key(name),
            "{}: {name:?} is no field",
            event.kind
        );
    }
}

/// Sections `### \`type\``, each with a line on topic and version, a table and a block of JSON.
fn read(page: &str) -> BTreeMap<String, Section> {
    let mut sections = BTreeMap::<String, Section>::new();
    let (mut current, mut in_json) = (None, false);
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix("### `") {
            current = heading.strip_suffix('`').map(str::to_owned);
        } else if line.starts_with('#') {
            current = None;
        }
        let Some(section) = current
            .as_ref()
            .map(|c| sections.entry(c.clone()).or_default())
        else {
            continue;
        };
        match line {
            "```json" => in_json = true,
            "```" => in_json = false,
            _ if in_json => section.example.push_str(line),
            _ if line.starts_with("Topic ") => section.topic_and_version = line.to_owned(),
            _ => section.fields.extend(row(line)),
        }
    }
    sections
}

/// `| \`name\` | type | meaning |`
fn row(line: &str) -> Option<(String, String)> {
    let mut cells = line.strip_prefix("| `")?.split(" | ");
    let name = cells.next()?.strip_suffix('`')?;
    Some((name.to_owned(), cells.next()?.to_owned()))
}

/// The fields of a schema, in the page's words.
fn fields(schema: &Value) -> BTreeMap<String, String> {
    let required: Vec<&str> = schema["required"]
        .as_array()
        .map(|all| all.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let properties = schema["properties"].as_object().unwrap();
    properties
        .iter()
        .map(|(name, field)| {
            let optional = if required.contains(&name.as_str()) {
                ""
            } else {
                ", optional"
            };
            (name.clone(), format!("{}{optional}", words(field)))
        })
        .collect()
}

fn words(field: &Value) -> String {
    if let Some(options) = field["enum"].as_array() {
        let options: Vec<String> = options
            .iter()
            .map(|o| format!("`{}`", o.as_str().unwrap()))
            .collect();
        return options.join(" · ");
    }
    let bounds = |least: &str, most: &str| format!("{} to {}", field[least], field[most]);
    match (field["type"].as_str().unwrap(), field["format"].as_str()) {
        ("string", Some("uuid")) => "UUID".to_owned(),
        ("string", Some("date-time")) => "time, RFC 3339".to_owned(),
        ("string", None) if field["minLength"].is_u64() => {
            format!("text, {} characters", bounds("minLength", "maxLength"))
        }
        ("string", None) => format!("text, at most {} characters", field["maxLength"]),
        ("integer", _) => format!("whole number, {}", bounds("minimum", "maximum")),
        (kind, format) => panic!("no words for {kind} {format:?}"),
    }
}
