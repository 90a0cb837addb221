//! Requests as agents make them, and as others might.

use rcgen::{CertificateParams, KeyPair};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::*;
use crate::{
    auth::Account,
    enrollment::Enrolled,
    store::Store,
    translate,
    trust::{Authorities, Record, keeper::Current},
};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

struct Fixture {
    authority: Authority,
    metrics: Metrics,
    trust: Trust,
}

/// How long callers that are no agents get a certificate.
const OTHERS: Duration = Duration::from_secs(600);

fn trust() -> Trust {
    let record = Record::new("cluster.local", SystemTime::now()).unwrap();
    watch::channel(Current::new(Authorities::try_from(&record).unwrap(), true)).1
}

fn fixture() -> Fixture {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {weft.dev/mesh: enabled}}\n\
        spec: {nodeName: n1, serviceAccountName: web}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: db, namespace: shop}\n\
        spec: {nodeName: n1, serviceAccountName: db}\n";
    let mut store = Store::default();
    store.apply(crate::source::Delta { upserts: translate::tests::objects(text), deletes: Vec::new() });
    let (_, translator) = translate::tests::anew(store, &Enrolled::default(), &translate::tests::settings());
    let identities = translator.identities().clone();
    let trust = trust();
    let metrics = Metrics::default();
    let receiver = watch::channel(Some(Arc::new(identities))).1;
    let trust_domain = TrustDomain::new("cluster.local").unwrap();
    let authority = Authority::new(trust.clone(), OTHERS, trust_domain, receiver, metrics.clone());
    Fixture { authority, metrics, trust }
}

fn n(name: &str) -> Caller {
    Caller::Node(name.to_owned())
}

/// A request for `names`, and its key.
fn csr(names: &[&str], algorithm: &'static rcgen::SignatureAlgorithm) -> (String, KeyPair) {
    let key = KeyPair::generate_for(algorithm).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = names
        .iter()
        .map(|name| match name.strip_prefix("dns:") {
            Some(dns) => SanType::DnsName(dns.try_into().unwrap()),
            None => SanType::URI((*name).try_into().unwrap()),
        })
        .collect();
    (params.serialize_request(&key).unwrap().pem().unwrap(), key)
}

fn good_csr(names: &[&str]) -> String {
    csr(names, &rcgen::PKCS_ECDSA_P256_SHA256).0
}

#[test]
fn the_chain_verifies_and_the_leaf_is_what_agents_expect() {
    let Fixture { authority, metrics, trust } = fixture();
    let root = trust.borrow().authorities.clone();
    let (request, key) = csr(&[WEB], &rcgen::PKCS_ECDSA_P256_SHA256);
    let chain = authority.issue(&n("n1"), &request, Some(WEB), Some(Duration::from_secs(600))).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], root.pem());
    assert_eq!(metrics.certificates_issued.get(), 1);

    let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(root.signer.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
    verifier.verify_client_cert(&leaf, &[], UnixTime::now()).unwrap();
    let later = UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() + 660));
    assert!(verifier.verify_client_cert(&leaf, &[], later).is_err(), "longer than asked for");

    let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(matches!(names.value.general_names[..], [GeneralName::URI(WEB)]), "{names:?}");
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth);
    assert!(!leaf.is_ca());
    assert_eq!(leaf.public_key().subject_public_key.data.as_ref(), key.public_key_raw());
}

#[test]
fn a_day_at_most() {
    let Fixture { authority, .. } = fixture();
    for ttl in [None, Some(Duration::from_secs(u64::MAX)), Some(MAX_TTL * 2)] {
        let chain = authority.issue(&n("n1"), &good_csr(&[]), Some(WEB), ttl).unwrap();
        let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
        let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
        let left = leaf.validity().time_to_expiration().unwrap();
        assert!(left <= MAX_TTL && left > MAX_TTL - Duration::from_secs(60), "{ttl:?}: {left:?}");
    }
}

/// They hear of a new root with their next certificate only.
#[test]
fn callers_that_are_no_agents_get_less() {
    let Fixture { authority, .. } = fixture();
    let web = Caller::Account(Account { namespace: "shop".to_owned(), name: "web".to_owned() });
    let chain = authority.issue(&web, &good_csr(&[]), Some(WEB), None).unwrap();
    let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
    assert!(leaf.validity().time_to_expiration().unwrap() <= OTHERS);
}

