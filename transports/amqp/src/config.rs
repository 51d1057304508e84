//! What `[transport.amqp]` may say. Reads no file and opens no connection, except where a function says so.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use lapin::uri::{AMQPScheme, AMQPUri};
use pillarbox_transport::{Error, Kind, Result, limits::NAME_BYTES};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer};

/// The longest name that AMQP can carry: a short string, in bytes.
pub(crate) const SHORT_STRING: usize = 255;
/// Parameters that lapin reads from a URL's query and that this configuration does not set by itself.
const URL_PARAMETERS: &[&str] = &["auth_mechanism", "channel_max", "frame_max"];

/// How to reach RabbitMQ, and the topology that everybody who connects declares.
///
/// `Debug` shows neither user names nor passwords, and there is no way to serialize it.
///
/// ```
/// use pillarbox_amqp::{Config, Queue};
/// let mut config = Config::new("amqp://guest:guest@localhost:5672");
/// config.queues.insert(
///     "inventory.events.queue".into(),
///     Queue {
///         dead_letter: Some("inventory.events.dlq".into()),
///         ..Queue::new("inventory.events", "orders", ["inventory.stock.reserved"])
///     },
/// );
/// config.validate()?;
/// # Ok::<(), pillarbox_transport::Error>(())
/// ```
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `amqp://user:password@host:port/vhost`, or `amqps://…` for TLS. No path is the vhost `/`. The query may set
    /// `auth_mechanism` (`plain`, `amqplain`, `external`), `frame_max` and `channel_max`.
    /// Exactly one of `url` and `url_file` is needed.
    #[serde(deserialize_with = "secret")]
    pub url: Option<SecretString>,
    /// A file that holds the URL; read again at each connect, so that a password can be changed without a restart.
    pub url_file: Option<PathBuf>,
    /// How often both sides show that they live; whole seconds. A silent connection is given up after twice this time.
    /// Defaults to 10 s.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// The most time for a connection with its TLS and AMQP handshakes, and for each exchange with the broker that is
    /// not a publish: declaring the topology, opening or closing a session. Defaults to 10 s.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// The most time between a batch's first publish and its last confirm. Does not run while the broker blocks the
    /// connection. Defaults to 30 s.
    #[serde(with = "humantime_serde")]
    pub confirm_timeout: Duration,
    /// Channels of one publishing session: batches that may be unconfirmed at the same time. Defaults to 4.
    pub channels: u16,
    /// Unacknowledged messages that a reading session holds at most. Never lower it while a queue has unacknowledged
    /// messages: they come back out of order. Defaults to 500.
    pub prefetch: u16,
    /// The largest body that is sent, in bytes; a larger one is rejected by itself. Keep it at or below the broker's
    /// `max_message_size`. Defaults to 16 MiB, RabbitMQ 4's own default.
    pub max_payload: usize,
    /// What new queues are. Defaults to `quorum`.
    pub queue_type: QueueType,
    /// Whether exchanges, queues and bindings are declared. `false` is for users without the right to: what must exist
    /// is then only looked up, and nothing tells whether its bindings and arguments are right. Defaults to `true`.
    pub declare: bool,
    /// TLS, for `amqps://`.
    pub tls: Tls,
    /// Queues by name. A group that has none here reads `{topic}.{group}`, bound to the types that it has handlers for.
    pub queues: BTreeMap<String, Queue>,
}

/// One queue: where a group reads a topic.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// The topic, which is the exchange.
    pub topic: String,
    /// The consumer group; one queue for each topic and group.
    pub group: String,
    /// The event types (routing keys) that the queue is bound to. `*` stands for one word between dots, `#` for any
    /// number. A type that is taken away here stays bound at the broker until somebody unbinds it.
    pub types: Vec<String>,
    /// Where this group's dead letters go. Defaults to `{queue}.dlq`.
    #[serde(default)]
    pub dead_letter: Option<String>,
    /// As [`Config::queue_type`], for this queue and its dead letters. Defaults to that.
    #[serde(default)]
    pub queue_type: Option<QueueType>,
    /// As [`Config::prefetch`], for this queue. Defaults to that.
    #[serde(default)]
    pub prefetch: Option<u16>,
}

