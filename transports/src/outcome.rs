use crate::Error;

/// What became of one published message, told by what to do next.
#[derive(Debug)]
pub enum Outcome {
    /// The broker has durably taken it (and, where the broker routes, it was routed).
    Stored,
    /// Bytes may have left and no answer came: send it again with the same id, on a new session. Not an attempt.
    Unknown(Error),
    /// The broker cannot take it now, whatever the message: wait, then send again. Not an attempt.
    Unavailable(Error),
    /// A refusal that names this very message and may pass later: an attempt.
    Retry(Error),
    /// A refusal that names this very message and never passes: a dead letter at once.
    Rejected(Error),
}

impl Outcome {
    /// Whether the broker has the message.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        matches!(self, Self::Stored)
    }

    /// The reason, if it was not stored.
    #[must_use]
    pub fn error(&self) -> Option<&Error> {
        match self {
            Self::Stored => None,
            Self::Unknown(e) | Self::Unavailable(e) | Self::Retry(e) | Self::Rejected(e) => Some(e),
        }
    }
}
