//! The deferred lines of a partition, as its owner knows them: when each is due, and what is under way.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    event::Key,
    failure::{Line, LineId},
};

/// Heads under way at a time: retries are exceptions and must not crowd out the log.
const ACTIVE: usize = 16;
/// By how much a head must be due before the known one for its line to be read again.
const SOONER: Duration = Duration::from_secs(3);

/// A line's name: its key, or the one event of a keyless line.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum LineName {
    Key(Key),
    Keyless(LineId),
}

impl LineName {
    pub(super) fn new(key: Option<Key>, id: LineId) -> Self {
        key.map_or(Self::Keyless(id), Self::Key)
    }

    pub(super) fn key(&self) -> Option<&Key> {
        match self {
            Self::Key(key) => Some(key),
            Self::Keyless(_) => None,
        }
    }

    /// For a read: with a key, the id is not looked at.
    pub(super) fn id(&self) -> LineId {
        match self {
            Self::Key(_) => LineId::default(),
            Self::Keyless(id) => id.clone(),
        }
    }
}

#[derive(Debug)]
struct Known {
    /// When its head is due; none while the head is under way.
    due: Option<Instant>,
    /// Rows came since its head was last read.
    grew: bool,
}

#[derive(Debug, Default)]
pub(super) struct Lines {
    lines: HashMap<LineName, Known>,
    waiting: BTreeSet<(Instant, LineName)>,
}

impl Lines {
    pub(super) fn load(&mut self, lines: Vec<Line>, now: Instant) {
        for line in lines {
            self.grew(LineName::new(line.key, line.head), now + line.due_in);
        }
    }

    /// Rows were added to a line that may be known already. If its head is being read, that read may have missed them.
    pub(super) fn grew(&mut self, name: LineName, due: Instant) {
        if let Some(known) = self.lines.get_mut(&name) {
            known.grew = true;
            return;
        }
        self.waiting.insert((due, name.clone()));
        self.lines.insert(
            name,
            Known {
                due: Some(due),
                grew: false,
            },
        );
    }

    /// A read found it. It may be unknown: made by somebody else; or its head another one, due sooner.
    pub(super) fn found(&mut self, name: LineName, due: Instant) {
        match self.lines.get_mut(&name) {
            None => self.grew(name, due),
            Some(known) => match known.due {
                // The read of its head, under way, may have missed what this one saw.
                None => known.grew = true,
                // Not for a topic's pause, which is shorter.
                Some(before) if before > due + SOONER => self.wait(&name, due),
                Some(_) => {}
            },
        }
    }

    /// Lines that are due, as many as may be under way; or when the next one is.
    pub(super) fn due(&mut self, now: Instant) -> (Vec<LineName>, Option<Instant>) {
        let mut due = Vec::new();
        while self.under_way() < ACTIVE && self.waiting.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, name)) = self.waiting.pop_first() else {
                break;
            };
            if let Some(known) = self.lines.get_mut(&name) {
                (known.due, known.grew) = (None, false);
            }
            due.push(name);
        }
        let next = self
            .waiting
            .first()
            .map(|(at, _)| *at)
            .filter(|at| *at > now);
        (due, next)
    }

    /// Its head, which was under way, is to be looked at again at `due`.
    pub(super) fn wait(&mut self, name: &LineName, due: Instant) {
        if let Some(known) = self.lines.get_mut(name) {
            if let Some(before) = known.due.replace(due) {
                self.waiting.remove(&(before, name.clone()));
            }
            self.waiting.insert((due, name.clone()));
        }
    }

    /// A read found it empty. True if it is gone; false if rows came meanwhile and it must be read again.
    pub(super) fn empty(&mut self, name: &LineName, now: Instant) -> bool {
        if self.lines.get(name).is_some_and(|known| known.grew) {
            self.wait(name, now);
            return false;
        }
        self.lines.remove(name);
        true
    }

    pub(super) fn under_way(&self) -> usize {
        self.lines.len() - self.waiting.len()
    }
}
