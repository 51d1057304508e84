//! Who we are: token, nkey, credentials file, and a password that changes.

use data_encoding::{BASE32_NOPAD, BASE64URL_NOPAD};
use nkeys::KeyPair;
use pillarbox_testkit::servers::{self, Nats as Server};

use super::*;

async fn server(settings: &str) -> Option<Server> {
    servers::required(Server::start_with(settings).await)
}

fn with_file(
    url: &str,
    name: &str,
    text: &str,
    set: impl Fn(&mut Config, std::path::PathBuf),
) -> (tempfile::TempDir, Nats) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(name);
    std::fs::write(&file, text).unwrap();
    let mut config = config(url);
    set(&mut config, file);
    (folder, Nats::new(config).unwrap())
}

#[tokio::test]
async fn a_token_in_the_url() {
    let Some(server) = server("authorization { token: \"t0k/n\" }").await else {
        return;
    };
    let url = |token: &str| server.url().replace("nats://", &format!("nats://{token}@"));
    assert_stored(&publish(&nats(&url("t0k%2Fn")), events(0..3)).await);
    let error = soon(nats(&url("canary")).publisher()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Refused, "{error}");
    assert!(!format!("{error} {error:?}").contains("canary"));
}

#[tokio::test]
async fn an_nkey() {
    let pair = KeyPair::new_user();
    let settings = format!(
        "authorization {{ users: [{{ nkey: {} }}] }}",
        pair.public_key()
    );
    let Some(server) = server(&settings).await else {
        return;
    };
    let seed = format!("{}\n", pair.seed().unwrap());
    let set = |config: &mut Config, file| config.nkey_file = Some(file);
    let (_folder, good) = with_file(server.url(), "seed", &seed, set);
    assert_stored(&publish(&good, events(0..3)).await);

    let other = KeyPair::new_user().seed().unwrap();
    let (_folder, stranger) = with_file(server.url(), "seed", &other, set);
    let error = soon(stranger.publisher()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Refused, "{error}");
    assert!(!format!("{error} {error:?} {stranger:?}").contains(&other));
}

/// A JWT of NATS: claims, signed by `issuer` for `subject`.
fn jwt(issuer: &KeyPair, subject: &str, name: &str, claims: serde_json::Value) -> String {
    let mut body = serde_json::json!({
        "iat": 1_700_000_000, "iss": issuer.public_key(), "sub": subject, "name": name, "nats": claims,
    });
    body["jti"] = BASE32_NOPAD.encode(name.as_bytes()).into();
    let head = BASE64URL_NOPAD.encode(br#"{"typ":"JWT","alg":"ed25519-nkey"}"#);
    let signed = format!(
        "{head}.{}",
        BASE64URL_NOPAD.encode(body.to_string().as_bytes())
    );
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", BASE64URL_NOPAD.encode(&signature))
}

#[tokio::test]
async fn a_credentials_file() {
    let (operator, account, user) = (
        KeyPair::new_operator(),
        KeyPair::new_account(),
        KeyPair::new_user(),
    );
    let of_operator = jwt(
        &operator,
        &operator.public_key(),
        "operator",
        serde_json::json!({ "type": "operator", "version": 2 }),
    );
    let limits = serde_json::json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let mut limits_without_storage = limits.clone();
    for name in ["mem_storage", "disk_storage", "streams", "consumer"] {
        limits_without_storage[name] = 0.into();
    }
    let of_account = jwt(
        &operator,
        &account.public_key(),
        "account",
        serde_json::json!({ "type": "account", "version": 2, "limits": limits }),
    );
    let system = KeyPair::new_account();
    let of_system = jwt(
        &operator,
        &system.public_key(),
        "system",
        serde_json::json!({ "type": "account", "version": 2, "limits": limits_without_storage }),
    );
    let of_user = jwt(
        &account,
        &user.public_key(),
        "user",
        serde_json::json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {} }),
    );
    let settings = format!(
        "operator: {of_operator}\nresolver: MEMORY\nsystem_account: {system}\nresolver_preload: {{ {account}: {of_account}, {system}: {of_system} }}",
        account = account.public_key(),
        system = system.public_key(),
    );
    let Some(server) = server(&settings).await else {
        return;
    };
    let creds = format!(
        "-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        user.seed().unwrap()
    );
    let set = |config: &mut Config, file| config.credentials_file = Some(file);
    let (_folder, good) = with_file(server.url(), "user.creds", &creds, set);
    assert_stored(&publish(&good, events(0..3)).await);
    let (_folder, bad) = with_file(server.url(), "user.creds", "canary", set);
    let error = soon(bad.publisher()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Configuration, "{error}");
    assert!(error.to_string().contains("credentials_file"), "{error}");
    assert!(!format!("{error} {error:?}").contains("canary"));
}

#[tokio::test]
async fn a_url_in_a_file_is_read_again_at_each_connect() {
    let Some(url) = account().await else { return };
    let set = |config: &mut Config, file| {
        config.url = None;
        config.url_file = Some(file);
    };
    let wrong = url.replace("nats://", "nats://x");
    let (folder, nats) = with_file(&url, "url", &wrong, set);
    let error = soon(nats.publisher()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Refused, "{error}");
    std::fs::write(folder.path().join("url"), format!("{url}\n")).unwrap();
    assert_stored(&publish(&nats, events(0..3)).await);
}
