//! The conformance suite: what the engine's promises ask of a transport, as cases that run against any of them.
//!
//! A transport brings a [`Harness`]: how to get a corner of its broker, the transport itself configured for it, and an
//! independent client that tells what the broker has. [`exercise`] runs every [`Case`]; one that a broker cannot have is
//! declared with its reason, and printed.
//!
//! What was stored is believed from the harness's own client alone, never from the transport under test.

mod cases;
mod faults;
mod reading;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pillarbox_transport::{
    Binding, Bytes, Delivery, Message, Outcome, Publisher, Source, Subscription, Transport,
};

use crate::proxy::Proxy;

/// The deadline for confirms that a harness configures: long enough for a busy machine, short enough to be waited for.
pub const CONFIRM_TIMEOUT: Duration = Duration::from_secs(4);
/// The group whose messages [`Corner::stored`] tells.
pub const GROUP: &str = "one";
/// No wait of a case lasts longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to reach one kind of broker, and what it cannot do.
#[async_trait(?Send)]
pub trait Harness {
    /// The transport's name, as in the table of docs/reference/transports.md.
    fn name(&self) -> &'static str;

    /// Cases that this broker cannot have, each with the reason.
    fn exceptions(&self) -> &'static [(Case, &'static str)] {
        &[]
    }

    /// A place at the broker that nobody else uses, for one case. With `own_server`, a server that the case may crash.
    /// None when the server is missing and may be: then nothing is shown, and that is printed.
    async fn corner(&self, own_server: bool) -> Option<Box<dyn Corner>>;
}

/// A place at the broker for one case.
///
/// Its transport takes the types `{word}.thing.a`, `.b` and `.c` for [`Corner::topic`], and no other, as soon as
/// [`Corner::ready`] returned.
#[async_trait(?Send)]
pub trait Corner {
    /// One word that no other corner has: the first of topic and types.
    fn word(&self) -> &str;

    /// The transport under test: over [`Corner::proxy`], with [`CONFIRM_TIMEOUT`]. Another one at each call.
    fn transport(&self) -> Arc<dyn Transport>;

    /// The same with credentials that the broker does not know, and `canary` in them. None where there are none.
    fn stranger(&self) -> Option<Arc<dyn Transport>> {
        None
    }

    /// What the transport's connections go through. None where there are none.
    fn proxy(&self) -> Option<&Proxy> {
        None
    }

    /// Makes the broker take the case's types for [`GROUP`], so that they can be stored.
    async fn ready(&self, transport: &dyn Transport) {
        transport
            .bind(&self.binding(GROUP))
            .await
            .expect("bind the group");
    }

    /// All that was stored for [`GROUP`], in order, by an independent client. Asked once in a case.
    async fn stored(&mut self) -> Vec<Stored>;

    /// All dead letters of [`GROUP`], in order, by an independent client.
    async fn dead_letters(&mut self) -> Vec<Stored>;

    /// Kills the server and starts it again.
    async fn crash(&mut self);

    /// The largest payload that must pass, in bytes. Defaults to 1 MiB.
    fn largest(&self) -> usize {
        1_048_576
    }

    /// A payload that the transport or the broker refuses for its size, in bytes.
    fn too_large(&self) -> usize;

    /// The topic of the case.
    fn topic(&self) -> String {
        format!("{}.events", self.word())
    }

    /// What a group of the case reads.
    fn binding(&self, group: &str) -> Binding {
        let kind = |last: &&str| format!("{}.thing.{last}", self.word());
        Binding {
            topic: self.topic(),
            group: group.to_owned(),
            kinds: ["a", "b", "c"].iter().map(kind).collect(),
        }
    }
}

/// One message, as an independent client found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The attribute `id`.
    pub id: String,
    /// The attribute `partitionkey`.
    pub key: Option<String>,
    /// The body.
    pub payload: Bytes,
    /// All headers under the names that they have on the wire.
    pub headers: BTreeMap<String, String>,
}

