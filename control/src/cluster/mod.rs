//! The API server as a place to keep things: how it is reached, and what its errors mean to a person. The objects that
//! configure the mesh are read in `source::kubernetes`.

pub mod authority;
pub mod enrollment;
pub mod lease;
pub mod policy_status;
pub mod status;

use std::{future::Future, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::{Client, Config, api::ObjectMeta};
use tokio::time::{Instant, sleep, timeout};

/// A request other than a watch that takes longer has failed.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a watch lasts before the API server is asked to go on; bounds how long a dead one goes unnoticed.
pub const WATCH_SECONDS: u32 = 60;
/// Silence that nothing on a healthy connection explains.
const READ_TIMEOUT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 15);
/// Shortly after an installation the API server may not know our permissions yet, or be restarting. Less than a liveness
/// probe has patience for.
const PATIENCE: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_secs(1);

/// What goes wrong with the API server.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("no way to the API server: neither a kubeconfig nor a pod's service account can be used: {0}")]
    Config(String),
    #[error("{what}: {why}")]
    Request { what: String, why: String },
    #[error("{what} is not usable: {why}")]
    Invalid { what: String, why: String },
}

impl ClusterError {
    pub fn request(what: &str, error: &kube::Error) -> Self {
        Self::Request { what: what.to_owned(), why: words(error) }
    }
}

/// A client by KUBECONFIG (or ~/.kube/config), else by the pod's own service account; and the namespace that it says we
/// are in.
pub async fn connect() -> Result<(Client, String), ClusterError> {
    let mut config = Config::infer().await.map_err(|error| ClusterError::Config(error.to_string()))?;
    // Everybody who asks here has a patience and a backoff of its own.
    config.default_retry = false;
    // A connection whose other end is gone would otherwise keep a list waiting for a quarter of an hour.
    config.read_timeout = Some(READ_TIMEOUT);
    let namespace = config.default_namespace.clone();
    let client = Client::try_from(config).map_err(|error| ClusterError::Config(error.to_string()))?;
    Ok((client, namespace))
}

/// Does `attempt` until it succeeds, for as long as a start may take.
pub async fn patiently<T, F: Future<Output = Result<T, ClusterError>>>(
    mut attempt: impl FnMut() -> F,
) -> Result<T, ClusterError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match bounded("the API server", attempt()).await {
            Err(error @ ClusterError::Request { .. }) if Instant::now() < deadline => {
                tracing::warn!(target: "cluster", "{error}; trying again");
                sleep(RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

/// A request with an end.
pub async fn bounded<T>(
    what: &str,
    request: impl Future<Output = Result<T, ClusterError>>,
) -> Result<T, ClusterError> {
    let why = || format!("no answer within {REQUEST_TIMEOUT:?}");
    let late = |_| ClusterError::Request { what: what.to_owned(), why: why() };
    timeout(REQUEST_TIMEOUT, request).await.map_err(late)?
}

/// The HTTP status of the API server's refusal; 0 if it did not answer at all.
pub fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    }
}

/// Whether the API server answered no more than "not now": it is starting or overloaded, and nobody has to mend anything.
pub fn passes(code: u16) -> bool {
    code == 429 || code >= 500
}

/// Of an object that Weft makes.
fn metadata(name: &str) -> ObjectMeta {
    let label = ("app.kubernetes.io/part-of".to_owned(), "weft".to_owned());
    ObjectMeta { name: Some(name.to_owned()), labels: Some([label].into()), ..ObjectMeta::default() }
}

/// As Kubernetes writes times: whole seconds.
fn seconds(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

/// An error in one line, without the debugging text that kube's own words repeat.
pub fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            format!("{} (403: is the RBAC of weft-control as it was installed?)", status.message)
        }
        kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
        error => {
            let mut text = error.to_string().trim_start_matches("ServiceError: ").to_owned();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                let cause_text = cause.to_string();
                if !text.contains(&cause_text) {
                    text = format!("{text}: {cause_text}");
                }
                source = cause.source();
            }
            text
        }
    }
}
