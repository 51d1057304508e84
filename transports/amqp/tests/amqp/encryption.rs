//! TLS: who is believed, who is not, and that nothing falls back to plain text.

use std::{fs, net::TcpListener, path::PathBuf, sync::Arc};

use pillarbox_amqp::Tls;
use pillarbox_testkit::servers::{self, RabbitMq};
use pillarbox_transport::{Error, Transport};
use rcgen::{CertificateParams, CertifiedIssuer, DnType, KeyPair};
use rustls::{
    ServerConfig, ServerConnection,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tempfile::TempDir;

use super::*;

/// An authority and what it signed, as files.
struct Papers {
    folder: TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Papers {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "authority");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let papers = Self {
            folder: tempfile::tempdir().unwrap(),
            authority,
        };
        fs::write(papers.file("ca.pem"), papers.authority.pem()).unwrap();
        papers
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// `NAME.pem` and `NAME.key`.
    fn sign(&self, name: &str, host: &str, until: time::OffsetDateTime) {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = until - time::Duration::days(30);
        params.not_after = until;
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        fs::write(self.file(&format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn trusted(&self) -> Tls {
        Tls {
            ca_file: Some(self.file("ca.pem")),
            ..Tls::default()
        }
    }
}

fn tomorrow() -> time::OffsetDateTime {
    time::OffsetDateTime::now_utc() + time::Duration::days(1)
}

fn with_tls(url: &str, tls: Tls) -> Amqp {
    let mut config = config(url);
    config.tls = tls;
    Amqp::new(config).unwrap()
}

async fn error_of(amqp: Amqp) -> Error {
    soon(amqp.publisher()).await.err().unwrap()
}

/// Below the range that systems hand out by themselves, so that no outgoing connection takes it before the broker does.
fn free_port() -> u16 {
    let first = 20_000 + u16::try_from(std::process::id() % 5_000).unwrap();
    let mut ports = first..26_000;
    ports
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap()
}

/// Shakes hands with everybody who comes, with that certificate; speaks no AMQP.
fn greeter(papers: &Papers, name: &str) -> u16 {
    let chain = fs::read(papers.file(&format!("{name}.pem"))).unwrap();
    let key = fs::read(papers.file(&format!("{name}.key"))).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(&chain).unwrap()],
            PrivateKeyDer::from_pem_slice(&key).unwrap(),
        )
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut session = ServerConnection::new(Arc::new(config.clone())).unwrap();
            // The client may turn away.
            let _ = session.complete_io(&mut stream.unwrap());
        }
    });
    port
}

#[tokio::test]
async fn a_broker_that_asks_for_a_certificate_takes_ours_in_both_forms() {
    let papers = Papers::new();
    papers.sign("server", "127.0.0.1", tomorrow());
    papers.sign("client", "client", tomorrow());
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let settings = [
        ("listeners.ssl.1", listen.as_str()),
        ("ssl_options.cacertfile", &papers.text("ca.pem")),
        ("ssl_options.certfile", &papers.text("server.pem")),
        ("ssl_options.keyfile", &papers.text("server.key")),
        ("ssl_options.verify", "verify_peer"),
        ("ssl_options.fail_if_no_peer_cert", "true"),
    ];
    let Some(server) = servers::required(RabbitMq::start_with(&settings).await) else {
        return;
    };
    // The broker says that it is ready before its second listener is.
    let listening = async {
        while tokio::net::TcpStream::connect(&listen).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon(listening).await;
    let login = server
        .url()
        .split("//")
        .nth(1)
        .unwrap()
        .split('@')
        .next()
        .unwrap();
    let url = format!("amqps://{login}@{listen}");

    let pem = Tls {
        certificate_file: Some(papers.file("client.pem")),
        key_file: Some(papers.file("client.key")),
        ..papers.trusted()
    };
    let publisher = soon(with_tls(&url, pem).publisher()).await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(0..100)))).await,
        "stored",
        None,
    );

    let read = |name: &str| fs::read(papers.file(name)).unwrap();
    let certificate = CertificateDer::from_pem_slice(&read("client.pem")).unwrap();
    let certificate = p12_keystore::Certificate::from_der(&certificate).unwrap();
    let key = PrivateKeyDer::from_pem_slice(&read("client.key")).unwrap();
    let chain = p12_keystore::PrivateKeyChain::new(key.secret_der(), [1], [certificate]);
    let mut store = p12_keystore::KeyStore::new();
    store.add_entry(
        "client",
        p12_keystore::KeyStoreEntry::PrivateKeyChain(chain),
    );
    fs::write(
        papers.file("client.p12"),
        store.writer("canary").write().unwrap(),
    )
    .unwrap();
    fs::write(papers.file("password"), "canary\n").unwrap();
    let p12 = Tls {
        pkcs12_file: Some(papers.file("client.p12")),
        pkcs12_password_file: Some(papers.file("password")),
        ..papers.trusted()
    };
    let publisher = soon(with_tls(&url, p12.clone()).publisher()).await.unwrap();
    assert_all(
        &soon(publisher.publish(shared(events(100..200)))).await,
        "stored",
        None,
    );
    assert_eq!(
        Raw::connect(server.url()).await.drain(QUEUE).await.len(),
        200
    );

    // The broker says why, unless the end of the connection overtakes it.
    let bare = error_of(with_tls(&url, papers.trusted())).await;
    assert!(
        [Kind::Refused, Kind::Unreachable].contains(&bare.kind()),
        "{bare}"
    );
    fs::write(papers.file("password"), "other").unwrap();
    let locked = error_of(with_tls(&url, p12)).await;
    assert_eq!(locked.kind(), Kind::Configuration, "{locked}");
    assert!(
        !format!("{locked} {locked:?}").contains("other"),
        "{locked:?}"
    );

    // Neither side falls back to plain text.
    let plain_port = server.url().replacen("amqp://", "amqps://", 1);
    let error = error_of(with_tls(&plain_port, papers.trusted())).await;
    assert_ne!(error.kind(), Kind::Timeout, "{error}");
    let tls_port = url.replacen("amqps://", "amqp://", 1);
    assert!(soon(amqp(&tls_port).publisher()).await.is_err());
    server.end().await;
}

