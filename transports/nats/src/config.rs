//! What `[transport.nats]` may say. Reads no file and opens no connection, except where a function says so.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use pillarbox_transport::{Error, Kind, Result};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer};

use crate::address::Address;

/// The longest name of a stream, in bytes: the server's own limit, with room for suffixes.
const NAME_BYTES: usize = 200;
/// JetStream's own default for how long it knows an id.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// How to reach NATS, and the streams that everybody who connects declares.
///
/// `Debug` shows neither user names nor passwords, and there is no way to serialize it.
///
/// ```
/// use pillarbox_nats::{Config, Stream};
/// let mut config = Config::new("nats://localhost:4222");
/// config.streams.insert(
///     "inventory_events".into(),
///     Stream::new("inventory.events", ["inventory.>"]),
/// );
/// config.validate()?;
/// # Ok::<(), pillarbox_transport::Error>(())
/// ```
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `nats://user:password@host:port`, `nats://token@host:port`, or `tls://…`; several servers of one cluster are
    /// joined by commas. Exactly one of `url` and `url_file` is needed.
    #[serde(deserialize_with = "secret")]
    pub url: Option<SecretString>,
    /// A file that holds the URL; read again at each connect, so that a password can be changed without a restart.
    pub url_file: Option<PathBuf>,
    /// A credentials file (JWT and seed, as `nsc` writes it); read again at each connect. The URL then has no user.
    pub credentials_file: Option<PathBuf>,
    /// A file with the seed of an nkey (`SU…`); read again at each connect. The URL then has no user.
    pub nkey_file: Option<PathBuf>,
    /// The cluster's name in the consumers' cursors. Set it where servers may get other addresses: under another name
    /// a group starts at the oldest event. Defaults to the hosts and ports of the URL.
    pub cluster: Option<String>,
    /// How often each connection shows that it lives. A silent one is given up after three times this time. Defaults to
    /// 10 s.
    #[serde(with = "humantime_serde")]
    pub ping_interval: Duration,
    /// The most time for a connection with its TLS and NATS handshakes, and for each exchange with the server that is
    /// not a publish: declaring streams, opening or closing a session. Defaults to 10 s.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// The most time between a batch's first publish and its last acknowledgement. Defaults to 30 s.
    #[serde(with = "humantime_serde")]
    pub confirm_timeout: Duration,
    /// Messages that wait in the client for the socket. Few: what waits there can still be sent when the network comes
    /// back, after the session has ended. Defaults to 64.
    pub send_queue: usize,
    /// Messages that one pull of a reading session asks for. Defaults to 500.
    pub prefetch: usize,
    /// The largest message that is sent, headers and payload, in bytes; a larger one is rejected by itself. The server's
    /// own `max_payload` holds where it is smaller. Defaults to 8 MiB.
    pub max_payload: usize,
    /// Copies of each new stream in a cluster, 1 to 5. 3 survives the loss of a server. Defaults to 1.
    pub replicas: usize,
    /// For how long the server knows the ids of a new stream's messages: a message that is sent again within it is not
    /// stored twice. Not less than `confirm_timeout`. Defaults to 2 min.
    #[serde(with = "humantime_serde")]
    pub duplicate_window: Duration,
    /// Whether streams are created, and subjects added to them. `false` is for users without the right to: what must
    /// exist is then only looked up. Defaults to `true`.
    pub declare: bool,
    /// TLS, for `tls://`.
    pub tls: Tls,
    /// Streams by name. A topic that has none here has the stream of its name with `_` for `.`, which takes all types
    /// whose first word is that of a type that is bound or published.
    pub streams: BTreeMap<String, Stream>,
}

