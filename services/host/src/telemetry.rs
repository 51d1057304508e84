//! Logs and metrics of a program: the libraries only emit them, the program says where they go.

use std::{io::IsTerminal as _, sync::OnceLock, time::Duration};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();

/// How often old samples of histograms are given up.
const UPKEEP: Duration = Duration::from_secs(5);
/// Seconds: from a commit on the same machine to an outage.
const BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

/// Logs to stderr, as lines on a terminal and as JSON elsewhere; `RUST_LOG` chooses, `info` without it. Metrics for
/// [`metrics_text`]. A second call does nothing.
pub(crate) fn install() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // An error says that a subscriber is there: a host's own is as good.
    let _ = if std::io::stderr().is_terminal() {
        logs.try_init()
    } else {
        logs.json().flatten_event(true).try_init()
    };
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), BUCKETS)
        .map(PrometheusBuilder::install_recorder);
    match recorder {
        Ok(Ok(handle)) => {
            let _ = METRICS.set(handle);
            tokio::spawn(upkeep());
        }
        Ok(Err(e)) | Err(e) => tracing::warn!(error = %e, "no metrics"),
    }
}

/// All metrics of the process, as Prometheus reads them.
#[must_use]
pub fn metrics_text() -> String {
    METRICS
        .get()
        .map(PrometheusHandle::render)
        .unwrap_or_default()
}

async fn upkeep() {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        if let Some(metrics) = METRICS.get() {
            metrics.run_upkeep();
        }
    }
}
