//! `[transport]`: which broker, and what its adapter reads for itself. Knows no adapter.

use std::{collections::BTreeMap, fmt};

use figment::value::{Dict, Value};
use serde::de::DeserializeOwned;

use super::problem::{Scope, is_table, list, nearest, refuse};
use crate::error::{Error, Result};

/// Where it stands, unless it is a destination's own.
const TABLE: &str = "transport";

/// `[transport]`: the word that selects the broker, and a table for each broker that is spoken about.
///
/// The tables stay as they are written: `[transport.amqp]` is read by the adapter for AMQP. Only the selected one is
/// read, so that a file may speak of several brokers and choose by `kind`. `Debug` shows no content.
#[derive(Clone, Default)]
pub struct TransportSettings {
    kind: Option<String>,
    tables: BTreeMap<String, Value>,
    scope: Scope,
    /// Where it stands, below `[transport]` itself: `destinations`, a name, `transport`.
    path: Vec<String>,
}

impl TransportSettings {
    /// The transport for one process, which needs no further settings.
    #[must_use]
    pub fn memory() -> Self {
        Self {
            kind: Some("memory".to_owned()),
            ..Self::default()
        }
    }

    pub(super) fn none(scope: Scope) -> Self {
        Self {
            scope,
            ..Self::default()
        }
    }

    pub(super) fn read(value: &Value, scope: Scope) -> Result<Self> {
        Self::read_at(&[TABLE], value, scope)
    }

    /// Reads a table that stands elsewhere.
    pub(super) fn read_at(path: &[&str], value: &Value, scope: Scope) -> Result<Self> {
        let mut tables: Dict = scope.read(path, value)?;
        let at_kind = [path, &["kind"]].concat();
        let kind: Option<String> = match tables.remove("kind") {
            Some(kind) => Some(scope.read(&at_kind, &kind)?),
            None => None,
        };
        if kind.as_deref().is_some_and(|kind| !is_word(kind)) {
            let found = "a text that is no word (not shown)";
            return Err(scope.wrong(&at_kind, found, "a word such as \"amqp\""));
        }
        if let Some((key, _)) = tables.iter().find(|(_, v)| !is_table(v)) {
            let mut path: Vec<String> = path.iter().map(|p| (*p).to_owned()).collect();
            path.push(key.clone());
            return Err(scope.unknown(&path, ["kind"].into_iter(), false));
        }
        Ok(Self {
            kind,
            tables,
            scope,
            path: path.iter().map(|p| (*p).to_owned()).collect(),
        })
    }

    /// The path of something below it.
    fn at<'a>(&'a self, below: &[&'a str]) -> Vec<&'a str> {
        let own = match self.path.is_empty() {
            true => vec![TABLE],
            false => self.path.iter().map(String::as_str).collect(),
        };
        [own.as_slice(), below].concat()
    }

    fn owned(&self, below: &[&str]) -> Vec<String> {
        self.at(below).into_iter().map(str::to_owned).collect()
    }

    /// The word that selects the broker.
    ///
    /// # Errors
    /// [`Kind::Configuration`](crate::Kind::Configuration): none is given, or none of `known`; the text names the nearest.
    /// So does one for a table that belongs to none of `known`, nor of `later`: kinds of other versions, of which a file may
    /// speak but which it may not select.
    pub fn kind(&self, known: &[&str], later: &[&str]) -> Result<&str> {
        let quoted: Vec<_> = known.iter().map(|k| format!("{k:?}")).collect();
        let known_list = list(&quoted.iter().map(String::as_str).collect::<Vec<_>>());
        let Some(kind) = &self.kind else {
            return Err(self.scope.wrong(
                &self.at(&[]),
                "no kind",
                format_args!("kind = {known_list}"),
            ));
        };
        if !known.contains(&kind.as_str()) {
            let hint = nearest(kind, known.iter().copied());
            let hint = hint
                .map(|n| format!(" (did you mean {n:?}?)"))
                .unwrap_or_default();
            let here = match later.contains(&kind.as_str()) {
                true => ", which this version does not have",
                false => "",
            };
            return Err(self.scope.wrong(
                &self.at(&["kind"]),
                format_args!("{kind:?}{here}"),
                format_args!("{known_list}{hint}"),
            ));
        }
        let spoken_of = |t: &str| known.contains(&t) || later.contains(&t);
        match self.tables.keys().find(|t| !spoken_of(t.as_str())) {
            Some(table) => {
                let path = self.owned(&[table]);
                let keys = known.iter().copied().chain(["kind"]);
                Err(self.scope.unknown(&path, keys, false))
            }
            None => Ok(kind),
        }
    }

    /// Reads the table of one kind, `[transport.KIND]`; where there is none, an empty one.
    ///
    /// # Errors
    /// [`Kind::Configuration`](crate::Kind::Configuration) names the file or environment variable, the key, what was
    /// found and what was expected; for an unknown key, the nearest known one. No secret is shown.
    pub fn table<T: DeserializeOwned>(&self, kind: &str) -> Result<T> {
        let empty = Value::from(Dict::new());
        let value = self.tables.get(kind).unwrap_or(&empty);
        self.scope.read(&self.at(&[kind]), value)
    }

    /// Refuses a table of a kind that has no settings.
    ///
    /// # Errors
    /// [`Kind::Configuration`](crate::Kind::Configuration) names the first key that it has.
    pub fn no_table(&self, kind: &str) -> Result<()> {
        match self
            .tables
            .get(kind)
            .and_then(Value::as_dict)
            .and_then(|t| t.keys().next())
        {
            Some(key) => {
                let path = self.owned(&[kind, key]);
                Err(self.scope.unknown(&path, std::iter::empty(), false))
            }
            None => Ok(()),
        }
    }

    /// An error about a key of `[transport]`, such as `kind` or the name of a kind's table, with where that stands. A
    /// reason that begins with the name of a field that the table has, as in `url: found …`, is about that field.
    #[must_use]
    pub fn refuse(&self, key: &str, reason: &str) -> Error {
        let mut path = self.owned(&[key]);
        let table = self.tables.get(key).and_then(Value::as_dict);
        let text = match reason.split_once(": ") {
            Some((field, rest)) if table.is_some_and(|t| t.contains_key(field)) => {
                path.push(field.to_owned());
                rest
            }
            _ => reason,
        };
        refuse(self.scope.sentence(&path, format_args!("{text}")))
    }
}

impl fmt::Debug for TransportSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportSettings")
            .field("kind", &self.kind)
            .field("tables", &self.tables.keys().collect::<Vec<_>>())
            .finish()
    }
}

/// Whether it may be shown: a URL may not.
fn is_word(kind: &str) -> bool {
    kind.len() <= 30
        && kind
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
}
