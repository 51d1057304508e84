//! What can go wrong, by meaning.

use std::{borrow::Cow, error::Error as StdError, fmt};

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The database cannot be reached, is starting, shutting down, full or read-only.
    Unavailable,
    /// The database refused a statement.
    Database,
    /// The schema is not there: run [`migrate`](crate::migrate).
    NotMigrated,
    /// The schema names this program too old.
    Incompatible,
    /// Somebody else holds the lease now: everything in memory is void.
    LeaseLost,
    /// An event, name or call breaks a rule; nothing was written.
    Invalid,
    /// An event is larger than a limit; nothing was written.
    TooLarge,
    /// The relays are too far behind, and the outbox was told to refuse events then; nothing was written.
    Backlogged,
    /// What a command names is not there; nothing was written.
    NotFound,
    /// What a command would make is there already, in another way; nothing was written.
    Exists,
    /// The database was restored into another cluster, or another server took over. A relay anchors its cursors anew by itself.
    Moved,
    /// The configuration is wrong.
    Configuration,
    /// The broker; see the source.
    Transport,
    /// A task of the engine panicked: a fault of the engine.
    Panicked,
}

/// The engine's error: kind, the operation under way, what it was about, and the native source.
///
/// Never holds a payload or a secret.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    operation: &'static str,
    context: Cow<'static, str>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` while doing `operation`, with a sentence for people.
    #[must_use]
    pub fn new(kind: Kind, operation: &'static str, context: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            operation,
            context: context.into(),
            source: None,
        }
    }

    /// Keeps the native error, which stays downcastable.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// A database error, told apart into [`Kind::Unavailable`] and [`Kind::Database`].
    #[must_use]
    pub fn database(operation: &'static str, source: sqlx::Error) -> Self {
        let kind = if is_away(&source) {
            Kind::Unavailable
        } else {
            Kind::Database
        };
        Self::new(kind, operation, "the database answered").caused_by(source)
    }

    /// By meaning.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        match self.kind {
            Kind::Unavailable | Kind::LeaseLost | Kind::Backlogged | Kind::Moved => true,
            Kind::Transport => self
                .source
                .as_ref()
                .and_then(|s| s.downcast_ref::<pillarbox_transport::Error>())
                .is_some_and(pillarbox_transport::Error::is_temporary),
            _ => false,
        }
    }

    /// What was being done.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.operation
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, self.context)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

impl From<pillarbox_transport::Error> for Error {
    fn from(e: pillarbox_transport::Error) -> Self {
        use pillarbox_transport::Kind as T;
        let kind = match e.kind() {
            T::Invalid => Kind::Invalid,
            T::TooLarge => Kind::TooLarge,
            T::Configuration => Kind::Configuration,
            _ => Kind::Transport,
        };
        let context = match kind {
            Kind::Invalid | Kind::TooLarge => "the event is refused",
            _ => "the broker",
        };
        Self::new(kind, e.operation(), context).caused_by(e)
    }
}

/// The SQLSTATE of a database error.
pub(crate) fn sqlstate(e: &sqlx::Error) -> Option<Cow<'_, str>> {
    e.as_database_error().and_then(|d| d.code())
}

/// The database is away or cannot take writes now: nobody's fault, never an attempt (PostgreSQL classes 08, 53, 57P,
/// 25006; a lost connection; SQLite busy, locked, full, I/O).
pub(crate) fn is_away(e: &sqlx::Error) -> bool {
    match e {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        _ => sqlstate(e).is_some_and(|code| match sqlite_code(&code) {
            Some(n) => matches!(n & 0xff, 5 | 6 | 8 | 10 | 13 | 14 | 15),
            None => {
                let class = ["08", "53", "57P"].iter().any(|c| code.starts_with(c));
                class || code == "25006"
            }
        }),
    }
}

/// The transaction lost to another one and may simply run again, alone (40xxx, 55P03, 57014).
pub(crate) fn is_conflict(e: &sqlx::Error) -> bool {
    sqlstate(e).is_some_and(|code| code.starts_with("40") || code == "55P03" || code == "57014")
}

fn sqlite_code(code: &str) -> Option<u32> {
    // SQLSTATEs have five characters; SQLite's codes are shorter numbers.
    (code.len() < 5).then(|| code.parse().ok()).flatten()
}