macro_rules! cases {
    ($($(#[$doc:meta])* $name:ident $title:literal $run:path $(, $own:ident)?;)+) => {
        /// One promise, as a case of the suite.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Case { $($(#[$doc])* $name,)+ }

        impl Case {
            /// All of them, in the order in which they run.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// What it shows, as in the table.
            #[must_use]
            pub fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)+ }
            }

            fn own_server(self) -> bool {
                match self { $(Self::$name => false $(|| stringify!($own) == "own")?,)+ }
            }

            async fn run(self, corner: Box<dyn Corner>) {
                match self { $(Self::$name => $run(corner).await,)+ }
            }
        }
    };
}

cases! {
    /// `Stored` is true.
    Confirmed "what is told to be stored is there" cases::confirmed;
    /// One outcome for each message, in the order of the calls.
    Outcomes "outcomes come for each message, in order" cases::outcomes;
    /// A message that the broker cannot take costs its neighbours nothing.
    Blame "the bad event alone is rejected" cases::blame;
    /// A type without a place is told as such.
    Unrouted "a type that nobody takes is told alone" cases::unrouted;
    /// Unicode, empty, missing and large payloads.
    Content "content arrives as it was sent" cases::content;
    /// Open batches are answered, also when their session is dropped.
    Drain "open batches are answered" cases::drain;
    /// Dead letters reach their address, however malformed.
    DeadLetters "dead letters arrive, also malformed ones" cases::dead_letters;
    /// What was not acknowledged comes again.
    Redelivery "what is not acknowledged comes again, in order" reading::redelivery;
    /// A session of the same group goes on where another one ended.
    HandOver "the next reader of a group goes on where the last ended" reading::hand_over;
    /// Each group has all of it.
    Groups "each group gets everything, in order" reading::groups;
    /// First arrivals of each key are in order, whatever breaks.
    KeyOrder "each key stays in order through lost connections" faults::key_order;
    /// A lost connection leaves the unconfirmed unknown, at once.
    Cut "a lost connection leaves the unconfirmed unknown" faults::cut;
    /// Silence ends by the deadline.
    Silence "silence ends by the deadline" faults::silence;
    /// Late answers within the deadline count.
    Slow "a slow broker is waited for" faults::slow;
    /// A broker that is away is a temporary error in bounded time.
    Away "a broker that is away is waited for" faults::away;
    /// Credentials that are refused are told apart, and not shown.
    Credentials "wrong credentials are told and not shown" faults::credentials;
    /// A crash of the server loses nothing that was stored.
    Crash "a crash of the server loses nothing" faults::crash, own;
    /// Sessions that are over leave nothing behind.
    NoLeak "100 reconnects leave nothing behind" faults::no_leak;
}

/// Runs every case of the suite against a transport, one after the other, and prints what each has shown.
///
/// Run it in a test program of its own, on a runtime with two threads or more: one case counts the process's files and
/// tasks.
///
/// # Panics
/// When a case fails.
pub async fn exercise(harness: &dyn Harness) {
    let mut table = String::new();
    for case in Case::ALL {
        let exception = harness.exceptions().iter().find(|(c, _)| c == case);
        let shown = match exception {
            Some((_, reason)) => format!("not here: {reason}"),
            None => {
                let Some(corner) = harness.corner(case.own_server()).await else {
                    // The harness has said what is missing.
                    return;
                };
                let start = Instant::now();
                let run = tokio::time::timeout(PATIENCE * 2, case.run(corner)).await;
                assert!(run.is_ok(), "{}: {case:?} takes for ever", harness.name());
                format!("shown in {:.1?}", start.elapsed())
            }
        };
        let line = format!("{:>8}  {:<58} {shown}", harness.name(), case.title());
        // Straight to stderr: the test harness swallows what a passing test prints.
        let _ = writeln!(std::io::stderr(), "{line}");
        let _ = writeln!(table, "{line}");
    }
}

