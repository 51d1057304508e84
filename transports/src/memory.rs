//! The transport for one process: no server, nothing stored.
//!
//! [`Outcome::Stored`] means that every group bound to the topic that wants the type has committed the event, because
//! nothing else would survive a crash. The outbox is then the only store, and a restart sends again what was not
//! applied. A group that is full or not reading makes the topic unavailable; so does a topic without groups.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use futures_util::future::{BoxFuture, join_all};
use tokio::sync::{mpsc, oneshot};

use crate::{
    Ack, Binding, Delivery, Error, Kind, Message, Outcome, Publisher, Result, Source, Subscription,
    Transport,
};

/// Events that wait in the process for one group. Beyond it the group is full. Defaults to 1,000.
pub const CAPACITY: usize = 1_000;
/// Copies of dead letters kept for a look; the store has the real ones.
const DEAD_LETTERS: usize = 1_000;

/// The in-process transport. Clones share one broker: give the same one to every service of the process.
///
/// ```
/// use std::sync::Arc;
/// use pillarbox_transport::{Transport, memory::Memory};
/// let transport: Arc<dyn Transport> = Arc::new(Memory::new());
/// assert_eq!(transport.kind(), "memory");
/// ```
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<Broker>>);

#[derive(Default)]
struct Broker {
    topics: HashMap<String, BTreeMap<String, Group>>,
    dead_letters: VecDeque<Arc<Message>>,
}

#[derive(Default)]
struct Group {
    kinds: HashSet<String>,
    reader: Option<mpsc::Sender<Waiting>>,
}

/// An event on its way to one group; dropping it tells the publisher that the group did not take it.
struct Waiting {
    message: Arc<Message>,
    applied: oneshot::Sender<()>,
}

impl Memory {
    /// A broker without topics.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The newest dead letters, oldest first; at most 1,000 are kept.
    #[must_use]
    pub fn dead_lettered(&self) -> Vec<Message> {
        self.with(|b| b.dead_letters.iter().map(|m| Message::clone(m)).collect())
    }

    fn with<T>(&self, f: impl FnOnce(&mut Broker) -> T) -> T {
        // No code that runs under the lock can leave it half done.
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Memory")
    }
}

#[async_trait]
impl Transport for Memory {
    fn kind(&self) -> &'static str {
        "memory"
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(self.clone()))
    }

    async fn bind(&self, binding: &Binding) -> Result<Vec<Source>> {
        self.with(|b| {
            let groups = b.topics.entry(binding.topic.clone()).or_default();
            let group = groups.entry(binding.group.clone()).or_default();
            group.kinds.extend(binding.kinds.iter().cloned());
        });
        Ok(vec![Source {
            transport: "memory",
            cluster: String::new(),
            topic: binding.topic.clone(),
            name: binding.topic.clone(),
            partition: 0,
            identity: String::new(),
            replayable: false,
        }])
    }

    async fn subscribe(
        &self,
        source: &Source,
        group: &str,
        _from: Option<u64>,
    ) -> Result<Box<dyn Subscription>> {
        let (sender, receiver) = mpsc::channel(CAPACITY);
        self.with(|b| {
            let group = b
                .topics
                .get_mut(&source.topic)
                .and_then(|groups| groups.get_mut(group));
            // A later session replaces an earlier one: its holder has the lease.
            group.map(|g| g.reader = Some(sender))
        })
        .ok_or_else(|| {
            let text = format!("group {group:?} is not bound to topic {:?}", source.topic);
            Error::new(Kind::Missing, "subscribe", text)
        })?;
        Ok(Box::new(Reader(receiver)))
    }

    async fn dead_letters(&self, _topic: &str, _group: &str) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(DeadLetters(self.clone())))
    }
}

impl Publisher for Memory {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let waits: Vec<_> = self.with(|b| messages.into_iter().map(|m| b.offer(m)).collect());
        Box::pin(join_all(waits.into_iter().map(settle)))
    }
}

async fn settle(offered: Result<Vec<oneshot::Receiver<()>>, Outcome>) -> Outcome {
    match offered {
        Err(outcome) => outcome,
        Ok(groups) => {
            if join_all(groups)
                .await
                .iter()
                .all(std::result::Result::is_ok)
            {
                return Outcome::Stored;
            }
            let text = "a group stopped reading before it had applied the event";
            Outcome::Unavailable(Error::new(Kind::Missing, "publish", text))
        }
    }
}

impl Broker {
    fn offer(&mut self, message: Arc<Message>) -> Result<Vec<oneshot::Receiver<()>>, Outcome> {
        let unavailable = |kind, text| Outcome::Unavailable(Error::new(kind, "publish", text));
        let Some(groups) = self.topics.get(&message.topic).filter(|g| !g.is_empty()) else {
            let text = format!("no group is bound to topic {:?}", message.topic);
            return Err(unavailable(Kind::Unrouted, text));
        };
        let wanting: Vec<_> = groups
            .iter()
            .filter(|(_, g)| g.kinds.contains(&message.kind))
            .collect();
        if wanting.is_empty() {
            let text = format!(
                "no group of topic {:?} has a handler for {:?}",
                message.topic, message.kind
            );
            return Err(Outcome::Retry(Error::new(Kind::Unrouted, "publish", text)));
        }
        let mut waits = Vec::with_capacity(wanting.len());
        for (name, group) in wanting {
            match group.reader.as_ref().map(mpsc::Sender::try_reserve) {
                Some(Ok(place)) => {
                    let (applied, wait) = oneshot::channel();
                    let message = message.clone();
                    place.send(Waiting { message, applied });
                    waits.push(wait);
                }
                Some(Err(mpsc::error::TrySendError::Full(()))) => {
                    let text = format!("group {name:?} has {CAPACITY} events waiting");
                    return Err(unavailable(Kind::Full, text));
                }
                Some(Err(mpsc::error::TrySendError::Closed(()))) | None => {
                    let text = format!("group {name:?} is not reading");
                    return Err(unavailable(Kind::Missing, text));
                }
            }
        }
        Ok(waits)
    }
}

struct Reader(mpsc::Receiver<Waiting>);

#[async_trait]
impl Subscription for Reader {
    async fn next(&mut self) -> Result<Delivery> {
        let Some(Waiting { message, applied }) = self.0.recv().await else {
            return Err(Error::new(
                Kind::Closed,
                "receive",
                "another session took over",
            ));
        };
        Ok(Delivery {
            message: Arc::unwrap_or_clone(message),
            position: None,
            defect: None,
            ack: Ack::new(move || {
                let told = applied.send(());
                Box::pin(async move {
                    told.map_err(|()| {
                        Error::new(Kind::Closed, "acknowledge", "the publisher is gone")
                    })
                })
            }),
        })
    }

    async fn close(self: Box<Self>) {}
}

struct DeadLetters(Memory);

impl Publisher for DeadLetters {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let outcomes = messages.iter().map(|_| Outcome::Stored).collect();
        self.0.with(|b| {
            b.dead_letters.extend(messages);
            let excess = b.dead_letters.len().saturating_sub(DEAD_LETTERS);
            b.dead_letters.drain(..excess);
        });
        Box::pin(async move { outcomes })
    }
}
