//! The three parts of a server's address that tests exchange. Not a URL parser: what it does not change it copies as it is.

use std::net::SocketAddr;

/// `scheme://[user[:password]@]host[:port][/path][?query]`, cut where the parts meet.
struct Parts<'a> {
    /// With `://` and, if there is one, `user:password@`.
    before_host: &'a str,
    host: &'a str,
    path: &'a str,
    /// With its `?`.
    query: &'a str,
}

fn parts(url: &str) -> Option<Parts<'_>> {
    let authority = url.find("://")? + 3;
    let (url_without_query, query) = url.split_at(url.find('?').unwrap_or(url.len()));
    let rest = url_without_query.get(authority..)?;
    let path = authority + rest.find('/').unwrap_or(rest.len());
    let host = url[..path]
        .rfind('@')
        .filter(|at| *at >= authority)
        .map_or(authority, |at| at + 1);
    Some(Parts {
        before_host: &url[..host],
        host: &url[host..path],
        path: &url_without_query[path..],
        query,
    })
}

/// The same server, another database or vhost. `name` must need no percent-encoding. `None` for what is not a URL.
pub(crate) fn with_path(url: &str, name: &str) -> Option<String> {
    let Parts {
        before_host,
        host,
        query,
        ..
    } = parts(url)?;
    Some(format!("{before_host}{host}/{name}{query}"))
}

/// The same login and database at another socket. `None` for what is not a URL.
pub(crate) fn with_host(url: &str, host: SocketAddr) -> Option<String> {
    let Parts {
        before_host,
        path,
        query,
        ..
    } = parts(url)?;
    Some(format!("{before_host}{host}{path}{query}"))
}

/// The same server and password, another user. `None` for what is not a URL, or has no user.
pub(crate) fn with_user(url: &str, user: &str) -> Option<String> {
    let before_host = parts(url)?.before_host;
    let (scheme, login) = before_host.split_once("://")?;
    let password = login.split_once(':')?.1;
    let rest = url.get(before_host.len()..)?;
    Some(format!("{scheme}://{user}:{password}{rest}"))
}

/// `host:port`, the port of the scheme where the URL names none. `None` without either.
pub(crate) fn host_and_port(url: &str) -> Option<String> {
    let Parts {
        before_host, host, ..
    } = parts(url)?;
    // The last colon of `[::1]` is inside the brackets.
    if host
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok())
    {
        return Some(host.to_owned());
    }
    let port = match before_host.split("://").next()? {
        "postgres" | "postgresql" => 5432,
        "amqp" => 5672,
        "amqps" => 5671,
        "nats" | "tls" => 4222,
        _ => return None,
    };
    Some(format!("{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_replaced_and_the_rest_copied() {
        let cases = [
            (
                "postgres://u:p@h:1/old?sslmode=disable",
                "postgres://u:p@h:1/new?sslmode=disable",
            ),
            ("postgres://h", "postgres://h/new"),
            ("amqp://u:p%2F@h:1/%2f", "amqp://u:p%2F@h:1/new"),
            ("amqp://h:1?heartbeat=10", "amqp://h:1/new?heartbeat=10"),
        ];
        for (url, want) in cases {
            assert_eq!(with_path(url, "new").as_deref(), Some(want), "{url}");
        }
        assert_eq!(with_path("host=h dbname=d", "new"), None);
    }

    #[test]
    fn the_user_is_replaced() {
        let other = with_user("nats://a:p@h:1", "b");
        assert_eq!(other.as_deref(), Some("nats://b:p@h:1"));
        assert_eq!(with_user("nats://h:1", "b"), None);
    }

    #[test]
    fn the_host_is_replaced_and_found() {
        let to = SocketAddr::from(([127, 0, 0, 1], 9));
        assert_eq!(
            with_host("amqp://u:p@h:1/v?a=b", to).as_deref(),
            Some("amqp://u:p@127.0.0.1:9/v?a=b")
        );
        assert_eq!(host_and_port("amqp://u:p@h:1/v").as_deref(), Some("h:1"));
        assert_eq!(host_and_port("amqp://u:p@h/v").as_deref(), Some("h:5672"));
        assert_eq!(
            host_and_port("postgres://[::1]/v").as_deref(),
            Some("[::1]:5432")
        );
        assert_eq!(
            host_and_port("postgres://[::1]:7/v").as_deref(),
            Some("[::1]:7")
        );
        assert_eq!(host_and_port("ftp://h/v"), None);
    }
}
