//! TLS: whom we trust, who we are, and that nothing falls back to plain text.

use std::path::{Path, PathBuf};

use pillarbox_nats::Tls;
use pillarbox_testkit::servers::{self, Nats as Server};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::*;

/// An authority with certificates for the server and a client, as files.
struct Authority {
    folder: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        write("ca.pem", params.self_signed(&key).unwrap().pem());
        let issuer = Issuer::new(params, key);
        for (file, name) in [("server", "localhost"), ("client", "client")] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            write(
                &format!("{file}.pem"),
                params.signed_by(&key, &issuer).unwrap().pem(),
            );
            write(&format!("{file}.key"), key.serialize_pem());
        }
        Self { folder }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn settings(&self, more: &str) -> String {
        let shown = |path: &Path| path.display().to_string();
        format!(
            "tls {{ cert_file: \"{}\", key_file: \"{}\", ca_file: \"{}\", {more} }}",
            shown(&self.file("server.pem")),
            shown(&self.file("server.key")),
            shown(&self.file("ca.pem"))
        )
    }
}

fn over_tls(server: &Server, host: &str, tls: Tls) -> Nats {
    let url = server
        .url()
        .replace("nats://127.0.0.1", &format!("tls://{host}"));
    let mut config = config(&url);
    config.tls = tls;
    Nats::new(config).unwrap()
}

#[tokio::test]
async fn the_servers_certificate_is_verified_and_ours_is_shown() {
    let authority = Authority::new();
    let settings = authority.settings("verify: true");
    let Some(server) = servers::required(Server::start_with(&settings).await) else {
        return;
    };
    let ours = Tls {
        ca_file: Some(authority.file("ca.pem")),
        certificate_file: Some(authority.file("client.pem")),
        key_file: Some(authority.file("client.key")),
        first: false,
    };
    let good = over_tls(&server, "localhost", ours.clone());
    assert_stored(&publish(&good, events(0..3)).await);

    let without_ours = Tls {
        certificate_file: None,
        key_file: None,
        ..ours.clone()
    };
    let error = soon(over_tls(&server, "localhost", without_ours).publisher())
        .await
        .err();
    assert!(error.is_some());
    let other = Authority::new();
    let strangers = Tls {
        ca_file: Some(other.file("ca.pem")),
        ..ours.clone()
    };
    let error = soon(over_tls(&server, "localhost", strangers).publisher())
        .await
        .err()
        .unwrap();
    assert_eq!(error.kind(), Kind::Refused, "{error}");
    // The name that was asked for is not in the certificate.
    let error = soon(over_tls(&server, "127.0.0.1", ours).publisher())
        .await
        .err()
        .unwrap();
    assert_eq!(error.kind(), Kind::Refused, "{error}");
}

#[tokio::test]
async fn tls_before_the_greeting_and_never_in_its_place_plain_text() {
    let authority = Authority::new();
    let settings = authority.settings("handshake_first: true");
    let Some(server) = servers::required(Server::start_with(&settings).await) else {
        return;
    };
    let tls = Tls {
        ca_file: Some(authority.file("ca.pem")),
        first: true,
        ..Tls::default()
    };
    assert_stored(&publish(&over_tls(&server, "localhost", tls.clone()), events(0..3)).await);
    let Some(plain) = servers::required(Server::start_with("").await) else {
        return;
    };
    for first in [false, true] {
        let tls = Tls {
            first,
            ..tls.clone()
        };
        let mut nats = config(&plain.url().replace("nats://127.0.0.1", "tls://localhost"));
        nats.tls = tls;
        nats.connect_timeout = Duration::from_secs(2);
        let error = soon(Nats::new(nats).unwrap().publisher()).await.err();
        assert!(
            error.is_some(),
            "a server without TLS was spoken to in plain text"
        );
    }
}
