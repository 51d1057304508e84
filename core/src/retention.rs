//! Removing what nobody needs any more: the log's settled events, what the inbox has remembered for long enough, and dead
//! letters beyond their age and number.
//!
//! One cleaner by lease for each log, beside a relay, and one for each inbox, beside a consumer. What may go is proved by
//! the store, in the transaction that removes it; the lease only saves work. A cleaner's trouble stops nobody.

mod abandoned;

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use abandoned::Warned;

use crate::{
    backoff::{Backoff, chance},
    error::{Kind, Result},
    failure::Side,
    lease::{Keeper, Lease, LeaseKey, LeaseTerm},
    running::Report,
    store::{Cleaned, Store},
    supervise::caught,
};

/// Its name in the health of relay and consumer.
const CLEANER: &str = "cleaner";
/// Between steps of one look, so that whoever waits for the database's one writer gets a turn.
const PAUSE: Duration = Duration::from_millis(20);
/// Steps of one look. The next look goes on.
const STEPS: usize = 1_000;
/// What cannot be cleaned for longer than this is worth a line in the log.
const PATIENCE: Duration = Duration::from_secs(600);

/// How long what is over is kept, and how much of it. The same for all programs on a database: whoever has the lease decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetentionSettings {
    /// How long events stay in the log at least. They stay longer while a destination is not done with them. Defaults to
    /// 1 h. On PostgreSQL the log goes by slots of half this time, half an hour at least, each as a whole: it holds
    /// events for up to four slots.
    pub log: Duration,
    /// How long dead letters are kept. Defaults to 30 days. Those of a consumer stay until the broker has their copy.
    pub dead_letters: Duration,
    /// Most dead letters of a destination or group; beyond it the oldest go, whatever their age. Defaults to 100,000.
    pub dead_letters_max: u64,
    /// How long the log is kept for a destination that no relay serves; then the destination is removed, with what it has not
    /// published, and that is recorded. Counted while any relay runs on the database, and never for `main`. From half of it
    /// on there are warnings. Defaults to 14 days.
    pub abandon_after: Duration,
    /// How often the cleaner looks, 1 min at most. Defaults to 30 s.
    pub interval: Duration,
}

impl Default for RetentionSettings {
    fn default() -> Self {
        Self {
            log: Duration::from_secs(3_600),
            dead_letters: Duration::from_secs(30 * 86_400),
            dead_letters_max: 100_000,
            abandon_after: Duration::from_secs(14 * 86_400),
            interval: Duration::from_secs(30),
        }
    }
}

/// What a cleaner cleans.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scope {
    /// The log, and the dead letters of relays.
    Log,
    /// The inbox, which remembers for so long, and the dead letters of consumers.
    Inbox(Duration),
}

/// One cleaner, which works while it has the lease.
pub(crate) struct Cleaner {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) scope: Scope,
    pub(crate) term: LeaseTerm,
    pub(crate) settings: Arc<RetentionSettings>,
    pub(crate) report: Report,
}

