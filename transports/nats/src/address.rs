//! Where NATS is and who we are there, out of a URL. Shows only what may be shown.

use std::net::IpAddr;

use async_nats::ServerAddr;
use secrecy::SecretString;

/// The servers of one cluster, without credentials, and the credentials that their URLs had.
#[derive(Clone)]
pub(crate) struct Address {
    servers: Vec<Server>,
    pub(crate) user: Option<User>,
}

#[derive(Clone)]
struct Server {
    host: String,
    port: u16,
    tls: bool,
}

#[derive(Clone)]
pub(crate) enum User {
    Password(String, SecretString),
    Token(SecretString),
}

impl Address {
    /// Reads one URL or several that are joined by commas. The error never shows any part of them.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut servers = Vec::new();
        let mut user = None;
        for url in text.split(',').map(str::trim) {
            let (server, its_user) = one(url)?;
            servers.push(server);
            user = user.or(its_user);
        }
        if servers.iter().any(|s| s.tls != servers[0].tls) {
            return Err("url: found nats:// and tls:// together, expected one of them".into());
        }
        Ok(Self { servers, user })
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.servers.iter().all(|server| server.tls)
    }

    pub(crate) fn has_user(&self) -> bool {
        self.user.is_some()
    }

    /// `host:port`, sorted and joined by commas: what names the cluster in leases and logs.
    pub(crate) fn cluster(&self) -> String {
        let mut all: Vec<String> = self.servers.iter().map(Server::shown).collect();
        all.sort();
        all.join(",")
    }

    pub(crate) fn shown(&self) -> String {
        let scheme = if self.is_tls() { "tls" } else { "nats" };
        format!("{scheme}://***@{}", self.cluster())
    }

    /// Each server in the client's form, without credentials, and its name for errors.
    pub(crate) fn servers(&self) -> Vec<(String, String)> {
        let one = |server: &Server| {
            let scheme = if server.tls { "tls" } else { "nats" };
            (format!("{scheme}://{}", server.shown()), server.shown())
        };
        self.servers.iter().map(one).collect()
    }

    /// Whether a secret would cross a network that others may read.
    pub(crate) fn exposes_secrets(&self) -> bool {
        let is_open = |server: &Server| {
            let loopback = server.host == "localhost"
                || server
                    .host
                    .parse::<IpAddr>()
                    .is_ok_and(|ip| ip.is_loopback());
            !server.tls && !loopback
        };
        self.has_user() && self.servers.iter().any(is_open)
    }
}

impl Server {
    fn shown(&self) -> String {
        if self.host.contains(':') {
            return format!("[{}]:{}", self.host, self.port);
        }
        format!("{}:{}", self.host, self.port)
    }
}

fn one(url: &str) -> Result<(Server, Option<User>), String> {
    let expected = "expected nats://user:password@host:port, nats://token@host:port or tls://…";
    let refuse = |found: &str| {
        Err(format!(
            "url: found {found} (not shown: it may hold a password), {expected}"
        ))
    };
    if !url.contains("://") {
        return refuse("a text without a scheme");
    }
    let Ok(address) = url.parse::<ServerAddr>() else {
        return refuse("a text that is no such URL");
    };
    if address.is_websocket() {
        return refuse("a websocket");
    }
    if address.host().is_empty() {
        return refuse("no host");
    }
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let behind = rest
        .split_once(['/', '?', '#'])
        .map_or("", |(_, behind)| behind);
    if !behind.is_empty() {
        return refuse("more than a host and a port");
    }
    let user = match (address.username(), address.password()) {
        (Some(user), Some(password)) => Some(User::Password(
            decoded(user)?,
            SecretString::from(decoded(password)?),
        )),
        (Some(token), None) => Some(User::Token(SecretString::from(decoded(token)?))),
        (None, Some(_)) => return refuse("a password without a user"),
        (None, None) => None,
    };
    let server = Server {
        host: address.host().to_owned(),
        port: address.port(),
        tls: address.tls_required(),
    };
    Ok((server, user))
}

/// The URL keeps what was percent-encoded as it is, and the client would send it so.
fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        match (digit(), digit()) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err("url: found a \"%\" without two hexadecimal digits".into()),
        }
    }
    String::from_utf8(bytes).map_err(|_| "url: found a user or password that is no text".into())
}