#[tokio::test]
async fn a_broker_that_cannot_prove_its_name_is_not_believed() {
    let papers = Papers::new();
    papers.sign("server", "127.0.0.1", tomorrow());
    papers.sign("expired", "127.0.0.1", tomorrow() - time::Duration::days(2));
    let good = greeter(&papers, "server");
    let expired = greeter(&papers, "expired");
    let stranger = Papers::new();
    for (what, url, tls) in [
        (
            "another name",
            format!("amqps://localhost:{good}"),
            papers.trusted(),
        ),
        (
            "another authority",
            format!("amqps://127.0.0.1:{good}"),
            stranger.trusted(),
        ),
        (
            "the system's authorities",
            format!("amqps://127.0.0.1:{good}"),
            Tls::default(),
        ),
        (
            "expired",
            format!("amqps://127.0.0.1:{expired}"),
            papers.trusted(),
        ),
    ] {
        let error = error_of(with_tls(&url, tls)).await;
        assert_eq!(error.kind(), Kind::Refused, "{what}: {error}");
        assert!(error.to_string().contains("certificate"), "{what}: {error}");
    }
    // The same greeter is believed under its name, and then says nothing that is AMQP.
    let error = error_of(with_tls(
        &format!("amqps://127.0.0.1:{good}"),
        papers.trusted(),
    ))
    .await;
    assert_eq!(error.kind(), Kind::Unreachable, "{error}");
}

#[tokio::test]
async fn files_that_are_not_what_they_should_be_are_named() {
    let papers = Papers::new();
    papers.sign("client", "client", tomorrow());
    papers.sign("other", "client", tomorrow());
    fs::write(papers.file("empty"), "").unwrap();
    let file = |name: &str| Some(papers.file(name));
    let identity = |certificate: &str, key: &str| Tls {
        certificate_file: file(certificate),
        key_file: file(key),
        ..papers.trusted()
    };
    for (tls, expected) in [
        (
            Tls {
                ca_file: file("missing"),
                ..Tls::default()
            },
            "missing",
        ),
        (
            Tls {
                ca_file: file("empty"),
                ..Tls::default()
            },
            "ca_file holds no PEM certificate",
        ),
        (
            identity("empty", "client.key"),
            "certificate_file holds no PEM certificate",
        ),
        (
            identity("client.pem", "client.pem"),
            "key_file holds no unencrypted PEM private key",
        ),
        (identity("client.pem", "other.key"), "do not fit"),
        (
            Tls {
                pkcs12_file: file("empty"),
                ..papers.trusted()
            },
            "pkcs12_file cannot be opened",
        ),
    ] {
        let error = error_of(with_tls("amqps://127.0.0.1:1", tls)).await;
        assert_eq!(error.kind(), Kind::Configuration, "{error}");
        assert!(
            error.to_string().contains(expected),
            "{error} should say {expected:?}"
        );
    }
}
