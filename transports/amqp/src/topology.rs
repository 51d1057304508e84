//! What must exist at the broker: exchanges, queues, bindings. Declares, never deletes or changes.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use lapin::{
    Channel, ErrorKind, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use pillarbox_transport::{Binding, Error, Kind, Result};

use crate::{
    config::{Config, QueueType},
    connection::Live,
    outcome::classify,
};

/// RabbitMQ 4 drops a message at its 20th redelivery unless told otherwise, and 3.10 drops it at the first when told -1.
const DELIVERY_LIMIT: i32 = i32::MAX;
const DECLARE: &str = "declare the topology";
/// `precondition-failed`: it exists, and is not what was asked for.
const DIFFERS: u16 = 406;

/// A queue, as it is declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) topic: String,
    pub(crate) group: String,
    pub(crate) types: BTreeSet<String>,
    pub(crate) dead_letter: String,
    pub(crate) prefetch: u16,
    queue_type: QueueType,
}

/// The configured queues, and those of groups that have none configured and are bound by this process.
#[derive(Debug)]
pub(crate) struct Topology {
    config: Arc<Config>,
    configured: BTreeMap<String, Spec>,
    bound: Mutex<BTreeMap<String, Spec>>,
}

impl Topology {
    pub(crate) fn new(config: Arc<Config>) -> Self {
        let spec = |(name, queue): (&String, &crate::Queue)| {
            let spec = Spec {
                name: name.clone(),
                topic: queue.topic.clone(),
                group: queue.group.clone(),
                types: queue.types.iter().cloned().collect(),
                dead_letter: queue
                    .dead_letter
                    .clone()
                    .unwrap_or_else(|| format!("{name}.dlq")),
                prefetch: queue.prefetch.unwrap_or(config.prefetch),
                queue_type: queue.queue_type.unwrap_or(config.queue_type),
            };
            (name.clone(), spec)
        };
        let configured = config.queues.iter().map(spec).collect();
        Self {
            config,
            configured,
            bound: Mutex::default(),
        }
    }

    /// Notes what a group reads, and answers the queue where it does.
    pub(crate) fn bind(&self, binding: &Binding) -> Result<Spec> {
        let Some(spec) = self.configured(&binding.topic, &binding.group) else {
            let mut spec = self.default_spec(&binding.topic, &binding.group)?;
            let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = bound.get(&spec.name) {
                spec.types.clone_from(&known.types);
            }
            spec.types.extend(binding.kinds.iter().cloned());
            bound.insert(spec.name.clone(), spec.clone());
            return Ok(spec);
        };
        let covered = |kind: &str| spec.types.iter().any(|pattern| covers(pattern, kind));
        let missing: Vec<_> = binding.kinds.iter().filter(|k| !covered(k)).collect();
        if missing.is_empty() {
            return Ok(spec.clone());
        }
        let text = format!(
            "group {:?} has handlers for {missing:?}, which the queue {:?} is not bound to; expected them among its types {:?}",
            spec.group, spec.name, spec.types
        );
        Err(Error::new(Kind::Configuration, "bind", text))
    }

    /// The queue of a group, bound or not.
    pub(crate) fn of_group(&self, topic: &str, group: &str) -> Result<Spec> {
        if let Some(spec) = self.configured(topic, group) {
            return Ok(spec.clone());
        }
        let spec = self.default_spec(topic, group)?;
        let bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(bound.get(&spec.name).cloned().unwrap_or(spec))
    }

    fn configured(&self, topic: &str, group: &str) -> Option<&Spec> {
        let mut all = self.configured.values();
        all.find(|s| s.topic == topic && s.group == group)
    }

    fn default_spec(&self, topic: &str, group: &str) -> Result<Spec> {
        let name = format!("{topic}.{group}");
        if self.configured.contains_key(&name) {
            let text = format!(
                "group {group:?} has no queue for topic {topic:?}, and the default name {name:?} is configured for others; expected a queue of its own"
            );
            return Err(Error::new(Kind::Configuration, "bind", text));
        }
        Ok(Spec {
            dead_letter: format!("{name}.dlq"),
            name,
            topic: topic.to_owned(),
            group: group.to_owned(),
            types: BTreeSet::new(),
            prefetch: self.config.prefetch,
            queue_type: self.config.queue_type,
        })
    }

