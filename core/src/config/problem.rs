//! Says what is wrong with a value: where it stands, what was found, what was expected. Shows no secret.

use std::{
    borrow::Cow,
    fmt::{self, Display},
    sync::Arc,
};

use figment::{
    error::{Actual, Kind as Fault},
    value::{Dict, Value},
};
use serde::de::DeserializeOwned;

use super::source::{self, Place, Source};
use crate::error::{Error, Kind, Result};

/// Texts longer than this are cut where they are shown, in characters.
const SHOWN: usize = 60;

/// A value that a table's own checks refuse; the path is relative to the table.
pub(super) struct Wrong {
    pub(super) path: Vec<String>,
    pub(super) found: String,
    pub(super) expected: String,
}

impl Wrong {
    pub(super) fn new(key: &str, found: impl Display, expected: impl Display) -> Self {
        Self {
            path: vec![key.to_owned()],
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    pub(super) fn below(mut self, table: &str) -> Self {
        self.path.insert(0, table.to_owned());
        self
    }
}

/// The configuration as one section sees it.
#[derive(Clone, Default)]
pub(super) struct Scope {
    source: Arc<Source>,
    section: Option<String>,
}

impl Scope {
    pub(super) fn new(source: Arc<Source>, section: Option<String>) -> Self {
        Self { source, section }
    }

    /// Reads a value into a type.
    pub(super) fn read<T: DeserializeOwned>(&self, at: &[&str], value: &Value) -> Result<T> {
        let mut value = Cow::Borrowed(value);
        loop {
            let error = match T::deserialize(&*value) {
                Ok(read) => return Ok(read),
                Err(error) => error,
            };
            // A variable's text may look like a number where text is meant: a password of digits.
            let Some(text) = self.meant_as_text(at, &error) else {
                return Err(self.explain(at, &value, error));
            };
            if !replace(value.to_mut(), &error.path, text) {
                return Err(self.explain(at, &value, error));
            }
        }
    }

    fn meant_as_text(&self, at: &[&str], error: &figment::Error) -> Option<String> {
        let Fault::InvalidType(actual, expected) = &error.kind else {
            return None;
        };
        let scalar = matches!(
            actual,
            Actual::Bool(_) | Actual::Unsigned(_) | Actual::Signed(_) | Actual::Float(_)
        );
        let text = scalar && expected.contains("string");
        let path = self.located(&full(at, &error.path));
        text.then(|| self.source.variable(&path).map(str::to_owned))
            .flatten()
    }

    fn explain(&self, at: &[&str], value: &Value, error: figment::Error) -> Error {
        let path = full(at, &error.path);
        let secret = is_secret(&path);
        let (found, expected) = match error.kind {
            Fault::UnknownField(_, known) => {
                let is_table = matches!(find(value, &error.path), Some(Value::Dict(..)));
                return self.unknown(&path, known.iter().copied(), is_table);
            }
            Fault::MissingField(name) => {
                let text = self.sentence(&path, format_args!("found no {name}, which is needed"));
                return refuse(text);
            }
            Fault::UnknownVariant(name, known) => {
                let nearest = nearest(&name, known.iter().copied()).map(|n| format!(" ({n}?)"));
                let expected = format!("{}{}", list(known), nearest.unwrap_or_default());
                (shown(&Actual::Str(name), secret), expected)
            }
            Fault::InvalidType(actual, expected) | Fault::InvalidValue(actual, expected) => {
                (shown(&actual, secret), plain(&expected))
            }
            Fault::InvalidLength(length, expected) => (format!("{length} items"), plain(&expected)),
            Fault::ISizeOutOfRange(n) => (n.to_string(), "a smaller number".to_owned()),
            Fault::USizeOutOfRange(n) => (n.to_string(), "a smaller number".to_owned()),
            other => {
                let actual = find(value, &error.path).map(Value::to_actual);
                let found = actual.as_ref().map(|a| shown(a, secret));
                let mut reason = masked(&other.to_string()).into_owned();
                if let (true, Some(Actual::Str(text))) = (secret, &actual) {
                    reason = reason.replace(text.as_str(), "***");
                }
                let reason = format!("{}: {reason}", found.unwrap_or_default());
                return refuse(self.sentence(&path, format_args!("found {reason}")));
            }
        };
        refuse(self.sentence(&path, format_args!("found {found}, expected {expected}")))
    }

    /// The error for a value that breaks a rule of ours.
    pub(super) fn wrong(
        &self,
        path: &[&str],
        found: impl Display,
        expected: impl Display,
    ) -> Error {
        let path = full(path, &[]);
        refuse(self.sentence(&path, format_args!("found {found}, expected {expected}")))
    }

    /// As [`Scope::wrong`], for a table's own checks.
    pub(super) fn judge<T>(&self, table: &str, built: Result<T, Wrong>) -> Result<T> {
        built.map_err(|w| {
            let path = full(&[table], &w.path);
            let (found, expected) = (w.found, w.expected);
            refuse(self.sentence(&path, format_args!("found {found}, expected {expected}")))
        })
    }

    /// The error for a key that nobody knows.
    pub(super) fn unknown<'k>(
        &self,
        path: &[String],
        known: impl Iterator<Item = &'k str> + Clone,
        is_table: bool,
    ) -> Error {
        let name = path.last().map_or("", String::as_str);
        let mut text = match nearest(name, known.clone()) {
            Some(near) => format!("this key is unknown; did you mean {near}?"),
            None => format!(
                "this key is unknown, expected {}",
                list(&known.collect::<Vec<_>>())
            ),
        };
        if is_table && path.len() > 2 {
            text.push_str(" (a name with dots is one name only in quotes: [types.\"a.b\"])");
        }
        refuse(self.sentence(path, format_args!("{text}")))
    }

    /// The error for a table that looks like a misspelt one of ours.
    pub(super) fn misspelt(&self, name: &str, near: &str) -> Error {
        let text = "this table is unknown; did you mean";
        let path = full(&[name], &[]);
        refuse(self.sentence(
            &path,
            format_args!("{text} [{near}]? (if not, choose a name less like it)"),
        ))
    }

    /// A sentence about a path, with where it stands.
    pub(super) fn sentence(&self, path: &[String], text: fmt::Arguments<'_>) -> String {
        let path = self.located(path);
        let key = dotted(&path);
        let colon = if key.is_empty() { "" } else { ": " };
        match self.source.place(&path) {
            Place::Nowhere => format!("{key}{colon}{text}"),
            Place::File(name) => format!("{name}: {key}{colon}{text}"),
            Place::Line(name, line) => format!("{name}, line {line}: {key}{colon}{text}"),
            Place::Variable(name) => format!("the environment variable {name}: {key}{colon}{text}"),
        }
    }

    /// The section, if there is one.
    pub(super) fn section(&self) -> Option<&str> {
        self.section.as_deref()
    }

    /// Where the value of a merged path really stands: in the section, if it is there.
    fn located(&self, path: &[String]) -> Vec<String> {
        let Some(section) = &self.section else {
            return path.to_vec();
        };
        let mut own = vec![section.clone()];
        own.extend_from_slice(path);
        let common = path
            .first()
            .is_some_and(|t| super::TABLES.contains(&t.as_str()));
        if common && !self.source.has(&own) {
            return path.to_vec();
        }
        own
    }
}

pub(super) fn refuse(text: impl Into<Cow<'static, str>>) -> Error {
    Error::new(Kind::Configuration, "read configuration", text)
}

fn full(at: &[&str], path: &[String]) -> Vec<String> {
    at.iter()
        .map(|k| (*k).to_owned())
        .chain(path.iter().cloned())
        .collect()
}

fn find<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    match (path, value) {
        ([], _) => Some(value),
        (_, Value::Dict(_, dict)) => source::get(dict, path),
        _ => None,
    }
}