/// One stream: where a topic's events lie. A stream that exists keeps its settings, except that missing subjects are added.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stream {
    /// The topic.
    pub topic: String,
    /// The event types (subjects) that it takes. `*` stands for one word between dots, `>` at the end for one or more.
    /// No two streams may take the same type.
    pub subjects: Vec<String>,
    /// The stream with the dead letters of all groups of this topic, under the subjects `{dead_letter}.{group}`.
    /// Defaults to `{stream}_dlq`.
    #[serde(default)]
    pub dead_letter: Option<String>,
    /// As [`Config::replicas`], for this stream and its dead letters. Defaults to that.
    #[serde(default)]
    pub replicas: Option<usize>,
    /// As [`Config::duplicate_window`], for this stream. Defaults to that.
    #[serde(default, with = "humantime_serde")]
    pub duplicate_window: Option<Duration>,
    /// When the server removes an event, read or not. Defaults to never.
    #[serde(default, with = "humantime_serde")]
    pub max_age: Option<Duration>,
    /// The most bytes of a new stream. A full one refuses events, which wait in the outbox, and never removes any.
    /// Defaults to no limit.
    #[serde(default)]
    pub max_bytes: Option<u64>,
}

impl Stream {
    /// A stream with the defaults.
    #[must_use]
    pub fn new(
        topic: impl Into<String>,
        subjects: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        Self {
            topic: topic.into(),
            subjects: subjects.into_iter().map(Into::into).collect(),
            dead_letter: None,
            replicas: None,
            duplicate_window: None,
            max_age: None,
            max_bytes: None,
        }
    }
}

/// TLS settings. The server's name is always verified, TLS 1.2 is the oldest version spoken, and `tls://` never falls back
/// to plain text. Files are read again at each connect.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// The only authorities to trust, PEM. Defaults to those of the system.
    pub ca_file: Option<PathBuf>,
    /// This client's certificate chain, PEM; needs `key_file`.
    pub certificate_file: Option<PathBuf>,
    /// The private key of `certificate_file`, PEM, not encrypted.
    pub key_file: Option<PathBuf>,
    /// Whether TLS comes before the server's greeting, as a server with `handshake_first` asks for. Defaults to `false`.
    pub first: bool,
}

impl Tls {
    pub(crate) fn is_set(&self) -> bool {
        let files = [&self.ca_file, &self.certificate_file, &self.key_file];
        self.first || files.iter().any(|file| file.is_some())
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: None,
            url_file: None,
            credentials_file: None,
            nkey_file: None,
            cluster: None,
            ping_interval: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            confirm_timeout: Duration::from_secs(30),
            send_queue: 64,
            prefetch: 500,
            max_payload: 8 * 1_024 * 1_024,
            replicas: 1,
            duplicate_window: DUPLICATE_WINDOW,
            declare: true,
            tls: Tls::default(),
            streams: BTreeMap::new(),
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.url.as_ref().map(|url| {
            Address::parse(url.expose_secret()).map_or_else(|_| "***".to_owned(), |a| a.shown())
        });
        f.debug_struct("Config")
            .field("url", &url)
            .field("url_file", &self.url_file)
            .field("credentials_file", &self.credentials_file)
            .field("nkey_file", &self.nkey_file)
            .field("cluster", &self.cluster)
            .field("ping_interval", &self.ping_interval)
            .field("connect_timeout", &self.connect_timeout)
            .field("confirm_timeout", &self.confirm_timeout)
            .field("send_queue", &self.send_queue)
            .field("prefetch", &self.prefetch)
            .field("max_payload", &self.max_payload)
            .field("replicas", &self.replicas)
            .field("duplicate_window", &self.duplicate_window)
            .field("declare", &self.declare)
            .field("tls", &self.tls)
            .field("streams", &self.streams)
            .finish()
    }
}

