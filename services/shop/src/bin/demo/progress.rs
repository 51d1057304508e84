//! How far the demo is: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::watch;

use crate::say;

/// Counts orders that were placed. Clones share it.
#[derive(Clone)]
pub(crate) struct Progress {
    placed: watch::Sender<usize>,
    of: usize,
    bar: ProgressBar,
    on_terminal: bool,
}

impl Progress {
    pub(crate) fn new(of: usize) -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        let target = if on_terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(of as u64), target);
        if let Ok(style) =
            ProgressStyle::with_template("{bar:40} {pos}/{len} orders, {elapsed} {wide_msg}")
        {
            bar.set_style(style);
        }
        Self {
            placed: watch::Sender::new(0),
            of,
            bar,
            on_terminal,
        }
    }

    /// Counts the time from now.
    pub(crate) fn begin(&self) {
        self.bar.reset_elapsed();
    }

    /// One more.
    pub(crate) fn advance(&self) {
        let mut now = 0;
        self.placed.send_modify(|placed| {
            *placed += 1;
            now = *placed;
        });
        self.bar.inc(1);
        let step = (self.of / 10).max(1);
        if !self.on_terminal && now.is_multiple_of(step) {
            say(format_args!(
                "{now}/{} orders, {:.0?}",
                self.of,
                self.bar.elapsed()
            ));
        }
    }

    /// Waits until so many are placed.
    pub(crate) async fn placed(&self, wanted: usize) {
        let mut placed = self.placed.subscribe();
        // The sender lives as long as this.
        let _ = placed.wait_for(|placed| *placed >= wanted).await;
    }

    /// Says something beside the bar.
    pub(crate) fn note(&self, text: &str) {
        if self.on_terminal {
            self.bar.println(text);
        } else {
            say(format_args!("{text}"));
        }
    }

    pub(crate) fn finish(&self) {
        self.bar.finish();
    }
}
