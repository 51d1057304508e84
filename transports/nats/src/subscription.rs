//! Reading sessions: one stream from a position on, in its order. Nothing is acknowledged to the server: progress is the
//! consumer's own cursor, and redelivery, which JetStream does out of order, never happens.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::consumer::{
    AckPolicy, DeliverPolicy, ReplayPolicy,
    pull::{Config as Pull, MessagesErrorKind, Stream as Messages},
};
use async_trait::async_trait;
use futures_util::StreamExt;
use pillarbox_transport::{Ack, Delivery, Error, Kind, Result, Source, Subscription};

use crate::{
    connection::Live,
    outcome::{Refusal, classify_refusal},
    topology,
    wire::{self, Arrived},
};

const OPEN: &str = "subscribe";
const RECEIVE: &str = "receive";
/// When the server forgets a session that ended without a word.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Subjects of one filter. A group with more types reads the whole stream.
const FILTERS: usize = 64;

/// An open reading session.
pub(crate) struct Reader {
    messages: Messages,
    live: Arc<Live>,
    topic: String,
    stream: String,
    consumer: String,
    /// How many were given: the server counts too.
    given: u64,
}

/// What a session reads.
pub(crate) struct Wanted<'a> {
    pub(crate) source: &'a Source,
    /// The types that the group has handlers for; none means all.
    pub(crate) types: Vec<String>,
    pub(crate) from: Option<u64>,
    pub(crate) prefetch: usize,
    pub(crate) ping_interval: Duration,
}

impl Reader {
    /// Starts to read. The stream has been declared.
    pub(crate) async fn open(live: Arc<Live>, wanted: &Wanted<'_>) -> Result<Self> {
        let stream = &wanted.source.name;
        let start = start(&live, wanted).await?;
        let config = Pull {
            description: Some("pillarbox: read by position".into()),
            deliver_policy: start,
            ack_policy: AckPolicy::None,
            replay_policy: ReplayPolicy::Instant,
            filter_subjects: match wanted.types.len() {
                1..=FILTERS => wanted.types.clone(),
                _ => Vec::new(),
            },
            inactive_threshold: FORGOTTEN,
            // Its place is in our database; the server's copy of it need not survive anything.
            memory_storage: true,
            num_replicas: 1,
            ..Pull::default()
        };
        let create = live.context.create_consumer_on_stream(config, stream);
        let consumer = live.answer(OPEN, create).await?.map_err(|e| {
            use async_nats::jetstream::stream::ConsumerErrorKind as E;
            match e.kind() {
                E::JetStream(refusal) => {
                    let refusal = Refusal {
                        code: u16::try_from(refusal.code()).unwrap_or_default(),
                        err_code: refusal.error_code().0,
                        description: refusal.to_string(),
                    };
                    classify_refusal(&refusal, OPEN, format!("{stream:?}"))
                }
                E::TimedOut => {
                    live.suspect();
                    Error::new(Kind::Timeout, OPEN, format!("{stream:?}")).caused_by(e)
                }
                _ => Error::new(Kind::Unreachable, OPEN, format!("{stream:?}")).caused_by(e),
            }
        })?;
        let name = consumer.cached_info().name.clone();
        // Without messages the server shows that it lives: two silences in a row end the session.
        let heartbeat = wanted
            .ping_interval
            .div_f32(2.0)
            .max(Duration::from_millis(50));
        let pulling = consumer
            .stream()
            .max_messages_per_batch(wanted.prefetch)
            .expires(heartbeat * 4)
            .heartbeat(heartbeat)
            .messages();
        let messages = live
            .answer(OPEN, pulling)
            .await?
            .map_err(|e| Error::new(Kind::Unreachable, OPEN, format!("{stream:?}")).caused_by(e))?;
        Ok(Self {
            messages,
            topic: wanted.source.topic.clone(),
            stream: stream.clone(),
            consumer: name,
            live,
            given: 0,
        })
    }

