//! Replays: events of the log, sent to a destination's transport once more.
//!
//! A replay is a destination for as long as it lasts: with cursors, leases, lines and a window of its own. So it goes on where
//! it stopped, several processes may share it, its events keep their order among themselves, and the log keeps what it
//! has not sent, up to the limit for abandoned destinations. It is removed when it is through.

use std::{
    future::Future,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{Admin, Destination, Filter, Removed, Side, destinations::tell};
use crate::{
    destination::{Start, as_replay, check_name, of_replay},
    error::{Error, Kind, Result},
    relay::Relay,
    store::{Added, Counted, Extent, Logged, NewDestination, Registered},
};

/// Why a replay was removed that has done its work.
const THROUGH: &str = "the replay is through";
/// How often a replay looks how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// Events counted at most.
pub(crate) const COUNTED: i64 = 100_000;

/// Which events of the log: those that satisfy all that is given. The default is all there are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Selection {
    /// Enqueued at this time or later, by the database's clock.
    pub since: Option<SystemTime>,
    /// Enqueued before this time.
    pub before: Option<SystemTime>,
    /// From this position on.
    pub from: Option<i64>,
    /// Up to this position, which is in it.
    pub to: Option<i64>,
    /// Of this topic.
    pub topic: Option<String>,
    /// Of this type.
    pub kind: Option<String>,
    /// Of this key.
    pub key: Option<String>,
}

impl Selection {
    /// Whether it names an event. One whose time has not come was not sent before and is none of a replay's.
    pub(crate) fn names(&self, event: &Logged, now: SystemTime) -> bool {
        let m = &event.message;
        self.since.is_none_or(|t| m.time >= t)
            && self.before.is_none_or(|t| m.time < t)
            && self.from.is_none_or(|p| event.position >= p)
            && self.to.is_none_or(|p| event.position <= p)
            && self.topic.as_ref().is_none_or(|t| *t == m.topic)
            && self.kind.as_ref().is_none_or(|k| *k == m.kind)
            && (self.key.is_none() || self.key == m.key)
            && event.deliver_at.is_none_or(|t| t <= now)
    }

    fn check(&self, operation: &'static str) -> Result<()> {
        let wrong = |text: &'static str| Err(Error::new(Kind::Invalid, operation, text));
        match (self.since, self.before) {
            (Some(since), Some(before)) if since >= before => {
                return wrong("`since` is not before `before`: no event lies between them");
            }
            _ => {}
        }
        match (self.from, self.to) {
            (Some(from), _) if from < 0 => wrong("`from` is negative; positions begin at 1"),
            (from, Some(to)) if to < from.unwrap_or(1) => {
                wrong("`to` lies before `from`, or before 1, where positions begin")
            }
            _ => Ok(()),
        }
    }
}

/// What is to be sent again, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplayRequest {
    /// The replay's name, 1 to 64 letters, digits, `_`, `-`, `.`: by it a replay is run, looked at and cancelled. The events
    /// carry it as the attribute `pillarboxreplayed`.
    pub name: String,
    /// The destination whose transport gets the events.
    pub destination: String,
    /// Which events. Those that are enqueued after the replay was started are not among them.
    pub selection: Selection,
    /// Most events a second, across all that run the replay in one process; 0.01 to 100,000. Defaults to 100.
    pub per_second: f64,
    /// How long the consumers' inboxes remember (`[consumer] remember`). Within it an event that was applied is not applied
    /// again. Defaults to 24 h.
    pub remember: Duration,
    /// Also events that are older than that: who has applied them applies them a second time. Defaults to false.
    pub allow_duplicates: bool,
    /// Goes ahead with what is left where retention has removed some of what is asked for. Defaults to false.
    pub allow_gaps: bool,
}

impl ReplayRequest {
    /// A replay of everything in the log.
    #[must_use]
    pub fn new(name: impl Into<String>, destination: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            destination: destination.into(),
            selection: Selection::default(),
            per_second: 100.0,
            remember: Duration::from_secs(24 * 3_600),
            allow_duplicates: false,
            allow_gaps: false,
        }
    }

    /// Of these events.
    #[must_use]
    pub fn of(mut self, selection: Selection) -> Self {
        self.selection = selection;
        self
    }

    fn check(&self, operation: &'static str) -> Result<()> {
        check_name(operation, &self.name)?;
        check_name(operation, &self.destination)?;
        self.selection.check(operation)?;
        if (0.01..=100_000.0).contains(&self.per_second) {
            return Ok(());
        }
        let text = format!(
            "{} events a second; 0.01 to 100,000 are expected",
            self.per_second
        );
        Err(Error::new(Kind::Invalid, operation, text))
    }
}

