//! The events' JSON Schemas, and the check of a payload against them.

use std::{collections::HashMap, fmt::Write as _, sync::LazyLock};

use jsonschema::{
    ValidationError, Validator,
    error::{TypeKind, ValidationErrorKind},
};
use pillarbox::{Event, transport::Message};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::Value;

use crate::{
    OrderCancelled, OrderConfirmed, OrderCreated, OrderFailed, StockConfirmed, StockDepleted,
    StockFailed, StockReleased, StockReplenished, StockReserved,
};

/// The most faults of one payload that a reason names.
const FAULTS: usize = 3;
/// The most characters of a value that a reason shows.
const SHOWN: usize = 60;

/// One event type with its schema.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// The type, which also names the file: `docs/reference/schemas/<kind>.json`.
    pub kind: &'static str,
    /// The topic.
    pub topic: &'static str,
    /// The version of the payload.
    pub version: u32,
    /// The schema.
    pub schema: Value,
}

/// Every event of both services.
#[must_use]
pub fn published() -> Vec<Published> {
    vec![
        publish::<StockReserved>(),
        publish::<StockConfirmed>(),
        publish::<StockReleased>(),
        publish::<StockFailed>(),
        publish::<StockDepleted>(),
        publish::<StockReplenished>(),
        publish::<OrderCreated>(),
        publish::<OrderConfirmed>(),
        publish::<OrderFailed>(),
        publish::<OrderCancelled>(),
    ]
}

/// Checks an event's payload against the schema of its type and version; for [`pillarbox::Consumer::check`].
///
/// A type or version that is not published here passes: whether it has a handler is the consumer's question.
///
/// # Errors
/// Where in the payload, what was found, and what was expected.
pub fn check(message: &Message) -> Result<(), String> {
    static VALIDATORS: LazyLock<HashMap<(&str, u32), Validator>> = LazyLock::new(validators);
    let Some(validator) = message
        .version()
        .and_then(|version| VALIDATORS.get(&(message.kind.as_str(), version)))
    else {
        return Ok(());
    };
    let Some(body) = &message.payload else {
        return Err("the payload is missing".to_owned());
    };
    let payload: Value =
        serde_json::from_slice(body).map_err(|e| format!("the payload is not JSON: {e}"))?;
    let mut reason = String::new();
    for fault in validator.iter_errors(&payload).take(FAULTS) {
        let separator = if reason.is_empty() { "" } else { "; " };
        // Writing to a text cannot fail.
        let _ = write!(reason, "{separator}{}", explain(&fault));
    }
    if reason.is_empty() {
        Ok(())
    } else {
        Err(reason)
    }
}

/// The schema of a time: RFC 3339, as text.
pub(crate) fn timestamp(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time" })
}

fn publish<E: Event + JsonSchema>() -> Published {
    let mut schema = SchemaSettings::draft2020_12()
        .into_generator()
        .into_root_schema_for::<E>();
    schema.insert("title".to_owned(), E::TYPE.into());
    Published {
        kind: E::TYPE,
        topic: E::TOPIC,
        version: E::VERSION,
        schema: schema.to_value(),
    }
}

fn validators() -> HashMap<(&'static str, u32), Validator> {
    published()
        .into_iter()
        .map(|event| {
            let validator = jsonschema::options()
                .should_validate_formats(true)
                .build(&event.schema)
                .expect("our own schemas are valid: a test compiles them");
            ((event.kind, event.version), validator)
        })
        .collect()
}

