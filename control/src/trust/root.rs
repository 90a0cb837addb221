//! A root: a certificate authority of our own making, or one that was given to us, with the intermediate under it that signs
//! then. It signs leaves; for whom is decided in `ca`, and in `tls` for the controller's own port.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Pair, Unfit, given::ders};

const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// After every certificate's end.
const FAR: Duration = Duration::from_secs(1 << 40);
/// Agents' clocks may be behind the controller's by this much.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

pub struct Root {
    pem: String,
    der: CertificateDer<'static>,
    /// Between leaves and the root, the one that signs first; none where the root signs itself.
    chain: Vec<CertificateDer<'static>>,
    chain_pem: String,
    not_before: SystemTime,
    /// The earliest end of all of them.
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

/// The error continues a sentence about the certificate.
impl TryFrom<&Pair> for Root {
    type Error = Unfit;

    fn try_from(Pair { certificate, key, chain: chain_text }: &Pair) -> Result<Self, Unfit> {
        let key =
            KeyPair::from_pem(key).map_err(|error| format!("has a key that cannot be read: {error}"))?;
        let [der] = <[_; 1]>::try_from(ders(certificate)?).map_err(|_| "is not one certificate")?;
        let chain = ders(chain_text)?;
        let signs = chain.first().unwrap_or(&der).clone();
        let (mut not_before, mut not_after) = (SystemTime::now(), SystemTime::UNIX_EPOCH + FAR);
        for certificate in chain.iter().chain([&der]) {
            let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
            let time = |at: x509_parser::time::ASN1Time| {
                UNIX_EPOCH + Duration::from_secs(u64::try_from(at.timestamp()).unwrap_or_default())
            };
            if !parsed.is_ca() {
                return Err("is not the certificate of an authority".to_owned());
            }
            (not_before, not_after) =
                (time(parsed.validity().not_before), not_after.min(time(parsed.validity().not_after)));
            let key = (*certificate == signs).then(|| key.public_key_raw());
            if key.is_some_and(|key| parsed.public_key().subject_public_key.data.as_ref() != key) {
                return Err("does not belong to the key beside it".to_owned());
            }
        }
        if not_after <= SystemTime::now() {
            return Err("has expired, or what it leads to".to_owned());
        }
        let issuer = Issuer::from_ca_cert_der(&signs, key).map_err(|e| e.to_string())?;
        let (pem, chain_pem) = (certificate.clone(), chain_text.clone());
        Ok(Self { pem, der, chain, chain_pem, not_before, not_after, issuer })
    }
}

impl Root {
    /// Certificate and key of a new root, in PEM.
    pub fn generate(organization: &str) -> Result<(String, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        Ok((self_sign(&key, organization)?, key.serialize_pem()))
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }

    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// What leaves are shown with, the certificate that signed them first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The same in PEM.
    pub fn chain_pem(&self) -> &str {
        &self.chain_pem
    }

    /// Since its certificate was made.
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.not_before).unwrap_or_default()
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs a certificate for `key` with exactly `name`, valid from a minute ago until `ttl` from now, or the authority's
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
