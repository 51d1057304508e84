//! Destinations that nobody serves: the log keeps everything for them, and not for ever.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::Cleaner;
use crate::{
    admin::{may_be_abandoned, tell},
    error::{Kind, Result},
    lease::Lease,
    store::Unserved,
};

/// Between two warnings about a destination.
const AGAIN: Duration = Duration::from_secs(3_600);

/// When each destination was last warned of.
#[derive(Debug, Default)]
pub(super) struct Warned(HashMap<String, Instant>);

impl Warned {
    fn is_due(&mut self, name: &str) -> bool {
        let now = Instant::now();
        let last = self.0.get(name);
        let due = last.is_none_or(|at| now.saturating_duration_since(*at) >= AGAIN);
        if due {
            self.0.insert(name.to_owned(), now);
        }
        due
    }
}

impl Cleaner {
    /// Counts for how long each destination has been without a relay; warns from half of the limit on; and at it removes the
    /// destination with its cursors and lines. It is removed rather than passed over: one that came back would skip, without a
    /// word, what was cleaned away under it.
    pub(super) async fn watch(&self, lease: &Lease, warned: &mut Warned) -> Result<()> {
        let limit = self.settings.abandon_after;
        let all = self.store.watch_destinations(lease).await?;
        warned.0.retain(|name, _| {
            all.iter()
                .any(|u| u.name == *name && u.unserved > Duration::ZERO)
        });
        for Unserved { name, unserved } in all {
            metrics::gauge!("pillarbox_destination_unserved_seconds", "destination" => name.clone())
                .set(unserved.as_secs_f64());
            if unserved >= limit && may_be_abandoned(&name) {
                self.abandon(&name, unserved).await?;
            } else if unserved >= limit / 2 && warned.is_due(&name) {
                let (unserved, limit) = (shown(unserved), shown(limit));
                let then = if may_be_abandoned(&name) {
                    "it is removed at the limit, with what it has not published"
                } else {
                    "it is not removed by itself"
                };
                tracing::warn!(destination = %name, ?unserved, ?limit, "no relay serves this destination, and the log keeps everything for it; {then}");
            }
        }
        Ok(())
    }

    async fn abandon(&self, name: &str, unserved: Duration) -> Result<()> {
        let unserved = shown(unserved);
        let why = format!("abandoned: no relay has served it for {unserved:?}");
        match self.store.remove_destination(name, &why, None).await {
            Ok(Some(removed)) => {
                tracing::warn!(destination = %name, ?unserved, "a destination was abandoned and is removed");
                tell(&removed);
                Ok(())
            }
            Ok(None) => Ok(()),
            // The last one.
            Err(e) if e.kind() == Kind::Invalid => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// Whole seconds.
fn shown(d: Duration) -> Duration {
    Duration::from_secs(d.as_secs())
}
