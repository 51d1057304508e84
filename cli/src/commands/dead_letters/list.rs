use std::time::SystemTime;

use clap::Args;
use pillarbox::admin::{self, Page};
use serde_json::json;

use super::selection::Selection;
use crate::{
    answer::{lasting, plain, table},
    failure::Result,
    place::Place,
    shape,
};

/// List dead letters, the newest first, without payloads.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox dead-letters list --config shop.toml
  pillarbox dead-letters list --config shop.toml --group billing --reason 'no such account' --since 2h
  pillarbox dead-letters list --config shop.toml --parked")]
pub(crate) struct List {
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(flatten)]
    selection: Selection,
    /// The events that their keys wait behind, instead: those of `on_exhausted = "park"`
    #[arg(long)]
    parked: bool,
    /// The oldest first
    #[arg(long)]
    oldest: bool,
    /// Most letters, 1 to 1000
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Go on behind the letter of this number, from the list before
    #[arg(long, value_name = "NUMBER")]
    after: Option<i64>,
}

impl List {
    pub(crate) async fn run(self) -> Result<()> {
        let admin = self.place.admin("list").await?;
        self.selection.check(&admin).await?;
        let page = Page {
            newest_first: !self.oldest,
            after: self.after,
            limit: self.limit,
        };
        let filter = self.selection.filter();
        let letters = if self.parked {
            admin.parked(&filter, &page).await?
        } else {
            admin.dead_letters(&filter, &page).await?
        };
        // A full page may be the last one; the next one then is empty.
        let is_full = letters.len() >= usize::try_from(self.limit).unwrap_or(usize::MAX);
        let next = letters.last().filter(|_| is_full).map(|l| l.number);
        let shapes: Vec<shape::Letter> = letters.iter().map(Into::into).collect();
        let shape = json!({ "letters": shapes, "next": next });
        self.place.answer().give(&shape, || text(&letters, next))
    }
}

fn text(letters: &[admin::Letter], next: Option<i64>) -> String {
    if letters.is_empty() {
        return "none".to_owned();
    }
    let heads = [
        "number", "id", "by", "type", "key", "attempts", "given up", "reason",
    ];
    let now = SystemTime::now();
    let row = |l: &admin::Letter| {
        let ago = now.duration_since(l.last_failure).unwrap_or_default();
        vec![
            l.number.to_string(),
            plain(&l.id.id, 60),
            format!("{} {}", l.id.side.as_str(), plain(&l.id.scope, 40)),
            plain(&l.kind, 60),
            l.key
                .as_deref()
                .map_or_else(|| "-".to_owned(), |k| plain(k, 40)),
            l.attempts.to_string(),
            format!("{} ago", lasting(ago)),
            plain(&l.reason, 100),
        ]
    };
    let rows: Vec<_> = letters.iter().map(row).collect();
    let mut text = table(0, &heads, &rows);
    if let Some(next) = next {
        text.push_str(&format!("more with --after {next}\n"));
    }
    text
}
