//! Publishing sessions, to topics and to dead letters. One connection and one task for each session.
//!
//! Answers arrive under reply subjects of the session's own, `{inbox}.{batch}.{place}`. The client's ack futures are not
//! used: each starts its time when it is first awaited, and keeps its entry for ever when the answer is lost.

mod prepare;

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use async_nats::{Client, Message as Received, Subscriber};
use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use pillarbox_transport::{Error, Kind, Message, Outcome, Publisher, Result};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use crate::{
    connection::Live,
    outcome::of_answer,
    topology::{Spec, Topology},
    wire::Wire,
};

/// The error of a session whose task is gone, which happens when the runtime stops.
const GONE: &str = "the session's task is gone";

/// Where a session's messages go.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// Each to the stream of its topic, under its type.
    Topics,
    /// All to the dead letters of this stream's topic, under this subject.
    DeadLetters(Box<Spec>, String),
}

/// What a session is made of.
pub(crate) struct Plan {
    pub(crate) live: Arc<Live>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) target: Target,
    pub(crate) confirm_timeout: Duration,
    /// The largest message in bytes.
    pub(crate) max_payload: usize,
}

/// An open session. Dropping it ends it: batches that have not been started are not sent.
pub(crate) struct Session {
    queue: mpsc::UnboundedSender<Batch>,
    /// Why the session is over. From then on every message is unknown.
    end: watch::Receiver<Option<End>>,
    /// Its end is the session's: what waits is not sent any more.
    _owner: oneshot::Sender<()>,
}

struct Batch {
    messages: Vec<Arc<Message>>,
    answer: oneshot::Sender<Vec<Outcome>>,
}

#[derive(Clone)]
struct End(Kind, Arc<str>);

impl Session {
    /// Declares the streams and starts to listen for answers.
    pub(crate) async fn open(plan: Plan) -> Result<Self> {
        let streams = plan.declare().await?;
        let live = &plan.live;
        let inbox = live.client.new_inbox();
        let listening = live.client.subscribe(format!("{inbox}.>"));
        let answers = live
            .answer("listen for answers", listening)
            .await?
            .map_err(|_| live.lost("listen for answers"))?;
        let (queue, receiver) = mpsc::unbounded_channel();
        let (told, end) = watch::channel(None);
        let (owner, dropped) = oneshot::channel();
        let work = Work {
            forbidden: plan.live.forbidden(),
            inbox,
            answers,
            streams,
            stale: false,
            batches: 0,
            flights: VecDeque::new(),
            step: None,
            queue: receiver,
            dropped,
            plan: Arc::new(plan),
        };
        tokio::spawn(work.run(told));
        Ok(Self {
            queue,
            end,
            _owner: owner,
        })
    }
}

impl Publisher for Session {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        let count = messages.len();
        if count == 0 {
            return Box::pin(async { Vec::new() });
        }
        let (answer, outcomes) = oneshot::channel();
        // Fails only when the task has ended; the end says why.
        let _ = self.queue.send(Batch { messages, answer });
        let end = self.end.clone();
        Box::pin(async move {
            outcomes.await.unwrap_or_else(|_| {
                let gone = || End(Kind::Closed, GONE.into());
                let end = end.borrow().clone().unwrap_or_else(gone);
                (0..count).map(|_| end.outcome()).collect()
            })
        })
    }
}

impl End {
    fn outcome(&self) -> Outcome {
        let text = format!("the session is over: {}", self.1);
        Outcome::Unknown(Error::new(self.0, "publish", text))
    }
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self(error.kind(), error.to_string().into())
    }
}

impl Plan {
    /// Answers the topics that have a stream now.
    async fn declare(&self) -> Result<HashMap<String, Spec>> {
        let topics = self.topology.declare(&self.live).await?;
        if let Target::DeadLetters(spec, _) = &self.target {
            self.topology.declare_dead_letters(&self.live, spec).await?;
        }
        Ok(topics)
    }
}