/// Whether the table of docs/reference/transports.md says of this transport what the harness does.
///
/// # Panics
/// With the row that should be there.
pub fn assert_documented(harness: &dyn Harness, page: &str) {
    let rows: Vec<Vec<&str>> = page
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let head = rows.iter().find(|row| row[0] == "case");
    let column = head.and_then(|row| row.iter().position(|name| *name == harness.name()));
    let column =
        column.expect("a table with the head `| case | …` and a column for each transport");
    for case in Case::ALL {
        let exception = harness.exceptions().iter().find(|(c, _)| c == case);
        let wanted = if exception.is_some() { "no" } else { "yes" };
        let row = rows.iter().find(|row| row[0] == case.title());
        let found = row.and_then(|row| row.get(column)).copied();
        assert_eq!(
            found,
            Some(wanted),
            "docs/reference/transports.md: the row {:?}, column {}",
            case.title(),
            harness.name()
        );
        if let Some((_, reason)) = exception {
            let line = format!("- {}, {}: {reason}", harness.name(), case.title());
            assert!(
                page.contains(&line),
                "docs/reference/transports.md: expected the line\n{line}"
            );
        }
    }
}

/// What the cases share.
impl dyn Corner + '_ {
    fn event(&self, id: impl ToString) -> Message {
        self.event_of("a", id)
    }

    fn event_of(&self, last: &str, id: impl ToString) -> Message {
        let kind = format!("{}.thing.{last}", self.word());
        let id = format!("{}-{}", self.word(), id.to_string());
        Message::new(id, self.topic(), kind, "{}").with_attribute("source", "suite")
    }

    fn events(&self, ids: std::ops::Range<usize>) -> Vec<Message> {
        ids.map(|id| self.event(id)).collect()
    }

    fn id(&self, id: impl ToString) -> String {
        format!("{}-{}", self.word(), id.to_string())
    }

    fn ids(&self, ids: std::ops::Range<usize>) -> Vec<String> {
        ids.map(|id| self.id(id)).collect()
    }

    /// The transport, with the broker ready for it, and a session.
    async fn open(&self) -> (Arc<dyn Transport>, Box<dyn Publisher>) {
        let transport = self.transport();
        self.ready(&*transport).await;
        let publisher = soon(transport.publisher()).await.expect("a publisher");
        (transport, publisher)
    }

    /// A session as soon as one can be had, as an engine would try.
    async fn publisher_again(&self, transport: &dyn Transport) -> Box<dyn Publisher> {
        let again = async {
            loop {
                match transport.publisher().await {
                    Ok(publisher) => return publisher,
                    Err(e) => assert!(e.is_temporary(), "{e}"),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        soon(again).await
    }

    async fn stored_ids(&mut self) -> Vec<String> {
        self.stored().await.into_iter().map(|s| s.id).collect()
    }

    async fn bind(&self, transport: &dyn Transport, group: &str) -> Source {
        let mut sources = soon(transport.bind(&self.binding(group)))
            .await
            .expect("bind");
        assert_eq!(sources.len(), 1, "one queue or partition: {sources:?}");
        sources.remove(0)
    }
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, work).await;
    waited.expect("nothing happened for a minute")
}

/// Hands messages to a session, at once.
fn send(
    publisher: &dyn Publisher,
    messages: Vec<Message>,
) -> Pin<Box<dyn Future<Output = Vec<Outcome>> + Send>> {
    publisher.publish(messages.into_iter().map(Arc::new).collect())
}

fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Stored => "stored",
        Outcome::Unknown(_) => "unknown",
        Outcome::Unavailable(_) => "unavailable",
        Outcome::Retry(_) => "retry",
        Outcome::Rejected(_) => "rejected",
    }
}

#[track_caller]
fn assert_all(outcomes: &[Outcome], expected: &str) {
    for (at, outcome) in outcomes.iter().enumerate() {
        assert_eq!(word(outcome), expected, "message {at}: {outcome:?}");
    }
}

fn set(ids: Vec<String>) -> BTreeSet<String> {
    ids.into_iter().collect()
}

/// Reads so many deliveries.
async fn take(reader: &mut Box<dyn Subscription>, count: usize) -> Vec<Delivery> {
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        all.push(soon(reader.next()).await.expect("a delivery"));
    }
    all
}
