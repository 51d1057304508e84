//! What must exist at the server: streams, their subjects, and streams for dead letters. Creates, and adds subjects; never
//! deletes or changes anything else.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::jetstream::stream::{
    Config as Declared, DiscardPolicy, Info, RetentionPolicy, StorageType,
};
use pillarbox_transport::{Binding, Error, Kind, Result};

use crate::{
    config::{Config, covers},
    connection::Live,
    outcome::{STREAM_NAME_IN_USE, STREAM_NOT_FOUND, SUBJECT_OVERLAPS, classify_refusal},
};

const DECLARE: &str = "declare a stream";
/// Two topics can have one stream's name; this mark in the stream tells whose it is.
const TOPIC_MARK: &str = "pillarbox-topic";
/// Two processes may add subjects at the same time.
const TRIES: u32 = 5;

/// A stream, as it is declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) topic: String,
    pub(crate) subjects: BTreeSet<String>,
    pub(crate) dead_letter: String,
    /// Whether the configuration says which types it takes.
    fixed: bool,
    replicas: usize,
    duplicate_window: Duration,
    max_age: Duration,
    max_bytes: Option<u64>,
}

impl Spec {
    pub(crate) fn covers(&self, kind: &str) -> bool {
        self.subjects.iter().any(|subject| covers(subject, kind))
    }

    /// Takes events of this type from now on, unless the configuration says which ones it takes.
    fn extend(&mut self, kind: &str) {
        if !self.fixed && !self.covers(kind) {
            self.subjects.insert(family(kind));
        }
    }

    /// Where a group's dead letters go.
    ///
    /// # Errors
    /// The group's name is no subject.
    pub(crate) fn dead_letter_subject(&self, group: &str) -> Result<String> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b);
        let good = |word: &str| !word.is_empty() && word.bytes().all(allowed);
        if group.len() <= 200 && group.split('.').all(good) {
            return Ok(format!("{}.{group}", self.dead_letter));
        }
        let shown: String = group.chars().take(64).collect();
        let text = format!(
            "found the group {shown:?}, expected letters, digits, '_', '-' in parts joined by '.'"
        );
        Err(Error::new(Kind::Configuration, "name a subject", text))
    }
}

/// The subject for a type and its relatives: its first word and all behind it.
fn family(kind: &str) -> String {
    match kind.split_once('.') {
        Some((first, _)) => format!("{first}.>"),
        None => kind.to_owned(),
    }
}

/// The configured streams, and those of topics that have none configured and are used by this process.
#[derive(Debug)]
pub(crate) struct Topology {
    config: Arc<Config>,
    configured: BTreeMap<String, Spec>,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    /// By topic.
    streams: BTreeMap<String, Spec>,
    /// The types that a (topic, group) has handlers for.
    groups: HashMap<(String, String), BTreeSet<String>>,
    /// What was said about a stream, so that it is said once.
    told: HashSet<String>,
}

impl Topology {
    pub(crate) fn new(config: Arc<Config>) -> Self {
        let spec = |(name, stream): (&String, &crate::Stream)| {
            let spec = Spec {
                name: name.clone(),
                topic: stream.topic.clone(),
                subjects: stream.subjects.iter().cloned().collect(),
                dead_letter: stream.dead_letter(name),
                fixed: true,
                replicas: stream.replicas.unwrap_or(config.replicas),
                duplicate_window: stream.duplicate_window.unwrap_or(config.duplicate_window),
                max_age: stream.max_age.unwrap_or_default(),
                max_bytes: stream.max_bytes,
            };
            (stream.topic.clone(), spec)
        };
        Self {
            configured: config.streams.iter().map(spec).collect(),
            config,
            used: Mutex::default(),
        }
    }

