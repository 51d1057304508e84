//! Pausing and resuming.

use std::time::{Duration, SystemTime};

use super::Admin;
use crate::{
    error::{Error, Kind, Result},
    failure::Side,
    pause::{Expiry, NewPause, Pause, Target},
};

const PAUSE: &str = "pause";
const RESUME: &str = "resume";
/// The longest reason, in characters.
const REASON: usize = 1_000;
/// The longest name or key, in bytes, as [`Limits`](crate::transport::Limits) has it for keys.
const NAME: usize = 1_024;
/// How far clocks may be apart when an expiry is judged here, before the database judges it by its own.
const APART: Duration = Duration::from_secs(86_400);

impl Admin {
    /// Holds a destination, one topic or key of it, a group or one key of it back, until [`Admin::resume`] or the expiry,
    /// 7 days ahead at most. Pausing again replaces expiry, reason and name. Whoever runs obeys within about a second, finishes what is
    /// under way, and tells it in its [`Health`](crate::Health); so does whoever starts later. No attempt is counted, and
    /// order holds.
    ///
    /// Where the events wait meanwhile: of a destination or topic in the log (a topic's in its partitions' windows first;
    /// when these are full, the partition waits), of a group at the broker, of a key in `deferred` (when that is full, the
    /// partition or source waits).
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use pillarbox_core::{Admin, admin::Target};
    /// # async fn f(admin: Admin) -> pillarbox_core::Result<()> {
    /// let billing = Target::group("billing");
    /// admin.pause(&billing, Duration::from_secs(1_800), "the tax service is being moved").await?;
    /// // …
    /// admin.resume(&billing, "it has moved").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a destination or group that has never run on this database, with those that have;
    /// [`Kind::Invalid`] for an expiry that is over or more than 7 days ahead, an empty reason, a topic of a group, or more
    /// than 1,000 pauses; the database's.
    pub async fn pause(
        &self,
        target: &Target,
        expiry: impl Into<Expiry> + Send,
        why: &str,
    ) -> Result<Pause> {
        let expiry = expiry.into();
        check(target)?;
        check_expiry(expiry)?;
        let reason = reason(why)?;
        self.check_known(target).await?;
        let all = self.store.pauses(None).await?;
        let is_new = !all.iter().any(|p| p.pause.target == *target);
        if is_new && all.len() >= Pause::MOST {
            let text = format!(
                "{target}: there are {} pauses, and {} at most; resume some, or pause a topic or the whole",
                all.len(),
                Pause::MOST
            );
            return Err(Error::new(Kind::Invalid, PAUSE, text));
        }
        let pause = NewPause {
            target: target.clone(),
            expiry,
            reason,
            operator: self.operator.to_string(),
        };
        let paused = self.store.pause(&pause).await?;
        let Some(paused) = paused else {
            return Err(out_of_bounds("by the database's clock"));
        };
        tracing::info!(operator = %self.operator, why, "{}", paused.pause);
        Ok(paused.pause)
    }

    /// Ends a pause now, and answers what it was. Whoever runs goes on within about a second, in order.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is none; the database's.
    pub async fn resume(&self, target: &Target, why: &str) -> Result<Pause> {
        check(target)?;
        let Some(paused) = self.store.resume(target).await? else {
            let text = format!(
                "{target} is not paused; its pause may have ended by itself, and a list shows what there is"
            );
            return Err(Error::new(Kind::NotFound, RESUME, text));
        };
        tracing::info!(operator = %self.operator, why, target_of = %target, "resumed");
        Ok(paused.pause)
    }

    /// The pauses in force, by what they hold.
    ///
    /// # Errors
    /// The database's.
    pub async fn pauses(&self) -> Result<Vec<Pause>> {
        let all = self.store.pauses(None).await?;
        Ok(all.into_iter().map(|p| p.pause).collect())
    }

    async fn check_known(&self, target: &Target) -> Result<()> {
        let known = self.store.scopes(target.side).await?;
        if known.contains(&target.scope) {
            return Ok(());
        }
        let (what, whats) = match target.side {
            Side::Relay => ("destination", "destinations"),
            Side::Consumer => ("group", "groups"),
        };
        let text = format!(
            "there is no {what} {:?} in this database; the {whats} that have run on it are {known:?}",
            target.scope
        );
        Err(Error::new(Kind::NotFound, PAUSE, text))
    }
}

fn check(target: &Target) -> Result<()> {
    let wrong = |text: String| Err(Error::new(Kind::Invalid, PAUSE, text));
    let Target {
        side,
        scope,
        topic,
        key,
    } = target;
    if key.is_some() && topic.is_none() {
        return wrong(format!(
            "{target}: a key is one of a topic; name the topic too"
        ));
    }
    if *side == Side::Consumer && topic.is_some() && key.is_none() {
        return wrong(format!(
            "{target}: a group is paused as a whole, or one key of it; a topic is paused at the destination"
        ));
    }
    if topic.as_deref() == Some("") {
        return wrong(format!("{target}: the topic's name is empty"));
    }
    let texts = [Some(scope), topic.as_ref(), key.as_ref()];
    let mut texts = texts.into_iter().flatten();
    if texts.any(|t| t.len() > NAME || t.contains('\0')) {
        return wrong(format!(
            "a name or key of more than {NAME} bytes, or with a NUL byte: nothing has such a one"
        ));
    }
    Ok(())
}

/// What needs no database to be refused. The rest is judged by its clock.
fn check_expiry(expiry: Expiry) -> Result<()> {
    let fits = match expiry {
        Expiry::In(d) => !d.is_zero() && d <= Pause::LONGEST,
        Expiry::At(at) => {
            let now = SystemTime::now();
            let latest = now.checked_add(Pause::LONGEST + APART);
            now.checked_sub(APART).is_none_or(|t| at > t) && latest.is_none_or(|t| at < t)
        }
    };
    if fits {
        return Ok(());
    }
    Err(out_of_bounds("as it is given"))
}

fn out_of_bounds(by: &str) -> Error {
    let days = Pause::LONGEST.as_secs() / 86_400;
    let text = format!(
        "the expiry is over already or too far ahead, {by}; a pause ends after now and within {days} days, and can be renewed"
    );
    Error::new(Kind::Invalid, PAUSE, text)
}

fn reason(why: &str) -> Result<String> {
    let reason = why.trim();
    let wrong = |text: String| Err(Error::new(Kind::Invalid, PAUSE, text));
    if reason.is_empty() {
        return wrong("the reason is empty; whoever finds the pause needs one".to_owned());
    }
    let length = reason.chars().count();
    if length > REASON {
        return wrong(format!(
            "the reason has {length} characters; {REASON} at most"
        ));
    }
    if reason.contains(char::is_control) {
        return wrong(
            "the reason holds control characters; one line of text is expected".to_owned(),
        );
    }
    Ok(reason.to_owned())
}
