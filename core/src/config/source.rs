//! Reads a file and the environment, and remembers where each value came from. Never shows a value.

use std::{
    collections::HashMap,
    convert::Infallible,
    ffi::OsString,
    fs::File,
    io::{ErrorKind, Read as _},
    path::Path,
};

use figment::value::{Dict, Value};
use toml::de::{DeTable, DeValue};

use super::problem::{masked, refuse};
use crate::error::Result;

/// What a variable of ours begins with.
const PREFIX: &str = "PILLARBOX_";
/// What stands between levels.
const LEVEL: &str = "__";
/// Longer files are refused, in bytes.
const LONGEST: u64 = 1 << 20;
/// Lists and tables within each other in a variable; more are taken for text.
const DEEPEST: usize = 16;

/// Everything that was said, and where.
#[derive(Default)]
pub(super) struct Source {
    /// The file, for messages; empty for settings that were made by hand.
    name: String,
    root: Dict,
    lines: HashMap<Vec<String>, usize>,
    variables: HashMap<Vec<String>, Variable>,
}

struct Variable {
    name: String,
    text: String,
}

/// Where a value stands.
pub(super) enum Place<'a> {
    Nowhere,
    File(&'a str),
    Line(&'a str, usize),
    Variable(&'a str),
}

impl Source {
    pub(super) fn load(
        path: &Path,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Self> {
        let name = path.display().to_string();
        let text = read(path, &name)?;
        let source = Self::parse(name, &text, variables)?;
        if is_exposed(path, &text) {
            tracing::warn!(
                file = %source.name,
                "holds a password and every user of this machine may read it; take the right away, or use url_file"
            );
        }
        Ok(source)
    }

    pub(super) fn parse(
        name: String,
        text: &str,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Self> {
        let table: toml::Table = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(text.len(), |span| span.start);
            let before = text.get(..at).unwrap_or(text);
            let line = before.matches('\n').count() + 1;
            let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
            let message = e.message().replace('\n', ", ");
            refuse(format!(
                "{name}, line {line}, column {column}: this is not TOML: {}",
                masked(&message)
            ))
        })?;
        let mut source = Self {
            name,
            root: table.into_iter().map(|(k, v)| (k, value(v))).collect(),
            ..Self::default()
        };
        if let Ok(table) = DeTable::parse(text) {
            lines(table.get_ref(), text, &mut Vec::new(), &mut source.lines);
        }
        source.overlay_environment(variables)?;
        Ok(source)
    }

    fn overlay_environment(
        &mut self,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<()> {
        let mut found = Vec::new();
        for (name, text) in variables {
            let (name, text) = (name.to_string_lossy(), text.to_string_lossy());
            // One level is no table and key: such variables belong to others (a service named "pillarbox" in Kubernetes
            // gives each container a dozen).
            let Some(levels) = name.strip_prefix(PREFIX).filter(|n| n.contains(LEVEL)) else {
                continue;
            };
            let path: Vec<_> = levels
                .split(LEVEL)
                .map(|p| p.trim().to_ascii_lowercase())
                .collect();
            if path.iter().any(String::is_empty) {
                return Err(refuse(format!(
                    "the environment variable {name}: found an empty name beside {LEVEL}, expected {PREFIX}TABLE{LEVEL}KEY"
                )));
            }
            found.push((path, name.into_owned(), text.trim().to_owned()));
        }
        // Sorted, so that a path stands right before those below it, and the outcome is the same each time.
        found.sort();
        for pair in found.windows(2) {
            let ([(path, one, _), (below, two, _)], true) = (pair, pair.len() == 2) else {
                continue;
            };
            if below.starts_with(path) {
                return Err(refuse(format!(
                    "the environment variables {one} and {two} contradict each other: expected one of them"
                )));
            }
        }
        let mut over = Dict::new();
        for (path, name, text) in found {
            insert(&mut over, &path, parse_variable(&text));
            self.variables.insert(path, Variable { name, text });
        }
        overlay(&mut self.root, over);
        Ok(())
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn root(&self) -> &Dict {
        &self.root
    }

    pub(super) fn has(&self, path: &[String]) -> bool {
        get(&self.root, path).is_some()
    }

    /// Where the value stands, or the nearest table around it.
    pub(super) fn place(&self, path: &[String]) -> Place<'_> {
        for end in (1..=path.len()).rev() {
            let path = path.get(..end).unwrap_or(path);
            if let Some(variable) = self.variables.get(path) {
                return Place::Variable(&variable.name);
            }
            if let Some(line) = self.lines.get(path) {
                return Place::Line(&self.name, *line);
            }
        }
        match self.name.as_str() {
            "" => Place::Nowhere,
            name => Place::File(name),
        }
    }

    /// A variable's text as it was given.
    pub(super) fn variable(&self, path: &[String]) -> Option<&str> {
        self.variables.get(path).map(|v| v.text.as_str())
    }
}

/// Whether every user of the machine may read a password that leads to another machine.
fn is_exposed(path: &Path, text: &str) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        if std::fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o004 == 0) {
            return false;
        }
    }
    #[cfg(not(unix))]
    let _ = path;
    text.split("://").skip(1).any(|rest| {
        let authority = rest.split(['/', '"', '\'', '\n']).next().unwrap_or("");
        let local = ["localhost", "127.0.0.1", "[::1]"];
        authority.rsplit_once('@').is_some_and(|(user, host)| {
            user.contains(':') && !local.iter().any(|l| host.starts_with(l))
        })
    })
}

