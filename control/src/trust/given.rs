//! A root, or an intermediate under one, that somebody else made: files as a Secret of the type kubernetes.io/tls has them.
//! Judged before anything is signed by it, with a certificate such as it is to sign.

use std::{fs, io, path::PathBuf, sync::Arc, time::SystemTime};

use rcgen::{KeyPair, SanType};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
};

use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    Pair, Unfit,
    root::{Root, Usage},
};
use crate::ca::MAX_TTL;

/// The certificate that signs, then those between it and the root.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
/// The root, where it is not the last one in `tls.crt`. Of several the one that fits.
const ROOTS: &str = "ca.crt";

/// Where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    pub directory: PathBuf,
    pub trust_domain: String,
}

impl Given {
    /// What is there now, if it is fit to sign for the mesh. The error is a sentence of its own.
    pub(super) fn read(&self) -> Result<Pair, Unfit> {
        let path = |name: &str| self.directory.join(name);
        let complain = |name: &str, why: String| format!("{} {why}", path(name).display());
        let text = |name: &str| match fs::read_to_string(path(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(complain(name, format!("cannot be read: {error}"))),
        };
        let needed = |name: &str| text(name)?.ok_or_else(|| complain(name, "is missing".to_owned()));
        let (certificate, key) = (needed(CERTIFICATE)?, needed(KEY)?);
        let mut chain = blocks(&certificate);
        if chain.is_empty() {
            return Err(complain(CERTIFICATE, "holds no certificate".to_owned()));
        }
        let roots = match text(ROOTS)? {
            Some(roots) => blocks(&roots),
            None => chain.last().cloned().into_iter().collect(),
        };
        let roots: Vec<String> = roots.into_iter().filter(|root| is_self_issued(root)).collect();
        let last = chain.last().cloned().unwrap_or_default();
        if roots.contains(&last) {
            chain.pop();
        }
        let mut why =
            format!("there is no root, neither in {ROOTS} nor at the end of {}", path(CERTIFICATE).display());
        for root in roots {
            let pair = Pair { certificate: root, key: key.clone(), chain: chain.concat() };
            match self.judge(&pair) {
                Ok(()) => return Ok(pair),
                Err(unfit) => why = complain(CERTIFICATE, unfit),
            }
        }
        Err(why)
    }

    /// By a certificate that it signs.
    fn judge(&self, pair: &Pair) -> Result<(), Unfit> {
        let root = Root::try_from(pair)?;
        let now = SystemTime::now();
        if root.not_after() < now + MAX_TTL {
            return Err("expires within a day, as may what it leads to".to_owned());
        }
        let text = |error: rcgen::Error| error.to_string();
        let key = KeyPair::generate().map_err(text)?;
        let identity = format!("spiffe://{}/ns/weft-system/sa/trial", self.trust_domain);
        let name = SanType::URI(identity.as_str().try_into().map_err(text)?);
        let (leaf, _) = root.sign(&key, name, Usage::Peer, MAX_TTL, now).map_err(text)?;
        let refused = |error: rustls::Error| format!("signs nothing that is believed: {error}");
        let invalid = |error: &dyn std::fmt::Display| format!("leads to a root that cannot be one: {error}");
        let mut roots = RootCertStore::empty();
        roots.add(root.der().clone()).map_err(|error| invalid(&error))?;
        let (roots, provider) = (Arc::new(roots), Arc::new(aws_lc_rs::default_provider()));
        let caller = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
        let caller = caller.map_err(|error| invalid(&error))?;
        caller.verify_client_cert(leaf.der(), root.chain(), UnixTime::now()).map_err(refused)?;
        let server = WebPkiServerVerifier::builder_with_provider(roots, provider).build();
        let server = server.map_err(|error| invalid(&error))?;
        let nobody = ServerName::try_from("identity.is.no.name").map_err(|error| invalid(&error))?;
        match server.verify_server_cert(leaf.der(), root.chain(), &nobody, &[], UnixTime::now()) {
            // The chain is judged first; that there is no DNS name in it is as it should be.
            Ok(_) => Ok(()),
            Err(rustls::Error::InvalidCertificate(
                rustls::CertificateError::NotValidForName
                | rustls::CertificateError::NotValidForNameContext { .. },
            )) => Ok(()),
            Err(error) => Err(refused(error)),
        }
    }
}

/// Whether a certificate names itself as its issuer, as a root does.
fn is_self_issued(pem: &str) -> bool {
    let ders = ders(pem).unwrap_or_default();
    let parsed = ders.first().and_then(|der| X509Certificate::from_der(der).ok());
    parsed.is_some_and(|(_, certificate)| certificate.subject() == certificate.issuer())
}

/// The certificates in a text, each in PEM.
fn blocks(text: &str) -> Vec<String> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let parts = text.split_inclusive(END);
    parts.filter_map(|part| Some(format!("{}\n", &part[part.find(BEGIN)?..]))).collect()
}