    /// Declares everything that is configured or bound, so that no event meets a missing queue. Answers the topics that
    /// have an exchange now.
    pub(crate) async fn declare(&self, live: &Live) -> Result<HashSet<String>> {
        let bound: Vec<Spec> = {
            let bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
            bound.values().cloned().collect()
        };
        let all: Vec<&Spec> = self.configured.values().chain(&bound).collect();
        let mut scratch = Scratch::new(live, self.config.declare);
        let topics: HashSet<String> = all.iter().map(|s| s.topic.clone()).collect();
        for topic in &topics {
            scratch.exchange(topic).await?;
        }
        for spec in all {
            scratch.queue(spec).await?;
        }
        Ok(topics)
    }

    /// Declares the exchange of a topic.
    pub(crate) async fn declare_exchange(&self, live: &Live, topic: &str) -> Result<()> {
        Scratch::new(live, self.config.declare)
            .exchange(topic)
            .await
    }

    /// Declares the dead-letter queue of a group, which need not be bound.
    pub(crate) async fn declare_dead_letters(&self, live: &Live, spec: &Spec) -> Result<()> {
        Scratch::new(live, self.config.declare)
            .dead_letters(spec)
            .await
    }
}

/// A channel that a refusal may close: the broker answers a contradiction by closing the channel that asked.
struct Scratch<'a> {
    live: &'a Live,
    channel: Option<Channel>,
    passive: bool,
}

impl<'a> Scratch<'a> {
    fn new(live: &'a Live, declare: bool) -> Self {
        Self {
            live,
            channel: None,
            passive: !declare,
        }
    }

    async fn channel(&mut self) -> Result<Channel> {
        if let Some(channel) = &self.channel {
            return Ok(channel.clone());
        }
        let channel = self.live.channel().await?;
        self.channel = Some(channel.clone());
        Ok(channel)
    }

    async fn exchange(&mut self, topic: &str) -> Result<()> {
        let channel = self.channel().await?;
        let options = ExchangeDeclareOptions {
            passive: self.passive,
            durable: true,
            ..ExchangeDeclareOptions::default()
        };
        let declared = channel.exchange_declare(
            short(topic)?,
            ExchangeKind::Topic,
            options,
            FieldTable::default(),
        );
        let result = self.live.answer_raw(DECLARE, declared).await?;
        result.map_err(|e| {
            if !differs(&e) {
                return classify(e, "declare an exchange", format!("{topic:?}"));
            }
            let text = format!(
                "the exchange {topic:?} exists and is another one; expected a durable topic exchange. Delete it, or choose another topic"
            );
            Error::new(Kind::Configuration, "declare an exchange", text).caused_by(e)
        })
    }

