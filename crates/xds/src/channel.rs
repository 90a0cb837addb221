//! How a node reaches the controller: one TLS endpoint, and on every call a join token and how much the node has seen. Used
//! by the xDS client here and by the agent's clients of the CA and of the node service.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

use crate::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, METADATA_KEY, VersionVector};

/// TCP connect, and TLS handshake, each at most this long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Flow-control windows: a full state of many megabytes should not crawl over a long path, and a client that stops
/// reading should not hold more than this of the controller's memory in flight.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// Where the controller is and how the two recognise each other.
#[derive(Clone, Debug)]
pub struct ControlEndpoint {
    /// `HOST:PORT`; the host is a name or an address, an IPv6 address in brackets.
    pub address: String,
    /// Certificates, one of which the controller's certificate must chain to.
    pub ca: CaSource,
    /// DNS name the controller's certificate must carry, normally `weft-control`.
    pub server_name: String,
    /// Proves which node is calling.
    pub token: TokenSource,
    /// What the node has seen of the controller's states, if it keeps that: a replica that has seen less does not serve it.
    pub seen: Option<watch::Receiver<VersionVector>>,
}

/// Where the certificates come from by which the controller is known; asked anew for each connection.
#[derive(Clone)]
pub struct CaSource(Arc<dyn Fn() -> Vec<u8> + Send + Sync>);

impl CaSource {
    /// `read` gives them in PEM.
    pub fn new(read: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> CaSource {
        CaSource(Arc::new(read))
    }

    /// As they are now, in PEM.
    pub fn pem(&self) -> Vec<u8> {
        (self.0)()
    }
}

impl From<Vec<u8>> for CaSource {
    fn from(pem: Vec<u8>) -> CaSource {
        CaSource::new(move || pem.clone())
    }
}

impl std::fmt::Debug for CaSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CaSource")
    }
}

/// Where the join token comes from.
#[derive(Clone, Debug)]
pub struct TokenSource {
    path: PathBuf,
}

impl TokenSource {
    /// A file that is read anew for every call, so that a rotated token needs no restart. White space around the token
    /// is ignored.
    pub fn file(path: impl Into<PathBuf>) -> TokenSource {
        TokenSource { path: path.into() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn bearer(&self) -> Result<MetadataValue<Ascii>, TokenError> {
        let path = || self.path.clone();
        let text = std::fs::read_to_string(&self.path)
            .map_err(|source| TokenError::Read { path: path(), source })?;
        let token = text.trim();
        if token.is_empty() {
            return Err(TokenError::Empty { path: path() });
        }
        let mut value = MetadataValue::try_from(format!("Bearer {token}"))
            .map_err(|_| TokenError::NotText { path: path() })?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[derive(Debug, thiserror::Error)]
enum TokenError {
    #[error("cannot read the join token {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the join token file {} is empty", path.display())]
    Empty { path: PathBuf },
    #[error("the join token file {} holds something that is not a token", path.display())]
    NotText { path: PathBuf },
}

/// Why the settings of a connection to the controller cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The address is not `HOST:PORT`.
    #[error("the controller's address {address:?} is not HOST:PORT: {reason}")]
    Address {
        /// As configured.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The CA file or the server name cannot be used for TLS.
    #[error(
        "cannot set up TLS towards the controller (CA certificate, server name {server_name:?}): {reason}"
    )]
    Tls {
        /// As configured.
        server_name: String,
        /// What is wrong.
        reason: String,
    },
}

/// Adds `authorization: Bearer TOKEN` to every call, and fails the call with `UNAUTHENTICATED` and the reason if there
/// is no token. Adds what the caller has seen, if that is anything.
#[derive(Clone, Debug)]
pub struct CallerMetadata {
    token: TokenSource,
    seen: Option<watch::Receiver<VersionVector>>,
}

impl Interceptor for CallerMetadata {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        // A blocking read of a few bytes of a local file, once a call, and calls are rare.
        let value = self.token.bearer().map_err(|error| Status::unauthenticated(error.to_string()))?;
        request.metadata_mut().insert("authorization", value);
        let seen = self.seen.as_ref().map(|seen| seen.borrow().to_string()).unwrap_or_default();
        if !seen.is_empty() {
            let value = MetadataValue::try_from(seen)
                .map_err(|_| Status::internal("what was seen cannot be said in a header"))?;
            request.metadata_mut().insert(METADATA_KEY, value);
        }
        Ok(request)
    }
}

/// What a generated gRPC client can be built on: `IstioCertificateServiceClient::new(channel(&endpoint)?)`.
pub type AuthenticatedChannel = InterceptedService<Channel, CallerMetadata>;

/// A channel to the controller that connects on first use and again whenever it has to. Must be called within a tokio
/// runtime.
pub fn channel(control: &ControlEndpoint) -> Result<AuthenticatedChannel, ConfigError> {
    let metadata = CallerMetadata { token: control.token.clone(), seen: control.seen.clone() };
    Ok(InterceptedService::new(endpoint(control)?.connect_lazy(), metadata))
}

fn endpoint(control: &ControlEndpoint) -> Result<Endpoint, ConfigError> {
    let bad_address = |reason: String| ConfigError::Address { address: control.address.clone(), reason };
    let endpoint = Endpoint::from_shared(format!("https://{}", control.address))
        .map_err(|error| bad_address(error_chain(&error)))?;
    if endpoint.uri().port_u16().is_none() || !matches!(endpoint.uri().path(), "" | "/") {
        return Err(bad_address("a port is needed, and nothing after it".to_owned()));
    }
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(control.ca.pem()))
        .domain_name(control.server_name.clone())
        .timeout(CONNECT_TIMEOUT);
    let endpoint = endpoint.tls_config(tls).map_err(|error| ConfigError::Tls {
        server_name: control.server_name.clone(),
        reason: error_chain(&error),
    })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW))
}

/// An error with its causes; tonic's own text is only "transport error".
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_token_is_trimmed_re_read_and_must_be_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let mut bearer = CallerMetadata { token: TokenSource::file(&path), seen: None };
        let mut header = || {
            let request = bearer.call(Request::new(())).map_err(|status| status.message().to_owned())?;
            Ok::<_, String>(request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned())
        };
        assert!(header().unwrap_err().contains("cannot read the join token"));
        std::fs::write(&path, "  one\n").unwrap();
        assert_eq!(header().unwrap(), "Bearer one");
        std::fs::write(&path, "two").unwrap();
        assert_eq!(header().unwrap(), "Bearer two");
        std::fs::write(&path, " \n").unwrap();
        assert!(header().unwrap_err().contains("is empty"));
        std::fs::write(&path, "a\nb").unwrap();
        assert!(header().unwrap_err().contains("not a token"));
    }

    #[test]
    fn unusable_settings_are_named() {
        let with_address = |address: &str| {
            endpoint(&ControlEndpoint {
                address: address.to_owned(),
                ca: Vec::new().into(),
                server_name: "weft-control".to_owned(),
                token: TokenSource::file("token"),
                seen: None,
            })
        };
        for good in ["10.0.0.1:15012", "[fd00::1]:15012", "weft-control.weft-system.svc:15012"] {
            assert!(with_address(good).is_ok(), "{good}");
        }
        for bad in ["", "weft-control", "fd00::1", "host:port", "host:1/path", "host:1 "] {
            assert!(matches!(with_address(bad), Err(ConfigError::Address { .. })), "{bad:?}");
        }
    }
}