    fn used<T>(&self, f: impl FnOnce(&mut Used) -> T) -> T {
        f(&mut self.used.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes what a group reads, and answers the stream where it does.
    pub(crate) fn bind(&self, binding: &Binding) -> Result<Spec> {
        let spec = self.with_types(&binding.topic, binding.kinds.iter().map(String::as_str))?;
        spec.dead_letter_subject(&binding.group)?;
        let missing: Vec<_> = binding.kinds.iter().filter(|k| !spec.covers(k)).collect();
        if !missing.is_empty() {
            let text = format!(
                "group {:?} has handlers for {missing:?}, which the stream {:?} does not take; expected them among its subjects {:?}",
                binding.group, spec.name, spec.subjects
            );
            return Err(Error::new(Kind::Configuration, "bind", text));
        }
        self.used(|used| {
            let key = (binding.topic.clone(), binding.group.clone());
            let known = used.groups.entry(key).or_default();
            known.extend(binding.kinds.iter().cloned());
        });
        Ok(spec)
    }

    /// The types that a group has bound; none when it has bound none here.
    pub(crate) fn types_of(&self, topic: &str, group: &str) -> BTreeSet<String> {
        let key = (topic.to_owned(), group.to_owned());
        self.used(|used| used.groups.get(&key).cloned().unwrap_or_default())
    }

    /// The stream of a topic, as far as it is known.
    pub(crate) fn of_topic(&self, topic: &str) -> Result<Spec> {
        self.with_types(topic, [])
    }

    /// The stream of a topic. One that is not configured takes these types too from now on.
    pub(crate) fn with_types<'a>(
        &self,
        topic: &str,
        kinds: impl IntoIterator<Item = &'a str>,
    ) -> Result<Spec> {
        if let Some(spec) = self.configured.get(topic) {
            return Ok(spec.clone());
        }
        let name = topic.replace('.', "_");
        let taken = |s: &&Spec| s.name == name || s.dead_letter == name;
        if let Some(other) = self.configured.values().find(taken) {
            let text = format!(
                "topic {topic:?} has no stream, and the default name {name:?} is used for topic {:?}; expected a stream of its own",
                other.topic
            );
            return Err(Error::new(Kind::Configuration, "name a stream", text));
        }
        self.used(|used| {
            let spec = used
                .streams
                .entry(topic.to_owned())
                .or_insert_with(|| Spec {
                    dead_letter: format!("{name}_dlq"),
                    name,
                    topic: topic.to_owned(),
                    subjects: BTreeSet::new(),
                    fixed: false,
                    replicas: self.config.replicas,
                    duplicate_window: self.config.duplicate_window,
                    max_age: Duration::ZERO,
                    max_bytes: None,
                });
            kinds.into_iter().for_each(|kind| spec.extend(kind));
            Ok(spec.clone())
        })
    }

    /// Declares everything that is configured or used, so that no event meets a missing stream. Answers the topics that
    /// have a stream now.
    pub(crate) async fn declare(&self, live: &Live) -> Result<HashMap<String, Spec>> {
        let mut all: Vec<Spec> = self.configured.values().cloned().collect();
        // One without a type has no subject yet, and NATS would give it its own name.
        let known = self.used(|used| used.streams.values().cloned().collect::<Vec<_>>());
        all.extend(known.into_iter().filter(|spec| !spec.subjects.is_empty()));
        for spec in &all {
            self.declare_stream(live, spec).await?;
            self.declare_dead_letters(live, spec).await?;
        }
        Ok(all.into_iter().map(|s| (s.topic.clone(), s)).collect())
    }

    /// Declares one topic's stream.
    pub(crate) async fn declare_stream(&self, live: &Live, spec: &Spec) -> Result<Info> {
        let mut wanted = self.declared(spec, &spec.name, spec.subjects.iter());
        wanted.duplicate_window = spec.duplicate_window;
        wanted.max_age = spec.max_age;
        if let Some(bytes) = spec.max_bytes {
            wanted.max_bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        }
        let info = self.ensure(live, wanted, &spec.topic).await?;
        self.tell_findings(&info);
        Ok(info)
    }

    /// Declares the stream of a topic's dead letters.
    pub(crate) async fn declare_dead_letters(&self, live: &Live, spec: &Spec) -> Result<Info> {
        let subject = format!("{}.>", spec.dead_letter);
        let wanted = self.declared(spec, &spec.dead_letter, [&subject]);
        self.ensure(live, wanted, &spec.topic).await
    }

    fn declared<'a>(
        &self,
        spec: &Spec,
        name: &str,
        subjects: impl IntoIterator<Item = &'a String>,
    ) -> Declared {
        Declared {
            name: name.to_owned(),
            subjects: subjects.into_iter().cloned().collect(),
            retention: RetentionPolicy::Limits,
            storage: StorageType::File,
            // A full stream must not make room by removing what was acknowledged.
            discard: DiscardPolicy::New,
            num_replicas: spec.replicas,
            max_bytes: -1,
            max_messages: -1,
            max_messages_per_subject: -1,
            metadata: HashMap::from([(TOPIC_MARK.to_owned(), spec.topic.clone())]),
            ..Declared::default()
        }
    }

