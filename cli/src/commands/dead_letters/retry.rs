use clap::Args;

use super::{
    bulk::{Bulk, Change},
    selection::Selection,
};
use crate::{failure::Result, place::Place};

/// Put dead letters back into their keys' lines: one by its id, or many in order for each key.
///
/// Relays and consumers find them within a second. What was sent of a key meanwhile is not taken back: a retried event comes after
/// it, and carries the attribute `pillarboxretried`. Mend the cause first.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox dead-letters retry 0198c0de-0000-7000-8000-000000000001 --config shop.toml --why 'the queue is bound now'
  pillarbox dead-letters retry --config shop.toml --destination main --type shop.order.placed --dry-run
  pillarbox dead-letters retry --config shop.toml --group billing --topic shop.events --key order-7 --yes
  pillarbox dead-letters retry --config shop.toml --group billing --since 2h --rate 20 --yes")]
pub(crate) struct Retry {
    #[command(flatten)]
    pub(crate) place: Place,
    /// The event's id; without it, all that the filters name
    id: Option<String>,
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    bulk: Bulk,
    /// Stop while so many events wait to be tried
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    waiting: u64,
}

impl Retry {
    pub(crate) async fn run(self) -> Result<()> {
        let change = Change::Retry {
            waiting: self.waiting,
        };
        let id = self.id.as_deref();
        self.bulk
            .run(&self.place, id, &self.selection, change)
            .await
    }
}
