//! Exceptions to the way of an event: few, apart from the log, bounded.

mod dead_letter;
mod deferred;
mod retry;

pub use dead_letter::{DeadLetter, RETRIED};
pub(crate) use dead_letter::{SUSPECT, UNREADABLE};
pub(crate) use deferred::PARKED;
pub use deferred::{Deferral, Deferred, Hold, Line, LineId, Resolution, Side};
pub use retry::{OnExhausted, Retry};
