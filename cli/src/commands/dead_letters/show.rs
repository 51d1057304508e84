use std::{collections::BTreeMap, fmt::Write as _};

use clap::Args;
use pillarbox::admin;

use super::selection::Selection;
use crate::{
    answer::{plain, rfc3339},
    failure::Result,
    place::Place,
    shape,
};

/// Payload characters that a terminal gets; `--json` has all.
const SHOWN: usize = 10_000;

/// Show one dead letter whole, with its payload.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox dead-letters show 0198c0de-0000-7000-8000-000000000001 --config shop.toml
  pillarbox dead-letters show 0198c0de-0000-7000-8000-000000000001 --config shop.toml --json | jq -r .payload")]
pub(crate) struct Show {
    #[command(flatten)]
    pub(crate) place: Place,
    /// The event's id
    id: String,
    #[command(flatten)]
    selection: Selection,
}

impl Show {
    pub(crate) async fn run(self) -> Result<()> {
        let admin = self.place.admin("show").await?;
        let letter = self.selection.one(&admin, &self.id).await?;
        let shown = admin.dead_letter(&letter.id).await?;
        let shape = shape::Shown::from(&shown);
        self.place.answer().give(&shape, || text(&shown))
    }
}

fn text(shown: &admin::Shown) -> String {
    let l = &shown.letter;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<14}{value}");
    };
    line("id", &plain(&l.id.id, 512));
    line("source", &plain(&l.id.source, 512));
    line(
        "given up by",
        &format!("{} {}", l.id.side.as_str(), plain(&l.id.scope, 256)),
    );
    line("reason", &plain(&l.reason, 4_000));
    line("attempts", &l.attempts.to_string());
    line("first failure", &rfc3339(l.first_failure));
    line("last failure", &rfc3339(l.last_failure));
    line("topic", &plain(&l.topic, 256));
    line("type", &plain(&l.kind, 256));
    line(
        "key",
        &l.key
            .as_deref()
            .map_or_else(|| "none".to_owned(), |k| plain(k, 1_024)),
    );
    line("enqueued", &rfc3339(l.time));
    line("position", &l.position.to_string());
    line(
        "maybe sent",
        if l.maybe_sent {
            "yes: the answer to an attempt was lost"
        } else {
            "no"
        },
    );
    line("retried", &l.retried.to_string());
    if l.unreadable {
        line("unreadable", "it can be discarded, but not retried");
    }
    map(&mut line, "attribute", &shown.message.attributes);
    map(&mut line, "header", &shown.message.headers);
    match shown.message.payload.as_deref() {
        None => line("payload", "none: a tombstone"),
        Some(bytes) => {
            line("payload", &format!("{} bytes", bytes.len()));
            match std::str::from_utf8(bytes) {
                Ok(body) => line("", &plain(body, SHOWN)),
                Err(_) => line("", "no text; --json has it in base64"),
            }
        }
    }
    text
}

fn map(line: &mut impl FnMut(&str, &str), what: &str, map: &BTreeMap<String, String>) {
    for (name, value) in map {
        line(
            what,
            &format!("{} = {}", plain(name, 256), plain(value, 1_024)),
        );
    }
}
