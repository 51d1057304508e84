//! What comes before a batch is sent: its streams are there, its messages are encoded.

use std::{collections::HashMap, sync::Arc};

use pillarbox_transport::{Error, Kind, Message, Outcome};

use super::{Batch, End, Plan, Prepared, Ready, Target};
use crate::{
    topology::Spec,
    wire::{To, encode},
};

/// Makes sure that the batch may be sent now: declares streams that are new or gone, encodes. Answers what to send, or why
/// not.
pub(super) async fn prepare(
    plan: Arc<Plan>,
    batch: Batch,
    mut streams: HashMap<String, Spec>,
    stale: bool,
) -> Ready {
    let wires = match declare(&plan, &batch.messages, &mut streams, stale).await {
        Ok(failed) => Ok(encode_all(&plan, &batch.messages, &streams, failed)),
        Err(end) => Err(end),
    };
    Ready {
        batch,
        wires,
        streams,
    }
}

/// Answers, by topic, why its stream could not be declared.
async fn declare(
    plan: &Plan,
    messages: &[Arc<Message>],
    streams: &mut HashMap<String, Spec>,
    stale: bool,
) -> Result<HashMap<String, Error>, End> {
    let mut failed = HashMap::new();
    if stale {
        match plan.declare().await {
            Ok(all) => *streams = all,
            Err(e) => return give_up(plan, messages, e),
        }
    }
    if !matches!(plan.target, Target::Topics) {
        return Ok(failed);
    }
    for message in messages {
        let Message { topic, kind, .. } = &**message;
        let covered = |spec: &Spec| spec.covers(kind);
        if failed.contains_key(topic) || streams.get(topic).is_some_and(covered) {
            continue;
        }
        let declared = async {
            let spec = plan.topology.with_types(topic, [kind.as_str()])?;
            if spec.covers(kind) {
                plan.topology.declare_stream(&plan.live, &spec).await?;
            }
            Ok(spec)
        };
        match declared.await {
            Ok(spec) => drop(streams.insert(topic.clone(), spec)),
            Err(e) => drop(failed.insert(topic.clone(), not_sent(e)?)),
        }
    }
    Ok(failed)
}

/// Without the streams nothing is sent: all topics wait, or the session is over.
fn give_up(
    plan: &Plan,
    messages: &[Arc<Message>],
    error: Error,
) -> Result<HashMap<String, Error>, End> {
    let error = not_sent(error)?;
    tracing::debug!(cluster = plan.live.cluster(), %error, "streams could not be declared");
    let copy = |m: &Arc<Message>| {
        let error = Error::new(error.kind(), "publish", error.to_string());
        (m.topic.clone(), error)
    };
    Ok(messages.iter().map(copy).collect())
}

/// An error of the connection ends the session.
fn not_sent(error: Error) -> Result<Error, End> {
    match error.kind() {
        Kind::Unreachable | Kind::Timeout => Err(error.into()),
        _ => Ok(error),
    }
}

fn encode_all(
    plan: &Plan,
    messages: &[Arc<Message>],
    streams: &HashMap<String, Spec>,
    failed: HashMap<String, Error>,
) -> Vec<Prepared> {
    let server = plan.live.client.max_payload();
    let most = plan.max_payload.min(server);
    let mut names: HashMap<&str, Arc<str>> = HashMap::new();
    let one = |m: &Arc<Message>| {
        let m = &**m;
        let (stream, to) = match &plan.target {
            Target::DeadLetters(spec, subject) => (
                spec.dead_letter.as_str(),
                To::DeadLetters(subject, &spec.dead_letter),
            ),
            Target::Topics => {
                // What can never pass is not held back by a stream that is missing.
                let to = |stream| encode(m, &To::Topic(stream), most).map_err(Outcome::Rejected);
                if let Some(e) = failed.get(&m.topic) {
                    to("")?;
                    let copy = Error::new(e.kind(), "publish", e.to_string());
                    return Err(Outcome::Unavailable(copy));
                }
                match streams.get(&m.topic) {
                    Some(spec) if spec.covers(&m.kind) => {
                        (spec.name.as_str(), To::Topic(&spec.name))
                    }
                    found => {
                        to("")?;
                        return Err(untaken(m, found));
                    }
                }
            }
        };
        let wire = encode(m, &to, most).map_err(Outcome::Rejected)?;
        let name = names.entry(stream).or_insert_with(|| stream.into());
        Ok((Arc::clone(name), wire))
    };
    messages.iter().map(one).collect()
}

/// No waiting makes a configured stream take another type.
fn untaken(m: &Message, spec: Option<&Spec>) -> Outcome {
    let subjects = spec.map(|s| &s.subjects);
    let text = format!(
        "the stream of topic {:?} takes {subjects:?}, and not the type {:?}; expected it among its subjects",
        m.topic, m.kind
    );
    Outcome::Rejected(Error::new(Kind::Unrouted, "publish", text))
}
