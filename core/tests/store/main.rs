//! Both stores under one suite.
// The bodies stand outside the test functions, where clippy does not know them for tests.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod suite;

#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;
