//! TLS for the connections. The crypto provider is passed on explicitly: nothing process-wide is set or needed.

use std::sync::Arc;

use pillarbox_transport::{Error, Kind, Result};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use crate::config::{Tls, read_bytes};

/// Reads the files that the settings name, or the system's authorities.
pub(crate) async fn client(tls: &Tls) -> Result<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(provider()?)
        .with_safe_default_protocol_versions()
        .map_err(|e| refused("the crypto provider lacks TLS 1.2 or 1.3").caused_by(e))?
        .with_root_certificates(roots(tls).await?);
    let (Some(certificate), Some(key)) = (&tls.certificate_file, &tls.key_file) else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates(&read_bytes(certificate).await?, "certificate_file")?;
    let key = PrivateKeyDer::from_pem_slice(&read_bytes(key).await?)
        .map_err(|_| refused("key_file holds no unencrypted PEM private key"))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|e| refused("the client's certificate and key do not fit").caused_by(e))
}

/// Ring where both are compiled in.
fn provider() -> Result<Arc<CryptoProvider>> {
    #[cfg(feature = "tls-ring")]
    return Ok(Arc::new(rustls::crypto::ring::default_provider()));
    #[cfg(all(feature = "tls-aws-lc-rs", not(feature = "tls-ring")))]
    return Ok(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    #[cfg(not(any(feature = "tls-ring", feature = "tls-aws-lc-rs")))]
    CryptoProvider::get_default().cloned().ok_or_else(|| {
        refused("tls:// needs the feature tls-ring or tls-aws-lc-rs, or an installed provider")
    })
}

async fn roots(tls: &Tls) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let Some(file) = &tls.ca_file else {
        let load = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs);
        let found = load
            .await
            .map_err(|e| refused("loading the system's authorities was cut short").caused_by(e))?;
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err(refused(
                "found no usable authorities in the system, expected some or tls.ca_file",
            ));
        }
        return Ok(roots);
    };
    for certificate in certificates(&read_bytes(file).await?, "ca_file")? {
        roots
            .add(certificate)
            .map_err(|e| refused("ca_file holds a certificate that is none").caused_by(e))?;
    }
    Ok(roots)
}

fn certificates(pem: &[u8], field: &str) -> Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(refused(format!("{field} holds no PEM certificate"))),
    }
}

fn refused(text: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(Kind::Configuration, "set up TLS", text)
}
