//! Who is calling, on every service of the port: proved by a join token ([`join`]) where a directory is read, by a
//! token of Kubernetes ([`review`]) in a cluster. What a caller may have is decided by the services.

pub mod join;
pub mod review;

use std::{fmt, sync::Arc, time::SystemTime};

use tonic::{Status, metadata::MetadataMap};

use self::{join::TokenKey, review::Reviewer};
use crate::metrics::Metrics;

/// A caller, as its token proves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// The agent of that node.
    Node(String),
    /// Some pod with that service account, which speaks for nobody else.
    Account(Account),
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node) => write!(f, "node {node}"),
            Self::Account(account) => write!(f, "service account {account}"),
        }
    }
}

/// Why a caller is not believed, or not the one to ask for this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("no token: expected `authorization: Bearer ...`")]
    Missing,
    #[error("not a token that Weft reads")]
    Malformed,
    #[error("the join token was not made by this controller, or was changed")]
    Forged,
    #[error("the join token of node {node} has expired; make another with `weft-control token`")]
    Expired { node: String },
    #[error("the API server does not accept the token (it must be of the audience {audience:?}): {why}", audience = review::AUDIENCE)]
    Rejected { why: String },
    #[error("{user} is no service account")]
    NotAnAccount { user: String },
    #[error(
        "the token of service account {account} does not say on which node its pod runs: it must be a projected token, and Kubernetes 1.32 or newer"
    )]
    NoNode { account: Account },
    #[error(
        "service account {account} is not the agents': it may ask for its own certificate and nothing else"
    )]
    NotAnAgent { account: Account },
    #[error("the token cannot be checked now: {why}")]
    Unchecked { why: String },
}

impl Refused {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "token_missing",
            Self::Malformed => "token_malformed",
            Self::Forged => "token_forged",
            Self::Expired { .. } => "token_expired",
            Self::Rejected { .. } => "token_rejected",
            Self::NotAnAccount { .. } => "not_an_account",
            Self::NoNode { .. } => "token_without_node",
            Self::NotAnAgent { .. } => "not_an_agent",
            Self::Unchecked { .. } => "token_unchecked",
        }
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Status {
        let message = refused.to_string();
        match refused {
            Refused::NotAnAgent { .. } => Status::permission_denied(message),
            Refused::Unchecked { .. } => Status::unavailable(message),
            _ => Status::unauthenticated(message),
        }
    }
}

/// Says who is calling. Cheap to clone.
#[derive(Clone)]
pub struct Authenticator {
    method: Method,
    metrics: Metrics,
}

#[derive(Clone)]
enum Method {
    JoinToken(Arc<TokenKey>),
    Review(Arc<Reviewer>),
}

impl Authenticator {
    pub fn join_tokens(key: TokenKey, metrics: Metrics) -> Self {
        Self { method: Method::JoinToken(Arc::new(key)), metrics }
    }

    pub fn reviews(reviewer: Reviewer, metrics: Metrics) -> Self {
        Self { method: Method::Review(Arc::new(reviewer)), metrics }
    }

    /// The caller, whoever it is.
    pub async fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Refused> {
        self.note(self.verify(metadata).await)
    }

    /// The node whose agent is calling; nobody else passes.
    pub async fn node(&self, metadata: &MetadataMap) -> Result<String, Refused> {
        self.note(match self.verify(metadata).await {
            Ok(Caller::Node(node)) => Ok(node),
            Ok(Caller::Account(account)) => Err(Refused::NotAnAgent { account }),
            Err(refused) => Err(refused),
        })
    }

    async fn verify(&self, metadata: &MetadataMap) -> Result<Caller, Refused> {
        let token = bearer(metadata)?;
        match &self.method {
            Method::JoinToken(key) => key.verify(token, SystemTime::now()).map(Caller::Node),
            Method::Review(reviewer) => reviewer.review(token).await,
        }
    }

    fn note<T>(&self, outcome: Result<T, Refused>) -> Result<T, Refused> {
        outcome.inspect_err(|refused| {
            self.metrics.refused_caller(refused.reason());
            tracing::warn!(target: "auth", "a caller was refused: {refused}");
        })
    }
}

fn bearer(metadata: &MetadataMap) -> Result<&str, Refused> {
    let value = metadata.get("authorization").ok_or(Refused::Missing)?;
    let value = value.to_str().map_err(|_| Refused::Malformed)?;
    value.strip_prefix("Bearer ").map(str::trim).ok_or(Refused::Missing)
}
