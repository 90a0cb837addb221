//! Certificates of the service accounts whose pods run here: one a service account, in memory only, asked for when the
//! first pod is enrolled, renewed at half their life and when another root signs, dropped with the last pod.
//!
//! One task owns the state; workers read the current set and wait on it where a certificate is not there yet. A new bundle of
//! roots ([`crate::trust`]) is in force when every certificate of the set is one that believes it; when all of them were also
//! issued by who signs now, the task says so, and the controller hears of it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost_types::{Struct, Value, value::Kind};
use rand::Rng;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tracing::{debug, error, info, warn};
use weft_core::SpiffeId;
use weft_proto::ca::IstioCertificateRequest;
use weft_transport::{Roots, TlsIdentity};
use zeroize::Zeroizing;

use crate::{
    controller::Controller,
    metrics::{IdentityLabels, Metrics, Text},
    trust::Trust,
};

/// Asked for; the controller may grant less.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Requests under way at once, so that an agent that starts on a full node does not flood the controller.
const MAX_CONCURRENT: usize = 8;
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// When another root signs, certificates are renewed within this time, so that not all agents ask at once.
const ROTATION_SPREAD: Duration = Duration::from_secs(10);

pub type Certificates = imbl::HashMap<SpiffeId, Arc<TlsIdentity>>;

/// Where workers find certificates.
#[derive(Clone)]
pub struct Identities(watch::Receiver<Certificates>);

impl Identities {
    /// The valid certificate of `id`, waiting up to `timeout` for one. `None`: there is none.
    pub async fn get(&mut self, id: &SpiffeId, timeout: Duration) -> Option<Arc<TlsIdentity>> {
        let usable = |certificates: &Certificates| {
            certificates.get(id).filter(|c| c.not_after() > SystemTime::now()).cloned()
        };
        if let Some(current) = usable(&self.0.borrow_and_update()) {
            return Some(current);
        }
        let found = tokio::time::timeout(timeout, self.0.wait_for(|c| usable(c).is_some())).await;
        found.ok()?.ok().and_then(|c| usable(&c))
    }

    /// Whether `former` is not the certificate in use of `id` any more.
    pub fn has_changed(&self, id: &SpiffeId, former: &Arc<TlsIdentity>) -> bool {
        self.0.borrow().get(id).is_none_or(|current| !Arc::ptr_eq(current, former))
    }