/// Certificates in PEM as DER.
pub(super) fn ders(pem: &str) -> Result<Vec<CertificateDer<'static>>, Unfit> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, GeneralSubtree, IsCa, Issuer, KeyUsagePurpose,
        NameConstraints,
    };
    use time::OffsetDateTime;

    use super::*;

    struct Made {
        pem: String,
        key: KeyPair,
        params: CertificateParams,
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    fn root(change: impl FnOnce(&mut CertificateParams)) -> Made {
        let (mut params, key) = (params("Example root"), KeyPair::generate().unwrap());
        change(&mut params);
        Made { pem: params.self_signed(&key).unwrap().pem(), key, params }
    }

    fn under(root: &Made, change: impl FnOnce(&mut CertificateParams)) -> Made {
        let (mut params, key) = (params("Example intermediate"), KeyPair::generate().unwrap());
        change(&mut params);
        let issuer = Issuer::from_params(&root.params, &root.key);
        Made { pem: params.signed_by(&key, &issuer).unwrap().pem(), key, params }
    }

    /// What is said of these files.
    fn read(certificate: &str, key: &KeyPair, roots: Option<&str>) -> Result<Pair, Unfit> {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write(CERTIFICATE, certificate);
        write(KEY, &key.serialize_pem());
        if let Some(roots) = roots {
            write(ROOTS, roots);
        }
        let directory = directory.path().to_owned();
        Given { directory, trust_domain: "cluster.local".to_owned() }.read()
    }

    #[test]
    fn a_root_or_an_intermediate() {
        let root = root(|_| {});
        let pair = read(&root.pem, &root.key, None).unwrap();
        assert!(pair.chain.is_empty());
        assert_eq!(pair, read(&root.pem, &root.key, Some(&root.pem)).unwrap());
        let signs = under(&root, |_| {});
        let both = format!("{}{}", signs.pem, root.pem);
        for (certificate, roots) in [
            (&both, None),
            (&both, Some(&root.pem)),
            (&signs.pem, Some(&root.pem)),
            (&signs.pem, Some(&both)),
        ] {
            let pair = read(certificate, &signs.key, roots.map(String::as_str)).unwrap();
            assert_eq!(
                (blocks(&pair.certificate), blocks(&pair.chain)),
                (blocks(&root.pem), blocks(&signs.pem))
            );
        }
    }

    #[test]
    fn what_is_unfit_is_refused_with_the_reason() {
        let good = root(|_| {});
        let soon = OffsetDateTime::now_utc() + time::Duration::hours(3);
        let refused = |result: Result<Pair, Unfit>, why: &str| {
            let error = result.unwrap_err();
            assert!(error.contains(why), "{error:?} does not say {why:?}");
        };
        refused(read("", &good.key, None), "tls.crt holds no certificate");
        refused(read(&good.pem, &KeyPair::generate().unwrap(), None), "does not belong to the key");
        let no_ca = root(|params| params.is_ca = IsCa::ExplicitNoCa);
        refused(read(&no_ca.pem, &no_ca.key, None), "is not the certificate of an authority");
        let short = root(|params| params.not_after = soon);
        refused(read(&short.pem, &short.key, None), "expires within a day");
        let past =
            under(&good, |params| params.not_after = OffsetDateTime::now_utc() - time::Duration::days(1));
        refused(read(&past.pem, &past.key, Some(&good.pem)), "has expired");
        let stranger = root(|_| {});
        let signs = under(&good, |_| {});
        refused(read(&signs.pem, &signs.key, Some(&stranger.pem)), "signs nothing that is believed");
        refused(read(&signs.pem, &signs.key, None), "there is no root");
        let elsewhere = under(&good, |params| {
            let permitted = vec![GeneralSubtree::DnsName("elsewhere.example".to_owned())];
            params.name_constraints =
                Some(NameConstraints { permitted_subtrees: permitted, excluded_subtrees: Vec::new() });
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        });
        // Constraints of DNS names say nothing of URIs.
        read(&elsewhere.pem, &elsewhere.key, Some(&good.pem)).unwrap();
        let shallow = under(&good, |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
        let deep = under(&shallow, |_| {});
        let both = format!("{}{}", deep.pem, shallow.pem);
        refused(read(&both, &deep.key, Some(&good.pem)), "signs nothing that is believed");
    }
}