/// The state of a session's task.
struct Work {
    plan: Arc<Plan>,
    inbox: String,
    answers: Subscriber,
    forbidden: watch::Receiver<Vec<String>>,
    /// By topic: what has been declared.
    streams: HashMap<String, Spec>,
    /// Something that was declared is gone.
    stale: bool,
    batches: u64,
    /// In the order of their start, so the first has the earliest deadline.
    flights: VecDeque<Flight>,
    /// One batch is prepared or sent at a time: batches leave in call order.
    step: Option<Step>,
    queue: mpsc::UnboundedReceiver<Batch>,
    dropped: oneshot::Receiver<()>,
}

/// A batch between its first publish and its last answer.
struct Flight {
    number: u64,
    deadline: Instant,
    places: Vec<Place>,
    missing: usize,
    answer: oneshot::Sender<Vec<Outcome>>,
}

enum Place {
    /// The stream and the subject that it was sent to.
    Waiting(Arc<str>, String),
    Known(Outcome),
}

/// A message that may be sent, or what became of it.
type Prepared = Result<(Arc<str>, Wire), Outcome>;

enum Step {
    Prepare(BoxFuture<'static, Ready>),
    /// True when all is in the client's queue, false when the client is gone.
    Send(BoxFuture<'static, bool>),
}

/// What a preparation learned.
struct Ready {
    batch: Batch,
    wires: Result<Vec<Prepared>, End>,
    streams: HashMap<String, Spec>,
}

enum Event {
    Dropped,
    Answer(Option<Received>),
    Forbidden,
    Deadline,
    Step(Done),
    Batch(Option<Batch>),
}

enum Done {
    Prepared(Ready),
    Sent(bool),
}

impl Work {
    async fn run(mut self, told: watch::Sender<Option<End>>) {
        let end = loop {
            let event = self.next().await;
            if let Err(end) = self.take(event) {
                break end;
            }
        };
        // First the word, so that what is published from now on finds it.
        told.send_replace(Some(end.clone()));
        for flight in self.flights.drain(..) {
            flight.end(&end);
        }
        // What waits, and the batch that is being prepared, is dropped here: its outcome is the end's.
    }

    /// Waits for the next thing that happens. Nothing is lost when it is dropped.
    async fn next(&mut self) -> Event {
        let deadline = self.flights.front().map(|flight| flight.deadline);
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let free = self.step.is_none();
        let step = async {
            match &mut self.step {
                Some(step) => step.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = &mut self.dropped => Event::Dropped,
            answer = self.answers.next() => Event::Answer(answer),
            Ok(()) = self.forbidden.changed() => Event::Forbidden,
            () = late => Event::Deadline,
            done = step => Event::Step(done),
            batch = self.queue.recv(), if free => Event::Batch(batch),
        }
    }

    /// # Errors
    /// The session is over.
    fn take(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Dropped | Event::Batch(None) => {
                let text = "the session was dropped by its owner";
                return Err(End(Kind::Closed, text.into()));
            }
            Event::Answer(Some(answer)) => {
                self.land(&answer);
                // What has come already needs no new round.
                while let Some(Some(answer)) = self.answers.next().now_or_never() {
                    self.land(&answer);
                }
            }
            Event::Answer(None) => return Err(self.plan.live.lost("publish").into()),
            Event::Forbidden => self.forbid(),
            Event::Deadline => {
                let limit = self.plan.confirm_timeout;
                // What the client still holds must not be sent after whoever sends it again.
                self.plan.live.suspect();
                return Err(End(
                    Kind::Timeout,
                    format!("no acknowledgement within {limit:?}").into(),
                ));
            }
            Event::Step(done) => {
                self.step = None;
                match done {
                    Done::Prepared(ready) => self.start(ready)?,
                    Done::Sent(true) => {}
                    Done::Sent(false) => return Err(self.plan.live.lost("publish").into()),
                }
            }
            Event::Batch(Some(batch)) => {
                let stale = std::mem::take(&mut self.stale);
                let streams = std::mem::take(&mut self.streams);
                let prepared = prepare::prepare(Arc::clone(&self.plan), batch, streams, stale);
                self.step = Some(Step::Prepare(Box::pin(prepared)));
            }
        }
        Ok(())
    }

    fn start(&mut self, ready: Ready) -> Result<(), End> {
        self.streams = ready.streams;
        let wires = ready.wires?;
        let number = self.batches;
        self.batches += 1;
        let mut to_send = Vec::with_capacity(wires.len());
        let mut places = Vec::with_capacity(wires.len());
        for wire in wires {
            places.push(match wire {
                Ok((stream, wire)) => {
                    let place = Place::Waiting(stream, wire.subject.clone());
                    to_send.push((format!("{}.{number}.{}", self.inbox, places.len()), wire));
                    place
                }
                Err(outcome) => Place::Known(outcome),
            });
        }
        let flight = Flight {
            number,
            deadline: Instant::now() + self.plan.confirm_timeout,
            missing: to_send.len(),
            places,
            answer: ready.batch.answer,
        };
        if flight.missing == 0 {
            flight.finish();
            return Ok(());
        }
        self.flights.push_back(flight);
        let client = self.plan.live.client.clone();
        self.step = Some(Step::Send(Box::pin(send(client, to_send))));
        Ok(())
    }

    /// Finds the message that was answered, and notes what became of it.
    fn land(&mut self, answer: &Received) {
        let mut words = answer.subject.rsplitn(3, '.');
        let mut number = || words.next()?.parse::<u64>().ok();
        let (Some(place), Some(batch)) = (number(), number()) else {
            return;
        };
        let found = self.flights.iter().position(|f| f.number == batch);
        let Some(at) = found else { return };
        let Ok(place) = usize::try_from(place) else {
            return;
        };
        let flight = &mut self.flights[at];
        let Some(Place::Waiting(stream, _)) = flight.places.get(place) else {
            return;
        };
        let outcome = of_answer(answer.status, &answer.payload, stream);
        if let Outcome::Unavailable(e) = &outcome {
            // The stream is gone, or another one than was declared.
            self.stale |= matches!(e.kind(), Kind::Missing | Kind::Configuration);
        }
        self.settle(at, place, outcome);
    }

    fn settle(&mut self, at: usize, place: usize, outcome: Outcome) {
        let flight = &mut self.flights[at];
        flight.places[place] = Place::Known(outcome);
        flight.missing -= 1;
        if flight.missing == 0
            && let Some(flight) = self.flights.remove(at)
        {
            flight.finish();
        }
    }

    /// The server answers nothing to a publish that it forbids: what waits for it would run into the deadline.
    fn forbid(&mut self) {
        let forbidden = self.forbidden.borrow_and_update().clone();
        let is_forbidden =
            |place: &Place| matches!(place, Place::Waiting(_, s) if forbidden.contains(s));
        for at in (0..self.flights.len()).rev() {
            let places = &self.flights[at].places;
            let hit: Vec<usize> = (0..places.len())
                .filter(|p| is_forbidden(&places[*p]))
                .collect();
            for place in hit {
                let text = "NATS does not let this user publish to it";
                let error = Error::new(Kind::Refused, "publish", text);
                self.settle(at, place, Outcome::Unavailable(error));
            }
        }
    }
}

impl Future for Step {
    type Output = Done;

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        match &mut *self {
            Self::Prepare(work) => work.poll_unpin(cx).map(Done::Prepared),
            Self::Send(work) => work.poll_unpin(cx).map(Done::Sent),
        }
    }
}

impl Flight {
    fn finish(self) {
        let unknown = || End(Kind::Closed, GONE.into()).outcome();
        let outcome = |place| match place {
            Place::Known(outcome) => outcome,
            Place::Waiting(..) => unknown(),
        };
        // The owner may have lost interest.
        let _ = self
            .answer
            .send(self.places.into_iter().map(outcome).collect());
    }

    /// What was answered keeps its answer, the rest is unknown.
    fn end(mut self, end: &End) {
        for place in &mut self.places {
            if matches!(place, Place::Waiting(..)) {
                *place = Place::Known(end.outcome());
            }
        }
        self.finish();
    }
}

/// Hands the messages to the client, in order.
async fn send(client: Client, messages: Vec<(String, Wire)>) -> bool {
    for (reply, wire) in messages {
        let sent =
            client.publish_with_reply_and_headers(wire.subject, reply, wire.headers, wire.payload);
        if sent.await.is_err() {
            return false;
        }
    }
    true
}
