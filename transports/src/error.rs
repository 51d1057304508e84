use std::{borrow::Cow, error::Error as StdError, fmt};

/// The contract's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The broker cannot be reached, or the connection was lost.
    Unreachable,
    /// No answer within the deadline.
    Timeout,
    /// The broker took part and said no for now: a queue or stream is full, a limit or an alarm is on.
    Full,
    /// Exchange, queue, topic, stream or group does not exist (yet).
    Missing,
    /// The broker has nowhere to put this type of event: no queue is bound to it, no group wants it.
    Unrouted,
    /// Credentials or permissions.
    Refused,
    /// The configuration contradicts itself or what the broker has.
    Configuration,
    /// The message breaks a rule of the contract or of the broker.
    Invalid,
    /// The message is larger than a limit.
    TooLarge,
    /// The session was closed by its own side.
    Closed,
}

/// A transport's error: kind, the operation under way, what it was about, and the native source.
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
    /// An error of `kind` while doing `operation` (a few words, "publish", "declare queue"), with a sentence for people.
    #[must_use]
    pub fn new(kind: Kind, operation: &'static str, context: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            operation,
            context: context.into(),
            source: None,
        }
    }

    /// Keeps the client library's own error, which stays downcastable.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// By meaning.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(
            self.kind,
            Kind::Unreachable
                | Kind::Timeout
                | Kind::Full
                | Kind::Missing
                | Kind::Unrouted
                | Kind::Closed
        )
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
