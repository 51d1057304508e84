//! The program as a process: what it answers, how it exits, what it does to real servers.
// The bodies stand outside the test functions, where clippy does not know them for tests.
#![allow(clippy::unwrap_used)]

mod any_language;
mod arguments;
mod dead_letters;
mod debezium;
mod destinations;
mod migrate;
mod pause;
mod program;
mod relay;
mod status;
