//! Exceptions to the way of an event: few, apart from the log, bounded.

mod dead_letter;
mod deferred;
mod retry;

pub use dead_letter::DeadLetter;
pub use deferred::{Deferral, Deferred, Line, LineId, Resolution, Side};
pub use retry::Retry;
