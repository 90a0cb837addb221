//! The certificate authority: who gets which identity. An agent asks on behalf of the pods of its node, and only for
//! service accounts of live pods there that labels want in the mesh; anybody else gets the identity of its own service
//! account and no other. Every refusal is logged, counted and explained.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{CertificateSigningRequestParams, PublicKeyData, SanType};
use tokio::sync::watch;
use tonic::Status;
use weft_core::{SpiffeId, TrustDomain};

use crate::{
    auth::Caller,
    metrics::Metrics,
    translate::{Claim, Identities},
    trust::{keeper::Trust, root::Usage},
};

/// How long a workload's certificate is valid at most.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// Bounds what is parsed; a request with a P-256 key and one name is under 600 bytes.
const MAX_CSR_BYTES: usize = 16 << 10;
/// An uncompressed point on P-256.
const P256_KEY_BYTES: usize = 65;

/// Why a certificate is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the controller has not read its objects yet")]
    NotReady,
    #[error("the certificate signing request cannot be read: {0}")]
    MalformedCsr(String),
    #[error("the certificate signing request is not signed by its own key")]
    CsrSignature,
    #[error("the key is not a P-256 key")]
    KeyType,
    #[error("no single SPIFFE identity is asked for: {0}")]
    NoIdentity(String),
    #[error("{asked} is asked for, but the certificate signing request names {named}")]
    Contradiction { asked: String, named: String },
    #[error("{identity} is not of this mesh's trust domain {trust_domain}")]
    TrustDomain { identity: SpiffeId, trust_domain: TrustDomain },
    #[error("no live pod on node {node} has the identity {identity}")]
    NotOnNode { node: String, identity: SpiffeId },
    #[error("the pods with the identity {identity} on node {node} are not labelled to be in the mesh")]
    Unlabelled { node: String, identity: SpiffeId },
    #[error("{caller} is no agent's: it gets its own identity only, not {identity}")]
    NotOwn { caller: Caller, identity: SpiffeId },
    #[error("the API server has not said for a while which root signs")]
    Stale,
    #[error("signing failed: {0}")]
    Signing(String),
}

impl Refused {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotReady => "not_ready",
            Self::MalformedCsr(_) => "csr_malformed",
            Self::CsrSignature => "csr_signature",
            Self::KeyType => "key_type",
            Self::NoIdentity(_) => "no_identity",
            Self::Contradiction { .. } => "contradiction",
            Self::TrustDomain { .. } => "trust_domain",
            Self::NotOnNode { .. } => "not_on_node",
            Self::Unlabelled { .. } => "unlabelled",
            Self::NotOwn { .. } => "not_own",
            Self::Stale => "stale",
            Self::Signing(_) => "signing",
        }
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Status {
        let message = refused.to_string();
        match refused {
            Refused::NotReady | Refused::Stale => Status::unavailable(message),
            Refused::Signing(_) => Status::internal(message),
            Refused::TrustDomain { .. }
            | Refused::NotOnNode { .. }
            | Refused::Unlabelled { .. }
            | Refused::NotOwn { .. } => Status::permission_denied(message),
            _ => Status::invalid_argument(message),
        }
    }
}

pub struct Authority {
    trust: Trust,
    /// For how long callers that are no agents get a certificate at most.
    others: Duration,
    trust_domain: TrustDomain,
    /// None until the first state is there.
    identities: watch::Receiver<Option<Arc<Identities>>>,
    metrics: Metrics,
}

impl Authority {
    pub fn new(
        trust: Trust,
        others: Duration,
        trust_domain: TrustDomain,
        identities: watch::Receiver<Option<Arc<Identities>>>,
        metrics: Metrics,
    ) -> Self {
        Self { trust, others: others.min(MAX_TTL), trust_domain, identities, metrics }
    }

    /// A certificate for the key of `csr` (PEM) and the identity `asked` for, else the one that `csr` names. Returns
    /// PEM certificates: the leaf, then the roots to trust. `ttl` is what the caller would like.
    pub fn issue(
        &self,
        caller: &Caller,
        csr: &str,
        asked: Option<&str>,
        ttl: Option<Duration>,
    ) -> Result<Vec<String>, Refused> {
        match self.try_issue(caller, csr, asked, ttl) {
            Ok((identity, chain)) => {
                self.metrics.certificates_issued.inc();
                tracing::info!(target: "ca", %caller, %identity, "issued a certificate");
                Ok(chain)
            }
            Err(refused) => {
                self.metrics.refused_certificate(refused.reason());
                let reason = refused.reason();
                tracing::warn!(target: "ca", %caller, reason, "refused a certificate: {refused}");
                Err(refused)
            }
        }
    }