impl Queue {
    /// A queue with the defaults.
    #[must_use]
    pub fn new(
        topic: impl Into<String>,
        group: impl Into<String>,
        types: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        Self {
            topic: topic.into(),
            group: group.into(),
            types: types.into_iter().map(Into::into).collect(),
            dead_letter: None,
            queue_type: None,
            prefetch: None,
        }
    }
}

/// The kind of queue that is declared. It cannot be changed on a queue that exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueType {
    /// Replicated; a confirm means that a majority has it on disk. What Pillarbox's promises are made for.
    #[default]
    Quorum,
    /// One node; a confirm means written, not flushed: a power cut may lose confirmed events.
    Classic,
}

impl QueueType {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        }
    }
}

/// TLS settings. The server's name is always verified, TLS 1.2 is the oldest version spoken, and `amqps://` never falls
/// back to plain text. Files are read again at each connect.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// The only authorities to trust, PEM. Defaults to those of the system.
    pub ca_file: Option<PathBuf>,
    /// This client's certificate chain, PEM; needs `key_file`.
    pub certificate_file: Option<PathBuf>,
    /// The private key of `certificate_file`, PEM, not encrypted.
    pub key_file: Option<PathBuf>,
    /// This client's certificate and key as PKCS#12, in place of the two files above.
    pub pkcs12_file: Option<PathBuf>,
    /// The password of `pkcs12_file`. Defaults to the empty password.
    pub pkcs12_password_file: Option<PathBuf>,
}

impl Tls {
    pub(crate) fn is_set(&self) -> bool {
        [
            &self.ca_file,
            &self.certificate_file,
            &self.key_file,
            &self.pkcs12_file,
            &self.pkcs12_password_file,
        ]
        .iter()
        .any(|file| file.is_some())
    }

    fn validate(&self) -> Result<()> {
        if self.certificate_file.is_some() != self.key_file.is_some() {
            return refuse(
                "tls: found one of certificate_file and key_file, expected both or none",
            );
        }
        if self.pkcs12_file.is_some() && self.certificate_file.is_some() {
            return refuse(
                "tls: found pkcs12_file and certificate_file, expected one identity at most",
            );
        }
        if self.pkcs12_password_file.is_some() && self.pkcs12_file.is_none() {
            return refuse("tls: found pkcs12_password_file, expected pkcs12_file with it");
        }
        Ok(())
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: None,
            url_file: None,
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            confirm_timeout: Duration::from_secs(30),
            channels: 4,
            prefetch: 500,
            max_payload: 16 * 1_024 * 1_024,
            queue_type: QueueType::Quorum,
            declare: true,
            tls: Tls::default(),
            queues: BTreeMap::new(),
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.url.as_ref().map(|url| {
            let endpoint = self.endpoint(url.expose_secret());
            endpoint.map_or_else(
                |_| "***".to_owned(),
                |e| format!("{}://***@{e:?}", e.0.scheme),
            )
        });
        f.debug_struct("Config")
            .field("url", &url)
            .field("url_file", &self.url_file)
            .field("heartbeat", &self.heartbeat)
            .field("connect_timeout", &self.connect_timeout)
            .field("confirm_timeout", &self.confirm_timeout)
            .field("channels", &self.channels)
            .field("prefetch", &self.prefetch)
            .field("max_payload", &self.max_payload)
            .field("queue_type", &self.queue_type)
            .field("declare", &self.declare)
            .field("tls", &self.tls)
            .field("queues", &self.queues)
            .finish()
    }
}

