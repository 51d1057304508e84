use std::{
    io::{IsTerminal as _, stderr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use pillarbox::{
    Admin,
    admin::{Done, DryRun, Ended, Filter, Pace, Page},
};
use serde_json::json;

use super::selection::Selection;
use crate::{
    failure::{Failure, Result},
    place::{By, Place, confirm},
    shape, signals,
};

/// Parked events that a dry run counts at most.
const PARKED: u32 = 1_000;

/// How a command for one letter or many runs.
#[derive(Args)]
pub(crate) struct Bulk {
    /// Only say what it would touch
    #[arg(long)]
    dry_run: bool,
    /// Do not ask before many letters are changed
    #[arg(long, short)]
    yes: bool,
    /// Most letters a second
    #[arg(long, value_name = "N", default_value_t = 50.0, value_parser = rate)]
    rate: f64,
    /// Most letters in all
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    most: u64,
    #[command(flatten)]
    by: By,
}

/// Retrying or discarding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Retry { waiting: u64 },
    Discard,
}

impl Change {
    fn verb(self) -> &'static str {
        match self {
            Self::Retry { .. } => "retry",
            Self::Discard => "discard",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Self::Retry { .. } => "retried",
            Self::Discard => "discarded",
        }
    }
}

impl Bulk {
    pub(crate) async fn run(
        &self,
        place: &Place,
        id: Option<&str>,
        selection: &Selection,
        change: Change,
    ) -> Result<()> {
        let operator = self.by.operator();
        let admin = place.admin(&operator).await?;
        if let Some(id) = id {
            return self.one(place, &admin, id, selection, change).await;
        }
        selection.check(&admin).await?;
        let filter = selection.filter();
        if filter.scope.is_none() {
            let text = format!(
                "{} what? Name an event's id, or many by --destination or --group with any other filter",
                change.verb()
            );
            return Err(Failure::Usage(text));
        }
        let found = admin.dry_run(&filter).await?;
        let page = Page {
            limit: PARKED,
            ..Page::default()
        };
        let parked = admin.parked(&filter, &page).await?.len() as u64;
        if self.dry_run {
            let shape = shape::DryRun::new(&found, parked);
            place
                .answer()
                .give(&shape, || would(&found, parked, change))?;
        }
        if found.letters + parked == 0 {
            let text = "no dead letter matches; `pillarbox dead-letters list` shows what there is";
            return Err(Failure::Finding(text.to_owned()));
        }
        if self.dry_run {
            return Ok(());
        }
        if !self.yes {
            confirm(&would(&found, parked, change))?;
        }
        let expected = (found.letters + parked).min(self.most);
        self.many(place, admin, &filter, change, expected).await
    }

    async fn one(
        &self,
        place: &Place,
        admin: &Admin,
        id: &str,
        selection: &Selection,
        change: Change,
    ) -> Result<()> {
        let letter = selection.one(admin, id).await?;
        if self.dry_run {
            let filter = Filter {
                id: Some(letter.id.id.clone()),
                ..selection.filter()
            };
            let found = admin.dry_run(&filter).await?;
            let parked = 1_u64.saturating_sub(found.letters);
            let shape = shape::DryRun::new(&found, parked);
            return place
                .answer()
                .give(&shape, || would(&found, parked, change));
        }
        let why = &self.by.why;
        let done = match change {
            Change::Retry { .. } => admin.retry(&letter.id, why).await?,
            Change::Discard => admin.discard(&letter.id, why).await.map(|()| true)?,
        };
        let shape = json!({ change.done(): u64::from(done), "unreadable": 0, "ended": "complete" });
        place.answer().give(&shape, || {
            if done {
                format!("{} {}", change.done(), letter.id)
            } else {
                format!("{}: waits to be tried already", letter.id)
            }
        })
    }

