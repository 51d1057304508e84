//! What the broker's answers mean: errors by kind, and what became of each message of a batch. Pure.

use std::{borrow::Cow, collections::HashSet, io};

use lapin::{ErrorKind, types::ShortString};
use pillarbox_transport::{Error, Kind, Message, Outcome};

use crate::publisher::Target;

/// A confirm: whether it was taken, and the id of a returned message, which need not be this one.
pub(crate) type Answer = lapin::Result<(bool, Option<ShortString>)>;

/// Why messages of a batch have no confirm.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    None,
    /// The connection or the channel went.
    Lost(Kind, String),
    /// The broker closed the channel over this exchange, or over one that it did not name.
    Exchange(Kind, Option<String>, String),
    /// The broker closed the channel over a body larger than so many bytes.
    TooLarge(usize),
}

/// What the confirms of one batch say together.
pub(crate) struct Verdict {
    /// Ids of returned messages. lapin hands them out with the wrong confirms, but all of them within the batch.
    returned: HashSet<String>,
    pub(crate) cause: Cause,
}

impl Verdict {
    pub(crate) fn of<'a>(answers: impl IntoIterator<Item = &'a Answer>, cluster: &str) -> Self {
        let mut returned = HashSet::new();
        let mut failure: Option<&lapin::Error> = None;
        for answer in answers {
            match answer {
                Ok((_, Some(id))) => drop(returned.insert(id.to_string())),
                // What the broker said is worth more than that the channel is closed.
                Err(e) if failure.is_none_or(|f| !f.is_amqp_error()) => failure = Some(e),
                _ => {}
            }
        }
        let cause = failure.map_or(Cause::None, |e| Cause::of(e, cluster));
        Self { returned, cause }
    }

    pub(crate) fn on(&self, taken: Option<bool>, message: &Message, target: &Target) -> Outcome {
        let error = |kind, text: String| Error::new(kind, "publish", text);
        let Some(taken) = taken else {
            return self.without_confirm(message);
        };
        if self.returned.contains(&message.id) {
            return match target {
                Target::Topics => {
                    let text = format!(
                        "no queue is bound to exchange {:?} for type {:?}",
                        message.topic, message.kind
                    );
                    Outcome::Retry(error(Kind::Unrouted, text))
                }
                Target::DeadLetters(queue) => {
                    let text = format!("the queue {:?} does not exist", queue.dead_letter);
                    Outcome::Unavailable(error(Kind::Missing, text))
                }
            };
        }
        if taken {
            return Outcome::Stored;
        }
        let text = "the broker refuses it for now: a queue is full or in trouble";
        Outcome::Unavailable(error(Kind::Full, text.into()))
    }

    fn without_confirm(&self, message: &Message) -> Outcome {
        let error = |kind, text: &str| Error::new(kind, "publish", text.to_owned());
        match &self.cause {
            Cause::Exchange(kind, exchange, text)
                if exchange.as_ref().is_none_or(|name| *name == message.topic) =>
            {
                Outcome::Unavailable(error(*kind, text))
            }
            Cause::TooLarge(limit) => {
                let found = message.payload.as_ref().map_or(0, bytes::Bytes::len);
                if found > *limit {
                    let text =
                        format!("the payload has {found} bytes; the broker takes {limit} at most");
                    return Outcome::Rejected(error(Kind::TooLarge, &text));
                }
                let text = "the broker closed the channel over another message";
                Outcome::Unknown(error(Kind::Unreachable, text))
            }
            Cause::Lost(kind, text) => Outcome::Unknown(error(*kind, text)),
            Cause::Exchange(_, _, text) => Outcome::Unknown(error(Kind::Unreachable, text)),
            Cause::None => Outcome::Unknown(error(Kind::Unreachable, "no confirm")),
        }
    }
}

impl Cause {
    fn of(error: &lapin::Error, cluster: &str) -> Self {
        let kind = kind(error);
        let text = format!("{cluster}: {error}");
        let ErrorKind::ProtocolError(reply) = error.kind() else {
            return Self::Lost(kind, text);
        };
        let said = reply.get_message().as_str();
        // "message size 20 is larger than configured max size 10"
        let largest = said.rsplit_once("max size ").map(|(_, n)| n.trim().parse());
        match largest {
            Some(Ok(limit)) if said.contains("message size") => Self::TooLarge(limit),
            // "no exchange 'e' in vhost '/'", "access to exchange 'e' in vhost '/' refused for user 'u'"
            _ if error.is_amqp_soft_error() && matches!(kind, Kind::Missing | Kind::Refused) => {
                let name = said.split_once("exchange '").map(|(_, rest)| rest);
                let name = name.and_then(|rest| rest.split('\'').next());
                Self::Exchange(kind, name.map(str::to_owned), text)
            }
            _ => Self::Lost(kind, text),
        }
    }
}

/// A lapin error by meaning.
pub(crate) fn classify(
    error: lapin::Error,
    operation: &'static str,
    context: impl Into<Cow<'static, str>>,
) -> Error {
    Error::new(kind(&error), operation, context).caused_by(error)
}

fn kind(error: &lapin::Error) -> Kind {
    match error.kind() {
        ErrorKind::ProtocolError(e) => reply_kind(e.get_id(), e.get_message().as_str()),
        ErrorKind::IOError(e) if e.kind() == io::ErrorKind::TimedOut => Kind::Timeout,
        // A certificate that does not satisfy, on either side.
        ErrorKind::IOError(e) if e.get_ref().is_some_and(|e| e.is::<rustls::Error>()) => {
            Kind::Refused
        }
        ErrorKind::ChannelsLimitReached => Kind::Full,
        ErrorKind::SerialisationError(_) => Kind::Invalid,
        ErrorKind::InvalidProtocolVersion(_)
        | ErrorKind::AuthProviderError(_)
        | ErrorKind::NoDefaultRuntime => Kind::Configuration,
        _ => Kind::Unreachable,
    }
}

/// AMQP reply codes by meaning; the text tells apart what RabbitMQ puts under one code.
fn reply_kind(code: u16, text: &str) -> Kind {
    match code {
        311 => Kind::TooLarge,
        530 if text.contains("not found") => Kind::Missing,
        530 if text.contains("limit") => Kind::Full,
        403 | 530 => Kind::Refused,
        404 => Kind::Missing,
        405 | 406 => Kind::Configuration,
        _ => Kind::Unreachable,
    }
}
