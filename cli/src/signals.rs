use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How a second signal ends the program.
const STOPPED_AT_ONCE: i32 = 1;

/// Cancelled by the first SIGTERM or SIGINT; the second one ends the program at once.
pub(crate) fn stop() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        for first in [true, false] {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if first {
                tracing::info!(
                    signal = name,
                    "stopping: finishing what is in flight; a second signal stops at once"
                );
                stopped.cancel();
            } else {
                tracing::warn!(signal = name, "stopped at once");
                std::process::exit(STOPPED_AT_ONCE);
            }
        }
    });
    Ok(stop)
}
