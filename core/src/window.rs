//! What may be sent now, what came back, where the settled prefix ends, what must be deferred.
//!
//! A pure structure: no I/O, no clock, no randomness. The relay and the consumer drive it, and so does the simulator,
//! through millions of schedules.
//!
//! Invariants:
//! - the prefix never passes an event that is neither confirmed nor *known* to be stored as deferred;
//! - of one key, at most [`Limits::per_key`] events are in flight (or what its topic has instead), and none while the key has a
//!   line;
//! - events of a key leave in the order in which they came in, into flight or into the line;
//! - an answer to an attempt that is no longer the event's current one changes nothing.

use std::{
    collections::{BTreeSet, HashMap, VecDeque, hash_map},
    sync::Arc,
};

use crate::event::Key;

#[cfg(test)]
mod tests;

/// The bounds of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most events between the settled prefix and the newest: what a fault can repeat.
    pub unsettled: usize,
    /// Most events held in memory: those of them that are not confirmed themselves. What waits behind a slow event and
    /// is confirmed already costs next to nothing.
    pub held: usize,
    /// Most bytes of the events held.
    pub bytes: usize,
    /// Most events in flight.
    pub in_flight: usize,
    /// Most events of one key in flight. More than 1 gives up the order of a key whose event fails alone.
    pub per_key: usize,
}

/// An event's number in its window; grows without gaps.
pub type Seq = u64;

/// One try of one event. Answers that come with an older one are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Attempt {
    /// Which event.
    pub seq: Seq,
    generation: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    InFlight,
    /// Goes to its key's line; the key's unconfirmed event until the insert is known to be committed.
    Deferring,
    Settled,
}

#[derive(Debug)]
struct Entry<T> {
    item: Option<T>,
    key: Option<Key>,
    size: usize,
    state: State,
    generation: u32,
}

#[derive(Debug, Default)]
struct KeyState {
    /// Unsettled events in order.
    queue: VecDeque<Seq>,
    /// A row of its line exists, or is being inserted.
    blocked: bool,
    /// Somebody else made its line while an event of it was on its way: blocked once that one is decided.
    closing: bool,
    /// The line's head is in flight.
    line_in_flight: bool,
}

impl KeyState {
    /// Nothing of the key is left to remember.
    fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.blocked && !self.closing && !self.line_in_flight
    }
}

/// See the module.
#[derive(Debug)]
pub struct Window<T> {
    limits: Limits,
    entries: VecDeque<Entry<T>>,
    /// The number of the first entry.
    first: Seq,
    held: usize,
    bytes: usize,
    in_flight: usize,
    keys: HashMap<Key, KeyState>,
    ready: BTreeSet<Seq>,
    to_defer: BTreeSet<Seq>,
    per_topic: Arc<HashMap<String, usize>>,
}

