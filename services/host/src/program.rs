//! What the programs have in common: arguments, configuration, signals, exit codes.

use std::{future::Future, path::PathBuf, process::ExitCode};

use clap::Parser;
use pillarbox::{Config, Kind};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::telemetry;

/// Why a program cannot go on.
pub type Fatal = Box<dyn std::error::Error + Send + Sync>;

/// Good.
const DONE: u8 = 0;
/// It failed.
const FAILED: u8 = 1;
/// The arguments or the configuration are wrong.
const USAGE: u8 = 2;

#[derive(Parser)]
struct Arguments {
    /// The configuration, in TOML. Environment variables such as PILLARBOX_INVENTORY__STORE__URL override it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Runs a program: reads `--config`, sends logs to stderr, and stops gently on SIGTERM or SIGINT; a second signal ends
/// it at once. Exits with 0, with 1 after a failure, with 2 for wrong arguments or configuration.
pub async fn program<F>(
    about: &'static str,
    run: impl FnOnce(Config, CancellationToken) -> F,
) -> ExitCode
where
    F: Future<Output = Result<(), Fatal>>,
{
    use clap::{CommandFactory as _, FromArgMatches as _};
    let matches = Arguments::command().about(about).get_matches();
    let arguments = match Arguments::from_arg_matches(&matches) {
        Ok(arguments) => arguments,
        Err(e) => e.exit(),
    };
    telemetry::install();
    let stop = CancellationToken::new();
    let ended = async {
        stop_on_signal(stop.clone())?;
        run(Config::load(&arguments.config)?, stop).await
    };
    match ended.await {
        Ok(()) => ExitCode::from(DONE),
        Err(e) => {
            tracing::error!(error = %e, "cannot go on");
            ExitCode::from(code(&e))
        }
    }
}

fn code(e: &Fatal) -> u8 {
    let configuration = e
        .downcast_ref::<pillarbox::Error>()
        .is_some_and(|e| e.kind() == Kind::Configuration);
    if configuration { USAGE } else { FAILED }
}

fn stop_on_signal(stop: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        for first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if first {
                stop.cancel();
            } else {
                std::process::exit(i32::from(FAILED));
            }
        }
    });
    Ok(())
}