/// Puts text in place of the value at a path; false if it could not, or was there already.
fn replace(value: &mut Value, path: &[String], text: String) -> bool {
    match (path, value) {
        ([], value) => {
            let changed = !matches!(value, Value::String(..));
            *value = text.into();
            changed
        }
        ([key, rest @ ..], Value::Dict(_, dict)) => dict
            .get_mut(key)
            .is_some_and(|value| replace(value, rest, text)),
        _ => false,
    }
}

/// A path as one writes it in TOML.
pub(super) fn dotted(path: &[String]) -> String {
    let bare = |k: &str| {
        !k.is_empty()
            && k.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
    };
    let parts = path.iter().map(|k| match bare(k) {
        true => k.clone(),
        false => format!("{:?}", cut(k)),
    });
    parts.collect::<Vec<_>>().join(".")
}

/// Whether the value under this path may be a secret.
fn is_secret(path: &[String]) -> bool {
    const WORDS: [&str; 6] = [
        "url",
        "password",
        "secret",
        "token",
        "credential",
        "passphrase",
    ];
    path.iter().any(|key| {
        let key = key.to_ascii_lowercase();
        WORDS.iter().any(|word| key.contains(word))
    })
}

fn shown(actual: &Actual, secret: bool) -> String {
    match actual {
        Actual::Seq => "a list".into(),
        Actual::Map => "a table".into(),
        Actual::Unit | Actual::Option => "nothing".into(),
        Actual::Str(text) if secret || text.contains("://") => "a text (not shown)".into(),
        Actual::Str(text) => format!("{:?}", cut(text)),
        Actual::Bool(_) | Actual::Unsigned(_) | Actual::Signed(_) | Actual::Float(_) if secret => {
            "a value that is no text (not shown)".into()
        }
        Actual::Bool(v) => v.to_string(),
        Actual::Unsigned(v) => v.to_string(),
        Actual::Signed(v) => v.to_string(),
        Actual::Float(v) => v.to_string(),
        _ => "something else".into(),
    }
}