/// The root may have been let go meanwhile.
#[test]
fn nothing_is_issued_by_a_root_that_nobody_has_confirmed_for_long() {
    let Fixture { authority, trust, .. } = fixture();
    let (sender, receiver) = watch::channel(trust.borrow().clone().aged(Duration::ZERO));
    let authority = Authority { trust: receiver, ..authority };
    authority.issue(&n("n1"), &good_csr(&[WEB]), None, None).unwrap();
    sender.send_modify(|current| *current = current.clone().aged(Duration::from_secs(16)));
    assert_eq!(authority.issue(&n("n1"), &good_csr(&[WEB]), None, None), Err(Refused::Stale));
}

#[test]
fn the_identity_comes_from_the_request_where_none_is_named_beside_it() {
    let Fixture { authority, .. } = fixture();
    authority.issue(&n("n1"), &good_csr(&[WEB]), None, None).unwrap();
    authority.issue(&n("n1"), &good_csr(&[]), Some(WEB), None).unwrap();
}

#[test]
fn refusals_have_their_reason() {
    let Fixture { authority, metrics, .. } = fixture();
    let db = "spiffe://cluster.local/ns/shop/sa/db";
    let elsewhere = "spiffe://example.org/ns/shop/sa/web";
    let p384 = csr(&[WEB], &rcgen::PKCS_ECDSA_P384_SHA384).0;
    let ed25519 = csr(&[WEB], &rcgen::PKCS_ED25519).0;
    let other_namespace = "spiffe://cluster.local/ns/other/sa/web";
    let cases = [
        ("n2", good_csr(&[WEB]), Some(WEB), "not_on_node"),
        ("n1", good_csr(&[]), Some("spiffe://cluster.local/ns/shop/sa/nobody"), "not_on_node"),
        ("n1", good_csr(&[]), Some(other_namespace), "not_on_node"),
        ("n1", good_csr(&[db]), Some(db), "unlabelled"),
        ("n1", good_csr(&[]), Some(elsewhere), "trust_domain"),
        ("n1", good_csr(&[db]), Some(WEB), "contradiction"),
        ("n1", good_csr(&[WEB, db]), Some(WEB), "contradiction"),
        ("n1", good_csr(&[WEB, db]), None, "no_identity"),
        ("n1", good_csr(&[]), None, "no_identity"),
        ("n1", good_csr(&["dns:web.shop"]), Some(WEB), "no_identity"),
        ("n1", good_csr(&[]), Some("spiffe://cluster.local/web"), "no_identity"),
        ("n1", p384, Some(WEB), "key_type"),
        ("n1", ed25519, Some(WEB), "key_type"),
        ("n1", "not a request".to_owned(), Some(WEB), "csr_malformed"),
        ("n1", String::new(), Some(WEB), "csr_malformed"),
        ("n1", "x".repeat(1 << 20), Some(WEB), "csr_malformed"),
    ];
    let mut wrong = Vec::new();
    for (i, (node, csr, asked, reason)) in cases.into_iter().enumerate() {
        let before = refusals(&metrics, reason);
        let outcome = authority.issue(&n(node), &csr, asked, None).map_err(|refused| refused.reason());
        if outcome != Err(reason) || refusals(&metrics, reason) != before + 1 {
            wrong.push((i, reason, outcome.err().unwrap_or("issued")));
        }
    }
    assert!(wrong.is_empty(), "case, expected, seen: {wrong:?}");
    assert_eq!(metrics.certificates_issued.get(), 0);
}

fn refusals(metrics: &Metrics, reason: &'static str) -> u64 {
    metrics.certificates_refused.get_or_create(&crate::metrics::Reason { reason }).get()
}

#[test]
fn a_request_is_signed_by_its_own_key() {
    let Fixture { authority, .. } = fixture();
    let (_, block) = x509_parser::pem::parse_x509_pem(good_csr(&[WEB]).as_bytes()).unwrap();
    let mut der = block.contents;
    // The last byte belongs to the signature.
    *der.last_mut().unwrap() ^= 1;
    use base64::Engine;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let tampered =
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n");
    assert_eq!(authority.issue(&n("n1"), &tampered, Some(WEB), None), Err(Refused::CsrSignature));
}

#[test]
fn nothing_is_issued_before_the_objects_are_read() {
    let (_sender, receiver) = watch::channel(None);
    let trust_domain = TrustDomain::new("cluster.local").unwrap();
    let authority = Authority::new(trust(), OTHERS, trust_domain, receiver, Metrics::default());
    assert_eq!(authority.issue(&n("n1"), &good_csr(&[WEB]), None, None), Err(Refused::NotReady));
}
