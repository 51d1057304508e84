//! What was given up, by relays (events on their way to the broker) and by consumers (events on their way to a handler).

mod bulk;
mod discard;
mod export;
mod list;
mod retry;
mod selection;
mod show;

use clap::Subcommand;

use crate::{failure::Result, place::Place};

#[derive(Subcommand)]
pub(crate) enum DeadLetters {
    List(list::List),
    Show(show::Show),
    Retry(retry::Retry),
    Discard(discard::Discard),
    Export(export::Export),
}

impl DeadLetters {
    pub(crate) async fn run(self) -> Result<()> {
        match self {
            Self::List(list) => list.run().await,
            Self::Show(show) => show.run().await,
            Self::Retry(retry) => retry.run().await,
            Self::Discard(discard) => discard.run().await,
            Self::Export(export) => export.run().await,
        }
    }

    pub(crate) fn place(&self) -> &Place {
        match self {
            Self::List(list) => &list.place,
            Self::Show(show) => &show.place,
            Self::Retry(retry) => &retry.place,
            Self::Discard(discard) => &discard.place,
            Self::Export(export) => &export.place,
        }
    }
}
