use std::{
    fmt,
    io::{self, Write as _},
    process::ExitCode,
};

use pillarbox::Kind;
use serde_json::json;

/// The program's result.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why a command does not end with 0.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The arguments are wrong, for what they name does not exist or may not be asked for.
    Usage(String),
    /// The command did its work, and what it found is not good. The answer has been given.
    Finding(String),
    /// The engine, the database, the broker or the configuration.
    Engine(pillarbox::Error),
    /// A stream of this process.
    Io(io::Error),
}

impl Failure {
    /// Tells it on stderr and answers the exit code. Whoever closed our stdout has seen enough: that is no failure.
    pub(crate) fn tell(&self, json: bool) -> ExitCode {
        if self.is_broken_pipe() {
            return ExitCode::SUCCESS;
        }
        let (text, advice) = (self.to_string(), self.advice());
        let told = if json {
            json!({ "error": { "kind": self.kind(), "message": text, "advice": advice } })
                .to_string()
        } else {
            let advice = advice.map(|a| format!("\n  {a}")).unwrap_or_default();
            format!("pillarbox: {text}{advice}")
        };
        // Nobody may be there to read it.
        let _ = writeln!(io::stderr(), "{told}");
        ExitCode::from(self.code())
    }

    fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Engine(e) if e.kind() == Kind::Configuration => 2,
            Self::Engine(_) | Self::Finding(_) | Self::Io(_) => 1,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::Finding(_) => "finding",
            Self::Io(_) => "io",
            Self::Engine(e) => match e.kind() {
                Kind::Unavailable => "unavailable",
                Kind::NotMigrated => "not_migrated",
                Kind::Incompatible => "incompatible",
                Kind::Invalid => "invalid",
                Kind::NotFound => "not_found",
                Kind::Configuration => "configuration",
                Kind::Transport => "transport",
                _ => "database",
            },
        }
    }

    /// What to do, where the sentence itself does not say so to somebody at a terminal.
    fn advice(&self) -> Option<&'static str> {
        let Self::Engine(e) = self else { return None };
        match e.kind() {
            Kind::NotMigrated => Some(
                "run `pillarbox migrate` with the same --config and --at, or give `pillarbox migrate --print` to whoever may change the database",
            ),
            Kind::Incompatible => Some("update this program: a newer one has changed the tables"),
            Kind::Unavailable => Some("nothing was changed by what failed: try again later"),
            _ => None,
        }
    }

    fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Io(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(text) | Self::Finding(text) => f.write_str(text),
            Self::Engine(e) => e.fmt(f),
            Self::Io(e) => e.fmt(f),
        }
    }
}

impl From<pillarbox::Error> for Failure {
    fn from(e: pillarbox::Error) -> Self {
        Self::Engine(e)
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<serde_json::Error> for Failure {
    fn from(e: serde_json::Error) -> Self {
        Self::Io(e.into())
    }
}
