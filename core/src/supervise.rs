//! Tasks that go on after a panic.
//!
//! A fault that one event, or one moment, brings to light must not end what stands beside it. An error that only a person
//! can mend is none of this: it ends the relay or the consumer, as it did.

use std::{any::Any, future::Future, panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    error::{Error, Kind, Result},
    running::Report,
};

/// A task that has run for so long without a panic is well again.
const WELL: Duration = Duration::from_secs(10);

/// Runs a part of a task; its panic is an error of kind [`Kind::Panicked`]. What the part was given is not to be used again.
pub(crate) async fn caught<T>(
    operation: &'static str,
    part: impl Future<Output = Result<T>>,
) -> Result<T> {
    match AssertUnwindSafe(part).catch_unwind().await {
        Ok(ended) => ended,
        Err(panic) => Err(Error::new(Kind::Panicked, operation, said(&*panic))),
    }
}

/// A task under supervision.
#[derive(Debug, Clone)]
pub(crate) struct Supervised {
    /// What kind of task, for the counter.
    pub(crate) task: &'static str,
    /// Its name in the health.
    pub(crate) name: String,
    pub(crate) report: Report,
}

impl Supervised {
    /// Runs the task until it ends, and begins it anew, after a wait, each time that it panics. What it held was let go by its
    /// drop; what it did in the database is fenced by the lease of its next run.
    pub(crate) async fn run<F>(
        self,
        stop: CancellationToken,
        mut start: impl FnMut() -> F,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        let mut backoff = Backoff::connection();
        let trouble = format!("{} panicked", self.name);
        loop {
            let ended = {
                let run = caught(self.task, start());
                tokio::pin!(run);
                tokio::select! {
                    biased;
                    ended = &mut run => ended,
                    () = tokio::time::sleep(WELL) => {
                        self.well(&trouble);
                        backoff.reset();
                        run.await
                    }
                }
            };
            match ended {
                Err(e) if e.kind() == Kind::Panicked => self.panicked(&trouble, &e),
                ended => {
                    self.well(&trouble);
                    return ended;
                }
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(backoff.step()) => {}
            }
        }
    }

    fn panicked(&self, trouble: &str, e: &Error) {
        metrics::counter!("pillarbox_task_restarts_total", "task" => self.task).increment(1);
        if self.report.trouble(trouble, &e.to_string()) {
            tracing::error!(task = %self.name, error = %e, "a task panicked, and is started again");
        }
    }

    fn well(&self, trouble: &str) {
        if self.report.clear(trouble) {
            tracing::info!(task = %self.name, "it goes on after its panic");
        }
    }
}

/// What a panic said, where it said a text.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&'static str>()
        .map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    let text = text.unwrap_or_else(|| "without a word".to_owned());
    format!(
        "it panicked: {}",
        text.chars().take(200).collect::<String>()
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn supervised(report: Report) -> Supervised {
        Supervised {
            task: "test",
            name: "the task".to_owned(),
            report,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_restarts_the_task_and_is_seen_in_the_health() {
        let (report, health) = Report::new();
        let (runs, stop) = (AtomicU32::new(0), CancellationToken::new());
        let start = || async {
            match runs.fetch_add(1, Ordering::Relaxed) {
                0 => panic!("one {}", 1),
                1 => panic!("two"),
                _ => std::future::pending().await,
            }
        };
        let run = supervised(report).run(stop.clone(), start);
        let look = async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let trouble = health.borrow().trouble.clone();
            let told = "the task panicked: test: it panicked: one 1";
            assert_eq!(trouble.as_deref(), Some(told));
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert!(health.borrow().trouble.is_some(), "it has just begun");
            tokio::time::sleep(WELL).await;
            assert_eq!(health.borrow().trouble, None);
        };
        tokio::select! {
            _ = run => unreachable!("it does not end"),
            () = look => {}
        }
        assert_eq!(runs.into_inner(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_that_only_a_person_can_mend_ends_it() {
        let (report, _health) = Report::new();
        let start = || async { Err(Error::new(Kind::NotMigrated, "test", "no schema")) };
        let ended = supervised(report).run(CancellationToken::new(), start);
        assert_eq!(ended.await.unwrap_err().kind(), Kind::NotMigrated);
    }
}