/// `/quantity: found 0, expected at least 1`
fn explain(fault: &ValidationError<'_>) -> String {
    let path = match fault.instance_path().as_str() {
        "" => "the payload",
        path => path,
    };
    let found = shown(fault.instance());
    let expected = match fault.kind() {
        ValidationErrorKind::Required { property } => {
            let name = property.as_str().unwrap_or_default();
            return format!("/{name}: found nothing, expected a value");
        }
        ValidationErrorKind::Minimum { limit } => format!("at least {limit}"),
        ValidationErrorKind::Maximum { limit } => format!("at most {limit}"),
        ValidationErrorKind::MinLength { limit } => format!("at least {limit} characters"),
        ValidationErrorKind::MaxLength { limit } => format!("at most {limit} characters"),
        ValidationErrorKind::Format { format } => format!("the format {format}"),
        ValidationErrorKind::Enum { options } => format!("one of {options}"),
        ValidationErrorKind::Type {
            kind: TypeKind::Single(one),
        } => format!("the type {one}"),
        _ => return format!("{path}: {}", fault.masked()),
    };
    format!("{path}: found {found}, expected {expected}")
}

/// A value in a reason: enough to recognise it, never a whole payload.
fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        simple => {
            let text = simple.to_string();
            match text.char_indices().nth(SHOWN) {
                Some((end, _)) => format!("{}…", &text[..end]),
                None => text,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn depleted(change: impl FnOnce(&mut Value)) -> Message {
        let mut payload = json!({
            "productId": "sku-1",
            "orderId": "0198f3a4-5c1e-7a4b-9d55-3c1f0a7b2e10",
            "userId": "5f0c7f4e-8f4e-4a57-8a43-0d8f7a2f9f11",
            "depletedAt": "2026-11-24T08:00:00Z",
            "lastQuantity": 3
        });
        change(&mut payload);
        Message::new(
            "1",
            StockDepleted::TOPIC,
            StockDepleted::TYPE,
            payload.to_string(),
        )
    }

    #[test]
    fn what_fits_passes_and_further_fields_do_no_harm() {
        check(&depleted(|_| ())).unwrap();
        check(&depleted(|p| p["later"] = json!("kept"))).unwrap();
    }

    #[test]
    fn each_fault_is_named_with_place_found_and_expected() {
        let cases: Vec<(Message, &str)> = vec![
            (
                depleted(|p| p["lastQuantity"] = json!(0)),
                "/lastQuantity: found 0, expected at least 1",
            ),
            (
                depleted(|p| p["lastQuantity"] = json!("3")),
                "/lastQuantity: found \"3\", expected the type integer",
            ),
            (
                depleted(|p| p["lastQuantity"] = json!(5_000_000_000_u64)),
                "/lastQuantity: found 5000000000, expected at most 4294967295",
            ),
            (
                depleted(|p| drop(p.as_object_mut().unwrap().remove("orderId"))),
                "/orderId: found nothing, expected a value",
            ),
            (
                depleted(|p| p["orderId"] = json!("7")),
                "/orderId: found \"7\", expected the format uuid",
            ),
            (
                depleted(|p| p["depletedAt"] = json!("yesterday")),
                "/depletedAt: found \"yesterday\", expected the format date-time",
            ),
            (
                depleted(|p| p["productId"] = json!("")),
                "/productId: found \"\", expected at least 1 characters",
            ),
            (
                depleted(|p| *p = json!([])),
                "the payload: found an array, expected the type object",
            ),
        ];
        for (message, expected) in cases {
            assert_eq!(check(&message), Err(expected.to_owned()));
        }
    }

    #[test]
    fn no_json_and_no_payload_are_named() {
        let mut message = depleted(|_| ());
        message.payload = Some("{".into());
        assert!(
            check(&message)
                .unwrap_err()
                .starts_with("the payload is not JSON: EOF")
        );
        message.payload = None;
        assert_eq!(check(&message).unwrap_err(), "the payload is missing");
    }

    #[test]
    fn a_reason_shows_no_long_values() {
        let reason = check(&depleted(|p| p["productId"] = json!("é".repeat(500)))).unwrap_err();
        assert!(
            reason.contains("expected at most 64 characters"),
            "{reason}"
        );
        assert!(reason.chars().count() < 150, "{reason}");
    }

    #[test]
    fn types_and_versions_of_others_pass() {
        let mut message = depleted(|p| *p = json!([]));
        message.attributes.insert("dataversion".into(), "2".into());
        check(&message).unwrap();
        message.kind = "inventory.stock.counted".into();
        check(&message).unwrap();
    }
}
