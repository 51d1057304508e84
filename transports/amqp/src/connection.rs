//! The two connections and their supervision: connect on demand, know when the broker holds one back or it is lost, and
//! be able to end it for certain. Knows no topology, publishes nothing.
//!
//! lapin's own recovery stays off: it covers no closed channels, gives up after some minutes, and would replay frames for
//! a session whose lease is gone. A lost connection is dropped, and whoever opens the next session connects anew.

use std::{
    future::Future,
    io,
    net::{Shutdown, SocketAddr},
    pin::pin,
    sync::{Arc, Mutex as Lock, PoisonError},
    time::Duration,
};

use futures_util::StreamExt;
use lapin::{
    AsyncTcpStream, Channel, Connection, ConnectionProperties, Event, tcp::RustlsConnector,
    uri::AMQPUri,
};
use pillarbox_transport::{Error, Kind, Result};
use socket2::{SockRef, Socket};
use tokio::{
    sync::{Mutex, watch},
    task::AbortHandle,
    time::{Instant, timeout},
};
use tracing::{Dispatch, dispatcher, subscriber::NoSubscriber};

use crate::{
    config::{Config, Endpoint},
    outcome::classify,
    tls,
};

/// What a connection is for. Two, because a broker in trouble stops reading from connections that publish, and
/// acknowledgements must go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Publishing,
    Consuming,
}

/// Both connections of one transport.
#[derive(Debug)]
pub(crate) struct Connections {
    config: Arc<Config>,
    publishing: Mutex<Option<Arc<Live>>>,
    consuming: Mutex<Option<Arc<Live>>>,
}

impl Connections {
    pub(crate) fn new(config: Arc<Config>) -> Self {
        Self {
            config,
            publishing: Mutex::default(),
            consuming: Mutex::default(),
        }
    }

    /// The connection for `role`; a new one when there is none that lives.
    pub(crate) async fn live(&self, role: Role) -> Result<Arc<Live>> {
        let slot = match role {
            Role::Publishing => &self.publishing,
            Role::Consuming => &self.consuming,
        };
        // Held while connecting: those who come meanwhile share the outcome.
        let Ok(mut slot) = timeout(self.config.connect_timeout, slot.lock()).await else {
            return Err(Error::new(
                Kind::Timeout,
                "connect",
                "another session is still trying",
            ));
        };
        if let Some(live) = slot.as_ref().filter(|live| live.is_up()) {
            return Ok(Arc::clone(live));
        }
        *slot = None;
        let live = Arc::new(Live::connect(&self.config, role).await?);
        *slot = Some(Arc::clone(&live));
        Ok(live)
    }

    /// Ends both; sessions that are still open find them lost.
    pub(crate) async fn close(&self) {
        for slot in [&self.publishing, &self.consuming] {
            if let Some(live) = slot.lock().await.take() {
                live.close().await;
            }
        }
    }
}

/// Whether a connection takes what is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Open,
    /// The broker's reason.
    Blocked(String),
    Lost,
}

/// One established connection. Dropping the last handle closes it.
#[derive(Debug)]
pub(crate) struct Live {
    connection: Arc<Connection>,
    cluster: String,
    limit: Duration,
    cut: Cut,
    flow: watch::Receiver<Flow>,
    watcher: AbortHandle,
}