/// What a replay would send: a dry run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayPlan {
    /// Events that the selection names; counted up to 100,000. The destination's topics are not looked at.
    pub events: u64,
    /// The enqueue times of the first and the last of them.
    pub between: Option<(SystemTime, SystemTime)>,
    /// Of these, those that are older than the inboxes remember.
    pub forgotten: u64,
    /// What the selection asks for and retention has removed; none if nothing is known to be gone.
    pub gone: Option<Gone>,
    /// The oldest event of the log; none if it is empty.
    pub oldest: Option<(i64, SystemTime)>,
}

/// What retention has removed from the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone {
    /// The highest position that was removed.
    pub position: i64,
    /// The enqueue time of the newest event that was removed.
    pub time: SystemTime,
}

/// A replay as it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// Its name.
    pub name: String,
    /// Where the events go.
    pub destination: String,
    /// Which events.
    pub selection: Selection,
    /// Most events a second.
    pub per_second: f64,
    /// Who started it, and why.
    pub why: String,
    /// When it was started.
    pub started: SystemTime,
    /// Events that it named when it was started; counted up to 100,000.
    pub events: u64,
    /// Events that the broker has taken in this run, retried ones among them.
    pub sent: u64,
    /// The lowest position up to which a partition is through, and the log's end when it was started.
    pub position: i64,
    /// See `position`.
    pub end: i64,
    /// Events that wait for another attempt.
    pub deferred: u64,
    /// Events that were refused for good. They become the destination's own when the replay ends.
    pub dead_letters: u64,
    /// Whether a relay runs it now.
    pub is_running: bool,
    /// Whether all is sent, or given up.
    pub is_through: bool,
}

/// What the table keeps of a replay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Kept {
    destination: String,
    selection: Selection,
    per_second: f64,
    why: String,
    events: u64,
    end: i64,
}

impl Admin {
    /// Says what a replay would send, and changes nothing.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a name, a selection or a rate that is out of bounds; [`Kind::NotFound`] for an unknown destination;
    /// the database's.
    pub async fn plan_replay(&self, request: &ReplayRequest) -> Result<ReplayPlan> {
        Ok(self.plan("plan a replay", request).await?.0)
    }

    /// Starts a replay: from now on the log keeps its events for it. [`Admin::run_replay`] sends them. True if it is new;
    /// false if it is there already, as asked for.
    ///
    /// # Errors
    /// As [`Admin::plan_replay`], and [`Kind::Invalid`] if the selection names no event, reaches beyond what retention has left
    /// ([`ReplayRequest::allow_gaps`]) or beyond the inboxes' memory ([`ReplayRequest::allow_duplicates`]); [`Kind::Exists`] if
    /// another replay of this name is not through.
    pub async fn start_replay(&self, request: &ReplayRequest, why: &str) -> Result<bool> {
        const OPERATION: &str = "start a replay";
        let (plan, extent) = self.plan(OPERATION, request).await?;
        permit(OPERATION, request, &plan)?;
        let kept = Kept {
            destination: request.destination.clone(),
            selection: request.selection.clone(),
            per_second: request.per_second,
            why: format!("{}: {why}", self.operator),
            events: plan.events,
            end: extent.newest,
        };
        let text = serde_json::to_string(&kept).map_err(|e| {
            let text = "the selection holds a time that cannot be written down";
            Error::new(Kind::Invalid, OPERATION, text).caused_by(e)
        })?;
        let new = NewDestination {
            name: of_replay(&request.name),
            start: Start::Earliest,
            replay: Some(text),
            again: true,
        };
        if let Added::There(_) = self.store.add_destination(&new).await? {
            let there = self.replay(&request.name).await?;
            let same = there.destination == request.destination
                && there.selection == request.selection
                && (there.per_second - request.per_second).abs() < f64::EPSILON;
            if same {
                return Ok(false);
            }
            let text = format!(
                "another replay named {:?} is not through; run it, cancel it, or choose another name",
                request.name
            );
            return Err(Error::new(Kind::Exists, OPERATION, text));
        }
        let operator = &*self.operator;
        tracing::info!(operator, why, replay = request.name, destination = request.destination, events = plan.events, selection = ?request.selection, "a replay was started");
        Ok(true)
    }