impl Cleaner {
    /// Runs until `stop`. Ends early with no error: what stops a cleaner stops no relay and no consumer.
    /// But for a panic, which its supervisor counts.
    pub(crate) async fn run(self, stop: CancellationToken) -> Result<()> {
        // The simulation's database keeps everything, to look at it in the end.
        if self.store.pool().is_none() {
            return Ok(());
        }
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        // Never at the start: what the broker brings again after a stop comes first.
        let mut wait = self.settings.interval.mul_f64(1.0 + 0.1 * chance());
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
            wait = match self.hold(&stop).await {
                Ok(()) => {
                    backoff.reset();
                    self.settings.interval
                }
                // Its supervisor counts it and starts it again.
                Err(e) if e.kind() == Kind::Panicked => return Err(e),
                Err(e) => {
                    self.troubled(&e.to_string());
                    backoff.step()
                }
            };
        }
    }

    /// Cleans for as long as the lease lasts, if it is free.
    async fn hold(&self, stop: &CancellationToken) -> Result<()> {
        let sent = Instant::now();
        let key = LeaseKey::Duty {
            kind: CLEANER,
            scope: self.scope.name().to_owned(),
            shard: 0,
        };
        let Some(acquired) = self.store.acquire(&key, self.term).await? else {
            self.fine();
            return Ok(());
        };
        let lease = acquired.lease;
        let keeper = Keeper::start(self.store.clone(), lease.clone(), self.term, sent);
        let ended = tokio::select! {
            biased;
            () = keeper.lost().cancelled() => Ok(()),
            ended = caught(CLEANER, self.clean(&lease, stop)) => ended,
        };
        drop(keeper);
        let released = self.store.release(&lease).await;
        ended.and(released)
    }

    async fn clean(&self, lease: &Lease, stop: &CancellationToken) -> Result<()> {
        let (mut held, mut warned) = (Held::default(), Warned::default());
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                looked = self.look(lease, &mut held, &mut warned) => looked?,
            }
            self.fine();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(self.settings.interval) => {}
            }
        }
    }

    /// Everything that may go now, step by step.
    async fn look(&self, lease: &Lease, held: &mut Held, warned: &mut Warned) -> Result<()> {
        if let Scope::Log = self.scope {
            self.watch(lease, warned).await?;
        }
        for _ in 0..STEPS {
            let Cleaned {
                removed,
                more,
                held: now,
            } = match self.scope {
                Scope::Log => self.store.clean_log(lease, self.settings.log).await?,
                Scope::Inbox(remember) => self.store.clean_inbox(lease, remember).await?,
            };
            if removed > 0 {
                metrics::counter!("pillarbox_retention_removed_total", "of" => self.scope.name())
                    .increment(removed);
                tracing::debug!(of = self.scope.name(), removed, "cleaned");
            }
            held.note(now);
            if !more {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.forget_pauses(lease).await?;
        for _ in 0..STEPS {
            if !self.trim(lease).await? {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// They have ended by themselves already; here their rows go.
    async fn forget_pauses(&self, lease: &Lease) -> Result<()> {
        let removed = self.store.forget_pauses(lease, self.scope.side()).await?;
        if removed > 0 {
            tracing::debug!(of = self.scope.name(), removed, "pauses were over");
        }
        Ok(())
    }

    /// Some of the dead letters that are too old or too many. Loud, for each was an event that somebody wanted to look at.
    async fn trim(&self, lease: &Lease) -> Result<bool> {
        let side = self.scope.side();
        let RetentionSettings {
            dead_letters,
            dead_letters_max,
            ..
        } = *self.settings;
        let trims = self
            .store
            .trim_dead_letters(lease, side, dead_letters, dead_letters_max)
            .await?;
        for trim in &trims {
            let why = if trim.too_many { "number" } else { "age" };
            metrics::counter!(
                "pillarbox_dead_letters_removed_total",
                "side" => side.as_str(), "scope" => trim.scope.clone(), "for" => why
            )
            .increment(trim.removed);
            tracing::warn!(
                side = side.as_str(),
                scope = %trim.scope,
                removed = trim.removed,
                without_copy = trim.uncopied,
                "dead letters were removed for their {why}: nobody has looked at them in time"
            );
        }
        Ok(!trims.is_empty())
    }

    fn troubled(&self, trouble: &str) {
        if self.report.trouble(CLEANER, trouble) {
            tracing::warn!(of = self.scope.name(), trouble, "the cleaner waits");
        }
    }

    fn fine(&self) {
        if self.report.clear(CLEANER) {
            tracing::info!(of = self.scope.name(), "the cleaner goes on");
        }
    }
}

impl Scope {
    fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Inbox(_) => "inbox",
        }
    }

    fn side(self) -> Side {
        match self {
            Self::Log => Side::Relay,
            Self::Inbox(_) => Side::Consumer,
        }
    }
}

/// What cannot be cleaned, since when, and whether that was told.
#[derive(Debug, Default)]
struct Held(HashMap<String, (Instant, bool)>);

impl Held {
    fn note(&mut self, now: Vec<(String, &'static str)>) {
        self.0
            .retain(|what, _| now.iter().any(|(held, _)| held == what));
        for (what, why) in now {
            let (since, told) = self
                .0
                .entry(what.clone())
                .or_insert_with(|| (Instant::now(), false));
            if since.elapsed() >= PATIENCE && !std::mem::replace(told, true) {
                tracing::warn!(what, why, "cannot be cleaned, and grows");
            }
        }
    }
}