    /// Makes sure that the stream is there and takes these subjects.
    async fn ensure(&self, live: &Live, wanted: Declared, topic: &str) -> Result<Info> {
        let name = wanted.name.clone();
        for _ in 0..TRIES {
            let Some(found) = info(live, &name).await? else {
                if !self.config.declare {
                    let text = format!("{name:?} does not exist, and declare = false");
                    return Err(Error::new(Kind::Missing, DECLARE, text));
                }
                match live
                    .ask::<Info>(DECLARE, format!("STREAM.CREATE.{name}"), &wanted)
                    .await?
                {
                    Ok(created) => return Ok(created),
                    // Somebody was faster.
                    Err(refusal) if refusal.err_code == STREAM_NAME_IN_USE => continue,
                    Err(refusal) => return Err(refused(&refusal, &name, topic, &wanted.subjects)),
                }
            };
            usable(&found.config, topic)?;
            let takes = |kind: &String| found.config.subjects.iter().any(|s| takes_all(s, kind));
            let missing: Vec<&String> = wanted.subjects.iter().filter(|s| !takes(s)).collect();
            if missing.is_empty() {
                return Ok(found);
            }
            if !self.config.declare {
                let text = format!(
                    "{name:?} takes {:?} and not {missing:?}, and declare = false; expected all of them among its subjects",
                    found.config.subjects
                );
                return Err(Error::new(Kind::Configuration, DECLARE, text));
            }
            let mut changed = found.config.clone();
            let covered = |s: &String| missing.iter().any(|wider| takes_all(wider, s));
            changed.subjects.retain(|s| !covered(s));
            changed.subjects.extend(missing.into_iter().cloned());
            // Then looks again: another process may have written its own subjects over these.
            if let Err(refusal) = live
                .ask::<Info>(DECLARE, format!("STREAM.UPDATE.{name}"), &changed)
                .await?
            {
                return Err(refused(&refusal, &name, topic, &changed.subjects));
            }
        }
        let text = format!("{name:?}: others change it all the time");
        Err(Error::new(Kind::Full, DECLARE, text))
    }

    /// Says once for each stream what its settings can lose.
    fn tell_findings(&self, info: &Info) {
        let stream = &info.config.name;
        for finding in findings(info, &self.config) {
            if self.used(|used| used.told.insert(format!("{stream} {finding}"))) {
                tracing::warn!(stream = %stream, "{finding}");
            }
        }
    }
}

/// The stream as it is now; none when there is no such one.
pub(crate) async fn info(live: &Live, name: &str) -> Result<Option<Info>> {
    const LOOK: &str = "look for a stream";
    match live
        .ask::<Info>(LOOK, format!("STREAM.INFO.{name}"), &())
        .await?
    {
        Ok(info) => Ok(Some(info)),
        Err(refusal) if refusal.err_code == STREAM_NOT_FOUND => Ok(None),
        Err(refusal) => Err(classify_refusal(&refusal, LOOK, format!("{name:?}"))),
    }
}

/// What makes a stream that exists unfit for events.
fn usable(found: &Declared, topic: &str) -> Result<()> {
    let name = &found.name;
    let unfit = |text: String| Err(Error::new(Kind::Configuration, DECLARE, text));
    if let Some(other) = found.metadata.get(TOPIC_MARK).filter(|t| *t != topic) {
        return unfit(format!(
            "found {name:?} with the events of topic {other:?}, expected {topic:?}; configure a stream of another name for one of them"
        ));
    }
    if found.retention != RetentionPolicy::Limits {
        return unfit(format!(
            "{name:?}: found retention {:?}, expected limits: several groups read it by position",
            found.retention
        ));
    }
    if found.no_ack {
        return unfit(format!(
            "{name:?}: found no_ack, expected acknowledgements: nothing would tell what is stored"
        ));
    }
    if found.sealed || found.mirror.is_some() {
        return unfit(format!(
            "{name:?}: found a sealed stream or a mirror, expected one that takes events"
        ));
    }
    Ok(())
}

/// Settings of a stream that can lose or repeat what was acknowledged.
fn findings(info: &Info, config: &Config) -> Vec<String> {
    let found = &info.config;
    let mut all = Vec::new();
    if found.storage == StorageType::Memory {
        all.push(
            "storage is memory: a restart of the server loses acknowledged events; use file".into(),
        );
    }
    if info.cluster.as_ref().is_some_and(|c| c.name.is_some()) && found.num_replicas < 3 {
        all.push(format!(
            "replicas is {} in a cluster: the loss of one server loses acknowledged events; 3 would not",
            found.num_replicas
        ));
    }
    let limited = found.max_bytes > 0 || found.max_messages > 0;
    if (limited && found.discard == DiscardPolicy::Old) || found.max_messages_per_subject > 0 {
        all.push(
            "its limits remove old events, read or not, to make room for new ones; discard = new would refuse instead".into(),
        );
    }
    if found.duplicate_window < config.confirm_timeout {
        all.push(format!(
            "duplicate_window is {:?}, shorter than confirm_timeout ({:?}): what is sent again is stored twice",
            found.duplicate_window, config.confirm_timeout
        ));
    }
    let smaller = usize::try_from(found.max_message_size).is_ok_and(|n| n > 0 && n < 1_048_576);
    if smaller {
        all.push(format!(
            "max_msg_size is {}: larger events become dead letters",
            found.max_message_size
        ));
    }
    all
}