    /// Counts a request from a caller that did not prove who it is.
    pub fn refused_caller(&self, reason: &'static str) {
        self.metrics.refused_certificate(reason);
    }

    fn try_issue(
        &self,
        caller: &Caller,
        csr: &str,
        asked: Option<&str>,
        ttl: Option<Duration>,
    ) -> Result<(SpiffeId, Vec<String>), Refused> {
        let request = parse(csr)?;
        let identity = identity(&request, asked)?;
        if *identity.trust_domain() != self.trust_domain {
            return Err(Refused::TrustDomain { identity, trust_domain: self.trust_domain.clone() });
        }
        let most = match caller {
            Caller::Node(node) => {
                self.check_claim(node, &identity)?;
                MAX_TTL
            }
            Caller::Account(account) => {
                let own = SpiffeId::new(self.trust_domain.clone(), &account.namespace, &account.name);
                if own.ok().as_ref() != Some(&identity) {
                    return Err(Refused::NotOwn { caller: caller.clone(), identity });
                }
                self.others
            }
        };
        let trust = self.trust.borrow().clone();
        if !trust.is_fresh() {
            return Err(Refused::Stale);
        }
        let signing = |error: rcgen::Error| Refused::Signing(error.to_string());
        let name = SanType::URI(identity.to_string().try_into().map_err(signing)?);
        let (leaf, _) = trust
            .authorities
            .signer
            .sign(&request.public_key, name, Usage::Peer, ttl.unwrap_or(most).min(most), SystemTime::now())
            .map_err(signing)?;
        let authorities = &trust.authorities;
        let between = Some(authorities.signer.chain_pem()).filter(|chain| !chain.is_empty());
        let certificates = [Some(leaf.pem()), between.map(str::to_owned), Some(authorities.pem().to_owned())];
        Ok((identity, certificates.into_iter().flatten().collect()))
    }

    /// Whether the agent of `node` may speak for `identity`.
    fn check_claim(&self, node: &str, identity: &SpiffeId) -> Result<(), Refused> {
        let claim = self.identities.borrow().as_ref().map(|identities| identities.claim(node, identity));
        let (node, identity) = (node.to_owned(), identity.clone());
        match claim {
            Some(Claim::Granted) => Ok(()),
            Some(Claim::Unlabelled) => Err(Refused::Unlabelled { node, identity }),
            Some(Claim::NotOnNode) => Err(Refused::NotOnNode { node, identity }),
            None => Err(Refused::NotReady),
        }
    }
}

/// Reads a request and proves that the caller holds its key.
fn parse(csr: &str) -> Result<CertificateSigningRequestParams, Refused> {
    if csr.len() > MAX_CSR_BYTES {
        return Err(Refused::MalformedCsr(format!("more than {MAX_CSR_BYTES} bytes")));
    }
    // Checks the signature.
    let request = CertificateSigningRequestParams::from_pem(csr).map_err(|error| match error {
        rcgen::Error::InvalidCertificationRequestSignature => Refused::CsrSignature,
        other => Refused::MalformedCsr(other.to_string()),
    })?;
    let key = &request.public_key;
    let is_p256 = std::ptr::eq(key.algorithm(), &rcgen::PKCS_ECDSA_P256_SHA256)
        && key.der_bytes().len() == P256_KEY_BYTES
        && key.der_bytes()[0] == 4;
    if is_p256 { Ok(request) } else { Err(Refused::KeyType) }
}

fn identity(request: &CertificateSigningRequestParams, asked: Option<&str>) -> Result<SpiffeId, Refused> {
    let named: Vec<&str> = request
        .params
        .subject_alt_names
        .iter()
        .map(|name| match name {
            SanType::URI(uri) => Ok(uri.as_str()),
            other => Err(Refused::NoIdentity(format!("the request names {other:?}"))),
        })
        .collect::<Result<_, _>>()?;
    let identity = match (asked, named.as_slice()) {
        (Some(asked), []) => asked,
        (Some(asked), [named]) if asked == *named => asked,
        (Some(asked), named) => {
            return Err(Refused::Contradiction { asked: asked.to_owned(), named: named.join(", ") });
        }
        (None, [named]) => named,
        (None, names) => {
            return Err(Refused::NoIdentity(format!("the request names {} identities", names.len())));
        }
    };
    identity
        .parse()
        .map_err(|error: weft_core::identity::IdentityError| Refused::NoIdentity(error.to_string()))
}

#[cfg(test)]
mod tests;
