use std::{
    io::{IsTerminal as _, stderr},
    time::Duration,
};

use clap::Args;
use indicatif::ProgressBar;
use pillarbox::{Kind, admin::Page};

use super::selection::Selection;
use crate::{answer::Answer, failure::Result, place::Place, shape};

/// Write dead letters to stdout, whole, as JSON Lines, the oldest first. Changes nothing.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox dead-letters export --config shop.toml > dead-letters.jsonl
  pillarbox dead-letters export --config shop.toml --group billing | jq -r .payload")]
pub(crate) struct Export {
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(flatten)]
    selection: Selection,
    /// The events that their keys wait behind, instead
    #[arg(long)]
    parked: bool,
}

impl Export {
    pub(crate) async fn run(self) -> Result<()> {
        let admin = self.place.admin("export").await?;
        self.selection.check(&admin).await?;
        let filter = self.selection.filter();
        let mut page = Page {
            newest_first: false,
            after: None,
            limit: 500,
        };
        let progress = progress();
        loop {
            let letters = if self.parked {
                admin.parked(&filter, &page).await?
            } else {
                admin.dead_letters(&filter, &page).await?
            };
            let Some(last) = letters.last() else {
                progress.finish_and_clear();
                return Ok(());
            };
            page.after = Some(last.number);
            for letter in &letters {
                // One at a time: a page of large payloads would fill the memory.
                match admin.dead_letter(&letter.id).await {
                    Ok(shown) => Answer::line(&shape::Shown::from(&shown))?,
                    // Somebody has retried or discarded it meanwhile.
                    Err(e) if e.kind() == Kind::NotFound => {}
                    Err(e) => return Err(e.into()),
                }
                progress.inc(1);
            }
        }
    }
}

fn progress() -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
