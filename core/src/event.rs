use std::{borrow::Cow, sync::Arc};

/// Something that happened: what an application enqueues and what a handler receives.
///
/// No serde bound stands here, so that borrowed events, protobuf and raw bytes fit too; the methods that serialize ask
/// for what they need.
///
/// ```
/// use std::borrow::Cow;
/// use pillarbox_core::Event;
///
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct OrderPlaced { order: String }
///
/// impl Event for OrderPlaced {
///     const TYPE: &'static str = "shop.order.placed";
///     const TOPIC: &'static str = "shop.events";
///     fn key(&self) -> Option<Cow<'_, str>> { Some(self.order.as_str().into()) }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "implement `pillarbox::Event` for it: a TYPE, a TOPIC and, for order, a key"
)]
pub trait Event {
    /// The event's type, also its routing key: letters, digits, `_`, `-` in parts joined by `.`.
    const TYPE: &'static str;
    /// The topic that it travels on.
    const TOPIC: &'static str;
    /// The version of the payload's schema. Defaults to 1.
    const VERSION: u32 = 1;

    /// Events of one topic with equal keys stay in order. Defaults to none: no order.
    fn key(&self) -> Option<Cow<'_, str>> {
        None
    }
}

/// What order is promised for: events of one topic with one key. `""` is a key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The topic.
    pub topic: Arc<str>,
    /// The key.
    pub key: Arc<str>,
}

impl Key {
    /// The key of a message, none for a message without order.
    #[must_use]
    pub fn of(message: &pillarbox_transport::Message) -> Option<Self> {
        let key = message.key.as_deref()?;
        Some(Self {
            topic: message.topic.as_str().into(),
            key: key.into(),
        })
    }
}
