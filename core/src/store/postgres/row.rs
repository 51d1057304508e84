//! Messages to and from rows.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use pillarbox_transport::Message;
use serde_json::Value;
use sqlx::{Row, ValueRef, postgres::PgRow};
use uuid::Uuid;

/// Microseconds from 1970 to 2000, where PostgreSQL's times start.
const EPOCH_2000: i64 = 946_684_800_000_000;
/// The longest source or id that names a row: an index takes 2,704 bytes in all.
const NAME_BYTES: usize = 512;
/// The longest reason that is kept.
const REASON_BYTES: usize = 4_000;

/// What a column holds, and what is wrong with it.
pub(super) type Checked<T> = (T, Option<String>);

fn raw<'r>(row: &'r PgRow, column: &str) -> sqlx::Result<Option<&'r [u8]>> {
    let value = row.try_get_raw(column)?;
    if value.is_null() {
        return Ok(None);
    }
    let bytes = value.as_bytes();
    bytes.map(Some).map_err(sqlx::Error::Decode)
}

/// A text; from a database that does not check its encoding it may be none.
pub(super) fn text(row: &PgRow, column: &str) -> sqlx::Result<Checked<Option<String>>> {
    let Some(bytes) = raw(row, column)? else {
        return Ok((None, None));
    };
    Ok(match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text.to_owned()), None),
        Err(_) => (
            Some(String::from_utf8_lossy(bytes).into_owned()),
            Some(format!("the {column} is not UTF-8")),
        ),
    })
}

/// A uuid as PostgreSQL itself writes it.
pub(super) fn uuid(row: &PgRow, column: &str) -> sqlx::Result<String> {
    let bytes = raw(row, column)?.unwrap_or_default();
    let id = Uuid::from_slice(bytes).map_err(|e| sqlx::Error::Decode(e.into()))?;
    Ok(id.to_string())
}

/// A payload.
pub(super) fn bytes(row: &PgRow, column: &str) -> sqlx::Result<Option<Bytes>> {
    Ok(raw(row, column)?.map(Bytes::copy_from_slice))
}

/// A timestamptz, in binary microseconds since 2000.
pub(super) fn time(row: &PgRow, column: &str) -> sqlx::Result<SystemTime> {
    let bytes = raw(row, column)?.unwrap_or_default();
    let micros = bytes
        .try_into()
        .map(i64::from_be_bytes)
        .map_err(|_| sqlx::Error::Decode(format!("{column} is no timestamp").into()))?;
    let since_1970 = micros.saturating_add(EPOCH_2000);
    let distance = Duration::from_micros(since_1970.unsigned_abs());
    let time = if since_1970 < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    };
    Ok(time.unwrap_or(UNIX_EPOCH))
}

/// A time that may be missing, or lie beyond all times.
pub(super) fn deliver_at(row: &PgRow, column: &str) -> sqlx::Result<Option<SystemTime>> {
    if raw(row, column)?.is_none() {
        return Ok(None);
    }
    time(row, column).map(Some)
}

/// Microseconds since 1970, within what PostgreSQL's times can say.
pub(super) fn micros(time: SystemTime) -> i64 {
    const LEAST: i64 = -200_000_000_000_000_000;
    const MOST: i64 = 9_000_000_000_000_000_000;
    let signed = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_micros()).unwrap_or(MOST),
        // Rounded down, like the other side, so that a time read back lies in the same slot.
        Err(before) => {
            let before = before.duration().as_nanos().div_ceil(1_000);
            i64::try_from(before).map_or(LEAST, |b| -b)
        }
    };
    signed.clamp(LEAST, MOST)
}

/// A jsonb column as a map of texts. Numbers and booleans become texts, null is absent; what is no object, or has more than
/// a level, is a defect.
pub(super) fn map(row: &PgRow, column: &str) -> sqlx::Result<Checked<BTreeMap<String, String>>> {
    let Some(bytes) = raw(row, column)? else {
        return Ok((BTreeMap::new(), None));
    };
    // The first byte is the format's version.
    let json = bytes.get(1..).unwrap_or_default();
    Ok(object(json, column))
}

fn object(json: &[u8], column: &str) -> Checked<BTreeMap<String, String>> {
    // What our own writers make, without a tree in between.
    if let Ok(map) = serde_json::from_slice(json) {
        return (map, None);
    }
    let mut map = BTreeMap::new();
    let fields = match serde_json::from_slice(json) {
        Ok(Value::Object(fields)) => fields,
        // What some libraries write for nothing.
        Ok(Value::Null) => return (map, None),
        Ok(_) => {
            let defect = format!("the {column} are no JSON object");
            return (map, Some(defect));
        }
        Err(e) => {
            let defect = format!("the {column} cannot be read: {e}");
            return (map, Some(defect));
        }
    };
    let mut defect = None;
    for (name, value) in fields {
        let text = match value {
            Value::String(text) => text,
            Value::Null => continue,
            Value::Bool(_) | Value::Number(_) => value.to_string(),
            Value::Array(_) | Value::Object(_) => {
                defect = Some(format!("{name:?} of the {column} is no text"));
                continue;
            }
        };
        map.insert(name, text);
    }
    (map, defect)
}

