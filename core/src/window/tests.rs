//! The window against a simple model: a log, a broker, lines that outlive a crash, and every order of events between.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*};

use super::*;

const KEYS: usize = 3;

/// One thing that happens. Numbers choose among what is there.
#[derive(Debug, Clone)]
enum Op {
    Push(usize),
    Take(usize, u8),
    Confirm(usize),
    Again(usize),
    Defer(usize),
    Stale(usize, u8),
    TakeDeferrals(usize),
    /// The insert is known to be committed; or not known, and either committed or not.
    Deferrals(Insert),
    Pump(usize),
    EndLine(usize, bool),
    Unblock(usize),
    /// An operator puts an event that was given up back into its key's line; the owner does not know yet.
    Retry(usize),
    /// The owner looks for lines that it does not know.
    Look,
    Advance,
    Crash,
}

#[derive(Debug, Clone, Copy)]
enum Insert {
    Known,
    UnknownCommitted,
    Failed,
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0..8_usize;
    let insert = prop_oneof![
        3 => Just(Insert::Known),
        1 => Just(Insert::UnknownCommitted),
        1 => Just(Insert::Failed),
    ];
    prop_oneof![
        6 => (1..5_usize).prop_map(Op::Push),
        6 => (1..5_usize, any::<u8>()).prop_map(|(n, mask)| Op::Take(n, mask)),
        5 => n.clone().prop_map(Op::Confirm),
        2 => n.clone().prop_map(Op::Again),
        3 => n.clone().prop_map(Op::Defer),
        2 => (n.clone(), any::<u8>()).prop_map(|(i, how)| Op::Stale(i, how)),
        3 => (1..5_usize).prop_map(Op::TakeDeferrals),
        4 => insert.prop_map(Op::Deferrals),
        4 => n.clone().prop_map(Op::Pump),
        4 => (n.clone(), any::<bool>()).prop_map(|(i, done)| Op::EndLine(i, done)),
        3 => n.clone().prop_map(Op::Unblock),
        2 => n.prop_map(Op::Retry),
        2 => Just(Op::Look),
        3 => Just(Op::Advance),
        1 => Just(Op::Crash),
    ]
}

/// An event of the log: its key (none: no order), its size, whether the filter drops it.
type Event = (Option<u8>, usize, bool);

fn event() -> impl Strategy<Value = Event> {
    let key = prop_oneof![1 => Just(None), 6 => (0..KEYS as u8).prop_map(Some)];
    (
        key,
        1..40_usize,
        prop_oneof![9 => Just(false), 1 => Just(true)],
    )
}

/// What a line is called: a key's, or one event without key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    Key(u8),
    Event(usize),
}

/// Everything around the window. Events are numbers into `log`.
struct World {
    log: Vec<Event>,
    limits: Limits,
    // Outlives a crash.
    prefix: usize,
    done: BTreeSet<usize>,
    lines: BTreeMap<Name, BTreeSet<usize>>,
    once_stored: BTreeSet<usize>,
    /// Put back by an operator: out of order by nature.
    retried: BTreeSet<usize>,
    // Does not.
    /// Of these, those that the owner has not seen.
    unseen: BTreeSet<usize>,
    /// Sent from the log by this owner.
    sent: BTreeSet<usize>,
    window: Window<usize>,
    start: usize,
    next: usize,
    in_flight: Vec<(Attempt, usize)>,
    stale: Vec<Attempt>,
    inserting: Vec<Seq>,
    heads: BTreeMap<Name, usize>,
}

impl World {
    fn new(log: Vec<Event>, limits: Limits) -> Self {
        Self {
            log,
            limits,
            prefix: 0,
            done: BTreeSet::new(),
            lines: BTreeMap::new(),
            once_stored: BTreeSet::new(),
            retried: BTreeSet::new(),
            unseen: BTreeSet::new(),
            sent: BTreeSet::new(),
            window: Window::new(limits),
            start: 0,
            next: 0,
            in_flight: Vec::new(),
            stale: Vec::new(),
            inserting: Vec::new(),
            heads: BTreeMap::new(),
        }
    }

    fn key(key: u8) -> Key {
        Key {
            topic: "t".into(),
            key: key.to_string().as_str().into(),
        }
    }

    fn name(&self, event: usize) -> Name {
        self.log[event].0.map_or(Name::Event(event), Name::Key)
    }

