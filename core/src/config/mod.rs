//! One file and the environment, read once, checked whole, before anything is opened.
//!
//! Opens nothing by itself, except where [`StoreSettings::open`] is asked to, and never shows a secret.

mod problem;
mod settings;
mod source;
mod store;
mod tables;
#[cfg(test)]
mod tests;
mod transport;

use std::{ffi::OsString, fmt, path::Path, sync::Arc};

pub use settings::{
    DestinationSettings, OutboxSettings, Settings, TopicSettings, TypeSettings, Unrouted,
};
pub use store::StoreSettings;
pub use transport::TransportSettings;

use crate::error::Result;
use figment::value::Value;
use problem::{Scope, list, misspelt, nearest};
use source::Source;

/// The engine's own tables, at the top of a file and in each section.
pub const TABLES: [&str; 12] = [
    "store",
    "transport",
    "destinations",
    "relay",
    "consumer",
    "retry",
    "retention",
    "console",
    "telemetry",
    "outbox",
    "types",
    "topics",
];

/// A configuration as it was written: a TOML file, and over it environment variables.
///
/// One file serves several services: what stands at the top is common to all, `[inventory]` is the section of one, and
/// `[inventory.store]` is laid over `[store]` key by key. Where `url` is laid over `url_file`, or the other way round,
/// the lower one goes.
///
/// `PILLARBOX_STORE__URL` overrides `[store] url`, `PILLARBOX_INVENTORY__STORE__URL` overrides `[inventory.store] url`: two
/// underscores stand between levels, names are lower-cased, values are numbers, `true`, `false`, `["lists"]`,
/// `{ tables }` or text. A section wins over what is common, wherever each comes from. Variables that begin with
/// `PILLARBOX_` and have no two underscores after it are others' and left alone.
///
/// ```
/// use pillarbox_core::Config;
/// let config = Config::parse(
///     r#"
///     [store]
///     schema = "events"
///     [inventory.store]
///     url = "sqlite://inventory.db"
///     "#,
/// )?;
/// let settings = config.at("inventory")?;
/// assert_eq!(settings.store.schema, "events");
/// # Ok::<(), pillarbox_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Config {
    source: Arc<Source>,
}

impl Config {
    /// Reads a file (at most 1 MiB) and the environment. Logs a warning for a file with a password that everybody may read.
    ///
    /// # Errors
    /// [`Kind::Configuration`](crate::Kind::Configuration) when there is no such file, when it is not TOML, or when
    /// variables contradict each other; the text says where and what was expected.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(path.as_ref(), std::env::vars_os())
    }

    fn load_with(
        path: &Path,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Self> {
        let source = Arc::new(Source::load(path, variables)?);
        Ok(Self { source })
    }

    /// Reads a text, and no environment: for tests, and for programs that get their configuration elsewhere.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(toml: &str) -> Result<Self> {
        let name = "the configuration".to_owned();
        let source = Arc::new(Source::parse(name, toml, std::iter::empty())?);
        Ok(Self { source })
    }

    /// The settings of a program that has no section of its own.
    ///
    /// # Errors
    /// [`Kind::Configuration`](crate::Kind::Configuration) names the file or environment variable, the key, what was
    /// found and what was expected; for an unknown key, the nearest known one. No secret is shown.
    pub fn settings(&self) -> Result<Settings> {
        let scope = Scope::new(Arc::clone(&self.source), None);
        Settings::build(scope, self.source.root().clone())
    }

    /// The settings of one section: the common tables with the section's laid over them.
    ///
    /// # Errors
    /// As [`Config::settings`]; and when there is no such section.
    pub fn at(&self, section: &str) -> Result<Settings> {
        let root = self.source.root();
        let whole = Scope::new(Arc::clone(&self.source), None);
        if TABLES.contains(&section) {
            let expected = "a section of the program's own: this table is Pillarbox's";
            return Err(whole.wrong(&[section], "a section of this name", expected));
        }
        let others = || {
            root.keys()
                .map(String::as_str)
                .filter(|k| !TABLES.contains(k))
        };
        let own = match root.get(section) {
            Some(Value::Dict(_, own)) => own.clone(),
            Some(_) => return Err(whole.wrong(&[section], "a value", "a table")),
            None => {
                let near = nearest(section, others());
                let near = near
                    .map(|n| format!(" (did you mean [{n}]?)"))
                    .unwrap_or_default();
                let found = format!("no section [{section}]");
                let expected = format!(
                    "one of the sections: {}{near}",
                    list(&others().collect::<Vec<_>>())
                );
                return Err(whole.wrong(&[], found, expected));
            }
        };
        if let Some((name, near)) = misspelt(root) {
            return Err(whole.misspelt(name, near));
        }
        let mut all: figment::value::Dict = root.clone();
        all.retain(|key, _| TABLES.contains(&key.as_str()));
        source::overlay(&mut all, own);
        let scope = Scope::new(Arc::clone(&self.source), Some(section.to_owned()));
        Settings::build(scope, all)
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Config").field(&self.source.name()).finish()
    }
}