    async fn queue(&mut self, spec: &Spec) -> Result<()> {
        let arguments = arguments(spec.queue_type, true);
        self.one_queue(&spec.name, spec.queue_type, arguments)
            .await?;
        self.dead_letters(spec).await?;
        if self.passive {
            return Ok(());
        }
        for kind in &spec.types {
            let channel = self.channel().await?;
            let bound = channel.queue_bind(
                short(&spec.name)?,
                short(&spec.topic)?,
                short(kind)?,
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            self.live.answer_raw(DECLARE, bound).await?.map_err(|e| {
                let what = format!("{:?} to {:?} with {kind:?}", spec.name, spec.topic);
                classify(e, "bind a queue", what)
            })?;
        }
        Ok(())
    }

    async fn dead_letters(&mut self, spec: &Spec) -> Result<()> {
        let arguments = arguments_of_dead_letters(spec.queue_type);
        self.one_queue(&spec.dead_letter, spec.queue_type, arguments)
            .await
    }

    async fn one_queue(
        &mut self,
        name: &str,
        queue_type: QueueType,
        arguments: FieldTable,
    ) -> Result<()> {
        let wanted = describe(&arguments);
        let channel = self.channel().await?;
        let options = QueueDeclareOptions {
            passive: self.passive,
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let declared = channel.queue_declare(short(name)?, options, arguments);
        self.live.answer_raw(DECLARE, declared).await?.map(drop).map_err(|e| {
            if !differs(&e) {
                return classify(e, "declare a queue", format!("{name:?}"));
            }
            let other = match queue_type {
                QueueType::Quorum => "; or set queue_type = \"classic\" for it if it is one",
                QueueType::Classic => "; or set queue_type = \"quorum\" for it if it is one",
            };
            let text = format!(
                "the queue {name:?} exists and is another one; expected durable, {wanted}. Let it run empty and delete it, or choose another name{other}"
            );
            Error::new(Kind::Configuration, "declare a queue", text).caused_by(e)
        })
    }
}

fn arguments(queue_type: QueueType, single_active_consumer: bool) -> FieldTable {
    let mut arguments = FieldTable::default();
    let name = AMQPValue::LongString(queue_type.name().into());
    arguments.insert("x-queue-type".into(), name);
    if single_active_consumer {
        arguments.insert("x-single-active-consumer".into(), true.into());
    }
    if queue_type == QueueType::Quorum {
        arguments.insert("x-delivery-limit".into(), DELIVERY_LIMIT.into());
    }
    arguments
}

/// Whoever looks at dead letters may do so with several consumers.
fn arguments_of_dead_letters(queue_type: QueueType) -> FieldTable {
    arguments(queue_type, false)
}

fn describe(arguments: &FieldTable) -> String {
    let one = |(name, value): (&ShortString, &AMQPValue)| match value {
        AMQPValue::LongString(text) => format!("{name} = {text}"),
        AMQPValue::Boolean(value) => format!("{name} = {value}"),
        AMQPValue::LongInt(value) => format!("{name} = {value}"),
        _ => name.to_string(),
    };
    let all: Vec<String> = arguments.into_iter().map(one).collect();
    all.join(", ")
}

fn differs(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(e) if e.get_id() == DIFFERS)
}

/// A name in AMQP's form; lapin panics on longer ones.
pub(crate) fn short(name: &str) -> Result<ShortString> {
    ShortString::try_new(name).map_err(|_| {
        let shown: String = name.chars().take(64).collect();
        let text = format!(
            "the name {shown:?}… has {} bytes, expected 255 at most",
            name.len()
        );
        Error::new(Kind::Invalid, "name", text)
    })
}

/// Whether a binding with `pattern` brings events of type `kind`, as a topic exchange sees it.
fn covers(pattern: &str, kind: &str) -> bool {
    fn match_words(pattern: &[&str], kind: &[&str]) -> bool {
        match (pattern.split_first(), kind.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => {
                (0..=kind.len()).any(|taken| match_words(rest, &kind[taken..]))
            }
            (Some((&word, rest)), Some((&first, more))) => {
                (word == "*" || word == first) && match_words(rest, more)
            }
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.split('.').collect();
    let kind: Vec<&str> = kind.split('.').collect();
    match_words(&pattern, &kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Queue;

    fn topology() -> Topology {
        let mut config = Config::new("amqp://localhost");
        let queue = Queue::new("orders.events", "inventory", ["orders.order.*"]);
        config.queues.insert("orders.events.queue".into(), queue);
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
    fn patterns_match_as_a_topic_exchange_does() {
        for (pattern, kind, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("*.b", "a.b", true),
            ("a.#", "a", true),
            ("a.#", "a.b.c", true),
            ("#", "a.b", true),
            ("#.c", "a.b.c", true),
            ("#.c", "a.b", false),
            ("a.#.c", "a.c", true),
        ] {
            assert_eq!(covers(pattern, kind), expected, "{pattern} {kind}");
        }
    }

    #[test]
    fn a_handler_whose_type_is_not_bound_is_named() {
        let error = topology()
            .bind(&binding(
                "orders.events",
                "inventory",
                &["orders.order.failed", "orders.refund.made"],
            ))
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Configuration);
        let text = error.to_string();
        assert!(text.contains("[\"orders.refund.made\"]"), "{text}");
        assert!(text.contains("\"orders.events.queue\""), "{text}");
    }

    #[test]
    fn a_group_without_a_queue_gets_one_and_keeps_what_it_bound() {
        let topology = topology();
        topology.bind(&binding("t", "g", &["t.a"])).unwrap();
        let spec = topology.bind(&binding("t", "g", &["t.b"])).unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.dead_letter.as_str()),
            ("t.g", "t.g.dlq")
        );
        assert_eq!(
            spec.types,
            BTreeSet::from(["t.a".to_owned(), "t.b".to_owned()])
        );
        assert_eq!(topology.of_group("t", "g").unwrap(), spec);
    }

    #[test]
    fn a_default_name_that_others_have_is_refused() {
        let mut config = Config::new("amqp://localhost");
        config
            .queues
            .insert("t.g".into(), Queue::new("t", "other", ["t.a"]));
        let topology = Topology::new(Arc::new(config));
        let error = topology.bind(&binding("t", "g", &["t.a"])).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("\"t.g\" is configured for others"),
            "{error}"
        );
    }

    #[test]
    fn queues_are_declared_for_no_redelivery_limit() {
        let quorum = arguments(QueueType::Quorum, true);
        assert_eq!(
            describe(&quorum),
            "x-delivery-limit = 2147483647, x-queue-type = quorum, x-single-active-consumer = true"
        );
        let classic = arguments_of_dead_letters(QueueType::Classic);
        assert_eq!(describe(&classic), "x-queue-type = classic");
    }
}
