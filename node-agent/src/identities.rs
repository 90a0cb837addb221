//! Certificates of the service accounts whose pods run here: one a service account, in memory only, asked for when the
//! first pod is enrolled, renewed at half their life, dropped with the last pod.
//!
//! One task owns the state; workers read the current set and wait on it where a certificate is not there yet.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost_types::{Struct, Value, value::Kind};
use rand::Rng;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tracing::{debug, info, warn};
use weft_core::SpiffeId;
use weft_proto::ca::IstioCertificateRequest;
use weft_transport::TlsIdentity;
use zeroize::Zeroizing;

use crate::{
    controller::Controller,
    metrics::{IdentityLabels, Metrics, Text},
};

/// Asked for; the controller may grant less.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Requests under way at once, so that an agent that starts on a full node does not flood the controller.
const MAX_CONCURRENT: usize = 8;
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(60);

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

struct State {
    current: Option<Arc<TlsIdentity>>,
    next: Instant,
    retry: Duration,
    under_way: bool,
}

/// Starts the task. `wanted` is the set of identities of enrolled pods.
pub fn start(
    controller: Controller,
    wanted: watch::Receiver<BTreeSet<SpiffeId>>,
    metrics: Arc<Metrics>,
) -> Identities {
    let (tx, rx) = watch::channel(Certificates::new());
    tokio::spawn(run(controller, wanted, metrics, tx));
    Identities(rx)
}

async fn run(
    controller: Controller,
    mut wanted: watch::Receiver<BTreeSet<SpiffeId>>,
    metrics: Arc<Metrics>,
    publish: watch::Sender<Certificates>,
) {
    let mut states: HashMap<SpiffeId, State> = HashMap::new();
    let mut requests: JoinSet<(SpiffeId, Result<TlsIdentity, CertificateError>)> = JoinSet::new();
    loop {
        let now = Instant::now();
        for (id, state) in &mut states {
            if !state.under_way && state.next <= now && requests.len() < MAX_CONCURRENT {
                state.under_way = true;
                let (id, controller) = (id.clone(), controller.clone());
                requests.spawn(async move {
                    let answer = request(&controller, &id).await;
                    (id, answer)
                });
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
                        current: None, next: Instant::now(), retry: FIRST_RETRY, under_way: false,
                    });
                }
            }
            Some(done) = requests.join_next(), if !requests.is_empty() => {
                let Ok((id, answer)) = done else { continue };
                let Some(state) = states.get_mut(&id) else { continue };
                state.under_way = false;
                match answer {
                    Ok(certificate) => {
                        let renew_in = renewal_delay(&certificate);
                        info!(identity = %id, renew_in = ?renew_in, "certificate received");
                        metrics.certificate_expiry.get_or_create(&labels(&id)).set(unix(certificate.not_after()));
                        let certificate = Arc::new(certificate);
                        state.current = Some(certificate.clone());
                        state.next = Instant::now() + renew_in;
                        state.retry = FIRST_RETRY;
                        publish.send_modify(|c| { c.insert(id, certificate); });
                    }
                    Err(error) => {
                        metrics.certificate_failures.inc();
                        let kept = state.current.as_ref().map(|c| unix(c.not_after()));
                        warn!(identity = %id, %error, valid_until = kept, retry_in = ?state.retry, "no new certificate");
                        state.next = Instant::now() + jitter(state.retry);
                        state.retry = (state.retry * 2).min(LAST_RETRY);
                    }
                }
            }
            () = tokio::time::sleep_until(wake) => {}
        }
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
async fn request(controller: &Controller, id: &SpiffeId) -> Result<TlsIdentity, CertificateError> {
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
    // The last element is the bundle of roots, what comes before is the chain.
    let [chain @ .., roots] = chain.as_slice() else {
        return Err(CertificateError::Answer("no certificate in it".into()));
    };
    let parse = |pem: &String| {
        CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| CertificateError::Answer(format!("not PEM: {e}")))
    };
    let roots = parse(roots)?;
    let mut certificates = Vec::new();
    for pem in chain {
        certificates.extend(parse(pem)?);
    }
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    TlsIdentity::new(id.clone(), certificates, key, roots)
        .map_err(|e| CertificateError::Answer(e.to_string()))
}
