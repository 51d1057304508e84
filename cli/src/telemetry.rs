use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// Logs to stderr, as lines on a terminal and as JSON elsewhere.
pub(crate) fn install(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // Nobody else installs one in this program.
    let _ = if std::io::stderr().is_terminal() {
        logs.try_init()
    } else {
        logs.json().flatten_event(true).try_init()
    };
}
