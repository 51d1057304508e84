//! Suspect mode: an event whose handler ends the process.
//!
//! Nobody is left to count that attempt. So after a second owner that died without progress events run one by one, each noted
//! in the database before it begins. When the process dies again, the next owner knows which one it was; once another event
//! has got through, or the process has lived on for a while without it, that was its attempt.

use std::time::Duration;

use tokio::time::Instant;

use crate::{failure::LineId, lease::Acquired};

/// So many deaths without progress are no accident.
const DEATHS: u32 = 2;
/// Where nothing else is there to try, a process that has lived for so long speaks against the event.
const ALIVE: Duration = Duration::from_secs(2);

/// Why an event has failed that no handler gave an answer for.
pub(super) const ENDED: &str =
    "the process ended while it was handled, and nothing else was under way";

/// How carefully an owner begins.
#[derive(Debug)]
pub(super) struct Caution {
    /// So many of the next events run one by one.
    left: usize,
    /// Deaths that the next progress makes forgotten.
    died: bool,
    accused: Option<LineId>,
    since: Instant,
    /// Another event got through.
    probed: bool,
}

impl Caution {
    /// `most` events may have been under way at a death.
    pub(super) fn new(acquired: &Acquired, most: usize) -> Self {
        let left = if acquired.deaths >= DEATHS { most } else { 0 };
        Self {
            left,
            died: acquired.deaths > 0,
            accused: acquired.alone.clone().filter(|_| left > 0),
            since: Instant::now(),
            probed: false,
        }
    }

    pub(super) fn is_active(&self) -> bool {
        self.left > 0
    }

    pub(super) fn is_accused(&self, source: &str, id: &str) -> bool {
        let accused = self.accused.as_ref();
        accused.is_some_and(|accused| accused.0 == source && accused.1 == id)
    }

    /// Whether the accused one may be judged, where nothing else is to be done.
    pub(super) fn may_judge(&self) -> bool {
        self.accused.is_some() && (self.probed || self.since.elapsed() >= ALIVE)
    }

    pub(super) fn judged(&mut self) {
        self.accused = None;
    }

    /// When the accused one may be judged at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        let waits = self.accused.is_some() && !self.may_judge();
        (self.is_active() && waits).then(|| self.since + ALIVE)
    }

    /// So many events were stored.
    pub(super) fn got_through(&mut self, events: usize) {
        self.probed |= events > 0;
        self.left = self.left.saturating_sub(events);
    }

    /// Whether the database is to be told that the deaths are over: the prefix has moved.
    pub(super) fn is_over(&mut self) -> bool {
        self.left == 0 && std::mem::take(&mut self.died)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cursor::Progress,
        lease::{Lease, LeaseKey},
    };

    fn acquired(deaths: u32, alone: Option<&str>) -> Acquired {
        let key = LeaseKey::Duty {
            kind: "pump",
            scope: "group".to_owned(),
            shard: 0,
        };
        Acquired {
            lease: Lease {
                key,
                owner: uuid::Uuid::nil(),
                epoch: 1,
            },
            progress: Progress::default(),
            position: None,
            since: None,
            deaths,
            alone: alone.map(|id| ("source".to_owned(), id.to_owned())),
            reset: false,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_death_is_no_accident() {
        let mut first = Caution::new(&acquired(1, None), 10);
        assert!(!first.is_active());
        assert!(first.is_over() && !first.is_over(), "told once");
        let mut second = Caution::new(&acquired(2, Some("poison")), 2);
        assert!(second.is_active() && second.is_accused("source", "poison"));
        assert!(!second.may_judge(), "nothing else has got through");
        second.got_through(1);
        assert!(second.may_judge() && second.is_active() && !second.is_over());
        second.judged();
        second.got_through(1);
        assert!(!second.is_active() && second.is_over());
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_lives_without_it_speaks_against_it() {
        let caution = Caution::new(&acquired(3, Some("poison")), 2);
        assert_eq!(caution.due(), Some(caution.since + ALIVE));
        tokio::time::advance(ALIVE).await;
        assert!(caution.may_judge());
        assert_eq!(caution.due(), None);
    }
}
