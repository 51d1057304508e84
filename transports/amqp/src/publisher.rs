//! Publishing sessions, to topics and to dead-letter queues: confirms, mandatory, persistent.
//!
//! One batch at a time has a channel, from its first publish to its last confirm, and returned messages are told apart by
//! their id: lapin gives a returned message to whichever confirm comes next. One task publishes on each channel: lapin
//! numbers and queues a publish in two steps.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{BoxFuture, try_join_all},
};
use lapin::{
    Channel,
    options::{BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions},
};
use pillarbox_transport::{Error, Kind, Message, Outcome, Publisher, Result};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio_util::sync::ReusableBoxFuture;

use crate::{
    connection::Live,
    outcome::{Answer, Cause, Verdict},
    topology::{Spec, Topology},
    wire::{Encoder, Wire},
};

/// The error of a session whose task is gone, which happens when the runtime stops.
const GONE: &str = "the session's task is gone";

/// Where a session's messages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Each to the exchange of its topic, by its type.
    Topics,
    /// All to the dead letters of this queue.
    DeadLetters(Spec),
}

/// What a session is made of.
pub(crate) struct Plan {
    pub(crate) live: Arc<Live>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) target: Target,
    pub(crate) channels: u16,
    pub(crate) confirm_timeout: Duration,
    /// The largest body in bytes; falls when the broker says that it takes less.
    pub(crate) max_payload: Arc<AtomicUsize>,
}

impl Plan {
    /// Answers the topics that have an exchange now.
    async fn declare(&self) -> Result<HashSet<String>> {
        let topics = self.topology.declare(&self.live).await?;
        if let Target::DeadLetters(spec) = &self.target {
            self.topology.declare_dead_letters(&self.live, spec).await?;
        }
        Ok(topics)
    }
}

/// An open session. Dropping it ends it: batches that have not been started are not sent.
pub(crate) struct Session {
    queue: mpsc::UnboundedSender<Batch>,
    shared: Arc<Shared>,
}

struct Batch {
    messages: Vec<Arc<Message>>,
    answer: oneshot::Sender<Vec<Outcome>>,
}

struct Shared {
    plan: Plan,
    encoder: Encoder,
    inbox: Mutex<Inbox>,
    /// Something that was declared is gone.
    stale: AtomicBool,
    /// Why the session is over. From then on every message is unknown.
    end: watch::Sender<Option<End>>,
}

/// Held from taking a batch until its messages are queued for the broker, so that batches leave in call order.
struct Inbox {
    queue: mpsc::UnboundedReceiver<Batch>,
    declared: HashSet<String>,
}

#[derive(Clone)]
struct End(Kind, Arc<str>);

/// What may not be sent now, and why.
enum Held {
    All(End),
    Topics(HashMap<String, End>),
}

impl Held {
    /// The outcome of a message that is not sent.
    fn back(&self, message: &Message) -> Option<Outcome> {
        let why = match self {
            Self::All(why) => Some(why),
            Self::Topics(topics) if topics.is_empty() => None,
            Self::Topics(topics) => topics.get(&message.topic),
        };
        why.map(|End(kind, text)| {
            Outcome::Unavailable(Error::new(*kind, "publish", text.to_string()))
        })
    }
}

impl Session {
    /// Declares the topology and opens the channels.
    pub(crate) async fn open(plan: Plan) -> Result<Self> {
        let declared = plan.declare().await?;
        let open = (0..plan.channels).map(|_| confirming(&plan.live));
        let channels = try_join_all(open).await?;
        let (queue, receiver) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            encoder: Encoder::new(plan.target.clone(), plan.live.frame_max()),
            inbox: Mutex::new(Inbox {
                queue: receiver,
                declared,
            }),
            stale: AtomicBool::new(false),
            end: watch::Sender::new(None),
            plan,
        });
        for channel in channels {
            tokio::spawn(work(Arc::clone(&shared), channel));
        }
        Ok(Self { queue, shared })
    }
}

impl Publisher for Session {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let count = messages.len();
        if count == 0 {
            return Box::pin(async { Vec::new() });
        }
        let (answer, outcomes) = oneshot::channel();
        if let Some(end) = self.shared.ended() {
            return Box::pin(async move { end.outcomes(count) });
        }
        // Fails only when the tasks are gone; the answer says so.
        let _ = self.queue.send(Batch { messages, answer });
        Box::pin(async move {
            let lost = || End(Kind::Closed, GONE.into()).outcomes(count);
            outcomes.await.unwrap_or_else(|_| lost())
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.end(End(
            Kind::Closed,
            "the session was dropped by its owner".into(),
        ));
    }
}

impl End {
    fn outcome(&self) -> Outcome {
        let text = format!("the session is over: {}", self.1);
        Outcome::Unknown(Error::new(self.0, "publish", text))
    }

