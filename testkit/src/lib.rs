//! What tests of programs built on Pillarbox need besides the programs: real servers and faults between them.
//!
//! - [`servers`]: PostgreSQL, RabbitMQ and NATS for tests, taken from the environment or started on this machine.
//! - [`transport`]: the conformance suite that every transport runs, others' too.
//! - [`proxy`]: a TCP proxy on loopback that cuts, resets, holds and swallows what passes through it.
//!
//! For tests only: nothing here belongs in a production program, and nothing listens beyond loopback.

#[cfg(unix)]
mod address;
#[cfg(unix)]
pub mod proxy;
#[cfg(unix)]
pub mod servers;
#[cfg(unix)]
pub mod transport;
