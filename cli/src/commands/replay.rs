use std::{
    io::{IsTerminal as _, stderr},
    time::{Duration, SystemTime},
};

use clap::Args;
use humantime_serde::re::humantime;
use indicatif::{ProgressBar, ProgressStyle};
use pillarbox::admin::{self, ReplayPlan, ReplayRequest, Selection};
use serde_json::json;

use crate::{
    answer::{plain, rfc3339},
    failure::{Failure, Result},
    place::{By, Place, time},
    shape, signals,
};

/// Send events of the log to a destination once more.
///
/// Runs until all is sent; a signal stops it, and the same command goes on. Consumers that remember an event do not apply it
/// again. The log has what `[retention] log` keeps.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox replay lost-queue --config shop.toml --destination main --type shop.order.placed --dry-run
  pillarbox replay lost-queue --config shop.toml --destination main --since 30m --rate 200
  pillarbox replay one-order --config shop.toml --destination audit --topic shop.events --key order-7
  pillarbox replay lost-queue --config shop.toml --cancel")]
pub(crate) struct Replay {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Its name: by it the same replay goes on, and its events carry it as the attribute pillarboxreplayed
    name: String,
    /// Whose transport gets the events
    #[arg(long, value_name = "NAME", default_value = "main")]
    destination: String,
    /// Enqueued at this time or later: 2026-11-24T12:00:00Z, or how long ago, as in 90m
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<SystemTime>,
    /// Enqueued before this time
    #[arg(long, value_name = "TIME", value_parser = time)]
    before: Option<SystemTime>,
    /// From this position on
    #[arg(long, value_name = "POSITION")]
    from: Option<i64>,
    /// Up to this position, which is in it
    #[arg(long, value_name = "POSITION")]
    to: Option<i64>,
    /// Of this topic
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    /// Of this type
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Of this key
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Most events a second, 0.01 to 100000
    #[arg(long, value_name = "N", default_value_t = 100.0)]
    rate: f64,
    /// Only say what it would send
    #[arg(long)]
    dry_run: bool,
    /// Also events that are older than the consumers remember: who has applied them applies them again
    #[arg(long)]
    allow_duplicates: bool,
    /// Go ahead with what is left where retention has removed some of it
    #[arg(long)]
    allow_gaps: bool,
    /// How long the consumers remember, where that is not `[consumer] remember` of this configuration
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    remember: Option<Duration>,
    /// End the replay of this name instead, wherever it is
    #[arg(long, conflicts_with = "dry_run")]
    cancel: bool,
    #[command(flatten)]
    by: By,
}

impl Replay {
    pub(crate) async fn run(self) -> Result<()> {
        let settings = self.place.settings()?;
        let database = settings.store.open().await?;
        let admin = pillarbox::Admin::new(&database, self.by.operator());
        if self.cancel {
            let removed = admin.cancel_replay(&self.name, &self.by.why).await?;
            let shape =
                json!({ "ended": "cancelled", "unsent": removed.unpublished + removed.deferred });
            return self.place.answer().give(&shape, || {
                format!(
                    "the replay is cancelled; {} events were not sent",
                    removed.unpublished + removed.deferred
                )
            });
        }
        let request = self.request(settings.consumer.remember);
        if self.dry_run {
            let plan = admin.plan_replay(&request).await?;
            let shape = shape::ReplayPlan::from(&plan);
            return self.place.answer().give(&shape, || would(&plan));
        }
        let transport = pillarbox::connect(settings.transport_of(&self.destination)?).await?;
        if transport.kind() == "memory" {
            return Err(Failure::Usage("the destination's transport is \"memory\", whose consumers live in another process".to_owned()));
        }
        let outbox = settings.new_outbox(&database);
        let relay = settings.new_relay_to(&self.destination, &outbox, transport)?;
        admin.start_replay(&request, &self.by.why).await?;
        let stop = signals::stop()?;
        let bar = progress();
        let shown = bar.clone();
        let report = move |at: &admin::Replay| {
            shown.set_length(at.events);
            shown.set_position(at.sent);
        };
        let ended = admin
            .run_replay(&self.name, relay, stop.cancelled(), report)
            .await;
        bar.finish_and_clear();
        let ended = ended?;
        let word = if ended.is_through {
            "complete"
        } else {
            "stopped"
        };
        let shape = json!({
            "name": ended.name, "ended": word, "events": ended.events, "sent": ended.sent,
            "deferred": ended.deferred, "dead_letters": ended.dead_letters,
        });
        self.place.answer().give(&shape, || {
            format!(
                "sent {} events, {} were given up",
                ended.sent, ended.dead_letters
            )
        })?;
        if ended.is_through {
            return Ok(());
        }
        Err(Failure::Finding(format!(
            "the replay {:?} is not through: the same command goes on, --cancel ends it",
            plain(&self.name, 64)
        )))
    }

    fn request(&self, remember: Duration) -> ReplayRequest {
        let selection = Selection {
            since: self.since,
            before: self.before,
            from: self.from,
            to: self.to,
            topic: self.topic.clone(),
            kind: self.kind.clone(),
            key: self.key.clone(),
        };
        ReplayRequest {
            per_second: self.rate,
            remember: self.remember.unwrap_or(remember),
            allow_duplicates: self.allow_duplicates,
            allow_gaps: self.allow_gaps,
            ..ReplayRequest::new(&self.name, &self.destination).of(selection)
        }
    }
}

fn would(plan: &ReplayPlan) -> String {
    let mut text = format!("would send {} events", plan.events);
    if let Some((first, last)) = plan.between {
        text.push_str(&format!(
            ", enqueued from {} to {}",
            rfc3339(first),
            rfc3339(last)
        ));
    }
    if plan.forgotten > 0 {
        text.push_str(&format!(
            "; {} of them are older than the consumers remember (--allow-duplicates)",
            plan.forgotten
        ));
    }
    if let Some(gone) = plan.gone {
        text.push_str(&format!(
            "; events up to position {} are gone, the last enqueued at {} (--allow-gaps)",
            gone.position,
            rfc3339(gone.time)
        ));
    }
    text
}

/// On stderr, where that is a terminal.
fn progress() -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec}, {eta} left") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