    async fn many(
        &self,
        place: &Place,
        admin: Admin,
        filter: &Filter,
        change: Change,
        expected: u64,
    ) -> Result<()> {
        let bar = progress(expected);
        let (shown, so_far) = (bar.clone(), Arc::new(AtomicU64::new(0)));
        let counted = so_far.clone();
        let admin = admin.watched(move |done| {
            counted.store(done.done, Relaxed);
            shown.set_position(done.done);
        });
        let mut pace = Pace {
            per_second: self.rate,
            most: self.most,
            ..Pace::default()
        };
        let why = &self.by.why;
        let stop = signals::stop()?;
        let work = async {
            match change {
                Change::Retry { waiting } => {
                    pace.waiting = waiting;
                    admin.retry_all(filter, &pace, why).await
                }
                Change::Discard => admin.discard_all(filter, &pace, why).await,
            }
        };
        let ended = tokio::select! {
            done = work => Some(done),
            // Each step is a transaction of its own: what is done is done.
            () = stop.cancelled() => None,
        };
        bar.finish_and_clear();
        let stopped = Done {
            done: so_far.load(Relaxed),
            ..Done::default()
        };
        match ended {
            Some(Ok(done)) => tell(place, change, &done, word(done.ended)),
            // The answer says how far it came; the error why not farther.
            Some(Err(e)) => tell(place, change, &stopped, "failed").and_then(|()| Err(e.into())),
            None => tell(place, change, &stopped, "stopped"),
        }
    }
}

fn tell(place: &Place, change: Change, done: &Done, ended: &str) -> Result<()> {
    let shape = json!({ change.done(): done.done, "unreadable": done.unreadable, "ended": ended });
    let rest = match ended {
        "most" => "; there are more: --most was reached",
        "waiting" => {
            "; there are more, but too many wait to be tried: go on when `status` shows fewer deferred"
        }
        "stopped" => "; stopped by a signal, the rest is as it was",
        "failed" => "; then it failed, and the rest is as it was",
        _ => "",
    };
    place.answer().give(&shape, || {
        let unreadable = match done.unreadable {
            0 => String::new(),
            n => format!("; {n} cannot be read as they were written and were left alone"),
        };
        format!(
            "{} {} dead letters{unreadable}{rest}",
            change.done(),
            done.done
        )
    })?;
    match ended {
        "waiting" | "stopped" => Err(Failure::Finding(format!("not all was done{rest}"))),
        _ if done.unreadable > 0 => Err(Failure::Finding(format!(
            "{} dead letters cannot be retried",
            done.unreadable
        ))),
        _ => Ok(()),
    }
}

fn word(ended: Ended) -> &'static str {
    match ended {
        Ended::Complete => "complete",
        Ended::Most => "most",
        Ended::Waiting => "waiting",
    }
}

/// What it would do, as a sentence.
fn would(found: &DryRun, parked: u64, change: Change) -> String {
    let mut text = format!(
        "would {} {} dead letters of {} keys ({} without a key)",
        change.verb(),
        found.letters,
        found.keys,
        found.keyless
    );
    if parked > 0 {
        text.push_str(&format!(
            ", and {parked} parked events, whose keys then go on"
        ));
    }
    if found.maybe_sent > 0 {
        text.push_str(&format!(
            "; the broker may have {} of them already",
            found.maybe_sent
        ));
    }
    match (found.newer, change) {
        (Some(newer), Change::Retry { .. }) if newer > 0 => {
            text.push_str(&format!(
                "; {newer} newer events of these keys were sent before them"
            ));
        }
        _ => {}
    }
    text
}

/// On stderr, where that is a terminal.
fn progress(of: u64) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(of);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec}, {eta} left") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn rate(text: &str) -> Result<f64, String> {
    let found = text.parse::<f64>().ok();
    let good = found.filter(|n| (0.01..=10_000.0).contains(n));
    good.ok_or_else(|| "expected letters a second, 0.01 to 10000".to_owned())
}
