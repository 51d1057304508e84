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

/// Its kind alone.
pub(crate) fn kind(error: &lapin::Error) -> Kind {
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

#[cfg(test)]
mod tests {
    use lapin::protocol::{AMQPError, AMQPHardError, AMQPSoftError};

    use super::*;

    fn closed(error: AMQPSoftError, text: &str) -> Answer {
        let error = AMQPError::new(error.into(), text.into());
        Err(ErrorKind::ProtocolError(error).into())
    }

    fn lost() -> Answer {
        Err(io::Error::from(io::ErrorKind::ConnectionReset).into())
    }

    fn event(id: &str, topic: &str, bytes: usize) -> Message {
        Message::new(id, topic, "t.a", vec![0; bytes])
    }

    fn verdict(answers: &[Answer]) -> Verdict {
        Verdict::of(answers, "h:1/v")
    }

    /// The outcome of a message that has no confirm.
    fn without(answers: &[Answer], message: &Message) -> (&'static str, Option<Kind>) {
        let outcome = verdict(answers).on(None, message, &Target::Topics);
        let kind = outcome.error().map(Error::kind);
        match outcome {
            Outcome::Unknown(_) => ("unknown", kind),
            Outcome::Unavailable(_) => ("unavailable", kind),
            Outcome::Rejected(_) => ("rejected", kind),
            _ => ("other", kind),
        }
    }

    #[test]
    fn returned_messages_are_told_by_their_id_not_by_their_confirm() {
        // lapin gave the return of "b" to the confirm of "a", and acked "b" plainly.
        let answers = [
            Ok((true, Some("b".into()))),
            Ok((true, None)),
            Ok((false, None)),
        ];
        let verdict = verdict(&answers);
        let on = |id: &str, taken| verdict.on(Some(taken), &event(id, "t", 0), &Target::Topics);
        assert!(on("a", true).is_stored());
        assert!(matches!(on("b", true), Outcome::Retry(e) if e.kind() == Kind::Unrouted));
        assert!(matches!(on("c", false), Outcome::Unavailable(e) if e.kind() == Kind::Full));
    }

    #[test]
    fn a_closed_channel_blames_the_exchange_that_it_was_closed_over() {
        let missing = [
            Ok((true, None)),
            closed(
                AMQPSoftError::NOTFOUND,
                "NOT_FOUND - no exchange 't' in vhost '/'",
            ),
            lost(),
        ];
        assert_eq!(
            without(&missing, &event("a", "t", 0)),
            ("unavailable", Some(Kind::Missing))
        );
        assert_eq!(
            without(&missing, &event("a", "u", 0)),
            ("unknown", Some(Kind::Unreachable))
        );
        let text = "ACCESS_REFUSED - access to exchange 't' in vhost '/' refused for user 'u'";
        let refused = [lost(), closed(AMQPSoftError::ACCESSREFUSED, text)];
        assert_eq!(
            without(&refused, &event("a", "t", 0)),
            ("unavailable", Some(Kind::Refused))
        );
        // Words that no version used so far: better unavailable than lost.
        let strange = [closed(AMQPSoftError::NOTFOUND, "gone")];
        assert_eq!(
            without(&strange, &event("a", "t", 0)),
            ("unavailable", Some(Kind::Missing))
        );
    }

    #[test]
    fn a_body_over_the_brokers_limit_is_the_only_one_blamed() {
        let text = "PRECONDITION_FAILED - message size 20 is larger than configured max size 10";
        let answers = [closed(AMQPSoftError::PRECONDITIONFAILED, text)];
        assert_eq!(verdict(&answers).cause, Cause::TooLarge(10));
        assert_eq!(
            without(&answers, &event("a", "t", 11)),
            ("rejected", Some(Kind::TooLarge))
        );
        assert_eq!(
            without(&answers, &event("a", "t", 10)),
            ("unknown", Some(Kind::Unreachable))
        );
        let other = [closed(
            AMQPSoftError::PRECONDITIONFAILED,
            "PRECONDITION_FAILED - what",
        )];
        assert_eq!(
            without(&other, &event("a", "t", 11)),
            ("unknown", Some(Kind::Configuration))
        );
    }

    #[test]
    fn without_a_word_from_the_broker_everything_is_unknown() {
        assert_eq!(
            without(&[lost()], &event("a", "t", 0)),
            ("unknown", Some(Kind::Unreachable))
        );
        assert_eq!(
            without(&[], &event("a", "t", 0)),
            ("unknown", Some(Kind::Unreachable))
        );
        let text = "CONNECTION_FORCED - broker forced connection closure";
        let forced = AMQPError::new(AMQPHardError::CONNECTIONFORCED.into(), text.into());
        let forced = [Err(ErrorKind::ProtocolError(forced).into())];
        assert_eq!(
            without(&forced, &event("a", "t", 0)),
            ("unknown", Some(Kind::Unreachable))
        );
    }

    #[test]
    fn replies_have_their_kinds() {
        for (code, text, expected) in [
            (311, "", Kind::TooLarge),
            (320, "", Kind::Unreachable),
            (403, "", Kind::Refused),
            (404, "", Kind::Missing),
            (405, "", Kind::Configuration),
            (406, "", Kind::Configuration),
            (504, "", Kind::Unreachable),
            (530, "NOT_ALLOWED - vhost v not found", Kind::Missing),
            (
                530,
                "NOT_ALLOWED - access to vhost 'v' refused for user 'u'",
                Kind::Refused,
            ),
            (
                530,
                "NOT_ALLOWED - access to vhost 'v' refused for user 'u': connection limit (1) is reached",
                Kind::Full,
            ),
        ] {
            assert_eq!(reply_kind(code, text), expected, "{code} {text}");
        }
    }
}