impl Config {
    /// The defaults, for the broker at `url`.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: Some(SecretString::from(url.into())),
            ..Self::default()
        }
    }

    /// Checks everything that can be known without a file or a connection.
    ///
    /// # Errors
    /// [`Kind::Configuration`]; the text says what was found and what was expected, and shows no secret.
    pub fn validate(&self) -> Result<()> {
        match (&self.url, &self.url_file) {
            (Some(url), None) => drop(self.endpoint(url.expose_secret())?),
            (None, Some(_)) => {}
            (None, None) => return refuse("found neither url nor url_file, expected one of them"),
            (Some(_), Some(_)) => {
                return refuse("found both url and url_file, expected one of them");
            }
        }
        for (name, value) in [
            ("heartbeat", self.heartbeat),
            ("connect_timeout", self.connect_timeout),
            ("confirm_timeout", self.confirm_timeout),
        ] {
            if value.is_zero() {
                return refuse(format!("{name}: found 0s, expected more than 0"));
            }
        }
        if self.heartbeat < Duration::from_secs(1) || self.heartbeat.as_secs() > u64::from(u16::MAX)
        {
            let found = self.heartbeat;
            return refuse(format!(
                "heartbeat: found {found:?}, expected 1 s to 65535 s"
            ));
        }
        if !(1..=64).contains(&self.channels) {
            let found = self.channels;
            return refuse(format!("channels: found {found}, expected 1 to 64"));
        }
        if self.prefetch == 0 {
            return refuse("prefetch: found 0 (no limit), expected 1 to 65535");
        }
        if self.max_payload == 0 {
            return refuse("max_payload: found 0, expected more than 0 bytes");
        }
        self.tls.validate()?;
        self.validate_queues()
    }

    fn validate_queues(&self) -> Result<()> {
        let mut groups: HashMap<(&str, &str), &str> = HashMap::new();
        for (name, queue) in &self.queues {
            name_fits(name, "the queue", name)?;
            if name.starts_with("amq.") {
                return refuse(format!(
                    "queue {name:?}: found the prefix \"amq.\", expected another: RabbitMQ keeps that for itself"
                ));
            }
            name_fits(name, "topic", &queue.topic)?;
            name_fits(name, "group", &queue.group)?;
            if queue.types.is_empty() {
                return refuse(format!(
                    "queue {name:?}: types: found none, expected one at least: nothing would ever arrive"
                ));
            }
            for kind in &queue.types {
                name_fits(name, "types", kind)?;
            }
            if let Some(dead_letter) = &queue.dead_letter {
                name_fits(name, "dead_letter", dead_letter)?;
                if self.queues.contains_key(dead_letter) {
                    return refuse(format!(
                        "queue {name:?}: dead_letter: found {dead_letter:?}, itself a configured queue; expected another name"
                    ));
                }
            }
            if queue.prefetch == Some(0) {
                return refuse(format!(
                    "queue {name:?}: prefetch: found 0 (no limit), expected 1 to 65535"
                ));
            }
            if let Some(other) = groups.insert((&queue.topic, &queue.group), name) {
                return refuse(format!(
                    "found the queues {other:?} and {name:?} for topic {:?} and group {:?}, expected one",
                    queue.topic, queue.group
                ));
            }
        }
        Ok(())
    }

    /// Where to connect now. Reads `url_file`.
    pub(crate) async fn current_endpoint(&self) -> Result<Endpoint> {
        if let Some(url) = &self.url {
            return self.endpoint(url.expose_secret());
        }
        let Some(file) = &self.url_file else {
            return refuse("found neither url nor url_file, expected one of them");
        };
        let text = SecretString::from(read(file).await?);
        self.endpoint(text.expose_secret().trim())
    }

    /// Reads a URL. No error shows any part of it: it holds a password.
    fn endpoint(&self, url: &str) -> Result<Endpoint> {
        let expected = "expected amqp://user:password@host:port/vhost or amqps://…";
        let Ok(mut uri) = url.parse::<AMQPUri>() else {
            return refuse(format!(
                "url: found a text that is no such URL (not shown: it may hold a password), {expected}"
            ));
        };
        // The parser takes an IPv6 address for no host, and no host for localhost.
        let authority = authority(url);
        if let Some((host, _)) = authority.strip_prefix('[').and_then(|a| a.split_once(']')) {
            host.clone_into(&mut uri.authority.host);
        } else if authority.is_empty() || authority.starts_with(':') {
            return refuse(format!("url: found no host, {expected}"));
        }
        if uri.vhost.is_empty() {
            return refuse(
                "url: found \"/\" at the end, which is a vhost without a name; expected no path for the vhost \"/\", or /NAME",
            );
        }
        if uri.vhost.contains('@') {
            return refuse(
                "url: found \"@\" after a \"/\" (not shown: it may be a password), expected both percent-encoded: %40 and %2F",
            );
        }
        if uri.vhost.len() > SHORT_STRING {
            return refuse(format!(
                "url: found a vhost of {} bytes, expected {SHORT_STRING} at most",
                uri.vhost.len()
            ));
        }
        for name in parameters(url) {
            if !URL_PARAMETERS.contains(&name) {
                return refuse(format!(
                    "url: found the parameter {name:?}, expected {URL_PARAMETERS:?} at most (time limits have fields of their own)"
                ));
            }
        }
        if self.tls.is_set() && uri.scheme == AMQPScheme::AMQP {
            return refuse("found [tls] settings and a url of amqp://, expected amqps://");
        }
        uri.query.heartbeat = Some(u16::try_from(self.heartbeat.as_secs()).unwrap_or(u16::MAX));
        Ok(Endpoint(uri))
    }
}

