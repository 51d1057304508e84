//! What a consumer reads: a queue that gives back what was not acknowledged, or a log that can be read again.
//!
//! A queue serves its oldest reader alone; a reader that ends gives the rest back in order.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use pillarbox_transport::{
    Ack, Delivery, Error, Kind, Message, Outcome, Publisher, Result, Source, Subscription,
};
use tokio::sync::Notify;

use super::{
    application::number_of,
    database::Number,
    world::{Inner, World},
};

/// Most unacknowledged deliveries of a reader.
const PREFETCH: usize = 10;

#[derive(Debug, Default)]
pub(super) struct Queue {
    /// All that was ever put in, repeats included, with what makes it unreadable.
    pub(super) messages: Vec<(Message, Option<String>)>,
    ready: VecDeque<usize>,
    readers: Vec<Reader>,
    next_reader: usize,
    /// Something came, or a reader ended.
    pub(super) changed: Arc<Notify>,
    /// Copies of dead letters.
    pub(super) copies: BTreeSet<Number>,
}

#[derive(Debug)]
struct Reader {
    id: usize,
    process: usize,
    /// In a log: what it reads next.
    next: usize,
    unacked: BTreeSet<usize>,
}

impl Queue {
    pub(super) fn put(&mut self, message: Message, defect: Option<String>) {
        self.ready.push_back(self.messages.len());
        self.messages.push((message, defect));
        self.changed.notify_waiters();
    }

    /// Whether everything was acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.readers.iter().all(|r| r.unacked.is_empty())
    }

    fn end(&mut self, id: usize) {
        let Some(at) = self.readers.iter().position(|r| r.id == id) else {
            return;
        };
        let reader = self.readers.remove(at);
        for index in reader.unacked.into_iter().rev() {
            self.ready.push_front(index);
        }
        self.changed.notify_waiters();
    }

    /// The broker ends a process's sessions.
    pub(super) fn end_all(&mut self, of: Option<usize>) {
        let ended = self
            .readers
            .iter()
            .filter(|r| of.is_none_or(|p| p == r.process));
        for id in ended.map(|r| r.id).collect::<Vec<_>>() {
            self.end(id);
        }
    }
}

fn error(kind: Kind, operation: &'static str) -> Error {
    Error::new(kind, operation, "the session is gone")
}

impl Inner {
    fn subscribe(&mut self, process: usize, from: Option<u64>) -> usize {
        let id = self.queue.next_reader;
        self.queue.next_reader += 1;
        let next = from.map_or(0, |p| {
            usize::try_from(p).unwrap_or(usize::MAX).saturating_sub(1)
        });
        self.tell(|| format!("consumer {process}: reads from {next} as reader {id}"));
        self.queue.readers.push(Reader {
            id,
            process,
            next,
            unacked: BTreeSet::new(),
        });
        id
    }

    /// The next delivery; none if there is none for this reader now.
    fn deliver_to(&mut self, id: usize) -> Option<Result<usize>> {
        let replayable = self.plan.consumer.replayable;
        let oldest = self.queue.readers.first().map(|r| r.id);
        let Some(reader) = self.queue.readers.iter_mut().find(|r| r.id == id) else {
            return Some(Err(error(Kind::Closed, "receive")));
        };
        if replayable {
            let index = reader.next;
            (index < self.queue.messages.len()).then(|| {
                reader.next += 1;
                Ok(index)
            })
        } else if oldest == Some(id) && reader.unacked.len() < PREFETCH {
            let index = self.queue.ready.pop_front()?;
            reader.unacked.insert(index);
            Some(Ok(index))
        } else {
            None
        }
    }

    fn acknowledge(&mut self, id: usize, index: usize) -> Result<()> {
        let number = number_of(&self.queue.messages[index].0);
        let Some(reader) = self.queue.readers.iter_mut().find(|r| r.id == id) else {
            return Err(error(Kind::Closed, "acknowledge"));
        };
        reader.unacked.remove(&index);
        self.tell(|| format!("{number} is acknowledged"));
        self.check_acknowledged(number);
        if !self.healed && self.chance.hit(self.plan.faults.session_death) {
            self.queue.end(id);
        }
        Ok(())
    }
}

/// Opens a reading session for a process.
pub(super) async fn subscribe(
    world: &Arc<World>,
    process: usize,
    source: &Source,
    from: Option<u64>,
) -> Box<dyn Subscription> {
    world.pause(0..=5).await;
    let from = from.filter(|_| source.replayable);
    Box::new(ModelSubscription {
        world: world.clone(),
        id: world.with(|w| w.subscribe(process, from)),
        closed: false,
    })
}

struct ModelSubscription {
    world: Arc<World>,
    id: usize,
    closed: bool,
}

#[async_trait]
impl Subscription for ModelSubscription {
    async fn next(&mut self) -> Result<Delivery> {
        loop {
            let changed = self.world.with(|w| w.queue.changed.clone());
            let changed = changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(index) = self.world.with(|w| w.deliver_to(self.id)) {
                return Ok(self.delivery(index?));
            }
            changed.await;
        }
    }

    async fn close(mut self: Box<Self>) {
        self.world.pause(0..=3).await;
        self.world.with(|w| w.queue.end(self.id));
        // Only now: a process that dies meanwhile has not told the broker.
        self.closed = true;
    }
}

impl ModelSubscription {
    fn delivery(&self, index: usize) -> Delivery {
        let (message, defect) = self.world.with(|w| w.queue.messages[index].clone());
        let replayable = self.world.with(|w| w.plan.consumer.replayable);
        let (world, id) = (self.world.clone(), self.id);
        let acknowledge = move || -> BoxFuture<'static, Result<()>> {
            Box::pin(async move { world.with(|w| w.acknowledge(id, index)) })
        };
        Delivery {
            message,
            position: replayable.then(|| u64::try_from(index).unwrap_or_default() + 1),
            defect,
            ack: if replayable {
                Ack::none()
            } else {
                Ack::new(acknowledge)
            },
        }
    }
}

impl Drop for ModelSubscription {
    fn drop(&mut self) {
        // Its process died: the broker sees it soon.
        let (world, id) = (self.world.clone(), self.id);
        if let (false, Ok(runtime)) = (self.closed, tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                world.pause(0..=300).await;
                world.with(|w| w.queue.end(id));
            });
        }
    }
}

/// Takes copies of dead letters, mostly.
pub(super) struct Copies(pub(super) Arc<World>);

impl Publisher for Copies {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let world = self.0.clone();
        Box::pin(async move {
            world.pause(0..=5).await;
            world.with(|w| messages.iter().map(|m| w.copy(m)).collect())
        })
    }
}

impl Inner {
    fn copy(&mut self, message: &Message) -> Outcome {
        let number = number_of(message);
        let lost = !self.healed && self.chance.hit(self.plan.faults.lost);
        if !lost || self.chance.hit(0.5) {
            self.queue.copies.insert(number);
        }
        self.check_copy(number);
        if lost {
            Outcome::Unknown(error(Kind::Unreachable, "publish"))
        } else {
            Outcome::Stored
        }
    }
}