    fn outcomes(&self, count: usize) -> Vec<Outcome> {
        (0..count).map(|_| self.outcome()).collect()
    }
}

impl Shared {
    fn ended(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    fn end(&self, end: End) {
        self.end.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(end);
            }
            first
        });
    }

    /// Makes sure that `messages` may be sent now: waits while the broker blocks the connection, replaces a channel that
    /// was closed, declares exchanges that are new. Answers what may not be sent, and why.
    async fn prepare(
        &self,
        inbox: &mut Inbox,
        channel: &mut Arc<Channel>,
        messages: &[Arc<Message>],
    ) -> Result<Held, End> {
        let mut end = self.end.subscribe();
        tokio::select! {
            biased;
            _ = end.wait_for(Option::is_some) => {}
            up = self.plan.live.open() => if !up {
                self.end(End(Kind::Unreachable, "the connection is lost".into()));
            }
        }
        if let Some(end) = self.ended() {
            return Err(end);
        }
        if let Err(e) = self.renew(inbox, channel).await {
            return self.held(&e).map(Held::All);
        }
        self.declare_topics(inbox, messages).await
    }

    /// Makes good what the broker has closed or lost, so that a queue is never missing only because its exchange was
    /// made anew without it.
    async fn renew(&self, inbox: &mut Inbox, channel: &mut Arc<Channel>) -> Result<()> {
        if self.stale.load(Relaxed) {
            inbox.declared = self.plan.declare().await?;
            self.stale.store(false, Relaxed);
        }
        if !channel.status().connected() {
            *channel = Arc::new(confirming(&self.plan.live).await?);
        }
        Ok(())
    }

    async fn declare_topics(
        &self,
        inbox: &mut Inbox,
        messages: &[Arc<Message>],
    ) -> Result<Held, End> {
        let mut held = HashMap::new();
        if self.plan.target != Target::Topics {
            return Ok(Held::Topics(held));
        }
        for message in messages {
            let topic = &message.topic;
            // One that no broker may see is refused for its own reason.
            if inbox.declared.contains(topic)
                || held.contains_key(topic)
                || self.encode(message).is_err()
            {
                continue;
            }
            let declared = self.plan.topology.declare_exchange(&self.plan.live, topic);
            match declared.await {
                Ok(()) => drop(inbox.declared.insert(topic.clone())),
                Err(e) => drop(held.insert(topic.clone(), self.held(&e)?)),
            }
        }
        Ok(Held::Topics(held))
    }

    /// Why messages are held back because of `error`, or the end of the session.
    fn held(&self, error: &Error) -> Result<End, End> {
        let end = End(error.kind(), error.to_string().into());
        if matches!(error.kind(), Kind::Unreachable | Kind::Timeout) {
            self.end(end.clone());
            return Err(end);
        }
        Ok(end)
    }

    fn encode(&self, message: &Message) -> Result<Wire> {
        let limit = self.plan.max_payload.load(Relaxed);
        self.encoder.encode(message, limit)
    }
}

/// Serves one channel until the session's handle is dropped.
async fn work(shared: Arc<Shared>, channel: Channel) {
    let (mut channel, mut spare) = (Arc::new(channel), Vec::new());
    loop {
        let mut inbox = shared.inbox.lock().await;
        let Some(Batch { messages, answer }) = inbox.queue.recv().await else {
            return;
        };
        let prepared = shared.prepare(&mut inbox, &mut channel, &messages).await;
        let outcomes = match prepared {
            Err(end) => end.outcomes(messages.len()),
            Ok(held) => {
                let flight = Flight::start(&shared, &channel, &messages, &held, &mut spare);
                drop(inbox);
                flight.land(&shared, &channel, &messages, &mut spare).await
            }
        };
        // The owner may have lost interest.
        let _ = answer.send(outcomes);
    }
}

async fn confirming(live: &Live) -> Result<Channel> {
    let channel = live.channel().await?;
    let select = channel.confirm_select(ConfirmSelectOptions::default());
    live.answer("ask for confirms", select).await?;
    Ok(channel)
}

/// A publish until its confirm. lapin's futures are large: the memory of one serves the next.
type Publishing = ReusableBoxFuture<'static, Answer>;

enum Step {
    Known(Outcome),
    Waiting(Publishing),
    Answered(Answer),
}

/// One batch between its first publish and its last confirm.
struct Flight {
    steps: Vec<Step>,
    /// Messages that may not have left this process.
    unwritten: Arc<AtomicUsize>,
}

