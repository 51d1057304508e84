use pillarbox_transport::Message;

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
