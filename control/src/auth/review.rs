//! Callers of a cluster: a token of a service account, which the API server is asked about (TokenReview). It answers
//! for the signature, the audience, the expiry, and that the pod the token was made for is still there; who that is to
//! Weft is decided here. An answer is kept for a few seconds, so that an agent's burst of requests is one review.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::digest;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, Client, api::PostParams};
use tokio::{sync::Semaphore, time::timeout};
use weft_api::field::is_dns_subdomain;

use super::{Account, Caller, Refused};
use crate::cluster;

/// The audience of the tokens that are projected for calling the controller. A token for the API server is no good here,
/// so that nobody who gets hold of the one can use it as the other.
pub const AUDIENCE: &str = "weft";

/// The service account of the agents, in the controller's own namespace: the only one that speaks for others.
const AGENT: &str = "weft-agent";
/// What the API server knows of a token's pod, beside its account.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// How long an answer is believed. A pod that is deleted can call for this long with its token, beside the ten seconds for
/// which the API server itself keeps an answer.
const KEPT: Duration = Duration::from_secs(3);
/// Answers kept at most; beyond that the old ones are thrown away.
const MAX_KEPT: usize = 4096;
/// Tokens under review at the same time. Anyone can call with an invented token; the API server should not feel it.
const MAX_REVIEWS: usize = 16;
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// Bounds what is passed on. Tokens are about 1 200 bytes.
const MAX_TOKEN_BYTES: usize = 16 << 10;

pub struct Reviewer {
    api: Api<TokenReview>,
    agent: Account,
    kept: Mutex<HashMap<[u8; 32], (Instant, Caller)>>,
    slots: Semaphore,
}

impl Reviewer {
    /// `namespace` is the controller's own, which is the agents'.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            api: Api::all(client),
            agent: Account { namespace: namespace.to_owned(), name: AGENT.to_owned() },
            kept: Mutex::default(),
            slots: Semaphore::new(MAX_REVIEWS),
        }
    }

    /// Who `token` belongs to.
    pub async fn review(&self, token: &str) -> Result<Caller, Refused> {
        // A signed token has three parts; anything else need not be asked about.
        if token.len() > MAX_TOKEN_BYTES || token.split('.').filter(|part| !part.is_empty()).count() != 3 {
            return Err(Refused::Malformed);
        }
        let mut key = [0; 32];
        key.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
        if let Some(caller) = self.known(&key) {
            return Ok(caller);
        }
        let status = timeout(REVIEW_TIMEOUT, self.ask(token)).await.map_err(|_| Refused::Unchecked {
            why: format!("the API server has not answered within {REVIEW_TIMEOUT:?}"),
        })??;
        let caller = decide(status, &self.agent)?;
        self.keep(key, caller.clone());
        Ok(caller)
    }

    async fn ask(&self, token: &str) -> Result<TokenReviewStatus, Refused> {
        let unchecked = |why: String| Refused::Unchecked { why };
        let _slot = self.slots.acquire().await.map_err(|error| unchecked(error.to_string()))?;
        let spec = TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: token.to_owned() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = self.api.create(&PostParams::default(), &review).await;
        let answer = answer.map_err(|error| unchecked(cluster::words(&error)))?;
        answer.status.ok_or_else(|| unchecked("the API server's answer has no status".to_owned()))
    }

    fn known(&self, key: &[u8; 32]) -> Option<Caller> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(key).filter(|(at, _)| at.elapsed() < KEPT).map(|(_, caller)| caller.clone())
    }

    fn keep(&self, key: [u8; 32], caller: Caller) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.retain(|_, (at, _)| at.elapsed() < KEPT);
        kept.insert(key, (Instant::now(), caller));
    }
}

/// What the API server's answer means.
fn decide(status: TokenReviewStatus, agent: &Account) -> Result<Caller, Refused> {
    let rejected = |why: &str| Refused::Rejected { why: why.to_owned() };
    if status.authenticated != Some(true) {
        return Err(rejected(status.error.as_deref().unwrap_or("it is not valid")));
    }
    // An API server that knows nothing of audiences leaves them out, and has not checked ours.
    if !status.audiences.iter().flatten().any(|audience| audience == AUDIENCE) {
        return Err(rejected("it is for another audience"));
    }
    let user = status.user.ok_or_else(|| rejected("it belongs to nobody"))?;
    let name = user.username.unwrap_or_default();
    let account = account(&name).ok_or(Refused::NotAnAccount { user: name })?;
    if account != *agent {
        return Ok(Caller::Account(account));
    }
    let extra = user.extra.unwrap_or_default();
    match (only(&extra, NODE_NAME).filter(|node| is_dns_subdomain(node)), only(&extra, POD_UID)) {
        (Some(node), Some(_)) => Ok(Caller::Node(node.to_owned())),
        _ => Err(Refused::NoNode { account }),
    }
}

/// `system:serviceaccount:NAMESPACE:NAME`.
fn account(user: &str) -> Option<Account> {
    let (namespace, name) = user.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    (is_dns_subdomain(namespace) && is_dns_subdomain(name))
        .then(|| Account { namespace: namespace.to_owned(), name: name.to_owned() })
}

/// The value, if there is exactly one.
fn only<'a>(extra: &'a BTreeMap<String, Vec<String>>, key: &str) -> Option<&'a str> {
    match extra.get(key).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
