use clap::{Parser, Subcommand};

use crate::{
    commands::{
        completions::Completions, dead_letters::DeadLetters, destinations::Destinations,
        migrate::Migrate, pause::Pause, relay::Relay, replay::Replay, resume::Resume,
        status::Status,
    },
    failure::Result,
};

const EXAMPLES: &str = "\
Examples:
  pillarbox migrate --config shop.toml
  pillarbox relay --config shop.toml --at orders
  pillarbox status --config shop.toml --json
  pillarbox dead-letters list --config shop.toml --destination main
  pillarbox completions bash > /etc/bash_completion.d/pillarbox

Answers go to stdout, logs and errors to stderr; RUST_LOG chooses what is logged.
Exits with 0, with 1 after a finding or a failure, with 2 for wrong arguments or configuration.";

/// A transactional outbox for services in any language: relay what was committed, look at it, mend what failed.
#[derive(Parser)]
#[command(name = "pillarbox", version, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    Migrate(Migrate),
    Relay(Relay),
    Status(Status),
    Pause(Pause),
    Resume(Resume),
    /// Named sets of cursors over the log, each with a broker of its own: look at them, add one, remove one.
    #[command(subcommand)]
    Destinations(Destinations),
    Replay(Box<Replay>),
    /// What was given up: look at it, put it back, discard it, export it.
    #[command(subcommand)]
    DeadLetters(Box<DeadLetters>),
    Completions(Completions),
}

impl Command {
    pub(crate) async fn run(self) -> Result<()> {
        match self {
            Self::Migrate(migrate) => migrate.run().await,
            Self::Relay(relay) => relay.run().await,
            Self::Status(status) => status.run().await,
            Self::Pause(pause) => pause.run().await,
            Self::Resume(resume) => resume.run().await,
            Self::Destinations(destinations) => destinations.run().await,
            Self::Replay(replay) => replay.run().await,
            Self::DeadLetters(dead_letters) => dead_letters.run().await,
            Self::Completions(completions) => completions.run(),
        }
    }

    /// Whether answers and errors are for a machine.
    pub(crate) fn answers_json(&self) -> bool {
        match self {
            Self::Migrate(migrate) => migrate.place.json,
            Self::Relay(relay) => relay.place.json,
            Self::Status(status) => status.place.json,
            Self::Pause(pause) => pause.place.json,
            Self::Resume(resume) => resume.place.json,
            Self::Destinations(destinations) => destinations.place().json,
            Self::Replay(replay) => replay.place.json,
            Self::DeadLetters(dead_letters) => dead_letters.place().json,
            Self::Completions(_) => false,
        }
    }

    /// What is logged where `RUST_LOG` says nothing: a program that runs tells what it does, a command gives its answer.
    pub(crate) fn default_log(&self) -> &'static str {
        match self {
            Self::Relay(_) => "info",
            _ => "warn",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }
}