    /// Sends what a replay has not sent, with a relay of its destination: that relay's transport, topics, source and retry
    /// schedule count, and `on_exhausted` is `continue`. Ends when all is through, and the replay is then removed; or when
    /// `stop` resolves, after which it may be run again and goes on. `report` is called a few times a second.
    ///
    /// Waits for a database or broker that is away. If the process dies, at most a window of events is sent again.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is no such replay; [`Kind::Invalid`] for a relay of another destination; what ends
    /// a relay.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// # use pillarbox_core::{Admin, Outbox, Relay, admin::{ReplayRequest, Selection}, transport::Transport};
    /// # async fn f(admin: Admin, outbox: Outbox, broker: Arc<dyn Transport>) -> pillarbox_core::Result<()> {
    /// let request = ReplayRequest::new("lost-queue", "main").of(Selection {
    ///     kind: Some("shop.order.placed".to_owned()),
    ///     ..Selection::default()
    /// });
    /// println!("{} events", admin.plan_replay(&request).await?.events);
    /// admin.start_replay(&request, "the queue was deleted by mistake").await?;
    /// let relay = Relay::new(&outbox, broker).source("shop");
    /// let stop = std::future::pending();
    /// admin.run_replay("lost-queue", relay, stop, |at| println!("{} of {}", at.sent, at.events)).await?;
    /// # Ok(()) }
    /// ```
    pub async fn run_replay(
        &self,
        name: &str,
        relay: Relay,
        stop: impl Future<Output = ()> + Send,
        mut report: impl FnMut(&Replay) + Send,
    ) -> Result<Replay> {
        const OPERATION: &str = "run a replay";
        let replay = self.replay(name).await?;
        if !relay.serves(&replay.destination) {
            let text = format!(
                "the replay {name:?} goes to {:?}, and the relay is another destination's",
                replay.destination
            );
            return Err(Error::new(Kind::Invalid, OPERATION, text));
        }
        let per_second = replay.per_second;
        let (relay, sent) = relay.replaying(&self.store, name, &replay.selection, per_second);
        let mut running = relay.spawn();
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(stop);
        let mut last = replay;
        loop {
            tokio::select! {
                biased;
                ended = &mut running => match ended {
                    Ok(()) => return Ok(last),
                    Err(e) => return self.ended_by_others(name, last, e).await,
                },
                () = &mut stop => {
                    running.shutdown().await?;
                    last.sent = sent.sent();
                    return Ok(last);
                }
                _ = looks.tick() => {}
            }
            last = match self.replay(name).await {
                Ok(now) => now,
                Err(e) if e.is_temporary() => continue,
                Err(e) => {
                    running.abort();
                    return self.ended_by_others(name, last, e).await;
                }
            };
            last.sent = sent.sent();
            report(&last);
            if last.is_through {
                running.shutdown().await?;
                self.end(&last).await?;
                return Ok(last);
            }
        }
    }

    /// The replays that are not through, by name.
    ///
    /// # Errors
    /// The database's.
    pub async fn replays(&self) -> Result<Vec<Replay>> {
        let mut all = Vec::new();
        for known in self.store.destinations().await? {
            if known.replay.is_some() {
                all.push(self.look(known).await?);
            }
        }
        Ok(all)
    }

    /// One replay that is not through.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; the database's.
    pub async fn replay(&self, name: &str) -> Result<Replay> {
        const OPERATION: &str = "look at a replay";
        check_name(OPERATION, name)?;
        let destination = of_replay(name);
        let known = self.store.destinations().await?;
        let found = known
            .into_iter()
            .find(|k| k.destination.name == destination);
        match found {
            Some(known) => self.look(known).await,
            None => Err(missing(OPERATION, name)),
        }
    }

    /// Ends a replay that is not through, and answers what it has not sent. Whoever runs it ends with [`Kind::NotFound`].
    ///
    /// # Errors
    /// As [`Admin::replay`].
    pub async fn cancel_replay(&self, name: &str, why: &str) -> Result<Removed> {
        let replay = self.replay(name).await?;
        let why = format!("{}: {why}", self.operator);
        let (heir, destination) = (Some(replay.destination.as_str()), of_replay(name));
        let removed = self.store.remove_destination(&destination, &why, heir);
        let Some(removed) = removed.await? else {
            return Err(missing("cancel a replay", name));
        };
        tell(&removed);
        Ok(removed)
    }

    async fn end(&self, replay: &Replay) -> Result<()> {
        let heir = Some(replay.destination.as_str());
        let name = of_replay(&replay.name);
        self.store.remove_destination(&name, THROUGH, heir).await?;
        let (name, sent) = (&*replay.name, replay.sent);
        let dead_letters = replay.dead_letters;
        tracing::info!(replay = name, sent, dead_letters, "a replay is through");
        Ok(())
    }

