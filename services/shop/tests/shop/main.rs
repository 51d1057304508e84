//! The shop as a process: what it answers, what its events carry, and whether the check sees a broken promise.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod answers;
mod process;
mod promises;
mod starts;