    pub fn all(&self) -> Certificates {
        self.0.borrow().clone()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("making a key: {0}")]
    Key(#[from] rcgen::Error),
    #[error("the controller refused: {0}")]
    Refused(#[from] Box<tonic::Status>),
    #[error("the controller's answer: {0}")]
    Answer(String),
}

#[derive(Debug)]
struct State {
    current: Option<Arc<TlsIdentity>>,
    /// Whether it was issued under the root that signs now.
    fresh: bool,
    next: Instant,
    retry: Duration,
    under_way: bool,
}

/// Starts the task. `wanted` is the set of identities of enrolled pods. The number is the serial of the newest bundle that
/// is in force and under whose signer all certificates in use were issued; it never goes back.
pub fn start(
    controller: Controller,
    wanted: watch::Receiver<BTreeSet<SpiffeId>>,
    trust: watch::Receiver<Option<Arc<Trust>>>,
    metrics: Arc<Metrics>,
) -> (Identities, watch::Receiver<u64>) {
    let (tx, rx) = watch::channel(Certificates::new());
    let (settled, settled_rx) = watch::channel(0);
    tokio::spawn(run(controller, wanted, trust, metrics, tx, settled));
    (Identities(rx), settled_rx)
}

async fn run(
    controller: Controller,
    mut wanted: watch::Receiver<BTreeSet<SpiffeId>>,
    mut trusts: watch::Receiver<Option<Arc<Trust>>>,
    metrics: Arc<Metrics>,
    publish: watch::Sender<Certificates>,
    settled: watch::Sender<u64>,
) {
    let mut states: HashMap<SpiffeId, State> = HashMap::new();
    let mut believed: Option<Arc<Trust>> = None;
    let mut requests: JoinSet<(SpiffeId, Result<TlsIdentity, CertificateError>)> = JoinSet::new();
    loop {
        if let Some(trust) = trusts.borrow_and_update().clone() {
            believe(&trust, &mut believed, &mut states, &publish);
        }
        let now = Instant::now();
        if let Some(trust) = &believed {
            if states.values().all(State::is_settled) {
                settled.send_if_modified(|serial| {
                    std::mem::replace(serial, trust.serial.max(*serial)) < trust.serial
                });
            }
            for (id, state) in &mut states {
                if !state.under_way && state.next <= now && requests.len() < MAX_CONCURRENT {
                    state.under_way = true;
                    let (id, controller, roots) = (id.clone(), controller.clone(), trust.roots.clone());
                    requests.spawn(async move {
                        let answer = request(&controller, &id, &roots).await;
                        (id, answer)
                    });
                }
            }
        }
        let next = states.values().filter(|s| !s.under_way).map(|s| s.next).min();
        let wake = next.unwrap_or(now + Duration::from_secs(3600)).max(now + Duration::from_millis(10));
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                let wanted = wanted.borrow_and_update().clone();
                states.retain(|id, _| {
                    let keep = wanted.contains(id);
                    if !keep {
                        metrics.certificate_expiry.remove(&labels(id));
                        publish.send_modify(|c| { c.remove(id); });
                    }
                    keep
                });
                for id in wanted {
                    states.entry(id).or_insert_with(|| State {
                        current: None, fresh: false, next: Instant::now(), retry: FIRST_RETRY, under_way: false,
                    });
                }
            }
            Ok(()) = trusts.changed() => {}
            Some(done) = requests.join_next(), if !requests.is_empty() => {
                let Ok((id, answer)) = done else { continue };
                let (Some(state), Some(trust)) = (states.get_mut(&id), &believed) else { continue };
                state.under_way = false;
                match answer.and_then(|certificate| judge(certificate, trust)) {
                    Ok(certificate) => {
                        metrics.certificate_expiry.get_or_create(&labels(&id)).set(unix(certificate.not_after()));
                        state.fresh = trust.signer.issued(certificate.chain());
                        let certificate = Arc::new(certificate);
                        state.current = Some(certificate.clone());
                        if state.fresh {
                            let renew_in = renewal_delay(&certificate);
                            info!(identity = %id, renew_in = ?renew_in, "certificate received");
                            state.next = Instant::now() + renew_in;
                            state.retry = FIRST_RETRY;
                        } else {
                            // From a replica of the controller that is behind this node, or ahead of it.
                            info!(identity = %id, retry_in = ?state.retry, "certificate received, not of the root that signs now");
                            state.try_again();
                        }
                        publish.send_modify(|c| { c.insert(id, certificate); });
                    }
                    Err(error) => {
                        metrics.certificate_failures.inc();
                        complain(&id, state, &error);
                        state.try_again();
                    }
                }
            }
            () = tokio::time::sleep_until(wake) => {}
        }
    }
}

impl State {
    /// What has expired proves nothing any more, whoever issued it.
    fn is_settled(&self) -> bool {
        self.fresh || self.current.as_ref().is_none_or(|c| c.not_after() <= SystemTime::now())
    }

    fn try_again(&mut self) {
        self.next = Instant::now() + jitter(self.retry);
        self.retry = (self.retry * 2).min(LAST_RETRY);
    }
}

/// Puts a bundle in force, if it is another one: every certificate believes it from then on, and those of another root than
/// the one that signs are renewed soon. If a root is gone, what was proven by it is not enough for anything new.
fn believe(
    trust: &Arc<Trust>,
    believed: &mut Option<Arc<Trust>>,
    states: &mut HashMap<SpiffeId, State>,
    publish: &watch::Sender<Certificates>,
) {
    if believed.as_ref().is_some_and(|before| Arc::ptr_eq(before, trust)) {
        return;
    }
    info!(serial = trust.serial, "roots of trust received");
    publish.send_modify(|certificates| {
        for (id, state) in states.iter_mut() {
            let Some(current) = &state.current else { continue };
            match current.with_roots(&trust.roots) {
                Ok(renewed) => {
                    let renewed = Arc::new(renewed);
                    certificates.insert(id.clone(), renewed.clone());
                    state.current = Some(renewed);
                }
                Err(error) => {
                    error!(identity = %id, %error, "the certificate cannot be used any more");
                    certificates.remove(id);
                    state.current = None;
                }
            }
            state.fresh = state.current.as_ref().is_some_and(|c| trust.signer.issued(c.chain()));
            if !state.fresh {
                state.next = Instant::now() + rand::rng().random_range(Duration::ZERO..ROTATION_SPREAD);
                state.retry = FIRST_RETRY;
            }
        }
    });
    if let Some(before) = believed.replace(trust.clone())
        && !trust.covers(&before)
    {
        before.roots.retire();
    }
}

