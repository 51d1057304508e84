//! A TCP proxy on loopback between a client and a server, with faults on command: cut, reset, black hole, held bytes.
//!
//! It sees bytes, not messages. What it says, it does at once: when [`Proxy::hold`] has returned, not one byte more goes
//! that way; when [`Proxy::cut`] has returned, none of the connections of before carries anything.
//!
//! ```no_run
//! # async fn test() -> std::io::Result<()> {
//! use pillarbox_testkit::proxy::{Direction, Proxy};
//! let (proxy, url) = Proxy::before("amqp://guest:guest@127.0.0.1:5672/%2f").await?;
//! // … connect to `url`, publish …
//! proxy.hold(Direction::ToClient); // confirms no longer arrive
//! proxy.reset(); // and never will
//! proxy.release();
//! proxy.wait_for_connections(2).await; // the client is back
//! # Ok(()) }
//! ```

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::address;

/// Bytes taken at once: enough for speed, small enough that a held connection soon stops its sender too.
const CHUNK: usize = 16 * 1024;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server: statements, publishes, acknowledgements of deliveries.
    ToServer,
    /// From the server to the client: rows, confirms, deliveries.
    ToClient,
}

/// How connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// FIN after what was sent.
    Close,
    /// RST; what is in the buffers is lost.
    Reset,
}

/// What has passed so far. Monotonic, apart from `open`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Connections that reached the server since the start.
    pub connections: u64,
    /// Connections that stand now.
    pub open: u64,
    /// Connections that found no server behind the proxy.
    pub unreachable: u64,
    /// Bytes forwarded to the server.
    pub to_server: u64,
    /// Bytes forwarded to the client.
    pub to_client: u64,
}

impl Counters {
    fn bytes(&mut self, direction: Direction) -> &mut u64 {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

/// The rules in force. Every forwarding write happens under their lock, so a change holds from the moment it returns.
#[derive(Debug, Default)]
struct Rules {
    refuse: bool,
    black_hole: bool,
    held: [bool; 2],
    /// After so many more bytes in a direction, the connection that carried the last of them ends.
    budget: [Option<(u64, End)>; 2],
    /// The next connection that says this to the server ends before it has the answer.
    last_words: Option<Vec<u8>>,
    /// Connections with a number up to this one have been ended, and how.
    ended: (u64, Option<End>),
    /// The number of the last connection that was taken.
    taken: u64,
}

impl Rules {
    fn stopped(&self, direction: Direction) -> bool {
        self.black_hole || self.held[direction as usize]
    }

    fn ended(&self, connection: u64) -> Option<End> {
        if connection <= self.ended.0 {
            self.ended.1
        } else {
            None
        }
    }
}

#[derive(Debug)]
struct Shared {
    target: String,
    rules: Mutex<Rules>,
    /// Wakes whoever waits for other rules.
    changed: watch::Sender<()>,
    counters: watch::Sender<Counters>,
}

impl Shared {
    /// No code that holds the lock can panic half-way through a change.
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Rules) -> T) -> T {
        let answer = change(&mut self.rules());
        self.changed.send_replace(());
        answer
    }
}

/// A proxy in front of one server. Ends with this value: its connections are reset.
///
/// Its tasks run on the runtime that it was started on.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
    /// Bound and not listening: keeps the port while connections are refused.
    _claim: TcpSocket,
}

impl Proxy {
    /// Starts a proxy on a free port of 127.0.0.1 in front of `target` (`host:port`). The target is looked up and connected
    /// to at each connection, so it may be down now and come back later.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn start(target: impl Into<String>) -> io::Result<Self> {
        let claim = socket(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = claim.local_addr()?;
        let listener = socket(address)?.listen(1024)?;
        let shared = Arc::new(Shared {
            target: target.into(),
            rules: Mutex::default(),
            changed: watch::Sender::new(()),
            counters: watch::Sender::new(Counters::default()),
        });
        let accepting = tokio::spawn(accept(address, listener, Arc::clone(&shared)));
        Ok(Self {
            address,
            shared,
            accepting,
            _claim: claim,
        })
    }