impl<T> Window<T> {
    /// An empty window.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            entries: VecDeque::new(),
            first: 0,
            held: 0,
            bytes: 0,
            in_flight: 0,
            keys: HashMap::new(),
            ready: BTreeSet::new(),
            to_defer: BTreeSet::new(),
            per_topic: Arc::default(),
        }
    }

    /// With another [`Limits::per_key`] for the keys of these topics.
    #[must_use]
    pub fn per_topic(mut self, per_topic: Arc<HashMap<String, usize>>) -> Self {
        self.per_topic = per_topic;
        self
    }

    fn per_key(&self, key: &Key) -> usize {
        let of_topic = self.per_topic.get(&*key.topic).copied();
        of_topic.unwrap_or(self.limits.per_key)
    }

    /// How many more events it takes now. One event fits however large it is, if nothing is held.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.bytes >= self.limits.bytes && self.held > 0 {
            return 0;
        }
        let held = self.limits.held.saturating_sub(self.held);
        self.limits
            .unsettled
            .saturating_sub(self.entries.len())
            .min(held)
    }

    /// Events between the prefix and the newest.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether everything is settled.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Events in flight, line heads included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The number that the next event gets.
    #[must_use]
    pub fn next_seq(&self) -> Seq {
        self.first + self.entries.len() as Seq
    }

    /// An event that is not settled yet.
    #[must_use]
    pub fn get(&self, seq: Seq) -> Option<&T> {
        self.entry(seq).and_then(|e| e.item.as_ref())
    }

    /// An event that is not settled yet.
    #[must_use]
    pub fn get_mut(&mut self, seq: Seq) -> Option<&mut T> {
        self.entry_mut(seq).and_then(|e| e.item.as_mut())
    }

    /// The oldest event that is not settled.
    #[must_use]
    pub fn oldest(&self) -> Option<&T> {
        self.entries.iter().find_map(|e| e.item.as_ref())
    }

    /// The number of the first event that is not settled: grows when the prefix moves.
    #[must_use]
    pub fn prefix(&self) -> Seq {
        self.first
    }

    /// The events of the log that are in flight, oldest first.
    pub fn sent(&self) -> impl Iterator<Item = &T> {
        let sent = self.entries.iter().filter(|e| e.state == State::InFlight);
        sent.filter_map(|e| e.item.as_ref())
    }

    /// The events of the log that may be sent now, oldest first.
    pub fn ready(&self) -> impl DoubleEndedIterator<Item = &T> + Clone {
        self.ready.iter().filter_map(|seq| self.get(*seq))
    }

    /// Appends an event.
    pub fn push(&mut self, item: T, key: Option<Key>, size: usize) -> Seq {
        let seq = self.next_seq();
        let mut state = State::Ready;
        if let Some(key) = &key {
            let of_key = self.keys.entry(key.clone()).or_default();
            of_key.queue.push_back(seq);
            if of_key.blocked {
                state = State::Deferring;
            }
        }
        self.entries.push_back(Entry {
            item: Some(item),
            key: key.clone(),
            size,
            state,
            generation: 0,
        });
        self.bytes += size;
        self.held += 1;
        match (state, key) {
            (State::Deferring, _) => drop(self.to_defer.insert(seq)),
            (_, Some(key)) => self.refresh(&key),
            (_, None) => drop(self.ready.insert(seq)),
        }
        seq
    }

    /// Appends an event that is to be stored as deferred, whatever its key does: it waits for a time of its own.
    pub fn push_deferring(&mut self, item: T, size: usize) -> Seq {
        let seq = self.next_seq();
        self.entries.push_back(Entry {
            item: Some(item),
            key: None,
            size,
            state: State::Deferring,
            generation: 0,
        });
        self.bytes += size;
        self.held += 1;
        self.to_defer.insert(seq);
        seq
    }

    /// Appends an event that needs nothing more: it was filtered out, and counts as confirmed so that the prefix moves on.
    pub fn push_settled(&mut self) -> Seq {
        let seq = self.next_seq();
        let state = State::Settled;
        self.entries.push_back(Entry {
            item: None,
            key: None,
            size: 0,
            state,
            generation: 0,
        });
        seq
    }

    /// Takes up to `most` events into flight, oldest first, that `allowed` lets pass.
    pub fn take(&mut self, most: usize, mut allowed: impl FnMut(&T) -> bool) -> Vec<Attempt> {
        let most = most.min(self.limits.in_flight.saturating_sub(self.in_flight));
        let mut taken = Vec::with_capacity(most.min(self.ready.len()));
        let mut from = 0;
        while taken.len() < most {
            let Some(&seq) = self.ready.range(from..).next() else {
                break;
            };
            from = seq + 1;
            if !self.get(seq).is_some_and(&mut allowed) {
                continue;
            }
            self.ready.remove(&seq);
            let Some(entry) = self.entry_mut(seq) else {
                continue;
            };
            entry.state = State::InFlight;
            entry.generation = entry.generation.wrapping_add(1);
            taken.push(Attempt {
                seq,
                generation: entry.generation,
            });
            self.in_flight += 1;
            // With several in flight per key, taking one makes the next ready.
            if (self.limits.per_key > 1 || !self.per_topic.is_empty())
                && let Some(key) = self.key_of(seq)
                && self.per_key(&key) > 1
            {
                self.refresh(&key);
            }
        }
        taken
    }

    /// Whether an answer to this attempt would still count.
    #[must_use]
    pub fn is_current(&self, attempt: Attempt) -> bool {
        self.entry(attempt.seq)
            .is_some_and(|e| e.state == State::InFlight && e.generation == attempt.generation)
    }

    /// The event is confirmed (or given up for good).
    pub fn settle(&mut self, attempt: Attempt) -> bool {
        if !self.is_current(attempt) {
            return false;
        }
        self.in_flight -= 1;
        self.end(attempt.seq);
        true
    }

    /// Nobody knows, or nobody could take it: it is its key's first again.
    pub fn again(&mut self, attempt: Attempt) -> bool {
        if !self.is_current(attempt) {
            return false;
        }
        self.in_flight -= 1;
        let key = self.key_of(attempt.seq);
        // A later event of its key made a line meanwhile: this one goes there too, before it.
        let blocked = key.as_ref().is_some_and(|key| self.is_blocked(key));
        if let Some(entry) = self.entry_mut(attempt.seq) {
            entry.state = if blocked {
                State::Deferring
            } else {
                State::Ready
            };
        }
        match key {
            _ if blocked => drop(self.to_defer.insert(attempt.seq)),
            Some(key) => self.refresh(&key),
            None => drop(self.ready.insert(attempt.seq)),
        }
        true
    }

    /// The event failed and must wait: it and what else there is of its key go to the line, in order. Only earlier ones
    /// in flight are still awaited.
    pub fn defer(&mut self, attempt: Attempt) -> bool {
        if !self.is_current(attempt) {
            return false;
        }
        let queue: Vec<Seq> = match self.key_of(attempt.seq) {
            None => vec![attempt.seq],
            Some(key) => {
                let of_key = self.keys.entry(key).or_default();
                (of_key.blocked, of_key.closing) = (true, false);
                of_key.queue.iter().copied().collect()
            }
        };
        for seq in queue {
            let Some(entry) = self.entry_mut(seq) else {
                continue;
            };
            match entry.state {
                State::InFlight if seq >= attempt.seq => {
                    entry.state = State::Deferring;
                    self.in_flight -= 1;
                }
                State::Ready => entry.state = State::Deferring,
                State::InFlight | State::Deferring | State::Settled => continue,
            }
            self.ready.remove(&seq);
            self.to_defer.insert(seq);
        }
        true
    }

    /// Events whose deferred rows must be written, oldest first. They stay unconfirmed until [`Window::deferred`].
    pub fn take_deferrals(&mut self, most: usize) -> Vec<Seq> {
        let taken: Vec<Seq> = self.to_defer.iter().copied().take(most).collect();
        for seq in &taken {
            self.to_defer.remove(seq);
        }
        taken
    }

    /// Their rows are known to be committed.
    pub fn deferred(&mut self, seqs: &[Seq]) {
        for &seq in seqs {
            if self.entry(seq).is_some_and(|e| e.state == State::Deferring) {
                self.end(seq);
            }
        }
    }

    /// Their rows are not known to be committed: to be written again.
    pub fn not_deferred(&mut self, seqs: &[Seq]) {
        let deferring = |seq: &Seq| {
            self.entry(*seq)
                .is_some_and(|e| e.state == State::Deferring)
        };
        let back: Vec<Seq> = seqs.iter().copied().filter(deferring).collect();
        self.to_defer.extend(back);
    }

    /// The key has a line: found at take-over, or made by an operator since. What is there of the key goes behind the
    /// line, but for an event that was sent and is not decided: it stays its key's one unconfirmed event, and neither
    /// another one nor the line's head is sent before it is. If it went into the line, it could be written there after
    /// later ones of its key.
    pub fn block(&mut self, key: Key) {
        let undecided = self.is_undecided(&key);
        let of_key = self.keys.entry(key.clone()).or_default();
        if of_key.blocked {
            return;
        }
        of_key.closing = undecided;
        if !undecided {
            return self.close(&key);
        }
        // With several in flight per key, the next one may be ready beside it.
        for seq in of_key.queue.clone() {
            if self.entry(seq).is_some_and(|e| e.generation == 0) {
                self.ready.remove(&seq);
            }
        }
    }

    /// Whether the key has a line.
    #[must_use]
    pub fn is_blocked(&self, key: &Key) -> bool {
        self.keys.get(key).is_some_and(|k| k.blocked)
    }

    /// A fenced read found no row of the key's line. False, and the key stays blocked, while a row of it is still to be
    /// written: the line is about to exist again.
    pub fn unblock(&mut self, key: &Key) -> bool {
        let Some(of_key) = self.keys.get(key) else {
            return true;
        };
        let deferring = of_key.queue.iter().any(|seq| {
            self.entry(*seq)
                .is_some_and(|e| e.state == State::Deferring)
        });
        if deferring || of_key.line_in_flight {
            return false;
        }
        if let Some(of_key) = self.keys.get_mut(key) {
            (of_key.blocked, of_key.closing) = (false, false);
        }
        self.refresh(key);
        self.forget(key);
        true
    }

    /// The line's head goes into flight as its key's one unconfirmed event. False if it must wait (one is in flight, or
    /// the window's maximum is).
    pub fn take_line(&mut self, key: Option<&Key>) -> bool {
        if self.in_flight >= self.limits.in_flight {
            return false;
        }
        if let Some(key) = key {
            self.block(key.clone());
            let of_key = self.keys.entry(key.clone()).or_default();
            if of_key.line_in_flight || of_key.closing {
                return false;
            }
            of_key.line_in_flight = true;
        }
        self.in_flight += 1;
        true
    }

    /// The answer for the line's head came, and what followed from it is committed.
    pub fn end_line(&mut self, key: Option<&Key>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(of_key) = key.and_then(|k| self.keys.get_mut(k)) {
            of_key.line_in_flight = false;
        }
    }

    /// Moves the prefix over what is settled, and answers the number of the last event passed.
    pub fn advance(&mut self) -> Option<Seq> {
        let mut last = None;
        while self
            .entries
            .front()
            .is_some_and(|e| e.state == State::Settled)
        {
            self.entries.pop_front();
            last = Some(self.first);
            self.first += 1;
        }
        last
    }

    fn end(&mut self, seq: Seq) {
        let Some(entry) = self.entry_mut(seq) else {
            return;
        };
        entry.state = State::Settled;
        entry.item = None;
        let (key, size) = (entry.key.take(), entry.size);
        self.held -= 1;
        self.bytes -= size;
        let Some(key) = key else { return };
        let hash_map::Entry::Occupied(mut of_key) = self.keys.entry(key) else {
            return;
        };
        of_key.get_mut().queue.retain(|other| *other != seq);
        if of_key.get().is_idle() {
            of_key.remove();
            return;
        }
        let closing = of_key.get().closing;
        let key = of_key.key().clone();
        if closing && !self.is_undecided(&key) {
            self.close(&key);
        }
        self.refresh(&key);
        self.forget(&key);
    }

    /// Whether an event of the key was sent and has no answer that decides it.
    fn is_undecided(&self, key: &Key) -> bool {
        let queue = self.keys.get(key).map(|k| &k.queue);
        queue.into_iter().flatten().any(|seq| {
            self.entry(*seq).is_some_and(|e| match e.state {
                State::InFlight => true,
                State::Ready => e.generation > 0,
                State::Deferring | State::Settled => false,
            })
        })
    }

    /// Blocks the key; what waited to be sent goes behind its line.
    fn close(&mut self, key: &Key) {
        let Some(of_key) = self.keys.get_mut(key) else {
            return;
        };
        (of_key.blocked, of_key.closing) = (true, false);
        for seq in of_key.queue.clone() {
            let Some(entry) = self.entry_mut(seq) else {
                continue;
            };
            if entry.state == State::Ready {
                entry.state = State::Deferring;
                self.ready.remove(&seq);
                self.to_defer.insert(seq);
            }
        }
    }

    /// Makes ready what of a key may be sent now: its first events, unless it has a line.
    fn refresh(&mut self, key: &Key) {
        let Some(of_key) = self.keys.get(key).filter(|k| !k.blocked) else {
            return;
        };
        for &seq in of_key.queue.iter().take(self.per_key(key)) {
            let index = usize::try_from(seq - self.first).unwrap_or(usize::MAX);
            let Some(entry) = self.entries.get(index) else {
                break;
            };
            // Only what was sent before goes on while a line waits.
            if of_key.closing && entry.generation == 0 {
                break;
            }
            match entry.state {
                State::Ready => drop(self.ready.insert(seq)),
                State::InFlight => {}
                State::Deferring | State::Settled => break,
            }
            // In order: the next one is ready once this one is in flight.
            if self.ready.contains(&seq) {
                break;
            }
        }
    }

    fn forget(&mut self, key: &Key) {
        if let hash_map::Entry::Occupied(entry) = self.keys.entry(key.clone())
            && entry.get().is_idle()
        {
            entry.remove();
        }
    }

    fn key_of(&self, seq: Seq) -> Option<Key> {
        self.entry(seq).and_then(|e| e.key.clone())
    }

    fn entry(&self, seq: Seq) -> Option<&Entry<T>> {
        self.entries
            .get(usize::try_from(seq.checked_sub(self.first)?).ok()?)
    }

    fn entry_mut(&mut self, seq: Seq) -> Option<&mut Entry<T>> {
        self.entries
            .get_mut(usize::try_from(seq.checked_sub(self.first)?).ok()?)
    }
}
