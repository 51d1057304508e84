use clap::Args;

use super::{
    bulk::{Bulk, Change},
    selection::Selection,
};
use crate::{failure::Result, place::Place};

/// Delete dead letters: one by its id, or many. They do not come back; `export` first, if they may be missed.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox dead-letters discard 0198c0de-0000-7000-8000-000000000001 --config shop.toml --why 'a test order'
  pillarbox dead-letters discard --config shop.toml --destination main --type shop.test --before 30d --yes")]
pub(crate) struct Discard {
    #[command(flatten)]
    pub(crate) place: Place,
    /// The event's id; without it, all that the filters name
    id: Option<String>,
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    bulk: Bulk,
}

impl Discard {
    pub(crate) async fn run(self) -> Result<()> {
        let id = self.id.as_deref();
        self.bulk
            .run(&self.place, id, &self.selection, Change::Discard)
            .await
    }
}
