//! What operators hold back, as the session obeys it.
//!
//! The whole destination: as if the broker were away. A topic: its events wait in the window, and in the log once that is
//! full. Not in `deferred`: a topic's whole traffic, copied there and back, would fill in seconds the room that failures
//! need. A key: its events go into its line, as behind one that failed, so that its neighbours go on; the line is not begun.
//! What was sent already is brought to its end.

use std::{sync::Arc, time::Duration};

use pillarbox_transport::Message;
use tokio::time::Instant;

use super::{super::lines::LineName, Session};
use crate::{event::Key, pause::Pauses};

/// The wait of a line that is held back; the end of the pause ends it.
const HELD: Duration = Duration::from_secs(30 * 86_400);
const WINDOW: &str = "window";

impl Session<'_> {
    /// The pauses are others now.
    pub(super) fn heed(&mut self, pauses: Option<Arc<Pauses>>) {
        let now = Instant::now();
        self.pauses = pauses;
        for name in std::mem::take(&mut self.put_off) {
            self.lines.wait(&name, now);
        }
        let Some(pauses) = self.pauses.clone() else {
            return;
        };
        for key in &pauses.keys {
            self.window.block(key.clone());
            // Known as a line even where it has no row: the read that finds none unblocks the key afterwards.
            self.lines.found(LineName::Key(key.clone()), now);
        }
    }

    /// Nothing is sent. Also before the first look: a process that starts during a pause must not send first.
    pub(super) fn is_paused(&self) -> bool {
        self.pauses.as_ref().is_none_or(|p| p.whole)
    }

    /// Whether a message waits for an operator.
    pub(super) fn holds(&self, message: &Message) -> bool {
        self.pauses.as_ref().is_none_or(|p| {
            let by_key = || !p.keys.is_empty() && p.hold_key(Key::of(message).as_ref());
            p.whole || p.hold_topic(&message.topic) || by_key()
        })
    }

    fn holds_line(&self, name: &LineName) -> bool {
        // What a keyless line is about is seen when its event is read.
        self.pauses.as_ref().is_none_or(|p| {
            let by_topic = |key: &Key| p.hold_topic(&key.topic);
            p.whole || name.key().is_some_and(by_topic) || p.hold_key(name.key())
        })
    }

    /// Puts a line off until the pauses change.
    pub(super) fn put_off(&mut self, name: LineName) {
        self.lines.wait(&name, Instant::now() + HELD);
        self.put_off.insert(name);
    }

    /// Starts the lines that are due and answers when another will be.
    pub(super) fn start_lines(&mut self, now: Instant) -> Option<Instant> {
        loop {
            let (due, later) = self.lines.due(now);
            let mut again = false;
            for name in due {
                if self.holds_line(&name) {
                    self.put_off(name);
                    again = true;
                } else {
                    self.put_off.remove(&name);
                    self.load_line(name);
                }
            }
            // Those that were put off have left room for others.
            if !again {
                return later;
            }
        }
    }

    /// Says so when a paused topic has filled the window, and holds back its neighbours.
    pub(super) fn tell_full(&mut self) {
        let topics = self.pauses.as_ref().filter(|p| !p.topics.is_empty());
        if let Some(pauses) = topics
            && !self.wants_more()
        {
            let topics: Vec<&str> = pauses.topics.iter().map(String::as_str).collect();
            let text = format!(
                "full of events that wait; {} is paused, and its partition reads no further",
                topics.join(", ")
            );
            self.told_full = true;
            self.waits(WINDOW, &text);
        } else if std::mem::take(&mut self.told_full) {
            self.goes_on(WINDOW);
        }
    }
}