/// What is wrong with a version, which travels as a number from 0 to 4294967295.
pub(super) fn bad_version(version: i64) -> Option<String> {
    let wrong = u32::try_from(version).is_err();
    wrong.then(|| {
        format!("the version is {version}; a whole number from 0 to 4294967295 is expected")
    })
}

/// A text as PostgreSQL can store it: without NUL, which foreign messages may carry.
pub(super) fn storable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        text.replace('\0', "\u{fffd}").into()
    } else {
        text.into()
    }
}

/// A map as a jsonb column takes it.
pub(super) fn json(map: &BTreeMap<String, String>) -> String {
    let map: BTreeMap<_, _> = map
        .iter()
        .map(|(k, v)| (storable(k), storable(v)))
        .collect();
    // Texts alone: this cannot fail.
    serde_json::to_string(&map).unwrap_or_else(|_| "{}".to_owned())
}

/// A source or an id as the name of a row: as it is, or, when it is longer than an index takes, its beginning and a hash.
/// A name stays as it is.
pub(super) fn named(text: &str) -> String {
    let text = storable(text);
    if text.len() <= NAME_BYTES {
        return text.into_owned();
    }
    let hash = fnv(text.as_bytes());
    format!("{}…{hash:032x}", beginning(&text, NAME_BYTES - 40))
}

/// A reason, not endless.
pub(super) fn reason(text: &str) -> String {
    let text = storable(text);
    beginning(&text, REASON_BYTES).to_owned()
}

fn beginning(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

/// FNV-1a of 128 bits: the same in every release, unlike the standard library's hash.
fn fnv(bytes: &[u8]) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes
        .iter()
        .fold(OFFSET, |h, b| (h ^ u128::from(*b)).wrapping_mul(PRIME))
}

/// A number for a name: the same in every release.
pub(super) fn hash(name: &str) -> i64 {
    let bytes = fnv(name.as_bytes()).to_be_bytes();
    bytes
        .iter()
        .take(8)
        .fold(0, |h, b| (h << 8) | i64::from(*b))
}

/// A message of `deferred` or `dead_letter`.
pub(super) fn message(row: &PgRow) -> sqlx::Result<Message> {
    let required = |column| text(row, column).map(|(t, _)| t.unwrap_or_default());
    Ok(Message {
        id: required("id")?,
        time: time(row, "time")?,
        topic: required("topic")?,
        kind: required("type")?,
        key: text(row, "key")?.0,
        payload: bytes(row, "payload")?,
        attributes: map(row, "attributes")?.0,
        headers: map(row, "headers")?.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_become_texts_and_all_else_is_a_defect() {
        let (map, defect) = object(br#"{"a":"x","n":1.50,"b":true,"z":null}"#, "headers");
        assert_eq!(defect, None);
        assert_eq!(
            map.into_iter().collect::<Vec<_>>(),
            [("a", "x"), ("b", "true"), ("n", "1.5")].map(|(k, v)| (k.to_owned(), v.to_owned()))
        );
        assert_eq!(object(b"null", "headers"), (BTreeMap::new(), None));
        for bad in [
            "[]",
            "\"x\"",
            "1",
            "{\"a\":[1]}",
            "{\"a\":{}}",
            "{\"a\":1e999}",
        ] {
            let (_, defect) = object(bad.as_bytes(), "headers");
            assert!(defect.is_some_and(|d| d.contains("headers")), "{bad}");
        }
    }

    #[test]
    fn long_names_are_shortened_once_and_stay_apart() {
        let long = |end| "é".repeat(2_000) + end;
        let (a, b) = (named(&long("a")), named(&long("b")));
        assert_ne!(a, b);
        assert!(a.len() <= NAME_BYTES);
        assert_eq!(named(&a), a);
        assert_eq!(named("a\0b"), "a\u{fffd}b");
        assert_eq!(named("plain"), "plain");
    }

    #[test]
    fn times_before_1970_round_down() {
        let t = UNIX_EPOCH - Duration::from_nanos(1);
        assert_eq!(micros(t), -1);
        assert_eq!(micros(UNIX_EPOCH), 0);
        assert_eq!(micros(UNIX_EPOCH + Duration::from_nanos(1_999)), 1);
    }
}