/// A text as it may be shown.
pub(super) fn cut(text: &str) -> String {
    if text.contains("://") {
        return "(not shown)".to_owned();
    }
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// serde's words in ours.
fn plain(expected: &str) -> String {
    match expected {
        "a string" | "str" => "a text".into(),
        "a boolean" | "bool" => "true or false".into(),
        "a sequence" => "a list".into(),
        "a map" => "a table".into(),
        "a duration" => "a duration such as \"10s\", \"250ms\" or \"1m 30s\"".into(),
        "f32" | "f64" => "a number".into(),
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "a whole number, not below 0".into(),
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number".into(),
        _ if expected.starts_with("struct ") => "a table".into(),
        _ => expected.to_owned(),
    }
}

pub(super) fn list(known: &[&str]) -> String {
    match known {
        [] => "none here".to_owned(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}

/// The name that was probably meant.
pub(super) fn nearest<'k>(found: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let found = found.to_lowercase();
    known
        .map(|name| (strsim::damerau_levenshtein(&found, name), name))
        .filter(|(distance, name)| {
            let longest = found.chars().count().max(name.chars().count());
            distance * 3 <= longest || strsim::jaro_winkler(&found, name) >= 0.85
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// The text up to what may be a URL.
pub(super) fn masked(text: &str) -> Cow<'_, str> {
    match text.split_once("://") {
        None => text.into(),
        Some((before, _)) => format!("{before}://***").into(),
    }
}

/// Whether a dictionary says anything.
pub(super) fn is_table(value: &Value) -> bool {
    matches!(value, Value::Dict(..))
}

/// The name of a table that is one letter away from one of ours.
pub(super) fn misspelt(rest: &Dict) -> Option<(&str, &'static str)> {
    let tables = rest
        .iter()
        .filter(|(_, v)| is_table(v))
        .map(|(k, _)| k.as_str());
    tables.into_iter().find_map(|name| {
        let ours = super::TABLES
            .iter()
            .find(|t| strsim::damerau_levenshtein(name, t) == 1)?;
        Some((name, *ours))
    })
}