/// A certificate that was asked for, believing the bundle that is in force by now.
fn judge(certificate: TlsIdentity, trust: &Trust) -> Result<TlsIdentity, CertificateError> {
    if !trust.roots.issued(certificate.chain()) {
        return Err(CertificateError::Answer(
            "its certificate is of no root that this node believes".to_owned(),
        ));
    }
    if Arc::ptr_eq(certificate.roots(), &trust.roots) {
        return Ok(certificate);
    }
    certificate.with_roots(&trust.roots).map_err(|e| CertificateError::Answer(e.to_string()))
}

/// Louder when it gets serious: three quarters of the certificate's life are over, half of it without a new one.
fn complain(id: &SpiffeId, state: &State, error: &CertificateError) {
    let Some(current) = &state.current else {
        return warn!(identity = %id, %error, retry_in = ?state.retry, "no certificate");
    };
    let left = current.not_after().duration_since(SystemTime::now()).unwrap_or_default();
    let life = current.not_after().duration_since(current.not_before()).unwrap_or_default();
    if left > life / 4 {
        warn!(identity = %id, %error, valid_for = ?left, retry_in = ?state.retry, "no new certificate");
    } else {
        error!(
            identity = %id, %error, valid_for = ?left, retry_in = ?state.retry,
            "no new certificate, and the old one expires: the identity's connections are refused then"
        );
    }
}

fn labels(id: &SpiffeId) -> IdentityLabels {
    IdentityLabels { identity: Text(id.to_string().into()) }
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Half of what is left, give or take a tenth, so that agents that started together do not renew together.
fn renewal_delay(certificate: &TlsIdentity) -> Duration {
    let left = certificate.not_after().duration_since(SystemTime::now()).unwrap_or_default();
    jitter(left / 2).max(Duration::from_secs(1))
}

fn jitter(duration: Duration) -> Duration {
    duration.mul_f64(rand::rng().random_range(0.9..1.1))
}

/// One key, one request, one certificate. The key stays in this process's memory, and every copy is wiped before its memory is
/// given back: rcgen's here, the one in DER in [`TlsIdentity::new`], AWS-LC's own by itself.
async fn request(
    controller: &Controller,
    id: &SpiffeId,
    roots: &Arc<Roots>,
) -> Result<TlsIdentity, CertificateError> {
    let key = Zeroizing::new(rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?);
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![rcgen::SanType::URI(id.to_string().try_into()?)];
    let csr = params.serialize_request(&*key)?.pem()?;
    let impersonated = Value { kind: Some(Kind::StringValue(id.to_string())) };
    let request = IstioCertificateRequest {
        csr,
        validity_duration: LIFETIME.as_secs() as i64,
        metadata: Some(Struct { fields: [("ImpersonatedIdentity".to_owned(), impersonated)].into() }),
    };
    let chain = controller.create_certificate(request).await.map_err(Box::new)?.cert_chain;
    debug!(identity = %id, certificates = chain.len(), "the controller answered");
    // The last element is for those who do not hear of roots otherwise.
    let [chain @ .., _] = chain.as_slice() else {
        return Err(CertificateError::Answer("no certificate in it".into()));
    };
    let parse = |pem: &String| {
        CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| CertificateError::Answer(format!("not PEM: {e}")))
    };
    let mut certificates = Vec::new();
    for pem in chain {
        certificates.extend(parse(pem)?);
    }
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    TlsIdentity::new(id.clone(), certificates, key, roots)
        .map_err(|e| CertificateError::Answer(e.to_string()))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
    use sha2::{Digest, Sha256};
    use weft_proto::node::TrustBundle;

    use super::*;

    #[test]
    fn roots_are_retired_when_one_of_them_is_gone() {
        let root = || {
            let key = KeyPair::generate().expect("a key");
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.self_signed(&key).expect("signed").der().to_vec()
        };
        let (old, new) = (root(), root());
        let trust = |serial, roots: &[&Vec<u8>]| {
            let signer = Sha256::digest(roots[0]).to_vec();
            let roots = roots.iter().map(|root| (*root).clone()).collect();
            Arc::new(Trust::try_from(&TrustBundle { serial, roots, signer }).expect("a bundle"))
        };
        let bundles =
            [trust(1, &[&old]), trust(2, &[&old, &new]), trust(3, &[&new, &old]), trust(4, &[&new])];
        let (mut believed, mut states, publish) = (None, HashMap::new(), watch::Sender::default());
        for bundle in &bundles {
            believe(bundle, &mut believed, &mut states, &publish);
        }
        assert_eq!(bundles.each_ref().map(|bundle| bundle.roots.are_retired()), [false, false, true, false]);
    }
}