impl Config {
    /// The defaults, for the server at `url`.
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
        if self.credentials_file.is_some() && self.nkey_file.is_some() {
            return refuse("found credentials_file and nkey_file, expected one of them at most");
        }
        match (&self.url, &self.url_file) {
            (Some(url), None) => drop(self.address(url.expose_secret())?),
            (None, Some(_)) => {}
            (None, None) => return refuse("found neither url nor url_file, expected one of them"),
            (Some(_), Some(_)) => {
                return refuse("found both url and url_file, expected one of them");
            }
        }
        for (name, value) in [
            ("ping_interval", self.ping_interval),
            ("connect_timeout", self.connect_timeout),
            ("confirm_timeout", self.confirm_timeout),
        ] {
            if value < Duration::from_millis(100) {
                return refuse(format!("{name}: found {value:?}, expected 100ms at least"));
            }
        }
        for (name, value, most) in [
            ("send_queue", self.send_queue, 65_536),
            ("prefetch", self.prefetch, 65_536),
            // The server takes no more, whatever its own setting.
            ("max_payload", self.max_payload, 64 * 1_024 * 1_024),
        ] {
            if !(1..=most).contains(&value) {
                return refuse(format!("{name}: found {value}, expected 1 to {most}"));
            }
        }
        if self.cluster.as_ref().is_some_and(|name| !is_word(name)) {
            return refuse("cluster: expected 1 to 200 letters, digits, '.', '_', '-' or ':'");
        }
        if self.tls.certificate_file.is_some() != self.tls.key_file.is_some() {
            return refuse(
                "tls: found one of certificate_file and key_file, expected both or none",
            );
        }
        replicas_fit("replicas", self.replicas)?;
        self.window_fits("duplicate_window", self.duplicate_window)?;
        self.validate_streams()
    }

    fn validate_streams(&self) -> Result<()> {
        let mut topics: HashMap<&str, &str> = HashMap::new();
        let mut names: HashMap<String, &str> = HashMap::new();
        let mut taken: Vec<(&str, &str)> = Vec::new();
        for (name, stream) in &self.streams {
            let at = |field: &str| format!("stream {name:?}: {field}");
            let dead_letter = stream.dead_letter(name);
            for (field, value) in [("the name", name), ("dead_letter", &dead_letter)] {
                stream_name_fits(&at(field), value)?;
                if let Some(other) = names.insert(value.clone(), name) {
                    return refuse(format!(
                        "{}: found {value:?}, which {other:?} is or has for its dead letters; expected another name",
                        at(field)
                    ));
                }
            }
            if let Some(other) = topics.insert(&stream.topic, name) {
                return refuse(format!(
                    "found the streams {other:?} and {name:?} for topic {:?}, expected one",
                    stream.topic
                ));
            }
            if stream.subjects.is_empty() {
                return refuse(format!(
                    "{}: found none, expected one at least: nothing would ever be taken",
                    at("subjects")
                ));
            }
            for subject in &stream.subjects {
                subject_fits(&at("subjects"), subject)?;
                let overlaps = |(_, other): &&(&str, &str)| overlap(subject, other);
                if let Some((other, theirs)) = taken.iter().find(overlaps) {
                    return refuse(format!(
                        "{}: found {subject:?}, which overlaps with {theirs:?} of stream {other:?}; expected each type in one stream",
                        at("subjects")
                    ));
                }
            }
            taken.extend(stream.subjects.iter().map(|s| (name.as_str(), s.as_str())));
            replicas_fit(&at("replicas"), stream.replicas.unwrap_or(1))?;
            let window = stream.duplicate_window.unwrap_or(self.duplicate_window);
            self.window_fits(&at("duplicate_window"), window)?;
            if stream.max_age.is_some_and(|age| age < window) {
                return refuse(format!(
                    "{}: found {:?}, expected {window:?} (duplicate_window) at least",
                    at("max_age"),
                    stream.max_age.unwrap_or_default()
                ));
            }
            if stream.max_bytes == Some(0) {
                return refuse(format!("{}: found 0, expected more", at("max_bytes")));
            }
        }
        Ok(())
    }

    /// A message is sent again after the deadline: the server must still know its id then.
    fn window_fits(&self, name: &str, window: Duration) -> Result<()> {
        if window >= self.confirm_timeout {
            return Ok(());
        }
        refuse(format!(
            "{name}: found {window:?}, expected {:?} (confirm_timeout) at least: what is sent again would be stored twice",
            self.confirm_timeout
        ))
    }

    /// Where to connect now. Reads `url_file`.
    pub(crate) async fn current_address(&self) -> Result<Address> {
        if let Some(url) = &self.url {
            return self.address(url.expose_secret());
        }
        let Some(file) = &self.url_file else {
            return refuse("found neither url nor url_file, expected one of them");
        };
        let text = SecretString::from(read(file).await?);
        self.address(text.expose_secret().trim())
    }

    /// Reads a URL. No error shows any part of it: it holds a password.
    fn address(&self, url: &str) -> Result<Address> {
        let address = Address::parse(url).or_else(refuse)?;
        if self.tls.is_set() && !address.is_tls() {
            return refuse("found [tls] settings and a url of nats://, expected tls://");
        }
        if address.has_user() && (self.credentials_file.is_some() || self.nkey_file.is_some()) {
            return refuse(
                "found a user in the url and credentials_file or nkey_file, expected one of them",
            );
        }
        Ok(address)
    }
}

