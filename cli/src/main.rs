//! The program `pillarbox`: for services in any language, and for those who operate them.
//!
//! A thin layer over [`pillarbox::Admin`] and [`pillarbox::Relay`]. Answers go to stdout, logs and errors to stderr. Exits
//! with 0, with 1 after a finding or a failure, with 2 for wrong arguments or configuration.

mod answer;
mod arguments;
mod commands;
mod failure;
mod place;
mod shape;
mod signals;
mod telemetry;

use std::process::ExitCode;

use clap::Parser as _;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = arguments::Arguments::parse();
    let json = arguments.command.answers_json();
    telemetry::install(arguments.command.default_log());
    match arguments.command.run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(json),
    }
}
