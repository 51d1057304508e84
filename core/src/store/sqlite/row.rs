//! Messages as columns, and back.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pillarbox_transport::Message;
use serde_json::Value;
use sqlx::{Row as _, sqlite::SqliteRow};

use crate::store::Logged;

/// The longest reason that is kept.
const REASON_BYTES: usize = 4_000;

/// The columns of the log, as bytes where a plain INSERT may have put anything.
pub(super) const LOGGED: &str = "position, CAST(created_at AS INTEGER) AS time, CAST(deliver_at AS INTEGER) AS deliver_at, CAST(version AS INTEGER) AS version, \
     CAST(payload AS BLOB) AS payload, CAST(id AS BLOB) AS id, CAST(topic AS BLOB) AS topic, CAST(type AS BLOB) AS type, \
     CAST(key AS BLOB) AS key, CAST(content_type AS BLOB) AS content_type, CAST(headers AS BLOB) AS headers, \
     CAST(attributes AS BLOB) AS attributes";

/// The columns of a message in `deferred` and `dead_letter`.
pub(super) const MESSAGE: &str = "id, topic, type, key, payload, headers, attributes, time";

/// Microseconds of a duration.
pub(super) fn micros(d: Duration) -> i64 {
    i64::try_from(d.as_micros()).unwrap_or(i64::MAX)
}

/// Microseconds since 1970.
pub(super) fn instant(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => micros(after),
        Err(before) => -micros(before.duration()),
    }
}

pub(super) fn time(instant: i64) -> SystemTime {
    let distance = Duration::from_micros(instant.unsigned_abs());
    let time = if instant < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    };
    time.unwrap_or(UNIX_EPOCH)
}

/// A row of the log. What cannot be read becomes the event's defect; it never stops its neighbours.
pub(super) fn logged(row: &SqliteRow) -> sqlx::Result<Logged> {
    let mut defect = None;
    let mut text = |column: &'static str| -> sqlx::Result<Option<String>> {
        let bytes: Option<Vec<u8>> = row.try_get(column)?;
        Ok(bytes.map(|b| {
            String::from_utf8(b).unwrap_or_else(|e| {
                defect.get_or_insert_with(|| format!("{column} is no UTF-8 text"));
                String::from_utf8_lossy(e.as_bytes()).into_owned()
            })
        }))
    };
    let id = text("id")?.unwrap_or_default();
    let topic = text("topic")?.unwrap_or_default();
    let kind = text("type")?.unwrap_or_default();
    let key = text("key")?;
    let content_type = text("content_type")?;
    let (headers, attributes) = (text("headers")?, text("attributes")?);
    let mut map = |column: &str, json: Option<String>| {
        let (map, wrong) = json.map_or_else(Default::default, |j| object(&j));
        if let Some(wrong) = wrong {
            defect.get_or_insert_with(|| format!("{column}: {wrong}"));
        }
        map
    };
    let headers = map("headers", headers);
    let mut attributes = map("attributes", attributes);
    let version: i64 = row.try_get("version")?;
    if u32::try_from(version).is_err() {
        let wrong = "a whole number from 0 to 4294967295 is expected";
        defect.get_or_insert_with(|| format!("the version is {version}; {wrong}"));
    }
    attributes.insert("dataversion".to_owned(), version.to_string());
    if let Some(content_type) = content_type {
        attributes.insert("datacontenttype".to_owned(), content_type);
    }
    let payload: Option<Vec<u8>> = row.try_get("payload")?;
    Ok(Logged {
        position: row.try_get("position")?,
        deliver_at: row.try_get::<Option<i64>, _>("deliver_at")?.map(time),
        message: Arc::new(Message {
            id,
            time: time(row.try_get("time")?),
            topic,
            kind,
            key,
            payload: payload.map(Into::into),
            attributes,
            headers,
        }),
        defect,
    })
}

/// A message that the engine stored itself.
pub(super) fn message(row: &SqliteRow) -> sqlx::Result<Message> {
    let map = |column: &str| -> sqlx::Result<BTreeMap<String, String>> {
        match object(row.try_get(column)?) {
            (map, None) => Ok(map),
            (_, Some(wrong)) => Err(sqlx::Error::ColumnDecode {
                index: column.to_owned(),
                source: wrong.into(),
            }),
        }
    };
    let payload: Option<Vec<u8>> = row.try_get("payload")?;
    Ok(Message {
        id: row.try_get("id")?,
        time: time(row.try_get("time")?),
        topic: row.try_get("topic")?,
        kind: row.try_get("type")?,
        key: row.try_get("key")?,
        payload: payload.map(Into::into),
        attributes: map("attributes")?,
        headers: map("headers")?,
    })
}

/// A JSON object as a map of texts, and what is wrong with it. Numbers and booleans become texts, null is absent.
fn object(json: &str) -> (BTreeMap<String, String>, Option<String>) {
    let mut map = BTreeMap::new();
    let fields = match serde_json::from_str(json) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) => return (map, Some("no JSON object".to_owned())),
        Err(e) => return (map, Some(format!("no JSON: {e}"))),
    };
    let mut wrong = None;
    for (name, value) in fields {
        let text = match value {
            Value::String(text) => text,
            Value::Null => continue,
            Value::Bool(_) | Value::Number(_) => value.to_string(),
            Value::Array(_) | Value::Object(_) => {
                wrong = Some(format!("{name:?} is no text"));
                continue;
            }
        };
        map.insert(name, text);
    }
    (map, wrong)
}

/// A reason, cut to what is kept.
pub(super) fn reason(text: &str) -> &str {
    &text[..text.floor_char_boundary(REASON_BYTES)]
}

/// A map as JSON.
pub(super) fn json(map: &BTreeMap<String, String>) -> String {
    // A map of texts is always an object.
    serde_json::to_string(map).unwrap_or_else(|_| "{}".to_owned())
}