fn refused(
    refusal: &crate::outcome::Refusal,
    name: &str,
    topic: &str,
    subjects: &[String],
) -> Error {
    if refusal.err_code == SUBJECT_OVERLAPS {
        let text = format!(
            "{name:?}: another stream takes some of the types {subjects:?}; expected subjects of its own for topic {topic:?}: [transport.nats.streams.{name}]"
        );
        return Error::new(Kind::Configuration, DECLARE, text);
    }
    classify_refusal(refusal, DECLARE, format!("{name:?}"))
}

/// Whether everything that `subject` takes is taken by `wider` too.
fn takes_all(wider: &str, subject: &str) -> bool {
    let (mut wider, mut subject) = (wider.split('.'), subject.split('.'));
    loop {
        match (wider.next(), subject.next()) {
            (None, None) => return true,
            (Some(">"), Some(_)) => return true,
            (Some("*"), Some(word)) if word != ">" => {}
            (Some(a), Some(b)) if a == b => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Stream;

    fn topology() -> Topology {
        let mut config = Config::new("nats://localhost");
        let stream = Stream::new("orders.events", ["orders.order.*"]);
        config.streams.insert("orders".into(), stream);
        Topology::new(Arc::new(config))
    }

    fn binding(topic: &str, group: &str, kinds: &[&str]) -> Binding {
        Binding {
            topic: topic.into(),
            group: group.into(),
            kinds: kinds.iter().map(|k| (*k).to_owned()).collect(),
        }
    }

    #[test]
    fn subjects_take_what_nats_would() {
        for (subject, kind, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("*.b", "a.b", true),
            ("a.>", "a", false),
            ("a.>", "a.b.c", true),
            (">", "a", true),
            ("a.*.c", "a.b.c", true),
        ] {
            assert_eq!(covers(subject, kind), expected, "{subject} {kind}");
            assert_eq!(takes_all(subject, kind), expected, "{subject} {kind}");
        }
        assert!(takes_all("a.>", "a.*"));
        assert!(!takes_all("a.*", "a.>"));
        assert!(takes_all("a.>", "a.b.>"));
    }

    #[test]
    fn a_handler_whose_type_is_not_taken_is_named() {
        let kinds = ["orders.order.failed", "orders.refund.made"];
        let bound = topology().bind(&binding("orders.events", "inventory", &kinds));
        let error = bound.unwrap_err();
        assert_eq!(error.kind(), Kind::Configuration);
        let text = error.to_string();
        assert!(text.contains("[\"orders.refund.made\"]"), "{text}");
        assert!(text.contains("\"orders\""), "{text}");
    }

    #[test]
    fn a_topic_without_a_stream_gets_one_that_takes_what_is_used() {
        let topology = topology();
        topology
            .bind(&binding("t.events", "g", &["t.a.b"]))
            .unwrap();
        let spec = topology.with_types("t.events", ["t.c", "alone"]).unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.dead_letter.as_str()),
            ("t_events", "t_events_dlq")
        );
        assert_eq!(
            spec.subjects,
            BTreeSet::from(["t.>".to_owned(), "alone".to_owned()])
        );
        assert_eq!(
            topology.types_of("t.events", "g"),
            BTreeSet::from(["t.a.b".to_owned()])
        );
    }

    #[test]
    fn a_configured_stream_takes_nothing_more() {
        let topology = topology();
        let spec = topology.with_types("orders.events", ["x.y"]).unwrap();
        assert!(!spec.covers("x.y"));
        let error = topology.of_topic("orders").unwrap_err();
        assert!(error.to_string().contains("\"orders.events\""), "{error}");
    }

    #[test]
    fn a_group_that_is_no_subject_is_refused() {
        let topology = topology();
        for group in ["", "a b", "a.*", "a..b", ">"] {
            let bound = topology.bind(&binding("t", group, &["t.a"]));
            assert_eq!(bound.unwrap_err().kind(), Kind::Configuration, "{group:?}");
        }
    }
}