    /// Starts a proxy in front of the server in `url` (`postgres://`, `amqp://`, `nats://`, …), and gives the same URL with
    /// the proxy's host and port.
    ///
    /// # Errors
    /// As [`Proxy::start`]; `InvalidInput` when the URL names no host or its port is unknown.
    pub async fn before(url: &str) -> io::Result<(Self, String)> {
        let invalid = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the URL names no host and port",
            )
        };
        let proxy = Self::start(address::host_and_port(url).ok_or_else(invalid)?).await?;
        let through = address::with_host(url, proxy.address).ok_or_else(invalid)?;
        Ok((proxy, through))
    }

    /// Where clients connect.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Closes all connections, both sides with FIN. What was held is dropped. New ones are taken.
    pub fn cut(&self) {
        self.end_all(End::Close);
    }

    /// Resets all connections, both sides with RST. What was held is dropped. New ones are taken.
    pub fn reset(&self) {
        self.end_all(End::Reset);
    }

    fn end_all(&self, end: End) {
        self.shared
            .change(|rules| rules.ended = (rules.taken, Some(end)));
    }

    /// Forwards nothing any more in either direction, not even the end of a connection, and keeps all sockets open; new
    /// connections are taken and hang. `false` lets everything go on where it stood, as a healed network does.
    pub fn black_hole(&self, on: bool) {
        self.shared.change(|rules| rules.black_hole = on);
    }

    /// Forwards nothing any more in one direction. What arrives waits for [`Proxy::release`]; cutting the connections
    /// instead loses it.
    pub fn hold(&self, direction: Direction) {
        self.shared
            .change(|rules| rules.held[direction as usize] = true);
    }

    /// Forwards what was held, in both directions. Does not end a black hole.
    pub fn release(&self) {
        self.shared.change(|rules| rules.held = [false; 2]);
    }

    /// Forwards `bytes` more in one direction, over all connections together, then closes the connection that carried the
    /// last of them: in the middle of a frame, if the number says so. Once; a later call replaces it.
    pub fn cut_after_bytes(&self, direction: Direction, bytes: u64) {
        self.shared
            .change(|rules| rules.budget[direction as usize] = Some((bytes, End::Close)));
    }

    /// As [`Proxy::cut_after_bytes`], with a reset.
    pub fn reset_after_bytes(&self, direction: Direction, bytes: u64) {
        self.shared
            .change(|rules| rules.budget[direction as usize] = Some((bytes, End::Reset)));
    }

    /// Forwards what a client says up to the next `text` inclusive, and then closes that connection: the server has all of
    /// it and the client no answer. Once; a later call replaces it. A text that is split between two packets is not seen.
    pub fn cut_before_answer(&self, text: &[u8]) {
        self.shared
            .change(|rules| rules.last_words = Some(text.to_vec()));
    }

    /// Whether a connection is still to end by [`Proxy::cut_before_answer`].
    #[must_use]
    pub fn awaits_text(&self) -> bool {
        self.shared.rules().last_words.is_some()
    }

    /// Stops listening, so that new connections are refused; those that stand go on. `false` listens again, on the same
    /// port. A connection that was just being made may still be taken for a moment, and is reset then.
    pub fn refuse(&self, on: bool) {
        self.shared.change(|rules| rules.refuse = on);
    }

    /// What has passed so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        *self.shared.counters.borrow()
    }

    /// Waits until `count` connections have reached the server since the start, ended ones included: take
    /// `counters().connections + 1` before a cut, and wait for that. No deadline of its own.
    pub async fn wait_for_connections(&self, count: u64) {
        self.wait_for(|counters| counters.connections >= count)
            .await;
    }

    /// Waits until no connection stands.
    pub async fn wait_until_closed(&self) {
        self.wait_for(|counters| counters.open == 0).await;
    }

    /// Waits until the counters are as wanted. No deadline of its own.
    pub async fn wait_for(&self, mut wanted: impl FnMut(&Counters) -> bool) {
        // The sender lives as long as this value: there is no error.
        let _ = self
            .shared
            .counters
            .subscribe()
            .wait_for(|counters| wanted(counters))
            .await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.shared
            .change(|rules| rules.ended = (u64::MAX, Some(End::Reset)));
    }
}

/// A socket on a port that a second socket of this process may hold too.
fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    Ok(socket)
}

async fn accept(address: SocketAddr, listener: TcpListener, shared: Arc<Shared>) {
    let mut changed = shared.changed.subscribe();
    let mut listener = Some(listener);
    loop {
        if shared.rules().refuse {
            listener = None;
        } else if listener.is_none() {
            listener = socket(address).and_then(|socket| socket.listen(1024)).ok();
        }
        let taken = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // The proxy holds the sender.
            _ = changed.changed() => {}
            client = taken => {
                let Ok((client, _)) = client else { continue };
                let number = shared.change(|rules| {
                    rules.taken += 1;
                    if rules.refuse { None } else { Some(rules.taken) }
                });
                match number {
                    Some(number) => drop(tokio::spawn(connection(number, client, Arc::clone(&shared)))),
                    None => finish(&client, End::Reset),
                }
            }
        }
    }
}

/// One connection, from the client's connect to the end of both sides.
async fn connection(number: u64, client: TcpStream, shared: Arc<Shared>) {
    // In a black hole the server is not reached either.
    let end = match until_running(number, &shared).await {
        Some(end) => end,
        None => match TcpStream::connect(&shared.target).await {
            Ok(server) => {
                shared.counters.send_modify(|counters| {
                    counters.connections += 1;
                    counters.open += 1;
                });
                let end = forward(number, &client, &server, &shared).await;
                finish(&server, end);
                drop(server);
                shared.counters.send_modify(|counters| counters.open -= 1);
                end
            }
            Err(_) => {
                shared
                    .counters
                    .send_modify(|counters| counters.unreachable += 1);
                End::Reset
            }
        },
    };
    finish(&client, end);
}

