//! The client's end of one tunnel: TCP, TLS, who is there, HTTP/2, and a CONNECT on it. Called by `pool`.

use crate::limits::Limits;
use crate::pool::TunnelKey;
use crate::tls_io::{Flushed, TlsIo};
use crate::verify::{PeerRefused, peer_of};
use crate::{DESTINATION_UID, TlsIdentity};
use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::{HeaderValue, Method, Request, Uri, Version};
use rustls::pki_types::{IpAddr, Ipv4Addr, ServerName};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::SystemTime;
use std::{io, net};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Why a stream could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    #[error("cannot connect to {to}: {source}; does an agent serve that address, and does a NetworkPolicy let port {} pass?", to.port())]
    Dial { to: SocketAddr, source: Arc<io::Error> },
    #[error("{to} did not answer in time ({phase}); does a NetworkPolicy or firewall drop port {}?", to.port())]
    Timeout { to: SocketAddr, phase: &'static str },
    #[error(transparent)]
    Tls(#[from] PeerRefused),
    #[error("HTTP/2: {0}")]
    Http2(String),
    #[error("the far agent answered {status}{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Refused { status: u16, reason: Option<String> },
    #[error("the tunnel closed before the stream was open")]
    Closed,
}

impl OpenError {
    /// A short constant label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Dial { .. } => "dial",
            Self::Timeout { .. } => "timeout",
            Self::Tls(refused) => refused.reason(),
            Self::Http2(_) => "http2",
            Self::Refused { status: 403, .. } => "denied_by_peer",
            Self::Refused { .. } => "refused",
            Self::Closed => "closed",
        }
    }
}

/// What a CONNECT says.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// The address the application dialled, or the endpoint chosen for it.
    pub authority: SocketAddr,
    /// UID of the workload that is meant; empty where it is not known.
    pub destination_uid: String,
    /// W3C baggage that describes the source; empty for none.
    pub baggage: String,
    /// RFC 7239 `Forwarded`.
    pub forwarded: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

impl ConnectRequest {
    pub(crate) fn build(&self) -> Result<Request<()>, OpenError> {
        let invalid = |what: &str| OpenError::Http2(format!("{what} cannot be written in a CONNECT"));
        let uri: Uri = self.authority.to_string().parse().map_err(|_| invalid("the authority"))?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = uri;
        let optional = |value: &'_ Option<String>| value.clone().unwrap_or_default();
        for (name, value) in [
            (DESTINATION_UID, self.destination_uid.clone()),
            ("baggage", self.baggage.clone()),
            ("forwarded", optional(&self.forwarded)),
            ("traceparent", optional(&self.traceparent)),
        ] {
            if !value.is_empty() {
                let value = HeaderValue::try_from(value).map_err(|_| invalid(name))?;
                request.headers_mut().insert(name, value);
            }
        }
        Ok(request)
    }
}

pub(crate) type Driver = Flushed<Connection<TlsIo, Bytes>>;

/// Makes a tunnel over a socket whose connect was started. The peer's identity is compared before HTTP/2 begins. Says until
/// when the peer's certificate is good, too.
pub(crate) async fn establish(
    socket: net::TcpStream,
    key: &TunnelKey,
    tls: &TlsIdentity,
    limits: &Limits,
) -> Result<(SendRequest<Bytes>, Driver, SystemTime), OpenError> {
    let to = key.to;
    let dial = |e: io::Error| OpenError::Dial { to, source: Arc::new(e) };
    let late = |phase| move |_| OpenError::Timeout { to, phase };
    socket.set_nonblocking(true).map_err(dial)?;
    let tcp = TcpStream::from_std(socket).map_err(dial)?;
    limits.tune((&tcp).into()).map_err(dial)?;
    timeout(limits.connect_timeout, tcp.writable())
        .await
        .map_err(late("TCP connect"))?
        .and_then(|()| tcp.take_error().and_then(|e| e.map_or(Ok(()), Err)))
        .map_err(dial)?;
    timeout(limits.handshake_timeout, secure(tcp, key, tls, limits)).await.map_err(late("handshake"))?
}

async fn secure(
    tcp: TcpStream,
    key: &TunnelKey,
    tls: &TlsIdentity,
    limits: &Limits,
) -> Result<(SendRequest<Bytes>, Driver, SystemTime), OpenError> {
    // Never sent (no SNI) nor compared: the identity is what counts.
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0, 0, 0, 0])));
    let session = rustls::ClientConnection::new(tls.client.clone(), name)
        .map_err(|e| PeerRefused::Tls(e.to_string()))?;
    let io = TlsIo::handshake(tcp, session.into()).await?;
    let (actual, good_until) = io.with_session(peer_of)?;
    if actual != key.expected {
        return Err(PeerRefused::WrongIdentity { expected: key.expected.clone(), actual }.into());
    }
    let handshake = pin!(
        h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(limits.stream_window)
            .initial_connection_window_size(limits.connection_window(limits.max_streams_per_tunnel))
            .max_frame_size(limits.max_frame)
            .max_header_list_size(limits.max_header_list)
            .max_send_buffer_size(limits.send_buffer)
            .initial_max_send_streams(limits.max_streams_per_tunnel)
            .handshake(io.clone())
    );
    let (requests, work) =
        Flushed { io: io.clone(), work: handshake }.await.map_err(|e| OpenError::Http2(e.to_string()))?;
    Ok((requests, Flushed { io, work }, good_until))
}
