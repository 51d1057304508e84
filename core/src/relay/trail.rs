//! Which progress belongs to which event of the window.

use std::collections::VecDeque;

use crate::{cursor::Progress, store::Slice, window::Seq};

/// The slices that were read and not yet settled, beside the window's events.
#[derive(Debug, Default)]
pub(super) struct Trail {
    /// The number of the first position kept.
    first: Seq,
    positions: VecDeque<i64>,
    slices: VecDeque<Piece>,
}

#[derive(Debug)]
struct Piece {
    last: Seq,
    within: Progress,
    end: Option<Progress>,
}

impl Trail {
    /// Notes a slice whose events take the window's next numbers from `first` on. Answers a progress that holds at
    /// once: a slice that ended without another event, when nothing is unsettled before it.
    pub(super) fn note(
        &mut self,
        first: Seq,
        slice: &Slice,
        nothing_unsettled: bool,
    ) -> Option<Progress> {
        if slice.events.is_empty() {
            let end = slice.end.clone()?;
            if nothing_unsettled {
                return Some(end);
            }
            self.slices.push_back(Piece {
                last: first - 1,
                within: slice.within.clone(),
                end: Some(end),
            });
            return None;
        }
        if self.positions.is_empty() {
            self.first = first;
        }
        self.positions
            .extend(slice.events.iter().map(|e| e.position));
        let last = first + slice.events.len() as Seq - 1;
        self.slices.push_back(Piece {
            last,
            within: slice.within.clone(),
            end: slice.end.clone(),
        });
        None
    }

    /// The progress once every event up to `last` is settled.
    pub(super) fn settled(&mut self, last: Seq) -> Option<Progress> {
        let mut passed = None;
        while self.slices.front().is_some_and(|s| s.last <= last) {
            passed = self.slices.pop_front();
        }
        let count = usize::try_from(last + 1 - self.first)
            .unwrap_or(usize::MAX)
            .min(self.positions.len());
        let position = self.positions.drain(..count).next_back();
        self.first = last + 1;
        match (passed, self.slices.front(), position) {
            (
                Some(Piece {
                    last: end_at,
                    end: Some(end),
                    ..
                }),
                _,
                _,
            ) if end_at == last => Some(end),
            (
                Some(Piece {
                    last: end_at,
                    within,
                    ..
                }),
                _,
                Some(position),
            ) if end_at == last => Some(within.at(position)),
            (_, Some(open), Some(position)) => Some(open.within.at(position)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Logged;
    use pillarbox_transport::Message;

    fn slice(positions: &[i64], upto: &str, end: Option<&str>) -> Slice {
        let logged = |position: &i64| Logged {
            position: *position,
            message: Message::new("i", "t", "k", "").into(),
            deliver_at: None,
            defect: None,
        };
        let seen = |s: &str| Progress {
            seen: s.into(),
            ..Progress::default()
        };
        Slice {
            events: positions.iter().map(logged).collect(),
            within: Progress {
                upto: Some(upto.into()),
                ..seen("s0")
            },
            end: end.map(seen),
            gate: None,
        }
    }

    #[test]
    fn progress_stays_inside_the_slice_until_the_slice_ends() {
        let mut trail = Trail::default();
        assert_eq!(trail.note(0, &slice(&[4, 9], "a", None), true), None);
        assert_eq!(trail.note(2, &slice(&[11], "a", Some("a")), false), None);
        assert_eq!(trail.note(3, &slice(&[3, 5], "b", Some("b")), false), None);
        let first = trail.settled(0).unwrap();
        assert_eq!((first.upto.as_deref(), first.last), (Some("a"), 4));
        assert_eq!(trail.settled(1).unwrap().last, 9);
        assert_eq!(trail.settled(2).unwrap().seen, "a");
        let inside = trail.settled(3).unwrap();
        assert_eq!((inside.upto.as_deref(), inside.last), (Some("b"), 3));
        assert_eq!(trail.settled(4).unwrap().seen, "b");
    }

    #[test]
    fn a_slice_may_end_without_another_event() {
        let mut trail = Trail::default();
        trail.note(0, &slice(&[4], "a", None), true);
        assert_eq!(trail.note(1, &slice(&[], "a", Some("a")), false), None);
        assert_eq!(trail.settled(0).unwrap().seen, "a");
        trail.note(1, &slice(&[6], "b", None), true);
        assert_eq!(trail.settled(1).unwrap().last, 6);
        assert_eq!(
            trail
                .note(2, &slice(&[], "b", Some("b")), true)
                .unwrap()
                .seen,
            "b"
        );
    }
}
