//! Connections and their supervision: connect on demand, know when one is lost. Knows no streams, publishes nothing.
//!
//! The client's own reconnecting is made impossible: it would send what a session whose lease is gone had left in its
//! queue, and answer nothing for what was under way. A lost connection ends its client at once, and whoever opens the next
//! session connects anew.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc, Mutex as Lock, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use async_nats::{
    Client, ConnectOptions, Event, ServerError,
    connection::State,
    jetstream::{
        self, Context,
        context::{ContextBuilder, RequestError},
    },
};
use pillarbox_transport::{Error, Kind, Result};
use secrecy::ExposeSecret;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::{Mutex, watch},
    time::timeout,
};

use crate::{
    address::{Address, User},
    config::{Config, read},
    outcome::{Refusal, classify_connect, classify_request},
    tls,
};

/// Nobody listens there, ever: the client, which tries to connect again once and must be told where, finds its end.
const NOWHERE: &str = "nats://127.0.0.1:0";

/// The connection that all reading sessions of a transport and its declarations share. Publishing sessions have their own,
/// which ends with their lease.
#[derive(Debug)]
pub(crate) struct Connections {
    config: Arc<Config>,
    reading: Mutex<Option<Arc<Live>>>,
}

impl Connections {
    pub(crate) fn new(config: Arc<Config>) -> Self {
        Self {
            config,
            reading: Mutex::default(),
        }
    }

    /// The shared connection; a new one when there is none that lives.
    pub(crate) async fn reading(&self) -> Result<Arc<Live>> {
        // Held while connecting: those who come meanwhile share the outcome.
        let Ok(mut slot) = timeout(self.config.connect_timeout, self.reading.lock()).await else {
            let text = "another session is still trying";
            return Err(Error::new(Kind::Timeout, "connect", text));
        };
        if let Some(live) = slot.as_ref().filter(|live| live.is_up()) {
            return Ok(Arc::clone(live));
        }
        *slot = None;
        let live = Arc::new(Live::connect(&self.config, "reading").await?);
        *slot = Some(Arc::clone(&live));
        Ok(live)
    }

    /// A connection of the caller's own.
    pub(crate) async fn publishing(&self) -> Result<Arc<Live>> {
        Live::connect(&self.config, "publishing")
            .await
            .map(Arc::new)
    }

    /// Ends the shared one; sessions that are still open find it lost.
    pub(crate) async fn close(&self) {
        if let Some(live) = self.reading.lock().await.take() {
            live.close().await;
        }
    }
}

/// One established connection. It ends with its last handle.
pub(crate) struct Live {
    pub(crate) client: Client,
    pub(crate) context: Context,
    pub(crate) limit: Duration,
    cluster: String,
    /// Not to be used by another session: it gave no answer.
    suspect: AtomicBool,
    notes: Arc<Notes>,
}

/// What the server said about the connection, which the client tells nobody who waits.
#[derive(Debug, Default)]
struct Notes {
    last: Lock<Option<String>>,
    /// Subjects that this user may not publish to, newest last.
    forbidden: watch::Sender<Vec<String>>,
}

impl Live {
    async fn connect(config: &Config, role: &str) -> Result<Self> {
        let address = config.current_address().await?;
        let cluster = config.cluster.clone().unwrap_or_else(|| address.cluster());
        if address.exposes_secrets() {
            tracing::warn!(%cluster, "the credentials cross the network in plain text; tls:// would not");
        }
        let limit = config.connect_timeout;
        let mut servers = address.servers();
        // Any of them will do, but not all programs should choose the same.
        let start = fastrand(servers.len());
        servers.rotate_left(start);
        // One that does not answer leaves time for the others.
        let share = limit / u32::try_from(servers.len().max(1)).unwrap_or(u32::MAX);
        let mut last = None;
        for (url, name) in servers {
            let notes = Arc::new(Notes::default());
            let options = options(config, &address, role, share, &notes).await?;
            let error = match timeout(share, options.connect(url)).await {
                Ok(Ok(client)) => {
                    let live = Self::over(client, limit, cluster, notes).await?;
                    tracing::info!(
                        cluster = live.cluster,
                        role,
                        server = name,
                        "connected to NATS"
                    );
                    return Ok(live);
                }
                Ok(Err(e)) => classify_connect(e, name),
                Err(_) => Error::new(
                    Kind::Timeout,
                    "connect",
                    format!("{name}: no answer within {share:?}"),
                ),
            };
            // What one server refuses another of its cluster would refuse too.
            if !error.is_temporary() {
                return Err(error);
            }
            last = Some(error);
        }
        Err(last.unwrap_or_else(|| Error::new(Kind::Unreachable, "connect", cluster)))
    }

    async fn over(
        client: Client,
        limit: Duration,
        cluster: String,
        notes: Arc<Notes>,
    ) -> Result<Self> {
        let text = || format!("{cluster}: the client is gone");
        let gone = |e: async_nats::client::SetServerPoolError| {
            Error::new(Kind::Unreachable, "connect", text()).caused_by(e)
        };
        match timeout(limit, client.set_server_pool(NOWHERE)).await {
            Ok(done) => done.map_err(gone)?,
            Err(_) => return Err(Error::new(Kind::Timeout, "connect", text())),
        }
        let context = ContextBuilder::new().timeout(limit).build(client.clone());
        Ok(Self {
            client,
            context,
            limit,
            cluster,
            suspect: AtomicBool::new(false),
            notes,
        })
    }

