use pillarbox_transport::Message;

/// The attribute of an event that an operator put back after it was given up: how often. Newer events of its key may have
/// overtaken it.
pub const RETRIED: &str = "pillarboxretried";

/// The attribute of a dead letter that could not be read as it was written: what is kept is not the event, and it is
/// never put back.
pub(crate) const UNREADABLE: &str = "pillarboxunreadable";

/// The attribute of an event that ended a session or a process when nothing else was under way: it goes alone from then on.
pub(crate) const SUSPECT: &str = "pillarboxsuspect";

/// An event that was given up, with what operators need to judge it.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// The event, whole.
    pub message: Message,
    /// Its place in the log (relay); 0 at the consumer.
    pub position: i64,
    /// Failed attempts.
    pub attempts: u32,
    /// The exact reason.
    pub reason: String,
    /// The broker may have it all the same (an answer was lost before it was refused).
    pub maybe_sent: bool,
}