impl Stream {
    pub(crate) fn dead_letter(&self, name: &str) -> String {
        let configured = self.dead_letter.clone();
        configured.unwrap_or_else(|| format!("{name}_dlq"))
    }
}

/// Whether there is a type that both patterns take.
pub(crate) fn overlap(one: &str, two: &str) -> bool {
    let (mut one, mut two) = (one.split('.'), two.split('.'));
    loop {
        match (one.next(), two.next()) {
            (None, None) => return true,
            (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

/// Whether a stream with this subject takes events of this type.
pub(crate) fn covers(subject: &str, kind: &str) -> bool {
    overlap(subject, kind)
}

/// A file's text, for secrets and certificates.
pub(crate) async fn read(file: &Path) -> Result<String> {
    let bytes = read_bytes(file).await?;
    String::from_utf8(bytes).or_else(|_| refuse(format!("{}: found no text", file.display())))
}

pub(crate) async fn read_bytes(file: &Path) -> Result<Vec<u8>> {
    tokio::fs::read(file).await.map_err(|e| {
        let shown = format!("{}", file.display());
        Error::new(Kind::Configuration, "read a file", shown).caused_by(e)
    })
}

fn secret<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SecretString>, D::Error> {
    Ok(Option::<String>::deserialize(d)?.map(SecretString::from))
}

fn is_word(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-:".contains(&b);
    (1..=NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed)
}

fn stream_name_fits(what: &str, name: &str) -> Result<()> {
    if is_word(name) && !name.contains(['.', ':']) {
        return Ok(());
    }
    refuse(format!(
        "{what}: found {:?}, expected 1 to {NAME_BYTES} letters, digits, '_' or '-'",
        shown(name)
    ))
}

fn subject_fits(what: &str, subject: &str) -> Result<()> {
    let words: Vec<&str> = subject.split('.').collect();
    let last = words.len() - 1;
    let good = |(at, word): (usize, &&str)| match *word {
        "*" => true,
        ">" => at == last,
        word => is_word(word) && !word.contains(':'),
    };
    if subject.len() <= NAME_BYTES && words.iter().enumerate().all(good) {
        return Ok(());
    }
    refuse(format!(
        "{what}: found {:?}, expected words of letters, digits, '_', '-' joined by '.', '*' for one word, '>' for the rest",
        shown(subject)
    ))
}

fn replicas_fit(what: &str, replicas: usize) -> Result<()> {
    if (1..=5).contains(&replicas) {
        return Ok(());
    }
    refuse(format!("{what}: found {replicas}, expected 1 to 5"))
}

fn shown(name: &str) -> String {
    name.chars().take(64).collect()
}

fn refuse<T>(text: impl Into<std::borrow::Cow<'static, str>>) -> Result<T> {
    Err(Error::new(
        Kind::Configuration,
        "read [transport.nats]",
        text,
    ))
}

#[cfg(test)]
mod tests;
