//! A root: a certificate authority of our own making. It signs leaves; for whom is decided in `ca`, and in `tls` for the
//! controller's own port.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Agents' clocks may be behind the controller's by this much.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

pub struct Root {
    pem: String,
    der: CertificateDer<'static>,
    not_before: SystemTime,
    not_after: SystemTime,
    issuer: Issuer<'static, KeyPair>,
}

/// What a leaf is for.
#[derive(Debug, Clone, Copy)]
pub enum Usage {
    /// Both ends of a connection between workloads.
    Peer,
    Server,
}

impl Root {
    /// Certificate and key of a new root, in PEM.
    pub fn generate(organization: &str) -> Result<(String, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        Ok((self_sign(&key, organization)?, key.serialize_pem()))
    }

    /// The root of that certificate and key, in PEM. The error continues a sentence about the certificate.
    pub fn from_pem(certificate: String, key: &str) -> Result<Self, String> {
        let key =
            KeyPair::from_pem(key).map_err(|error| format!("has a key that cannot be read: {error}"))?;
        Self::new(certificate, key)
    }

    fn new(pem: String, key: KeyPair) -> Result<Self, String> {
        let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|e| e.to_string())?;
        let (_, certificate) = X509Certificate::from_der(&block.contents).map_err(|e| e.to_string())?;
        if certificate.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err("does not belong to the key beside it".to_owned());
        }
        if !certificate.is_ca() {
            return Err("is not the certificate of an authority".to_owned());
        }
        let time = |at: x509_parser::time::ASN1Time| {
            UNIX_EPOCH + Duration::from_secs(u64::try_from(at.timestamp()).unwrap_or_default())
        };
        let (not_before, not_after) =
            (time(certificate.validity().not_before), time(certificate.validity().not_after));
        if not_after <= SystemTime::now() {
            return Err("has expired".to_owned());
        }
        let der = CertificateDer::from(block.contents.clone());
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|e| e.to_string())?;
        Ok(Self { pem, der, not_before, not_after, issuer })
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }

    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// Since its certificate was made.
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.not_before).unwrap_or_default()
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs a certificate for `key` with exactly `name`, valid from a minute ago until `ttl` from now, or the root's
    /// own end if that is earlier. Returns it with its expiry.
    pub fn sign(
        &self,
        key: &impl PublicKeyData,
        name: SanType,
        usage: Usage,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<(rcgen::Certificate, SystemTime), rcgen::Error> {
        let not_after = (now + ttl).min(self.not_after);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![name];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match usage {
            Usage::Peer => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            Usage::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
        };
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        params.not_before = OffsetDateTime::from(now - CLOCK_SKEW);
        params.not_after = OffsetDateTime::from(not_after);
        Ok((params.signed_by(key, &self.issuer)?, not_after))
    }
}

fn self_sign(key: &KeyPair, organization: &str) -> Result<String, rcgen::Error> {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, organization);
    params.distinguished_name.push(DnType::CommonName, "Weft root");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial()?);
    params.not_before = OffsetDateTime::from(now - CLOCK_SKEW);
    params.not_after = OffsetDateTime::from(now + LIFETIME);
    Ok(params.self_signed(key)?.pem())
}

/// 127 random bits, positive as RFC 5280 wants it.
fn serial() -> Result<SerialNumber, rcgen::Error> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| rcgen::Error::RemoteKeyError)?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