    pub(crate) fn is_up(&self) -> bool {
        self.client.connection_state() == State::Connected && !self.suspect.load(Relaxed)
    }

    /// Keeps it from being used by later sessions.
    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Relaxed);
    }

    /// The name in cursors and logs.
    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The error of a connection that is gone, with what the server said last.
    pub(crate) fn lost(&self, operation: &'static str) -> Error {
        let said = self
            .notes
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let text = match &*said {
            Some(said) => format!("{}: the connection is lost: {said}", self.cluster),
            None => format!("{}: the connection is lost", self.cluster),
        };
        Error::new(Kind::Unreachable, operation, text)
    }

    /// The subjects that the server forbids, as they become known.
    pub(crate) fn forbidden(&self) -> watch::Receiver<Vec<String>> {
        self.notes.forbidden.subscribe()
    }

    /// Waits for an exchange with the server, within the connection's limit.
    pub(crate) async fn answer<T>(
        &self,
        operation: &'static str,
        exchange: impl Future<Output = T>,
    ) -> Result<T> {
        timeout(self.limit, exchange).await.map_err(|_| {
            self.suspect();
            let text = format!("{}: no answer within {:?}", self.cluster, self.limit);
            Error::new(Kind::Timeout, operation, text)
        })
    }

    /// Asks the JetStream API. The inner error is the server's own.
    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        subject: String,
        body: &impl Serialize,
    ) -> Result<Result<T, Refusal>> {
        let asked = self.context.request(subject, body);
        let answer: Result<jetstream::response::Response<T>, RequestError> =
            self.answer(operation, asked).await?;
        match answer {
            Ok(jetstream::response::Response::Ok(value)) => Ok(Ok(value)),
            Ok(jetstream::response::Response::Err { error }) => Ok(Err(Refusal {
                code: u16::try_from(error.code()).unwrap_or_default(),
                err_code: error.error_code().0,
                description: error.to_string(),
            })),
            Err(_) if !self.is_up() => Err(self.lost(operation)),
            Err(e) => {
                let error = classify_request(e, operation, &self.cluster);
                if error.kind() == Kind::Timeout {
                    self.suspect();
                }
                Err(error)
            }
        }
    }

    async fn close(&self) {
        self.suspect();
        // Any error means that it is closed already.
        let _ = timeout(self.limit, self.client.drain()).await;
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Live").field(&self.cluster).finish()
    }
}

/// A number below `count` that differs from process to process and from call to call.
fn fastrand(count: usize) -> usize {
    use std::hash::{BuildHasher, RandomState};
    let hash = RandomState::new().hash_one(count);
    usize::try_from(hash % (count.max(1) as u64)).unwrap_or_default()
}

async fn options(
    config: &Config,
    address: &Address,
    role: &str,
    limit: Duration,
    notes: &Arc<Notes>,
) -> Result<ConnectOptions> {
    let heard = Arc::clone(notes);
    let mut options = ConnectOptions::new()
        .name(format!("pillarbox {role}"))
        .connection_timeout(limit)
        .request_timeout(Some(config.connect_timeout))
        .ping_interval(config.ping_interval)
        .client_capacity(config.send_queue)
        // The first counts too; none would mean no limit.
        .max_reconnects(1)
        .ignore_discovered_servers()
        .event_callback(move |event| {
            heard.hear(&event);
            async {}
        });
    if address.is_tls() {
        options = options
            .require_tls(true)
            .tls_client_config(tls::client(&config.tls).await?);
        if config.tls.first {
            options = options.tls_first();
        }
    }
    let unusable = |what: &str, e: std::io::Error| {
        Error::new(
            Kind::Configuration,
            "connect",
            format!("{what}: expected a file that nsc wrote"),
        )
        .caused_by(e)
    };
    if let Some(file) = &config.credentials_file {
        let text = read(file).await?;
        return options
            .credentials(&text)
            .map_err(|e| unusable("credentials_file", e));
    }
    if let Some(file) = &config.nkey_file {
        return Ok(options.nkey(read(file).await?.trim().to_owned()));
    }
    Ok(match &address.user {
        Some(User::Password(user, password)) => {
            options.user_and_password(user.clone(), password.expose_secret().to_owned())
        }
        Some(User::Token(token)) => options.token(token.expose_secret().to_owned()),
        None => options,
    })
}

impl Notes {
    fn hear(&self, event: &Event) {
        let Event::ServerError(error) = event else {
            return;
        };
        let said = error.to_string();
        if let Some(subject) = forbidden_subject(error) {
            tracing::warn!(%subject, "NATS does not let this user publish to it");
            self.forbidden.send_modify(|all| {
                // What is asked for again and again stays one entry.
                all.retain(|known| *known != subject);
                all.push(subject);
            });
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(said);
    }
}

/// `Permissions Violation for Publish to "subject"`
fn forbidden_subject(error: &ServerError) -> Option<String> {
    let ServerError::Other(said) = error else {
        return None;
    };
    let behind = said.to_lowercase().find("violation for publish to")?;
    let quoted = said.get(behind..)?.split('"').nth(1)?;
    Some(quoted.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_forbids_is_found_in_its_words() {
        let said = |text: &str| forbidden_subject(&ServerError::Other(text.into()));
        assert_eq!(
            said("Permissions Violation for Publish to \"a.B\""),
            Some("a.B".into())
        );
        assert_eq!(
            said("Permissions Violation for Subscription to \"a.B\""),
            None
        );
        assert_eq!(said("Stale Connection"), None);
    }
}
