//! A client that is not the agent: it speaks TLS and HTTP/2 to a pod's port 15008 with a certificate of its choice, made
//! with the key of the cluster's root.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme, SupportedProtocolVersion};
use time::OffsetDateTime;
use weft_testbed::{Cluster, Place};

use std::net::SocketAddr;

/// A certificate to be made.
pub struct Forged {
    pub uris: Vec<String>,
    pub valid_from: OffsetDateTime,
    pub valid_until: OffsetDateTime,
    pub signed_by: SignedBy,
}

/// Whose key is behind a certificate.
pub enum SignedBy {
    /// The root's that signs now.
    Root,
    /// The root's that signed then.
    Former(Arc<Issuer<'static, KeyPair>>),
    Nobody,
}

impl Forged {
    /// A good certificate for `identity`.
    pub fn good(identity: &str) -> Forged {
        let now = OffsetDateTime::now_utc();
        Forged {
            uris: vec![identity.to_owned()],
            valid_from: now - time::Duration::minutes(5),
            valid_until: now + time::Duration::hours(1),
            signed_by: SignedBy::Root,
        }
    }

    fn make(&self, cluster: &Cluster) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let issuer = match &self.signed_by {
            SignedBy::Root => Arc::new(cluster.controller().issuer()?),
            SignedBy::Former(issuer) => issuer.clone(),
            SignedBy::Nobody => {
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
                Arc::new(Issuer::new(CertificateParams::default(), key))
            }
        };
        let mut parameters = CertificateParams::default();
        for uri in &self.uris {
            parameters.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
        }
        parameters.not_before = self.valid_from;
        parameters.not_after = self.valid_until;
        parameters.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        parameters.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let leaf = parameters.signed_by(&key, &*issuer)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok((vec![leaf.der().clone()], key))
    }
}

/// How the client presents itself.
pub struct Rogue {
    pub certificate: Option<Forged>,
    pub version: &'static SupportedProtocolVersion,
    pub alpn: Option<&'static str>,
}

impl Rogue {
    /// As the agents do it, with `certificate`.
    pub fn with(certificate: Forged) -> Rogue {
        Rogue { certificate: Some(certificate), version: &rustls::version::TLS13, alpn: Some("h2") }
    }

    /// From `place`, opens a tunnel to `to` and asks for `authority`. Returns the HTTP status; a refusal before that is
    /// an error that says how.
    pub fn connect(&self, cluster: &Cluster, place: &Place, to: SocketAddr, authority: &str) -> Result<u16> {
        let builder =
            ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_protocol_versions(&[self.version])?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anyone));
        let mut config = match &self.certificate {
            Some(forged) => {
                let (chain, key) = forged.make(cluster)?;
                builder.with_client_auth_cert(chain, key)?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let stream = place.connect(to).with_context(|| format!("connecting to {to}"))?;
        stream.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let exchange = exchange(stream, config, to, authority);
            tokio::time::timeout(Duration::from_secs(10), exchange).await.context("no reply within 10 s")?
        })
    }
}

async fn exchange(
    stream: std::net::TcpStream,
    config: ClientConfig,
    to: SocketAddr,
    authority: &str,
) -> Result<u16> {
    let stream = tokio::net::TcpStream::from_std(stream)?;
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(ServerName::IpAddress(to.ip().into()), stream)
        .await
        .context("TLS")?;
    let (mut requests, connection) = h2::client::handshake(tls).await.context("HTTP/2")?;
    let connection = tokio::spawn(connection);
    let request = http::Request::builder().method(http::Method::CONNECT).uri(authority).body(())?;
    let (response, _body) = requests.send_request(request, false).context("CONNECT")?;
    match response.await {
        Ok(response) => Ok(response.status().as_u16()),
        // The connection's own error says more than the stream's.
        Err(stream_error) => match tokio::time::timeout(Duration::from_secs(1), connection).await {
            Ok(Ok(Err(error))) => Err(error).context("the connection"),
            _ => Err(stream_error).context("the stream"),
        },
    }
}

/// Takes any server: it is the server that is on trial.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
            SignatureScheme::RSA_PSS_SHA256,
        ]
    }
}
