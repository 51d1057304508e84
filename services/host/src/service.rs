//! Starts services, keeps them going, stops them in order.

use std::{io::Write as _, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::Router;
use pillarbox::{
    Consumer, Database, Kind, Relay, Settings, lease::LeaseTerm, transport::Transport,
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    Fatal, Migrations, Result, Status, engine,
    http::{HttpSettings, probes, serve, shell},
    migrate,
};

/// What a service gives to the process that runs it.
#[async_trait]
pub trait Service: Send + Sync + 'static {
    /// Its name, for logs and probes.
    fn name(&self) -> &'static str;

    /// Where and how it answers HTTP.
    fn http(&self) -> &HttpSettings;

    /// Its routes.
    fn routes(self: Arc<Self>) -> Router;

    /// Its database.
    fn database(&self) -> &Database;

    /// A relay of its outbox.
    fn relay(&self) -> Relay;

    /// A consumer with its handlers.
    fn consumer(&self) -> Consumer;

    /// How long its leases last.
    fn lease(&self) -> LeaseTerm;

    /// Whether its database and schema are there.
    ///
    /// # Errors
    /// Why not.
    async fn check(&self) -> Result<()>;
}

/// The transport that ends with its process.
const MEMORY: &str = "memory";

/// Whether other processes may run relays and consumers of the same databases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusive {
    /// As many as one likes: leases share the work out.
    No,
    /// One at a time, because its broker lives in the process. A second one serves HTTP and waits.
    Yes,
}

impl Exclusive {
    /// What this transport asks for.
    #[must_use]
    pub fn for_transport(transport: &dyn Transport) -> Self {
        if transport.kind() == MEMORY {
            Self::Yes
        } else {
            Self::No
        }
    }
}

/// A socket that listens, so that its real address is known before anything needs it.
#[derive(Debug)]
pub struct Listening {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listening {
    /// Listens where the service says, and tells it on stdout: `NAME listens on http://ADDRESS`.
    ///
    /// # Errors
    /// The address cannot be had; the text names it.
    pub async fn of(service: &dyn Service) -> Result<Self, Fatal> {
        let wanted = service.http().listen;
        let bind = async {
            let listener = TcpListener::bind(wanted).await?;
            let address = listener.local_addr()?;
            Ok::<_, std::io::Error>(Self { listener, address })
        };
        let listening = bind
            .await
            .map_err(|e| format!("cannot listen on {wanted}: {e}"))?;
        let mut out = std::io::stdout().lock();
        let (name, address) = (service.name(), listening.address);
        writeln!(out, "{name} listens on http://{address}")?;
        out.flush()?;
        Ok(listening)
    }

    /// The real address, also where the settings say port 0.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Connects a service that is a process of its own to its broker.
///
/// # Errors
/// The configuration's; `memory`, which joins services within one process alone, is refused.
pub async fn connect(settings: &Settings) -> Result<Arc<dyn Transport>, Fatal> {
    let transport = pillarbox::connect(&settings.transport).await?;
    if transport.kind() == MEMORY {
        let text = "the transport \"memory\" works within one process only: run `shop`, which is both services in \
                    one process, or configure another transport";
        return Err(pillarbox::Error::new(Kind::Configuration, "connect", text).into());
    }
    Ok(transport)
}

/// Opens a service's database and brings the engine's tables and its own up to date. Waits for a database that is away.
///
/// # Errors
/// What waiting does not mend.
pub async fn open(
    settings: &Settings,
    migrations: &Migrations,
    stop: &CancellationToken,
) -> Result<Database, Fatal> {
    let service = migrations.service;
    let (mut wait, mut told) = (Duration::from_millis(100), String::new());
    loop {
        let error = match prepare(settings, migrations).await {
            Ok(database) => return Ok(database),
            Err(crate::Error::Engine(e)) if e.is_temporary() => e.to_string(),
            Err(crate::Error::Engine(e)) => return Err(e.into()),
            Err(e) => return Err(e.into()),
        };
        // One line at each change, none for each try.
        if error != told {
            tracing::warn!(service, %error, "waiting for the database");
            told = error;
        }
        tokio::select! {
            () = stop.cancelled() => return Err("stopped while waiting for the database".into()),
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(Duration::from_secs(5)),
        }
    }
}

async fn prepare(settings: &Settings, migrations: &Migrations) -> Result<Database> {
    let database = settings.store.open().await?;
    pillarbox::migrate(&database).await?;
    migrate(&database, migrations).await?;
    Ok(database)
}

/// How long a stop waits for a database's connections.
const CLOSING: Duration = Duration::from_secs(5);

/// Runs services until `stop`: HTTP, relays and consumers of all of them. Then HTTP finishes its requests, then the
/// relays theirs, then the consumers; the databases are closed last.
///
/// # Errors
/// What ended one of them; the others are stopped then.
pub async fn run(
    services: Vec<(Arc<dyn Service>, Listening)>,
    exclusive: Exclusive,
    stop: CancellationToken,
) -> Result<(), Fatal> {
    let (stop_http, stop_engine) = (CancellationToken::new(), CancellationToken::new());
    let mut http = JoinSet::new();
    let (mut engines, mut databases) = (Vec::new(), Vec::new());
    for (service, listening) in services {
        databases.push(service.database().clone());
        let status = Status::new();
        let settings = service.http().clone();
        let routes = service.clone().routes();
        let router = shell(
            routes.merge(probes(service.clone(), status.clone())),
            &settings,
        );
        let serving = serve(
            listening.listener,
            router,
            settings.timeout,
            stop_http.clone(),
        );
        http.spawn(serving);
        engines.push(engine::Hosted { service, status });
    }
    let mut engine = tokio::spawn(engine::run(engines, exclusive, stop_engine.clone()));
    let mut ended: Result<(), Fatal> = Ok(());
    let mut engine_ended = false;
    tokio::select! {
        () = stop.cancelled() => tracing::info!("stopping: finishing what is in flight"),
        Some(served) = http.join_next() => ended = flatten(served),
        ran = &mut engine => {
            engine_ended = true;
            ended = flatten(ran);
        }
    }
    stop_http.cancel();
    while let Some(served) = http.join_next().await {
        ended = ended.and(flatten(served));
    }
    stop_engine.cancel();
    if !engine_ended {
        ended = ended.and(flatten(engine.await));
    }
    for database in databases {
        // A connection that somebody still holds must not keep the process.
        let _ = tokio::time::timeout(CLOSING, database.close()).await;
    }
    ended
}

fn flatten<E: Into<Fatal>>(
    joined: Result<Result<(), E>, tokio::task::JoinError>,
) -> Result<(), Fatal> {
    match joined {
        Ok(result) => result.map_err(Into::into),
        Err(e) => Err(e.into()),
    }
}
