//! The breaker against every order of what can happen to it.

use proptest::{collection::vec, prelude::*};

use super::*;

/// One thing that happens to a relay of a few partitions.
#[derive(Debug, Clone)]
enum Op {
    Pass(u64),
    Ask,
    Answered,
    /// An opening fails: the probe's, or one that began before.
    Failed(bool, f64),
    Lost(bool, f64),
    Abandoned,
    /// A probe of long ago says that it is gone.
    Stale,
}

fn op() -> impl Strategy<Value = Op> {
    let share = || 0.0..=1.0_f64;
    prop_oneof![
        4 => (0..5_000_u64).prop_map(Op::Pass),
        6 => Just(Op::Ask),
        1 => Just(Op::Answered),
        4 => (any::<bool>(), share()).prop_map(|(own, s)| Op::Failed(own, s)),
        3 => (any::<bool>(), share()).prop_map(|(own, s)| Op::Lost(own, s)),
        1 => Just(Op::Abandoned),
        1 => Just(Op::Stale),
    ]
}

/// What must hold whatever happens.
struct Run {
    breaker: Breaker,
    now: Instant,
    /// The probe that is under way.
    probe: Option<u64>,
    old: Option<u64>,
    told: Vec<(Instant, Told)>,
}

impl Run {
    fn new() -> Self {
        Self {
            breaker: Breaker::new(),
            now: Instant::now(),
            probe: None,
            old: None,
            told: Vec::new(),
        }
    }

    fn end_probe(&mut self) -> Option<u64> {
        let probe = self.probe.take();
        self.old = probe.or(self.old);
        probe
    }

    fn step(&mut self, op: &Op) {
        let before = self.breaker.state();
        let told = match *op {
            Op::Pass(ms) => {
                self.now += Duration::from_millis(ms);
                None
            }
            Op::Ask => {
                self.ask(before);
                None
            }
            Op::Answered => {
                self.end_probe();
                let told = self.breaker.answered(self.now);
                assert_eq!(self.breaker.state(), BreakerState::Closed);
                told
            }
            Op::Failed(own, share) | Op::Lost(own, share) => {
                let probe = if own { self.end_probe() } else { None };
                let told = match op {
                    Op::Failed(..) => self.breaker.failed(self.now, share, probe),
                    _ => self.breaker.lost(self.now, share, probe),
                };
                if matches!(op, Op::Failed(..)) {
                    assert_ne!(self.breaker.state(), BreakerState::Closed);
                }
                if before == BreakerState::HalfOpen && probe.is_none() {
                    assert_eq!(
                        self.breaker.state(),
                        before,
                        "a stranger's failure ended a probe"
                    );
                }
                told
            }
            Op::Abandoned => {
                if let Some(probe) = self.end_probe() {
                    self.breaker.abandoned(self.now, probe);
                }
                None
            }
            Op::Stale => {
                if let Some(old) = self.old {
                    self.breaker.abandoned(self.now, old);
                    assert_eq!(self.breaker.state(), before);
                }
                None
            }
        };
        if let Some(told) = told {
            self.told.push((self.now, told));
        }
        let open = self.breaker.state() != BreakerState::Closed;
        assert_eq!(open, self.breaker.outage.is_some());
        assert_eq!(
            self.breaker.state() == BreakerState::HalfOpen,
            self.probe.is_some(),
            "half-open means that exactly one probes"
        );
    }

    fn ask(&mut self, before: BreakerState) {
        match (before, self.breaker.ask(self.now)) {
            (BreakerState::Closed, Permit::Go) | (BreakerState::HalfOpen, Permit::Wait) => {}
            (BreakerState::Open, Permit::At(until)) => {
                assert!(
                    until > self.now && until <= self.now + LONGEST,
                    "waits too long"
                );
            }
            (BreakerState::Open, Permit::Probe(probe)) => {
                assert!(self.probe.is_none(), "two probe at once");
                self.probe = Some(probe);
            }
            (before, permit) => panic!("{before:?} answers {permit:?}"),
        }
    }

    /// The broker is back: whoever asks goes through. How long it takes until it is closed.
    fn heal(mut self) -> Duration {
        let begun = self.now;
        // The one that is just probing finds the broker.
        if self.probe.is_some() {
            self.step(&Op::Answered);
        }
        while self.breaker.state() != BreakerState::Closed {
            match self.breaker.ask(self.now) {
                Permit::At(until) => self.now = until,
                _ => drop(self.breaker.answered(self.now)),
            }
        }
        self.now - begun
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_one_probes_and_it_closes_soon_after_the_brokers_return(ops in vec(op(), 0..60)) {
        let mut run = Run::new();
        for op in &ops {
            run.step(op);
        }
        // Between opening and closing nothing but summaries, a minute apart.
        let mut last: Option<(Instant, Told)> = None;
        for (at, told) in &run.told {
            match (last, told) {
                (None | Some((_, Told::Closed { .. })), Told::Opened) => {}
                (Some((_, Told::Opened | Told::Still { .. })), Told::Closed { .. }) => {}
                (Some((before, Told::Opened | Told::Still { .. })), Told::Still { .. }) => {
                    prop_assert!(*at - before >= SUMMARY);
                }
                (before, told) => prop_assert!(false, "{before:?}, then {told:?}"),
            }
            last = Some((*at, *told));
        }
        prop_assert!(run.heal() <= LONGEST);
    }
}

/// Fewer than 20 lines in a five-minute outage: of the breaker's own there are seven at most.
#[test]
fn an_outage_of_five_minutes_takes_seven_lines() {
    let (mut breaker, begun) = (Breaker::new(), Instant::now());
    let (mut now, mut told) = (begun, Vec::new());
    told.extend(breaker.failed(now, 1.0, None));
    while now < begun + Duration::from_secs(300) {
        match breaker.ask(now) {
            Permit::At(until) => now = until,
            Permit::Probe(probe) => told.extend(breaker.failed(now, 1.0, Some(probe))),
            permit => panic!("{permit:?}"),
        }
    }
    told.extend(breaker.answered(now));
    assert!(told.len() <= 7, "{told:?}");
    let Some(Told::Closed { away, probes }) = told.last() else {
        panic!("{told:?}");
    };
    assert!(*away >= Duration::from_secs(300) && *probes > 90);
}

/// One event that kills each publisher must not stop the other partitions, whose events are answered meanwhile.
#[test]
fn losses_count_only_in_a_row() {
    let (mut breaker, mut now) = (Breaker::new(), Instant::now());
    for _ in 0..10 {
        now += TOGETHER;
        assert_eq!(breaker.lost(now, 0.5, None), None);
        now += TOGETHER;
        assert_eq!(breaker.lost(now, 0.5, None), None);
        assert_eq!(breaker.lost(now, 0.5, None), None, "at once, so one");
        assert_eq!(breaker.answered(now), None);
    }
    for n in 1..=LOSSES {
        now += TOGETHER;
        let told = breaker.lost(now, 0.5, None);
        assert_eq!(told.is_some(), n == LOSSES);
    }
    assert_eq!(breaker.state(), BreakerState::Open);
}