impl Flight {
    /// Queues the messages for the broker, in order.
    fn start(
        shared: &Shared,
        channel: &Arc<Channel>,
        messages: &[Arc<Message>],
        held: &Held,
        spare: &mut Vec<Publishing>,
    ) -> Self {
        let unwritten = Arc::new(AtomicUsize::new(0));
        let step = |message: &Arc<Message>| {
            // Encoded here, one by one: a batch of them is large.
            let wire = match shared.encode(message) {
                Ok(wire) => wire,
                Err(e) => return Step::Known(Outcome::Rejected(e)),
            };
            if let Some(why) = held.back(message) {
                return Step::Known(why);
            }
            let body = message.payload.clone().unwrap_or_default();
            let publish = publish(channel.clone(), wire, body, unwritten.clone());
            let mut publishing = match spare.pop() {
                Some(mut used) => {
                    used.set(publish);
                    used
                }
                None => Publishing::new(publish),
            };
            // The first poll queues the frames; the waker comes with the next.
            match publishing.poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(answer) => Step::Answered(answer),
                Poll::Pending => Step::Waiting(publishing),
            }
        };
        let steps = messages.iter().map(step).collect();
        Self { steps, unwritten }
    }

    /// Waits for all confirms.
    async fn land(
        mut self,
        shared: &Shared,
        channel: &Channel,
        messages: &[Arc<Message>],
        spare: &mut Vec<Publishing>,
    ) -> Vec<Outcome> {
        let all = async {
            for step in &mut self.steps {
                if let Step::Waiting(publishing) = step {
                    let answer = publishing.await;
                    if let Step::Waiting(used) = mem::replace(step, Step::Answered(answer)) {
                        spare.push(used);
                    }
                }
            }
        };
        let limit = shared.plan.confirm_timeout;
        let mut late = Vec::new();
        if shared.plan.live.within(limit, all).await.is_none() {
            late = self.give_up(shared, channel).await;
        }
        shared.judge(self.steps, &late, messages)
    }

    /// After the deadline: what was confirmed in time keeps its confirm, and the rest is unknown.
    ///
    /// A return may just be on its way from lapin's thread to a confirm that is not waited for any more. Whatever was
    /// received by now has been handed out when the broker's answer to one more question has: without that answer, no
    /// confirm is believed. Answers the confirms that came late, for the returns that they carry.
    async fn give_up(&mut self, shared: &Shared, channel: &Channel) -> Vec<Answer> {
        let live = &shared.plan.live;
        for step in &mut self.steps {
            if let Step::Waiting(confirm) = step
                && let Some(answer) = confirm.now_or_never()
            {
                *step = Step::Answered(answer);
            }
        }
        if self.unwritten.load(Relaxed) > 0 {
            // lapin would still send them later, after whoever sends them again.
            live.cut();
        }
        let question = channel.basic_qos(1, BasicQosOptions::default());
        let believed = live
            .answer("wait for the last confirms", question)
            .await
            .is_ok();
        let mut late = Vec::new();
        for step in &mut self.steps {
            match step {
                Step::Waiting(confirm) => late.extend(confirm.now_or_never()),
                Step::Answered(Ok(_)) if !believed => *step = Step::Answered(Err(overtaken())),
                _ => {}
            }
        }
        late
    }
}

/// The error of a confirm that is not believed.
fn overtaken() -> lapin::Error {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

async fn publish(
    channel: Arc<Channel>,
    wire: Wire,
    body: Bytes,
    unwritten: Arc<AtomicUsize>,
) -> Answer {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    unwritten.fetch_add(1, Relaxed);
    let written = channel
        .basic_publish(wire.exchange, wire.key, options, &body, wire.properties)
        .await;
    unwritten.fetch_sub(1, Relaxed);
    let confirmation = written?.await?;
    let taken = confirmation.is_ack();
    // The returned body is dropped here.
    let returned = confirmation.take_message();
    let id = returned.and_then(|m| m.properties.message_id().clone());
    Ok((taken, id))
}

impl Shared {
    /// What became of each message. Ends the session when that is unknown for any.
    fn judge(&self, steps: Vec<Step>, late: &[Answer], messages: &[Arc<Message>]) -> Vec<Outcome> {
        let answers = steps.iter().filter_map(|step| match step {
            Step::Answered(answer) => Some(answer),
            _ => None,
        });
        let verdict = Verdict::of(answers.chain(late), self.plan.live.cluster());
        if let Cause::TooLarge(limit) = verdict.cause {
            self.plan.max_payload.fetch_min(limit, Relaxed);
        }
        let mut end = None;
        let outcomes = steps.into_iter().zip(messages).map(|(step, message)| {
            let outcome = match step {
                Step::Known(outcome) => outcome,
                Step::Waiting(_) => Outcome::Unknown(Error::new(
                    Kind::Timeout,
                    "publish",
                    format!("no confirm within {:?}", self.plan.confirm_timeout),
                )),
                Step::Answered(answer) => {
                    let taken = answer.ok().map(|(taken, _)| taken);
                    verdict.on(taken, message, &self.plan.target)
                }
            };
            match &outcome {
                Outcome::Unknown(e) if end.is_none() => {
                    end = Some(End(e.kind(), e.to_string().into()));
                }
                Outcome::Unavailable(e) if e.kind() == Kind::Missing => {
                    self.stale.store(true, Relaxed);
                }
                _ => {}
            }
            outcome
        });
        let outcomes = outcomes.collect();
        if let Some(end) = end {
            self.end(end);
        }
        outcomes
    }
}