/// A broker's address, with its credentials. Shows only what may be shown.
#[derive(Clone)]
pub(crate) struct Endpoint(pub(crate) AMQPUri);

impl Endpoint {
    /// `host:port/vhost`: what names the cluster in leases and logs.
    pub(crate) fn cluster(&self) -> String {
        let authority = &self.0.authority;
        let vhost = &self.0.vhost;
        if authority.host.contains(':') {
            return format!("[{}]:{}/{vhost}", authority.host, authority.port);
        }
        format!("{}:{}/{vhost}", authority.host, authority.port)
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.0.scheme == AMQPScheme::AMQPS
    }

    /// Whether the password would cross a network that others may read.
    pub(crate) fn exposes_password(&self) -> bool {
        let host = self.0.authority.host.as_str();
        let loopback = host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_loopback());
        !self.is_tls() && !loopback
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cluster())
    }
}

/// A file's text, for secrets and certificates.
pub(crate) async fn read(file: &Path) -> Result<String> {
    let bytes = read_bytes(file).await?;
    String::from_utf8(bytes).or_else(|_| refuse(format!("{}: found no text", file.display())))
}

pub(crate) async fn read_bytes(file: &Path) -> Result<Vec<u8>> {
    tokio::fs::read(file).await.map_err(|e| {
        Error::new(
            Kind::Configuration,
            "read a file",
            format!("{}", file.display()),
        )
        .caused_by(e)
    })
}

fn secret<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SecretString>, D::Error> {
    Ok(Option::<String>::deserialize(d)?.map(SecretString::from))
}

/// `host:port`, or less.
fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let rest = rest.split(['/', '?', '#']).next().unwrap_or_default();
    rest.rsplit_once('@').map_or(rest, |(_, host)| host)
}

fn parameters(url: &str) -> impl Iterator<Item = &str> {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split('=').next().unwrap_or_default())
}

fn name_fits(queue: &str, what: &str, name: &str) -> Result<()> {
    if (1..=NAME_BYTES).contains(&name.len()) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    let shown: String = name.chars().take(64).collect();
    refuse(format!(
        "queue {queue:?}: {what}: found {shown:?} of {} bytes, expected 1 to {NAME_BYTES} bytes without control characters",
        name.len()
    ))
}

fn refuse<T>(text: impl Into<std::borrow::Cow<'static, str>>) -> Result<T> {
    Err(Error::new(
        Kind::Configuration,
        "read [transport.amqp]",
        text,
    ))
}

#[cfg(test)]
mod tests;
