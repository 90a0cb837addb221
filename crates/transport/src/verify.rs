//! Who a TLS peer is, and why one is refused. The chain is judged by webpki; the rules of SPIFFE on top are ours: exactly
//! one URI SAN, of the form in [`SpiffeId`], and for callers our own trust domain. Used by `identity` (as rustls
//! verifiers) and by both ends after the handshake.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    RootCertStore, SignatureScheme,
};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use weft_core::{SpiffeId, TrustDomain};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Why a peer is not let into (or relied on for) a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefused {
    #[error(
        "the peer's certificate has expired; does its node still reach its controller, and is its clock right?"
    )]
    Expired,
    #[error("the peer's certificate is not valid yet; are the clocks of both nodes right?")]
    NotYetValid,
    #[error("the peer's certificate was issued by nobody in the trust bundle")]
    UnknownIssuer,
    #[error("the peer's certificate has no URI SAN, so no identity")]
    NoSan,
    #[error("the peer's certificate has {0} URI SANs where SPIFFE wants exactly one")]
    ManySans(usize),
    #[error("the peer's URI SAN is not a workload's SPIFFE ID: {0}")]
    NotSpiffe(String),
    #[error("the peer is of trust domain {actual}, not {expected}")]
    TrustDomain { expected: TrustDomain, actual: TrustDomain },
    #[error("the peer is {actual}, but {expected} was meant; was its address reused?")]
    WrongIdentity { expected: SpiffeId, actual: SpiffeId },
    #[error("the peer showed no certificate")]
    NoCertificate,
    #[error("the peer does not speak HTTP/2 (ALPN h2)")]
    Alpn,
    #[error("the peer does not speak TLS 1.3")]
    Version,
    #[error("the peer refused this side's certificate or offer: {0}")]
    ByPeer(String),
    #[error("the peer closed the connection during the handshake")]
    Closed,
    #[error("TLS: {0}")]
    Tls(String),
}

impl PeerRefused {
    /// A short constant label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Expired => "certificate_expired",
            Self::NotYetValid => "certificate_not_yet_valid",
            Self::UnknownIssuer => "unknown_issuer",
            Self::NoSan => "no_san",
            Self::ManySans(_) => "many_sans",
            Self::NotSpiffe(_) => "not_spiffe",
            Self::TrustDomain { .. } => "trust_domain",
            Self::WrongIdentity { .. } => "wrong_identity",
            Self::NoCertificate => "no_certificate",
            Self::Alpn => "alpn",
            Self::Version => "tls_version",
            Self::ByPeer(_) => "refused_by_peer",
            Self::Closed => "closed_in_handshake",
            Self::Tls(_) => "tls",
        }
    }
}

impl From<Error> for PeerRefused {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidCertificate(c) => match c {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::NotYetValid
                }
                CertificateError::UnknownIssuer => Self::UnknownIssuer,
                CertificateError::Other(OtherError(e)) => match e.downcast_ref::<PeerRefused>() {
                    Some(ours) => ours.clone(),
                    None => Self::Tls(e.to_string()),
                },
                other => Self::Tls(Error::InvalidCertificate(other).to_string()),
            },
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::NoApplicationProtocol => Self::Alpn,
            Error::PeerIncompatible(
                PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls13RequiredForQuic
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled,
            ) => Self::Version,
            Error::AlertReceived(alert) => Self::ByPeer(format!("{alert:?}")),
            other => Self::Tls(other.to_string()),
        }
    }
}

fn refusal(why: PeerRefused) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

/// Two meshes' roots bear the same name but not the same key; to webpki that is a bad signature.
fn chain_error(e: Error) -> Error {
    match e {
        Error::InvalidCertificate(CertificateError::BadSignature) => CertificateError::UnknownIssuer.into(),
        other => other,
    }
}

fn unreadable(e: &dyn std::fmt::Display) -> PeerRefused {
    PeerRefused::Tls(format!("the certificate cannot be read: {e}"))
}

/// When a certificate expires.
pub(crate) fn expiry_of(certificate: &CertificateDer<'_>) -> Result<SystemTime, PeerRefused> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| unreadable(&e))?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

/// The one identity in a certificate.
pub(crate) fn identity_of(certificate: &CertificateDer<'_>) -> Result<SpiffeId, PeerRefused> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| unreadable(&e))?;
    let names = parsed.subject_alternative_name().map_err(|e| unreadable(&e))?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris[..] {
        [] => Err(PeerRefused::NoSan),
        [uri] => {
            uri.parse().map_err(|e: weft_core::identity::IdentityError| PeerRefused::NotSpiffe(e.to_string()))
        }
        _ => Err(PeerRefused::ManySans(uris.len())),
    }
}

/// The identity a finished handshake proved, and until when its certificate is good.
pub(crate) fn peer_of(tls: &rustls::CommonState) -> Result<(SpiffeId, SystemTime), PeerRefused> {
    if tls.alpn_protocol() != Some(b"h2") {
        return Err(PeerRefused::Alpn);
    }
    let certificate = tls.peer_certificates().and_then(<[_]>::first).ok_or(PeerRefused::NoCertificate)?;
    Ok((identity_of(certificate)?, expiry_of(certificate)?))
}

/// Ends when a peer's certificate expires.
pub(crate) async fn expired(at: SystemTime) {
    tokio::time::sleep(at.duration_since(SystemTime::now()).unwrap_or_default()).await;
}

/// A client's check of the server: chain and one SPIFFE ID. Which one it must be depends on the destination and is
/// compared after the handshake, so that one configuration serves all destinations.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub roots: Arc<RootCertStore>,
    pub algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(chain_error)?;
        identity_of(end_entity).map_err(refusal)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A server's check of the caller: chain, one SPIFFE ID, and our trust domain.
#[derive(Debug)]
pub(crate) struct CallerVerifier {
    pub chain: Arc<dyn ClientCertVerifier>,
    pub trust_domain: TrustDomain,
}

impl ClientCertVerifier for CallerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Says nothing that the caller does not know, and costs bytes in each handshake.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now).map_err(chain_error)?;
        let caller = identity_of(end_entity).map_err(refusal)?;
        if *caller.trust_domain() != self.trust_domain {
            let (expected, actual) = (self.trust_domain.clone(), caller.trust_domain().clone());
            return Err(refusal(PeerRefused::TrustDomain { expected, actual }));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
