//! The operators' side: what was given up, looked at, put back, or discarded; destinations and replays.
//!
//! Operators only insert rows (dead letter → waiting line) and delete rows. Who moves events on, relay or consumer, finds
//! what was put back by itself, within about a second.

mod destinations;
mod letters;
mod pauses;
pub(crate) mod replay;
mod status;

use std::{collections::HashSet, fmt, sync::Arc};

pub use crate::destination::{Cause, MAIN, REPLAYED, Reanchored, Start};
pub use crate::failure::Side;
pub use crate::pause::{Expiry, Pause, Target};
pub use destinations::{Destination, DestinationCursor, Removed};
pub(crate) use destinations::{may_be_abandoned, tell};
pub use letters::{Done, DryRun, Ended, Filter, Letter, LetterId, Pace, Page, Shown};
pub use replay::{Gone, Replay, ReplayPlan, ReplayRequest, Selection};
pub use status::{
    DestinationStatus, DutyStatus, Exceptions, GroupStatus, Installation, Owner, PartitionStatus,
    SourceStatus, Status,
};

use crate::{
    connection::Database,
    error::{Error, Kind, Result},
    failure::LineId,
    store::{Letters, Order, Store},
};

/// Letters read at a time by a command for many.
const READ: u32 = 1_000;
/// Keys of which a dry run looks for newer events.
const KEYS: usize = 100;

/// The operators' commands on one database: the dead letters of its relays (events on their way to the broker) and of its
/// consumers (events on their way to a handler).
///
/// Every step is one transaction of its own and changes nothing when it is repeated; a command that is dropped halfway has
/// done whole letters. Each change is told to `tracing` with the operator's name and the reason given.
///
/// **Order.** A retried event takes its place in its key's line at once, before what waits there. What went past it already
/// is not taken back: the event carries the attribute `pillarboxretried`, and [`Admin::dry_run`] counts the newer ones.
///
/// ```no_run
/// # use pillarbox_core::{Admin, admin::{Filter, Pace, Page}};
/// # async fn f(pool: sqlx::PgPool) -> pillarbox_core::Result<()> {
/// let admin = Admin::new(&pool, "ada");
/// let of_billing = Filter::of_group("billing");
/// for letter in admin.dead_letters(&of_billing, &Page::default()).await? {
///     println!("{} {}: {}", letter.id, letter.kind, letter.reason);
/// }
/// admin.retry_all(&of_billing, &Pace::default(), "the tax service is back").await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Admin {
    store: Arc<dyn Store>,
    operator: Arc<str>,
    watcher: Option<Watcher>,
}

/// Is told how far a command for many letters has come.
type Watcher = Arc<dyn Fn(&Done) + Send + Sync>;

impl Admin {
    /// Commands of this operator on this database.
    pub fn new(database: impl Into<Database>, operator: impl Into<String>) -> Self {
        Self {
            store: database.into().store().clone(),
            operator: operator.into().into(),
            watcher: None,
        }
    }

    /// With somebody who is told after each step of a command for many letters what is done by then, as for a progress bar.
    #[must_use]
    pub fn watched(mut self, watcher: impl Fn(&Done) + Send + Sync + 'static) -> Self {
        self.watcher = Some(Arc::new(watcher));
        self
    }

    /// What the schema says of itself, also one that is older than this program needs.
    ///
    /// # Errors
    /// [`Kind::NotMigrated`] where there is none; [`Kind::Incompatible`] if it names this program too old; the database's.
    pub async fn installation(&self) -> Result<Installation> {
        self.store.installation().await
    }