    /// Another process has sent the last of it.
    async fn ended_by_others(&self, name: &str, last: Replay, why: Error) -> Result<Replay> {
        let name = of_replay(name);
        let removed = match why.kind() {
            Kind::NotFound => self.store.removed_destinations().await?,
            _ => Vec::new(),
        };
        if !removed.iter().any(|r| r.name == name && r.why == THROUGH) {
            return Err(why);
        }
        Ok(Replay {
            is_through: true,
            is_running: false,
            ..last
        })
    }

    async fn look(&self, known: Registered) -> Result<Replay> {
        let Registered {
            destination,
            replay,
        } = known;
        let name = destination.name.clone();
        let kept: Kept =
            serde_json::from_str(replay.as_deref().unwrap_or_default()).map_err(|e| {
                let text = format!("what the table says of {name:?} cannot be read");
                Error::new(Kind::Database, "look at a replay", text).caused_by(e)
            })?;
        let waiting = self.store.deferred(Side::Relay, &name).await?;
        let letters = Filter::of_destination(&name);
        let dead_letters = self.store.count_letters(&letters).await?.letters;
        let deferred = waiting.total + waiting.scheduled;
        Ok(Replay {
            name: as_replay(&name).unwrap_or(&name).to_owned(),
            destination: kept.destination,
            selection: kept.selection,
            per_second: kept.per_second,
            why: kept.why,
            started: destination.added,
            events: kept.events,
            sent: 0,
            position: lowest(&destination, kept.end),
            end: kept.end,
            deferred,
            dead_letters,
            is_running: destination.is_served(),
            is_through: deferred == 0 && destination.cursors.iter().all(|c| !c.open),
        })
    }

    async fn plan(
        &self,
        operation: &'static str,
        request: &ReplayRequest,
    ) -> Result<(ReplayPlan, Extent)> {
        request.check(operation)?;
        let known = self.store.destinations().await?;
        let is_known = |k: &Registered| k.destination.name == request.destination;
        if !known.iter().any(is_known) {
            return Err(self.unknown(operation, &request.destination).await);
        }
        let extent = self.store.log_extent().await?;
        let selection = &request.selection;
        let counted = self.store.count_events(selection, request.remember);
        let Counted {
            events,
            between,
            older,
        } = counted.await?;
        let plan = ReplayPlan {
            events,
            between,
            forgotten: older,
            gone: extent.gone.filter(|gone| reaches(&request.selection, gone)),
            oldest: extent.oldest,
        };
        Ok((plan, extent))
    }
}

fn missing(operation: &'static str, name: &str) -> Error {
    let text = format!(
        "there is no replay {name:?}: it was not started, was cancelled, is through, or was abandoned"
    );
    Error::new(Kind::NotFound, operation, text)
}

/// Whether a selection asks, by a time or position of its own, for what is gone. One that names neither asks for what there is.
fn reaches(selection: &Selection, gone: &Gone) -> bool {
    selection.since.is_some_and(|t| t <= gone.time)
        || selection.from.is_some_and(|p| p <= gone.position)
        || (selection.since.is_none()
            && selection.from.is_none()
            && (selection.before.is_some_and(|t| t <= gone.time)
                || selection.to.is_some_and(|p| p <= gone.position)))
}

/// Refuses what would surprise somebody later.
fn permit(operation: &'static str, request: &ReplayRequest, plan: &ReplayPlan) -> Result<()> {
    let refuse = |text: String| Err(Error::new(Kind::Invalid, operation, text));
    if let (Some(gone), false) = (plan.gone, request.allow_gaps) {
        let left = plan.oldest.map_or_else(
            || "the log is empty".to_owned(),
            |(position, time)| {
                let time = Start::At(time);
                format!("the log begins at position {position}, enqueued at {time}")
            },
        );
        let newest = Start::At(gone.time);
        return refuse(format!(
            "the selection reaches beyond retention: events up to position {}, the last enqueued at {newest}, were removed; \
             {left}. Ask for what is left, or allow gaps ({} events of the selection are left)",
            gone.position, plan.events
        ));
    }
    if plan.events == 0 {
        return refuse("the selection names no event of the log".to_owned());
    }
    if plan.forgotten > 0 && !request.allow_duplicates {
        return refuse(format!(
            "{} of the {} events are older than the inboxes' memory of {:?}: consumers that have applied them would apply \
             them again. Ask for younger ones, or allow duplicates",
            plan.forgotten, plan.events, request.remember
        ));
    }
    Ok(())
}

/// How far the partition is that is farthest behind.
fn lowest(destination: &Destination, end: i64) -> i64 {
    let open = destination.cursors.iter().filter(|c| c.open);
    open.map(|c| c.position).min().unwrap_or(end)
}
