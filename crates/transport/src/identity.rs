//! One certificate's TLS configurations, built once when the certificate arrives and shared by every connection that
//! uses it. TLS 1.3 only, both sides always authenticated, no SNI, no resumption and no tickets: a tunnel is reused
//! instead, and a resumed session would outlive the certificates it was made with.

use crate::Roots;
use crate::verify::{CallerVerifier, PeerRefused, ServerVerifier, identity_of};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig, version};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};
use weft_core::SpiffeId;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

/// Why a certificate, key and roots do not make an identity.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    #[error("the certificate chain is empty")]
    NoCertificate,
    #[error("no usable root certificate in the trust bundle: {0}")]
    Roots(String),
    #[error("the certificate carries no identity: {0}")]
    Identity(#[source] PeerRefused),
    #[error("the certificate is for {actual}, not for {expected}")]
    OtherIdentity { expected: SpiffeId, actual: SpiffeId },
    #[error("the certificate and its key cannot be used: {0}")]
    Key(#[source] rustls::Error),
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
}

/// A workload identity's certificate, ready for use as client and as server.
#[derive(Debug)]
pub struct TlsIdentity {
    id: SpiffeId,
    generation: u64,
    not_before: SystemTime,
    not_after: SystemTime,
    certified: Arc<CertifiedKey>,
    roots: Arc<Roots>,
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

/// AES-GCM and key exchanges as a stock ztunnel offers them; the hybrid with ML-KEM first, so that traffic recorded today
/// stays closed to the quantum computers of later.
pub(crate) static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
        ..aws_lc_rs::default_provider()
    })
});

static GENERATION: AtomicU64 = AtomicU64::new(1);

impl TlsIdentity {
    /// `chain` is the leaf, then its intermediates. The leaf must carry `id` as its only URI SAN and fit `key`; whether
    /// it is valid now is the caller's to decide (see [`TlsIdentity::not_after`]).
    pub fn new(
        id: SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: &Arc<Roots>,
    ) -> Result<Self, TlsError> {
        // The builders' own way takes the key's bytes, and frees them as they are. Here they are wiped however this ends, and
        // both configurations share what AWS-LC made of them, which it wipes itself when the last user of it is gone.
        let key = Zeroizing::new(key);
        let leaf = chain.first().ok_or(TlsError::NoCertificate)?;
        let actual = identity_of(leaf).map_err(TlsError::Identity)?;
        if actual != id {
            return Err(TlsError::OtherIdentity { expected: id, actual });
        }
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| TlsError::Unreadable(e.to_string()))?;
        let time = |t: x509_parser::time::ASN1Time| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(t.timestamp()).unwrap_or_default())
        };
        let validity = (time(parsed.validity().not_before), time(parsed.validity().not_after));
        let certified = CertifiedKey::new(chain, any_supported_type(&key).map_err(TlsError::Key)?);
        certified.keys_match().map_err(TlsError::Key)?;
        Self::build(id, validity, Arc::new(certified), roots)
    }

    /// The same certificate and key, believing other roots.
    pub fn with_roots(&self, roots: &Arc<Roots>) -> Result<Self, TlsError> {
        Self::build(self.id.clone(), (self.not_before, self.not_after), self.certified.clone(), roots)
    }

    fn build(
        id: SpiffeId,
        (not_before, not_after): (SystemTime, SystemTime),
        certified: Arc<CertifiedKey>,
        roots: &Arc<Roots>,
    ) -> Result<Self, TlsError> {
        let own = Arc::new(SingleCertAndKey::from(certified.clone()));
        let algorithms = PROVIDER.signature_verification_algorithms;
        let mut client = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(TlsError::Key)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ServerVerifier {
                roots: roots.store.clone(),
                algorithms,
            }))
            .with_client_cert_resolver(own.clone());
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_sni = false;
        client.resumption = Resumption::disabled();

        let caller = CallerVerifier { chain: roots.callers.clone(), trust_domain: id.trust_domain().clone() };
        let mut server = ServerConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(TlsError::Key)?
            .with_client_cert_verifier(Arc::new(caller))
            .with_cert_resolver(own);
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        Ok(Self {
            id,
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
            not_before,
            not_after,
            certified,
            roots: roots.clone(),
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// The leaf, then its intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// By which peers are judged.
    pub fn roots(&self) -> &Arc<Roots> {
        &self.roots
    }

    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Differs for every identity built in this process: tunnels of a renewed certificate are not those of the old one.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }
}

/// Makes this thread's first use of the random generator, which stalls for tens of milliseconds. Call it on each worker
/// before it serves.
pub fn warm_up() {
    let mut bytes = [0; 32];
    if PROVIDER.secure_random.fill(&mut bytes).is_err() {
        tracing::warn!("the random generator failed to start; TLS handshakes will fail");
    }
}