    /// How everything stands: who relays and reads what, how far it has come, what waits and what was given up. Any replica
    /// can tell, whether it owns something or not. Changes nothing.
    ///
    /// ```no_run
    /// # use pillarbox_core::Admin;
    /// # async fn f(pool: sqlx::PgPool) -> pillarbox_core::Result<()> {
    /// for destination in Admin::new(&pool, "probe").status().await?.destinations {
    ///     println!("{}: {:?} behind", destination.name, destination.lag());
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Kind::NotMigrated`] for a schema that is missing or older than this program needs; the database's.
    pub async fn status(&self) -> Result<Status> {
        let installation = self.installation().await?;
        // Says what is missing.
        self.store.partitions().await?;
        let mut seen = self.store.standings().await?;
        for scope in std::mem::take(&mut seen.scopes) {
            let exceptions = self.exceptions(&scope).await?;
            seen.put(scope, exceptions);
        }
        Ok(Status {
            installation,
            seen: seen.at,
            destinations: seen.destinations,
            groups: seen.groups,
            duties: seen.duties,
        })
    }

    async fn exceptions(&self, (side, scope): &(Side, String)) -> Result<Exceptions> {
        let waiting = self.store.deferred(*side, scope).await?;
        let filter = Filter {
            side: Some(*side),
            scope: Some(scope.clone()),
            ..Filter::default()
        };
        Ok(Exceptions {
            deferred: waiting.total,
            parked: waiting.parked,
            longest_line: waiting.longest,
            scheduled: waiting.scheduled,
            dead_letters: self.store.count_letters(&filter).await?.letters,
        })
    }

    /// Lists dead letters, without payloads.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a page without a limit from 1 to 1,000; the database's.
    pub async fn dead_letters(&self, filter: &Filter, page: &Page) -> Result<Vec<Letter>> {
        let order = page_order(page, "list dead letters")?;
        self.read(filter, order, page.limit, false).await
    }

    /// Lists the events that their keys wait behind for an operator: those of [`OnExhausted::Park`](crate::failure::OnExhausted).
    /// [`Admin::retry`] and [`Admin::discard`] let a key go on, in order.
    ///
    /// # Errors
    /// As [`Admin::dead_letters`].
    pub async fn parked(&self, filter: &Filter, page: &Page) -> Result<Vec<Letter>> {
        let order = page_order(page, "list parked events")?;
        self.read(filter, order, page.limit, true).await
    }

    /// Shows one dead letter whole, with its payload.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; the database's.
    pub async fn dead_letter(&self, id: &LetterId) -> Result<Shown> {
        let shown = self.store.letter(id).await?;
        shown.ok_or_else(|| missing("show a dead letter", id))
    }

    /// Counts what a command with this filter would touch, and changes nothing.
    ///
    /// # Errors
    /// The database's.
    pub async fn dry_run(&self, filter: &Filter) -> Result<DryRun> {
        let mut counted = self.store.count_letters(filter).await?;
        let order = Order::Lines {
            after: None,
            through: i64::MAX,
        };
        let (mut seen, mut newer) = (HashSet::new(), None);
        for letter in self.read(filter, order, READ, false).await? {
            // The first letter of its key has the most events behind it.
            let is_first = letter.order().is_some_and(|key| seen.insert(key));
            if letter.id.side == Side::Relay && is_first && seen.len() <= KEYS {
                *newer.get_or_insert(0) += self.store.newer(&letter.id).await?;
            }
        }
        counted.newer = newer;
        Ok(counted)
    }

    /// Puts one dead letter back into its key's line, for a new round of attempts; or lets a parked event and its key go on.
    /// False if it waits to be tried already.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Invalid`] for one that is [unreadable](Letter::unreadable); [`Kind::Unavailable`] while the
    /// group's handlers are too busy for it; the database's.
    pub async fn retry(&self, id: &LetterId, why: &str) -> Result<bool> {
        const OPERATION: &str = "retry a dead letter";
        if self
            .put_back(id.side, &id.scope, &[id.line_id()], why)
            .await?
            > 0
        {
            return Ok(true);
        }
        if self.store.waits(id).await? {
            return Ok(false);
        }
        if self.store.letter(id).await?.is_none() {
            return Err(missing(OPERATION, id));
        }
        let text = format!(
            "{id}: it could not be read as it was written, so that it cannot be put back; enqueue it anew and discard this one"
        );
        Err(Error::new(Kind::Invalid, OPERATION, text))
    }

    /// Deletes one dead letter; or a parked event, whose key goes on without it. A consumer's inbox goes on remembering the event: it is not applied if it comes again.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; the database's.
    pub async fn discard(&self, id: &LetterId, why: &str) -> Result<()> {
        let ids = [id.line_id()];
        if self.drop_letters(id.side, &id.scope, &ids, why).await? == 0 {
            return Err(missing("discard a dead letter", id));
        }
        Ok(())
    }

    /// Puts back all that the filter names now, which must name side and scope: in order for each key, at the pace given, in
    /// transactions of at most 100 letters.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a filter or pace that is out of bounds; the database's, after which what was done stays done and
    /// the command may be repeated.
    pub async fn retry_all(&self, filter: &Filter, pace: &Pace, why: &str) -> Result<Done> {
        self.each(filter, pace, why, true).await
    }

    /// Deletes all that the filter names now, as [`Admin::discard`] does, at the pace given.
    ///
    /// # Errors
    /// As [`Admin::retry_all`].
    pub async fn discard_all(&self, filter: &Filter, pace: &Pace, why: &str) -> Result<Done> {
        self.each(filter, pace, why, false).await
    }

    async fn each(&self, filter: &Filter, pace: &Pace, why: &str, retry: bool) -> Result<Done> {
        let operation = if retry {
            "retry dead letters"
        } else {
            "discard dead letters"
        };
        let (side, scope) = filter.place(operation)?;
        pace.check(operation)?;
        let mut done = Done::default();
        // First what is older: a parked event's key may have given up others before the policy was another.
        for parked in [false, true] {
            let run = Run {
                filter,
                pace,
                place: (side, scope),
                why,
                retry,
                parked,
            };
            self.every(&run, &mut done).await?;
            if done.ended != Ended::Complete {
                break;
            }
        }
        Ok(done)
    }

    async fn every(&self, run: &Run<'_>, done: &mut Done) -> Result<()> {
        let (filter, parked) = (run.filter, run.parked);
        // What is given up from now on is not meant: a letter that fails again would be put back without end.
        let newest = self.read(filter, Order::Newest(None), 1, parked).await?;
        let Some(through) = newest.first().map(|l| l.number) else {
            return Ok(());
        };
        let mut after = None;
        loop {
            let order = Order::Lines { after, through };
            let letters = self.read(filter, order, READ, parked).await?;
            let Some(last) = letters.last() else {
                return Ok(());
            };
            after = Some((last.position, last.number));
            for some in letters.chunks(run.pace.at_once()) {
                if !self.step(run, some, done).await? {
                    return Ok(());
                }
            }
        }
    }

    /// One transaction and its wait. False if the command ends here.
    async fn step(&self, run: &Run<'_>, some: &[Letter], done: &mut Done) -> Result<bool> {
        let (pace, (side, scope)) = (run.pace, run.place);
        let left = usize::try_from(pace.most.saturating_sub(done.done)).unwrap_or(usize::MAX);
        if left == 0 {
            done.ended = Ended::Most;
            return Ok(false);
        }
        // What is parked waits in its line already.
        if run.retry && !run.parked && self.store.deferred(side, scope).await?.total >= pace.waiting
        {
            done.ended = Ended::Waiting;
            return Ok(false);
        }
        let is_cut = some.len() > left;
        let some = &some[..some.len().min(left)];
        let readable = some.iter().filter(|l| !(run.retry && l.unreadable));
        let ids: Vec<LineId> = readable.map(|l| l.id.line_id()).collect();
        done.unreadable += (some.len() - ids.len()) as u64;
        done.done += if run.retry {
            self.put_back(side, scope, &ids, run.why).await?
        } else {
            self.drop_letters(side, scope, &ids, run.why).await?
        };
        if let Some(watcher) = &self.watcher {
            watcher(done);
        }
        if is_cut {
            done.ended = Ended::Most;
            return Ok(false);
        }
        tokio::time::sleep(pace.wait(ids.len())).await;
        Ok(true)
    }

    async fn read(
        &self,
        filter: &Filter,
        order: Order,
        limit: u32,
        parked: bool,
    ) -> Result<Vec<Letter>> {
        let letters = Letters {
            filter: filter.clone(),
            parked,
            order,
            limit,
        };
        self.store.letters(&letters).await
    }

    async fn put_back(&self, side: Side, scope: &str, ids: &[LineId], why: &str) -> Result<u64> {
        let moved = self.store.retry_letters(side, scope, ids).await?;
        self.tell("retried", side, scope, ids, moved, why);
        Ok(moved)
    }

    async fn drop_letters(
        &self,
        side: Side,
        scope: &str,
        ids: &[LineId],
        why: &str,
    ) -> Result<u64> {
        let gone = self.store.discard_letters(side, scope, ids).await?;
        self.tell("discarded", side, scope, ids, gone, why);
        Ok(gone)
    }

    fn tell(&self, what: &str, side: Side, scope: &str, ids: &[LineId], count: u64, why: &str) {
        if count == 0 {
            return;
        }
        let (operator, side) = (&*self.operator, side.as_str());
        let ids: Vec<&str> = ids.iter().map(|(_, id)| id.as_str()).collect();
        tracing::info!(
            operator,
            why,
            side,
            scope,
            count,
            ?ids,
            "dead letters were {what}"
        );
        let what = what.to_owned();
        metrics::counter!("pillarbox_dead_letters_total", "side" => side, "scope" => scope.to_owned(), "command" => what)
            .increment(count);
    }
}

/// A command for many letters.
struct Run<'a> {
    filter: &'a Filter,
    pace: &'a Pace,
    place: (Side, &'a str),
    why: &'a str,
    retry: bool,
    parked: bool,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin")
            .field("operator", &self.operator)
            .finish_non_exhaustive()
    }
}

fn page_order(page: &Page, operation: &'static str) -> Result<Order> {
    if !(1..=READ).contains(&page.limit) {
        let text = format!("a page of {} letters; 1 to {READ} are expected", page.limit);
        return Err(Error::new(Kind::Invalid, operation, text));
    }
    Ok(if page.newest_first {
        Order::Newest(page.after)
    } else {
        Order::Oldest(page.after)
    })
}

fn missing(operation: &'static str, id: &LetterId) -> Error {
    let text = format!(
        "{id}: there is no such dead letter; it may have been retried or discarded already, and a list shows what there is"
    );
    Error::new(Kind::NotFound, operation, text)
}
