//! SPIFFE identities of workloads: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
//!
//! Specification: <https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>. Only the path form above is an
//! identity to Weft; every other SPIFFE ID is an error, never a partial match.

use std::{fmt, str::FromStr, sync::Arc};

/// Longest SPIFFE ID in bytes that the specification lets an implementation accept.
pub const MAX_LENGTH: usize = 2048;

/// Why a string is not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("{0:?} does not start with spiffe://")]
    Scheme(String),
    #[error("{0:?} is longer than {MAX_LENGTH} bytes")]
    Length(usize),
    #[error("trust domain {0:?} is empty or has characters other than a-z, 0-9, '.', '-' and '_'")]
    TrustDomain(String),
    #[error("{0:?} is not of the form spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT")]
    Path(String),
}

/// The root of trust an identity belongs to, such as `cluster.local`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    pub fn new(name: &str) -> Result<Self, IdentityError> {
        let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > 255 || !name.bytes().all(valid) {
            return Err(IdentityError::TrustDomain(name.to_owned()));
        }
        Ok(Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::new(s)
    }
}

/// Who a workload is: its service account. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    pub fn new(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        let id = Self { trust_domain, namespace: namespace.into(), service_account: service_account.into() };
        if !is_segment(namespace) || !is_segment(service_account) {
            return Err(IdentityError::Path(id.to_string()));
        }
        Ok(id)
    }

    /// As policies name it: without the scheme.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

/// One segment of a SPIFFE ID's path: letters, digits, '.', '-', '_', and not a relative one.
fn is_segment(s: &str) -> bool {
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !s.is_empty() && s != "." && s != ".." && s.bytes().all(valid)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if s.len() > MAX_LENGTH {
            return Err(IdentityError::Length(s.len()));
        }
        let rest = s.strip_prefix("spiffe://").ok_or_else(|| IdentityError::Scheme(s.to_owned()))?;
        let mut parts = rest.split('/');
        let trust_domain = TrustDomain::new(parts.next().unwrap_or_default())?;
        let path = || IdentityError::Path(s.to_owned());
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(trust_domain, namespace, account).map_err(|_| path())
            }
            _ => Err(path()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_writes() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().expect("valid");
        assert_eq!(id.namespace(), "shop");
        assert_eq!(id.service_account(), "web");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn refuses_everything_else() {
        for bad in [
            "",
            "spiffe://",
            "spiffe:///ns/a/sa/b",
            "http://cluster.local/ns/a/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/a",
            "spiffe://cluster.local/ns/a/sa",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local/ns/a/sa/b?x",
            "spiffe://cluster.local/ns/a%2e/sa/b",
            "spiffe://user@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:80/ns/a/sa/b",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad} was accepted");
        }
        assert!(format!("spiffe://a/ns/a/sa/{}", "b".repeat(2048)).parse::<SpiffeId>().is_err());
    }
}