    fn event(&self, seq: Seq) -> usize {
        self.start + seq as usize
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Push(n) => self.push(n),
            Op::Take(n, mask) => self.take(n, mask),
            Op::Confirm(i) => self.answer(i, |w, a| w.settle(a), true),
            Op::Again(i) => self.answer(i, |w, a| w.again(a), false),
            Op::Defer(i) => self.answer(i, |w, a| w.defer(a), false),
            Op::Stale(i, how) => self.stale(i, how),
            Op::TakeDeferrals(n) => self.take_deferrals(n),
            Op::Deferrals(how) => self.deferrals(how),
            Op::Pump(i) => self.pump(i),
            Op::EndLine(i, done) => self.end_line(i, done),
            Op::Unblock(i) => self.unblock((i % KEYS) as u8),
            Op::Retry(i) => self.retry(i),
            Op::Look => self.look(),
            Op::Advance => self.advance(),
            Op::Crash => self.crash(),
        }
        self.check();
    }

    fn push(&mut self, n: usize) {
        for _ in 0..n {
            if self.window.room() == 0 {
                return;
            }
            let Some(&(key, size, filtered)) = self.log.get(self.next) else {
                return;
            };
            let seq = if filtered {
                self.done.insert(self.next);
                self.window.push_settled()
            } else {
                self.window.push(self.next, key.map(Self::key), size)
            };
            assert_eq!(self.event(seq), self.next);
            self.next += 1;
            let held: Vec<usize> = (self.prefix..self.next)
                .filter(|e| self.is_held(*e))
                .collect();
            let bytes: usize = held.iter().map(|e| self.log[*e].1).sum();
            assert!(
                bytes < self.limits.bytes + size,
                "more bytes than one event above the limit"
            );
            assert!(held.len() <= self.limits.held);
            assert!(self.window.len() <= self.limits.unsettled);
        }
    }

    /// In memory: what the window was given and does not know to be through.
    fn is_held(&self, event: usize) -> bool {
        let seq = event
            .checked_sub(self.start)
            .and_then(|s| Seq::try_from(s).ok());
        seq.is_some_and(|seq| self.window.get(seq).is_some())
    }

    fn take(&mut self, n: usize, mask: u8) {
        let allowed = |e: &usize| mask & (1 << (e % 8)) != 0;
        for attempt in self.window.take(n, allowed) {
            let event = self.event(attempt.seq);
            assert!(allowed(&event), "took what was not allowed");
            self.leaves(event, false);
            self.sent.insert(event);
            self.in_flight.push((attempt, event));
        }
    }

    /// An event goes to the broker: from its line, or from the log.
    fn leaves(&self, event: usize, from_line: bool) {
        let Some(key) = self.log[event].0 else { return };
        if !from_line {
            let mut line = self.lines.get(&Name::Key(key)).into_iter().flatten();
            // What was sent before an operator's row was seen is decided first.
            let beside = |e: &usize| {
                self.retried.contains(e) && (self.unseen.contains(e) || self.sent.contains(&event))
            };
            assert!(line.all(beside), "{event} left while its key has a line");
        }
        if self.limits.per_key > 1 {
            return;
        }
        let others = self
            .in_flight
            .iter()
            .map(|(_, e)| *e)
            .chain(self.heads.values().copied());
        for other in others {
            assert_ne!(
                self.log[other].0,
                Some(key),
                "{event} left while {other} of its key is unconfirmed"
            );
        }
        if self.retried.contains(&event) {
            return;
        }
        let missing = |e: &usize| !self.done.contains(e) && !self.retried.contains(e);
        let earlier = (0..event).find(|e| self.log[*e].0 == Some(key) && missing(e));
        assert_eq!(
            earlier, None,
            "{event} left before an earlier one of its key was through"
        );
    }

    fn answer(
        &mut self,
        i: usize,
        tell: impl FnOnce(&mut Window<usize>, Attempt) -> bool,
        stored: bool,
    ) {
        if self.in_flight.is_empty() {
            return;
        }
        let (attempt, event) = self.in_flight.remove(i % self.in_flight.len());
        self.stale.push(attempt);
        let counted = tell(&mut self.window, attempt);
        // With several in flight per key, a neighbour's failure took it along into the line.
        assert!(
            counted || self.limits.per_key > 1,
            "a current answer was ignored"
        );
        if stored && counted {
            self.done.insert(event);
        }
    }

    fn stale(&mut self, i: usize, how: u8) {
        if self.stale.is_empty() {
            return;
        }
        let attempt = self.stale[i % self.stale.len()];
        let before = format!("{:?}", self.window);
        assert!(!self.window.is_current(attempt));
        let counted = match how % 3 {
            0 => self.window.settle(attempt),
            1 => self.window.again(attempt),
            _ => self.window.defer(attempt),
        };
        assert!(!counted, "a stale answer counted");
        assert_eq!(
            before,
            format!("{:?}", self.window),
            "a stale answer changed something"
        );
    }

    fn take_deferrals(&mut self, n: usize) {
        // One insert at a time, as the relay does it: with two, the later one could be through alone.
        if self.inserting.is_empty() {
            self.inserting = self.window.take_deferrals(n);
        }
    }

    fn deferrals(&mut self, how: Insert) {
        let seqs = std::mem::take(&mut self.inserting);
        if matches!(how, Insert::Known | Insert::UnknownCommitted) {
            for seq in &seqs {
                self.insert(self.event(*seq));
            }
        }
        match how {
            Insert::Known => self.window.deferred(&seqs),
            Insert::UnknownCommitted | Insert::Failed => self.window.not_deferred(&seqs),
        }
    }

    fn insert(&mut self, event: usize) {
        // Idempotent while the row stands; a row that is through already comes again, as a repeat.
        self.once_stored.insert(event);
        self.lines
            .entry(self.name(event))
            .or_default()
            .insert(event);
    }

    fn pump(&mut self, i: usize) {
        let waiting: Vec<Name> = self
            .lines
            .iter()
            .filter(|(_, l)| !l.is_empty())
            .map(|(n, _)| *n)
            .collect();
        if waiting.is_empty() {
            return;
        }
        let name = waiting[i % waiting.len()];
        let key = match name {
            Name::Key(key) => Some(Self::key(key)),
            Name::Event(_) if self.heads.contains_key(&name) => return,
            Name::Event(_) => None,
        };
        let full = self.window.in_flight() >= self.limits.in_flight;
        let taken = self.window.take_line(key.as_ref());
        assert!(!taken || !full, "more in flight than the limit");
        if taken {
            let head = *self.lines[&name].first().unwrap();
            assert!(
                !self.heads.contains_key(&name),
                "two heads of one line in flight"
            );
            if self.log[head].0.is_none_or(|_| !self.done.contains(&head)) {
                self.leaves_line(head);
            }
            self.heads.insert(name, head);
        }
    }

    fn leaves_line(&self, head: usize) {
        let of_log: Vec<usize> = self.in_flight.iter().map(|(_, e)| *e).collect();
        if self.limits.per_key == 1 && self.log[head].0.is_some() {
            assert!(
                of_log.iter().all(|e| self.log[*e].0 != self.log[head].0),
                "a head left beside one of the log"
            );
            self.leaves(head, true);
        }
    }

    fn end_line(&mut self, i: usize, through: bool) {
        let Some((&name, &head)) = self.heads.iter().nth(i % self.heads.len().max(1)) else {
            return;
        };
        self.heads.remove(&name);
        if through {
            self.done.insert(head);
            if let Some(line) = self.lines.get_mut(&name) {
                line.remove(&head);
            }
        }
        let key = if let Name::Key(key) = name {
            Some(Self::key(key))
        } else {
            None
        };
        self.window.end_line(key.as_ref());
    }

    /// A fenced read found the key's line empty, and no insert came between.
    fn unblock(&mut self, key: u8) {
        if self
            .lines
            .get(&Name::Key(key))
            .is_none_or(BTreeSet::is_empty)
        {
            self.window.unblock(&Self::key(key));
        }
    }

    fn retry(&mut self, i: usize) {
        let through = |e: &&usize| self.log[**e].0.is_some() && !self.log[**e].2;
        let Some(&event) = self.done.iter().filter(through).nth(i) else {
            return;
        };
        let line = self.lines.entry(self.name(event)).or_default();
        if line.insert(event) {
            self.done.remove(&event);
            self.retried.insert(event);
            self.unseen.insert(event);
        }
    }

    fn look(&mut self) {
        self.unseen.clear();
        self.block_lines();
    }

    fn block_lines(&mut self) {
        for (name, line) in &self.lines {
            if let (Name::Key(key), false) = (name, line.is_empty()) {
                self.window.block(Self::key(*key));
            }
        }
    }

    fn advance(&mut self) {
        let Some(last) = self.window.advance() else {
            return;
        };
        let passed = self.event(last) + 1;
        for event in self.prefix..passed {
            let settled = self.done.contains(&event)
                || self.once_stored.contains(&event)
                || self.retried.contains(&event);
            assert!(
                settled,
                "the prefix passed {event}, which is neither through nor in a line"
            );
        }
        self.prefix = passed;
    }

    fn crash(&mut self) {
        self.window = Window::new(self.limits);
        self.unseen.clear();
        self.sent.clear();
        self.block_lines();
        (self.start, self.next) = (self.prefix, self.prefix);
        self.in_flight.clear();
        self.stale.clear();
        self.inserting.clear();
        self.heads.clear();
    }

    fn check(&self) {
        let current = self
            .in_flight
            .iter()
            .filter(|(a, _)| self.window.is_current(*a))
            .count();
        assert_eq!(self.window.in_flight(), current + self.heads.len());
        assert!(self.window.in_flight() <= self.limits.in_flight);
        assert!(self.window.len() <= self.limits.unsettled);
        let mut per_key = BTreeMap::<u8, usize>::new();
        for (attempt, event) in &self.in_flight {
            if let (true, Some(key)) = (self.window.is_current(*attempt), self.log[*event].0) {
                *per_key.entry(key).or_default() += 1;
            }
        }
        for (key, n) in per_key {
            assert!(n <= self.limits.per_key, "{n} of key {key} in flight");
        }
        for seq in 0..self.window.next_seq() {
            if self.window.get(seq).is_some() {
                assert!(self.event(seq) >= self.prefix);
            }
        }
    }

    /// No more failures: everything gets through, in a bounded number of rounds.
    fn drain(&mut self) {
        for _ in 0..20 * (self.log.len() + 2) {
            self.step(&Op::Advance);
            if self.prefix == self.log.len() && self.lines.values().all(BTreeSet::is_empty) {
                assert!(self.window.is_empty());
                return;
            }
            self.step(&Op::Push(usize::MAX));
            self.step(&Op::Take(usize::MAX, u8::MAX));
            self.step(&Op::TakeDeferrals(usize::MAX));
            self.step(&Op::Deferrals(Insert::Known));
            self.step(&Op::Look);
            while !self.in_flight.is_empty() {
                self.step(&Op::Confirm(0));
            }
            for i in 0..self.lines.len() {
                self.step(&Op::Pump(i));
            }
            while !self.heads.is_empty() {
                self.step(&Op::EndLine(0, true));
            }
            for key in 0..KEYS {
                self.step(&Op::Unblock(key));
            }
        }
        panic!(
            "stuck at {} of {}: {:?}, lines {:?}",
            self.prefix,
            self.log.len(),
            self.window,
            self.lines
        );
    }
}

