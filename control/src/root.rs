//! The mesh's root of trust: a self-made certificate authority, created once and kept in the state directory, or in a
//! cluster's Secret (`cluster::authority`). It signs leaves; for whom is decided in `ca`, and in `tls` for the
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

use crate::state_dir::{Access, StateDir, StateError};

const CERTIFICATE_FILE: &str = "root.pem";
const KEY_FILE: &str = "root.key";
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Agents' clocks may be behind the controller's by this much.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

pub struct Root {
    pem: String,
    der: CertificateDer<'static>,
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
    /// The state directory's root; made if there is neither certificate nor key.
    pub fn load_or_create(state: &StateDir, organization: &str) -> Result<Self, StateError> {
        let bad_key = |why: String| StateError::Invalid { path: state.path(KEY_FILE), why };
        let bad_certificate = |why: String| StateError::Invalid { path: state.path(CERTIFICATE_FILE), why };
        let certificate = state.read(CERTIFICATE_FILE)?;
        let key = match state.read_private(KEY_FILE)? {
            Some(pem) => {
                let pem = String::from_utf8(pem).map_err(|e| bad_key(e.to_string()))?;
                KeyPair::from_pem(&pem).map_err(|e| bad_key(e.to_string()))?
            }
            None if certificate.is_some() => {
                return Err(bad_key(format!("is missing, but its certificate {CERTIFICATE_FILE} is there")));
            }
            None => {
                let key = KeyPair::generate().map_err(|e| bad_key(e.to_string()))?;
                state.write(KEY_FILE, key.serialize_pem().as_bytes(), Access::Private)?;
                key
            }
        };
        // A key without a certificate is what an interrupted first start leaves.
        let pem = match certificate {
            Some(pem) => String::from_utf8(pem).map_err(|e| bad_certificate(e.to_string()))?,
            None => {
                let pem = self_sign(&key, organization).map_err(|e| bad_certificate(e.to_string()))?;
                state.write(CERTIFICATE_FILE, pem.as_bytes(), Access::Public)?;
                pem
            }
        };
        Self::new(pem, key).map_err(bad_certificate)
    }

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
            return Err(format!("does not belong to the key beside it, {KEY_FILE}"));
        }
        if !certificate.is_ca() {
            return Err("is not the certificate of an authority".to_owned());
        }
        let expiry = certificate.validity().not_after.timestamp();
        let not_after = UNIX_EPOCH + Duration::from_secs(u64::try_from(expiry).unwrap_or_default());
        if not_after <= SystemTime::now() {
            return Err("has expired".to_owned());
        }
        let der = CertificateDer::from(block.contents.clone());
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|e| e.to_string())?;
        Ok(Self { pem, der, not_after, issuer })
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }

    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::state_dir::tests::temporary;

    #[test]
    fn is_made_once() {
        let (_guard, state) = temporary();
        let first = Root::load_or_create(&state, "cluster.local").unwrap();
        assert_eq!(Root::load_or_create(&state, "cluster.local").unwrap().pem(), first.pem());
        let mode = |name| std::fs::metadata(state.path(name)).unwrap().mode() & 0o777;
        assert_eq!((mode(KEY_FILE), mode(CERTIFICATE_FILE)), (0o600, 0o644));
        let left = first.not_after.duration_since(SystemTime::now()).unwrap();
        assert!(left > LIFETIME - Duration::from_secs(60) && left <= LIFETIME, "{left:?}");
    }

    #[test]
    fn a_half_made_root_is_completed_and_a_halved_one_refused() {
        let (_guard, state) = temporary();
        Root::load_or_create(&state, "cluster.local").unwrap();
        std::fs::remove_file(state.path(CERTIFICATE_FILE)).unwrap();
        Root::load_or_create(&state, "cluster.local").unwrap();
        std::fs::remove_file(state.path(KEY_FILE)).unwrap();
        assert!(matches!(Root::load_or_create(&state, "cluster.local"), Err(StateError::Invalid { .. })));
    }

    #[test]
    fn key_and_certificate_must_belong_together() {
        let (_guard, state) = temporary();
        let (_other_guard, other) = temporary();
        Root::load_or_create(&state, "cluster.local").unwrap();
        Root::load_or_create(&other, "cluster.local").unwrap();
        std::fs::copy(other.path(CERTIFICATE_FILE), state.path(CERTIFICATE_FILE)).unwrap();
        assert!(matches!(Root::load_or_create(&state, "cluster.local"), Err(StateError::Invalid { .. })));
    }
}