fn read(path: &Path, name: &str) -> Result<String> {
    let failed = |e: std::io::Error| match e.kind() {
        ErrorKind::NotFound => {
            let from = std::env::current_dir().unwrap_or_default();
            let from = match path.is_absolute() {
                true => String::new(),
                false => format!(" (looked for from {})", from.display()),
            };
            refuse(format!(
                "found no file {name}{from}; give the path of another, or write it: every field with its default stands in \
                 configs/reference.toml"
            ))
        }
        ErrorKind::IsADirectory => refuse(format!("{name}: found a folder, expected a TOML file")),
        ErrorKind::InvalidData => refuse(format!(
            "{name}: found bytes that are no text, expected a TOML file in UTF-8"
        )),
        _ => refuse(format!("{name}: the file cannot be read")).caused_by(e),
    };
    let mut text = String::new();
    File::open(path)
        .and_then(|f| f.take(LONGEST + 1).read_to_string(&mut text))
        .map_err(failed)?;
    if text.len() as u64 > LONGEST {
        return Err(refuse(format!(
            "{name}: found more than {LONGEST} bytes, expected a configuration"
        )));
    }
    Ok(text)
}

fn value(value: toml::Value) -> Value {
    match value {
        toml::Value::String(v) => v.into(),
        toml::Value::Integer(v) => v.into(),
        toml::Value::Float(v) => v.into(),
        toml::Value::Boolean(v) => v.into(),
        toml::Value::Datetime(v) => v.to_string().into(),
        toml::Value::Array(v) => v.into_iter().map(self::value).collect::<Vec<_>>().into(),
        toml::Value::Table(v) => v
            .into_iter()
            .map(|(k, v)| (k, self::value(v)))
            .collect::<Dict>()
            .into(),
    }
}

fn lines(
    table: &DeTable<'_>,
    text: &str,
    path: &mut Vec<String>,
    into: &mut HashMap<Vec<String>, usize>,
) {
    for (key, value) in table {
        path.push(key.get_ref().to_string());
        let before = text.get(..key.span().start).unwrap_or("");
        into.insert(path.clone(), before.matches('\n').count() + 1);
        if let DeValue::Table(table) = value.get_ref() {
            lines(table, text, path, into);
        }
        path.pop();
    }
}

/// Numbers, truth values, `["lists"]` and `{ tables }`; anything else is text.
fn parse_variable(text: &str) -> Value {
    let mut depth = 0_usize;
    let too_deep = text.chars().any(|c| {
        match c {
            '[' | '{' => depth += 1,
            ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > DEEPEST
    });
    if too_deep {
        return text.to_owned().into();
    }
    text.parse()
        .unwrap_or_else(|never: Infallible| match never {})
}

fn insert(into: &mut Dict, path: &[String], value: Value) {
    match path {
        [] => {}
        [key] => drop(into.insert(key.clone(), value)),
        [key, rest @ ..] => {
            let mut below = match into.remove(key) {
                Some(Value::Dict(_, dict)) => dict,
                _ => Dict::new(),
            };
            insert(&mut below, rest, value);
            into.insert(key.clone(), below.into());
        }
    }
}

/// Lays one table over another, key by key.
///
/// Of `url` and `url_file` only one may be given, so one that is laid over takes the other away.
pub(super) fn overlay(under: &mut Dict, over: Dict) {
    for (one, other) in [("url", "url_file"), ("url_file", "url")] {
        if over.contains_key(one) && !over.contains_key(other) {
            under.remove(other);
        }
    }
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Dict(_, under)), Value::Dict(_, over)) => overlay(under, over),
            (_, value) => drop(under.insert(key, value)),
        }
    }
}

/// The value at a path; lists are entered by index.
pub(super) fn get<'a>(root: &'a Dict, path: &[String]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    let mut value = root.get(first)?;
    for key in rest {
        value = match value {
            Value::Dict(_, dict) => dict.get(key)?,
            Value::Array(_, list) => list.get(key.parse::<usize>().ok()?)?,
            _ => return None,
        };
    }
    Some(value)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_password_that_everybody_may_read_is_noticed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let exposed = |mode, text: &str| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(file.path(), permissions).unwrap();
            is_exposed(file.path(), text)
        };
        assert!(exposed(0o644, "url = \"postgres://shop:secret@db/shop\""));
        assert!(!exposed(0o640, "url = \"postgres://shop:secret@db/shop\""));
        for text in [
            "url = \"postgres://shop@db/shop\"",
            "url = \"amqp://guest:guest@localhost:5672\"",
            "url = \"http://127.0.0.1:8081\" # mail me: a@b",
        ] {
            assert!(!exposed(0o644, text), "{text}");
        }
    }
}