    fn lost(&self, text: String) -> Error {
        // A later session does not build on a connection that gave no answer.
        self.live.suspect();
        Error::new(Kind::Unreachable, RECEIVE, text)
    }
}

/// Where to begin, after a look at what the stream is now.
async fn start(live: &Live, wanted: &Wanted<'_>) -> Result<DeliverPolicy> {
    let stream = &wanted.source.name;
    let Some(info) = topology::info(live, stream).await? else {
        return Err(Error::new(
            Kind::Missing,
            OPEN,
            format!("the stream {stream:?} does not exist"),
        ));
    };
    if identity(&info) != wanted.source.identity {
        // The cursor belongs to the other one: only whoever binds anew knows the right one.
        let text = format!(
            "the stream {stream:?} was deleted and made anew while it was read; bind the group again: its cursor starts at the oldest event then"
        );
        return Err(Error::new(Kind::Configuration, OPEN, text));
    }
    let Some(from) = wanted.from.filter(|from| *from > 1) else {
        return Ok(DeliverPolicy::All);
    };
    let (first, last) = (info.state.first_sequence, info.state.last_sequence);
    if from > last.saturating_add(1) {
        let text = format!(
            "the stream {stream:?} ends at {last}, before the group's cursor {}: it was restored from an older copy; expected one that has what was read, or delete it and let it be made anew",
            from - 1
        );
        return Err(Error::new(Kind::Configuration, OPEN, text));
    }
    if first > from {
        tracing::warn!(
            %stream,
            missing = first - from,
            "the stream's limits removed events before they were read"
        );
    }
    Ok(DeliverPolicy::ByStartSequence {
        start_sequence: from,
    })
}

/// Changes when the stream is deleted and made anew.
pub(crate) fn identity(info: &async_nats::jetstream::stream::Info) -> String {
    info.created.unix_timestamp_nanos().to_string()
}

#[async_trait]
impl Subscription for Reader {
    async fn next(&mut self) -> Result<Delivery> {
        let message = match self.messages.next().await {
            Some(Ok(message)) => message,
            Some(Err(e)) => {
                let text = format!("{:?}", self.stream);
                let kind = match e.kind() {
                    MessagesErrorKind::ConsumerDeleted | MessagesErrorKind::NoResponders => {
                        Kind::Missing
                    }
                    MessagesErrorKind::MissingHeartbeat => {
                        self.live.suspect();
                        Kind::Timeout
                    }
                    MessagesErrorKind::RequestLimitExceeded => Kind::Configuration,
                    _ => Kind::Unreachable,
                };
                return Err(Error::new(kind, RECEIVE, text).caused_by(e));
            }
            None => return Err(self.lost(format!("{:?}: the connection is lost", self.stream))),
        };
        let info = message.info().map_err(|e| {
            let text = format!("{:?}: found a message without a place", self.stream);
            Error::new(Kind::Unreachable, RECEIVE, text).caused_by(e)
        })?;
        let (sequence, count) = (info.stream_sequence, info.consumer_sequence);
        if count != self.given + 1 {
            // The client drops what it has no room for, and the stream's numbers have gaps of their own.
            let text = format!(
                "{:?}: found message {count} of this session, expected {}: some were lost on the way",
                self.stream,
                self.given + 1
            );
            return Err(self.lost(text));
        }
        self.given = count;
        let (message, defect) = wire::decode(Arrived {
            topic: &self.topic,
            stream: &self.stream,
            sequence,
            subject: message.subject.as_str(),
            headers: message.headers.as_ref(),
            payload: message.payload.clone(),
        });
        Ok(Delivery {
            message,
            position: Some(sequence),
            defect,
            ack: Ack::none(),
        })
    }

    /// Nothing is handed back: the next session begins at its own position.
    async fn close(self: Box<Self>) {
        let Self {
            messages,
            live,
            stream,
            consumer,
            ..
        } = *self;
        drop(messages);
        if live.is_up() {
            // The server forgets it by itself too.
            let delete = live.context.delete_consumer_from_stream(consumer, stream);
            let _ = live.answer("close a session", delete).await;
        }
    }
}