impl Live {
    async fn connect(config: &Config, role: Role) -> Result<Self> {
        let endpoint = config.current_endpoint().await?;
        let cluster = endpoint.cluster();
        let tls = match endpoint.is_tls() {
            true => Some(tls::connector(&config.tls).await?),
            false => None,
        };
        if endpoint.exposes_password() {
            tracing::warn!(%cluster, "the password crosses the network in plain text; amqps:// would not");
        }
        let limit = config.connect_timeout;
        let cut = Cut::default();
        // Also when the caller stops waiting: lapin's thread would wait for the broker for ever.
        let mut abandoned = CutOnDrop(Some(cut.clone()));
        let connecting = establish(endpoint, tls, role, limit, cut.clone());
        let connection = match timeout(limit, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(e)) => return Err(classify(e, "connect", cluster)),
            Err(_) => {
                let text = format!("{cluster}: no answer within {limit:?}");
                return Err(Error::new(Kind::Timeout, "connect", text));
            }
        };
        abandoned.0 = None;
        tracing::info!(%cluster, ?role, "connected to RabbitMQ");
        let (flow, watcher) = watch_over(&connection, cluster.clone(), role);
        let connection = Arc::new(connection);
        Ok(Self {
            connection,
            cluster,
            limit,
            cut,
            flow,
            watcher,
        })
    }

    pub(crate) fn is_up(&self) -> bool {
        self.connection.status().connected() && !self.cut.is_cut()
    }

    /// `host:port/vhost`.
    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The largest frame that either side may send, in bytes.
    pub(crate) fn frame_max(&self) -> usize {
        self.connection.configuration().frame_max() as usize
    }

    /// A new channel.
    pub(crate) async fn channel(&self) -> Result<Channel> {
        self.answer("open a channel", self.connection.create_channel())
            .await
    }

    /// Waits for one of the broker's answers, within the connection's limit.
    pub(crate) async fn answer<T>(
        &self,
        operation: &'static str,
        exchange: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T> {
        let answer = self.answer_raw(operation, exchange).await?;
        answer.map_err(|e| classify(e, operation, self.cluster.clone()))
    }

    /// As [`Live::answer`], with the broker's own error inside; the outer one is an answer that did not come.
    pub(crate) async fn answer_raw<T>(
        &self,
        operation: &'static str,
        exchange: impl Future<Output = lapin::Result<T>>,
    ) -> Result<lapin::Result<T>> {
        let answer = timeout(self.limit, exchange).await;
        answer.map_err(|_| match &*self.flow.borrow() {
            Flow::Blocked(reason) => {
                let text = format!("{} blocks this connection: {reason}", self.cluster);
                Error::new(Kind::Full, operation, text)
            }
            _ => {
                let text = format!("{}: no answer within {:?}", self.cluster, self.limit);
                Error::new(Kind::Timeout, operation, text)
            }
        })
    }

    /// Runs `work` for at most `limit`, not counting the time in which the broker blocks the connection. None when time
    /// ran out. Lost connections end the work by themselves: lapin fails what waits on them.
    pub(crate) async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let mut work = pin!(work);
        let mut flow = self.flow.clone();
        loop {
            let blocked = matches!(*flow.borrow_and_update(), Flow::Blocked(_));
            // What was written before the block is answered only after it: its whole time starts again.
            let end = Instant::now() + limit;
            tokio::select! {
                biased;
                done = &mut work => return Some(done),
                Ok(()) = flow.changed() => {}
                () = tokio::time::sleep_until(end), if !blocked => return None,
            }
        }
    }

    /// Resolves when the connection takes publishes, with false when it is lost.
    pub(crate) async fn open(&self) -> bool {
        let mut flow = self.flow.clone();
        loop {
            match *flow.borrow_and_update() {
                Flow::Open => return self.is_up(),
                Flow::Lost => return false,
                Flow::Blocked(_) => {}
            }
            if flow.changed().await.is_err() {
                return false;
            }
        }
    }

    /// Ends the connection at once, whatever is queued: nothing more of it reaches the broker.
    pub(crate) fn cut(&self) {
        self.cut.cut();
    }

    async fn close(&self) {
        close(&self.connection, &self.cut, self.limit).await;
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.watcher.abort();
        let (connection, cut, limit) = (Arc::clone(&self.connection), self.cut.clone(), self.limit);
        // lapin's own close has no deadline, and its thread would outlive a broker that does not answer.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                drop(runtime.spawn(async move { close(&connection, &cut, limit).await }))
            }
            Err(_) => cut.cut(),
        }
    }
}

async fn close(connection: &Connection, cut: &Cut, limit: Duration) {
    if connection.status().connected() {
        // Any error means that it is closed already.
        let _ = timeout(limit, connection.close(200, "OK".into())).await;
    }
    cut.cut();
}