/// Waits while there is a black hole. How the connection ends, if it does meanwhile.
async fn until_running(number: u64, shared: &Shared) -> Option<End> {
    let mut changed = shared.changed.subscribe();
    loop {
        {
            let rules = shared.rules();
            if let Some(end) = rules.ended(number) {
                return Some(end);
            }
            if !rules.black_hole {
                return None;
            }
        }
        let _ = changed.changed().await;
    }
}

/// Both directions until both have ended by themselves or one says how the connection ends.
async fn forward(number: u64, client: &TcpStream, server: &TcpStream, shared: &Shared) -> End {
    // Small frames must not wait for each other.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let up = pump(number, Direction::ToServer, client, server, shared);
    let down = pump(number, Direction::ToClient, server, client, shared);
    tokio::pin!(up, down);
    let (mut up_done, mut down_done) = (false, false);
    while !(up_done && down_done) {
        let ended = tokio::select! {
            ended = &mut up, if !up_done => { up_done = true; ended }
            ended = &mut down, if !down_done => { down_done = true; ended }
        };
        if let Some(end) = ended {
            return end;
        }
    }
    End::Close
}

/// One direction. `None` when its source has ended and that was passed on; else how the whole connection ends.
async fn pump(
    number: u64,
    direction: Direction,
    from: &TcpStream,
    to: &TcpStream,
    shared: &Shared,
) -> Option<End> {
    let mut changed = shared.changed.subscribe();
    let mut buffer = vec![0; CHUNK];
    let mut pending = 0..0;
    let mut source_ended = false;
    loop {
        changed.borrow_and_update();
        let stopped = {
            let rules = shared.rules();
            if let Some(end) = rules.ended(number) {
                return Some(end);
            }
            rules.stopped(direction)
        };
        if stopped {
            let _ = changed.changed().await;
        } else if pending.is_empty() && !source_ended {
            tokio::select! {
                _ = changed.changed() => continue,
                ready = from.readable() => if ready.is_err() { return Some(End::Reset) },
            }
            match from.try_read(&mut buffer) {
                Ok(0) => source_ended = true,
                Ok(count) => pending = 0..count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Some(End::Reset),
            }
        } else {
            match pass_on(number, direction, to, &buffer[pending.clone()], shared) {
                Passed::Bytes(count) => pending.start += count,
                Passed::End => return None,
                Passed::NotNow => {}
                Passed::Full => tokio::select! {
                    _ = changed.changed() => {}
                    ready = to.writable() => if ready.is_err() { return Some(End::Reset) },
                },
                Passed::Broken(end) => return Some(end),
            }
        }
    }
}

enum Passed {
    Bytes(usize),
    /// The end of the source.
    End,
    /// The rules changed: look again.
    NotNow,
    /// The destination takes no more at present.
    Full,
    /// The connection is over.
    Broken(End),
}

/// Writes what the rules allow, under their lock. No bytes stand for the end of the source.
fn pass_on(
    number: u64,
    direction: Direction,
    to: &TcpStream,
    bytes: &[u8],
    shared: &Shared,
) -> Passed {
    let mut rules = shared.rules();
    if let Some(end) = rules.ended(number) {
        return Passed::Broken(end);
    }
    if rules.stopped(direction) {
        return Passed::NotNow;
    }
    if bytes.is_empty() {
        let _ = rustix::net::shutdown(to, rustix::net::Shutdown::Write);
        return Passed::End;
    }
    let budget = &mut rules.budget[direction as usize];
    let allowed = budget.map_or(bytes.len(), |(left, _)| {
        usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()))
    });
    let written = if allowed == 0 {
        Ok(0)
    } else {
        to.try_write(&bytes[..allowed])
    };
    let written = match written {
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Passed::Full,
        Err(_) => return Passed::Broken(End::Reset),
    };
    shared
        .counters
        .send_modify(|counters| *counters.bytes(direction) += written as u64);
    if direction == Direction::ToServer && says(rules.last_words.as_deref(), &bytes[..written]) {
        rules.last_words = None;
        // A FIN: a reset could overtake what was said.
        return Passed::Broken(End::Close);
    }
    let budget = &mut rules.budget[direction as usize];
    if let Some((left, end)) = budget {
        *left -= written as u64;
        if *left == 0 {
            let end = *end;
            *budget = None;
            return Passed::Broken(end);
        }
    }
    Passed::Bytes(written)
}

fn says(text: Option<&[u8]>, bytes: &[u8]) -> bool {
    text.is_some_and(|text| !text.is_empty() && bytes.windows(text.len()).any(|w| w == text))
}

/// Makes the socket end in the given way when it is dropped.
fn finish(stream: &TcpStream, end: End) {
    match end {
        End::Reset => drop(stream.set_zero_linger()),
        End::Close => {
            let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Write);
            // A socket that is closed over unread bytes sends RST.
            let mut scrap = [0; 4096];
            while matches!(stream.try_read(&mut scrap), Ok(1..)) {}
        }
    }
}

#[cfg(test)]
mod tests;