fn limits(per_key: impl Strategy<Value = usize>) -> impl Strategy<Value = Limits> {
    (1..12_usize, 1..12_usize, 1..200_usize, 1..8_usize, per_key).prop_map(
        |(unsettled, held, bytes, in_flight, per_key)| Limits {
            unsettled,
            held,
            bytes,
            in_flight,
            per_key,
        },
    )
}

fn run(limits: Limits, log: Vec<Event>, ops: &[Op]) {
    let mut world = World::new(log, limits);
    for op in ops {
        world.step(op);
    }
    world.drain();
}

/// 256 cases; more with PROPTEST_CASES.
fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_schedule_keeps_order_loses_nothing_and_drains(
        limits in limits(Just(1)),
        log in vec(event(), 1..30),
        ops in vec(op(), 0..150),
    ) {
        run(limits, log, &ops);
    }

    #[test]
    fn several_in_flight_of_a_key_stay_bounded_lose_nothing_and_drain(
        limits in limits(2..4_usize),
        log in vec(event(), 1..30),
        ops in vec(op(), 0..150),
    ) {
        run(limits, log, &ops);
    }
}

fn of(topic: &str) -> Option<Key> {
    Some(Key {
        topic: topic.into(),
        key: "k".into(),
    })
}

/// Each topic has its own number, and what a topic is not told stays one.
#[test]
fn several_of_a_key_where_its_topic_allows_it() {
    let limits = Limits {
        unsettled: 100,
        held: 100,
        bytes: 1 << 20,
        in_flight: 100,
        per_key: 1,
    };
    let wide = HashMap::from([("wide".to_owned(), 3)]);
    let mut window = Window::new(limits).per_topic(Arc::new(wide));
    let push = |window: &mut Window<(&'static str, usize)>, topic: &'static str| {
        for n in 0..5 {
            window.push((topic, n), of(topic), 1);
        }
    };
    push(&mut window, "wide");
    push(&mut window, "plain");
    let taken = window.take(100, |_| true);
    let items: Vec<_> = taken.iter().map(|a| *window.get(a.seq).unwrap()).collect();
    let expected = [("wide", 0), ("wide", 1), ("wide", 2), ("plain", 0)];
    assert_eq!(items, expected);
    // One that ends makes room for one, in order.
    assert!(window.settle(taken[1]));
    assert!(window.settle(taken[3]));
    let next = window.take(100, |_| true);
    let items: Vec<_> = next.iter().map(|a| *window.get(a.seq).unwrap()).collect();
    assert_eq!(items, [("wide", 3), ("plain", 1)]);
    // One that fails alone takes those behind it into its line, and not those before.
    assert!(window.defer(taken[2]));
    assert_eq!(window.take_deferrals(10), [taken[2].seq, next[0].seq, 4]);
    assert!(window.settle(taken[0]));
    assert!(window.take(100, |_| true).is_empty());
    assert_eq!(window.advance(), Some(1));
}