/// Reaches the broker, then hands the socket to lapin. A socket that lapin fails to get itself costs it a task for ever.
async fn establish(
    endpoint: Endpoint,
    tls: Option<RustlsConnector>,
    role: Role,
    limit: Duration,
    cut: Cut,
) -> lapin::Result<Connection> {
    let AMQPUri { authority, .. } = &endpoint.0;
    let runtime = lapin::runtime::default_runtime()?;
    let address = (authority.host.as_str(), authority.port);
    let found: Vec<SocketAddr> = tokio::net::lookup_host(address).await?.collect();
    // One address that does not answer leaves time for the others.
    let share = limit / u32::try_from(found.len().max(1)).unwrap_or(u32::MAX);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    let mut reached = None;
    for address in found {
        match timeout(share, AsyncTcpStream::connect(&runtime, address)).await {
            Ok(Ok(stream)) => {
                reached = Some(stream);
                break;
            }
            Ok(Err(e)) => last = e,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    let mut stream = reached.ok_or(last)?;
    if let AsyncTcpStream::Plain(tcp) = &stream {
        cut.arm(SockRef::from(tcp.get_ref()).try_clone()?)?;
    }
    if let Some(tls) = &tls {
        stream = stream.into_rustls(tls, &authority.host).await?;
    }
    let stream = Lock::new(Some(stream));
    let hand_over = async move |_, _| {
        hush();
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(stream
            .ok_or(io::ErrorKind::ConnectionAborted)
            .map_err(io::Error::from)?)
    };
    Connection::connector(endpoint.0, runtime, hand_over, properties(role)).await
}

fn properties(role: Role) -> ConnectionProperties {
    let name = match role {
        Role::Publishing => "pillarbox publishing",
        Role::Consuming => "pillarbox consuming",
    };
    ConnectionProperties::default()
        .with_connection_name(name.into())
        .with_client_property("product".into(), "Pillarbox".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into())
}

/// lapin writes returned messages to its log with their bodies, and frames too when a program logs everything. All of it
/// happens on the thread that takes the socket over, which is lapin's alone.
fn hush() {
    // Without any subscriber, setting one for this thread would end the forwarding to `log` in the whole process.
    if dispatcher::get_default(|current| !current.is::<NoSubscriber>()) {
        std::mem::forget(dispatcher::set_default(&Dispatch::none()));
    }
}

/// Follows what the broker says about the connection until it is lost.
fn watch_over(
    connection: &Connection,
    cluster: String,
    role: Role,
) -> (watch::Receiver<Flow>, AbortHandle) {
    // lapin hands each event to one listener only: this is the only one.
    let mut events = Box::pin(connection.events_listener());
    let status = connection.status().clone();
    let (sender, receiver) = watch::channel(Flow::Open);
    let task = tokio::spawn(async move {
        while let Some(event) = events.next().await {
            match event {
                Event::ConnectionBlocked(reason) => {
                    tracing::warn!(%cluster, ?role, %reason, "RabbitMQ blocks the connection: publishing waits");
                    sender.send_replace(Flow::Blocked(reason));
                }
                Event::ConnectionUnblocked => {
                    tracing::info!(%cluster, ?role, "RabbitMQ takes events again");
                    sender.send_replace(Flow::Open);
                }
                // Also sent for a channel that the broker closed.
                Event::Error(error) if !status.connected() => {
                    tracing::warn!(%cluster, ?role, %error, "the connection to RabbitMQ is lost");
                    break;
                }
                _ => {}
            }
        }
        sender.send_replace(Flow::Lost);
    });
    (receiver, task.abort_handle())
}

/// A second handle on a connection's socket. lapin keeps what could not be written and sends it when the way is free
/// again; after a deadline, or when a lease is gone, only the end of the socket forbids that.
#[derive(Clone, Debug, Default)]
struct Cut(Arc<Lock<Wire>>);

#[derive(Debug, Default)]
enum Wire {
    #[default]
    NotYet,
    Open(Socket),
    Cut,
}

impl Cut {
    fn arm(&self, socket: Socket) -> io::Result<()> {
        let mut wire = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*wire, Wire::Cut) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        *wire = Wire::Open(socket);
        Ok(())
    }

    fn is_cut(&self) -> bool {
        let wire = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(*wire, Wire::Cut)
    }

    fn cut(&self) {
        let mut wire = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Wire::Open(socket) = &*wire {
            // Fails when the other side was first.
            let _ = socket.shutdown(Shutdown::Both);
        }
        *wire = Wire::Cut;
    }
}

struct CutOnDrop(Option<Cut>);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        if let Some(cut) = &self.0 {
            cut.cut();
        }
    }
}
