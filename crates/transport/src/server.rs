//! The server's end of tunnels: proves who is calling, and hands each CONNECT to the agent, which decides.

use crate::limits::Limits;
use crate::roots::retired;
use crate::stream::{Stream, StreamError};
use crate::tls_io::{Flushed, TlsIo};
use crate::verify::{PeerRefused, expired, peer_of};
use crate::{DESTINATION_UID, REFUSAL_REASON, TlsIdentity};
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::SystemTime;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use weft_core::SpiffeId;

/// Why a tunnel ended otherwise than by its peer closing it.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Tls(#[from] PeerRefused),
    #[error("the peer did not finish its handshake in time")]
    Timeout,
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
}

impl ServeError {
    /// A short constant label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Tls(refused) => refused.reason(),
            Self::Timeout => "timeout",
            Self::Http2(_) => "http2",
            Self::Socket(_) => "socket",
        }
    }
}

/// Why a request is not a CONNECT that can be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the method is {0}, not CONNECT")]
    Method(String),
    #[error("extended CONNECT (:protocol) is not HBONE")]
    Extended,
    #[error("there is no :authority")]
    NoAuthority,
    #[error("the authority {0:?} is not IP:PORT; host names are not served here")]
    Authority(String),
    #[error("the header {0} is not readable or occurs more than once")]
    Header(&'static str),
}

/// A CONNECT that waits for a decision. Dropping it resets the stream.
#[derive(Debug)]
pub struct Incoming {
    /// Who is calling, proven by its certificate.
    pub peer: SpiffeId,
    /// The far end of the tunnel's TCP connection; IPv4 where it is IPv4-mapped.
    pub peer_addr: SocketAddr,
    /// This end of it, so the workload that was reached.
    pub local_addr: SocketAddr,
    /// Where the caller wants to go; IPv4 where it was IPv4-mapped.
    pub authority: Result<SocketAddr, Malformed>,
    pub destination_uid: Option<String>,
    pub baggage: Option<String>,
    pub forwarded: Option<String>,
    pub traceparent: Option<String>,
    recv: RecvStream,
    respond: SendResponse<Bytes>,
    chunks: (usize, usize),
}

impl Incoming {
    /// Answers 200 and starts the stream, with baggage about the destination where there is some. A malformed request
    /// cannot be accepted.
    pub fn accept(mut self, baggage: Option<&str>) -> Result<Stream, StreamError> {
        if let Err(malformed) = &self.authority {
            let why = malformed.to_string();
            self.refuse(400, &why);
            return Err(StreamError::Tunnel(why));
        }
        let mut response = Response::new(());
        if let Some(baggage) = baggage.and_then(|b| HeaderValue::from_str(b).ok()) {
            response.headers_mut().insert("baggage", baggage);
        }
        let send = self.respond.send_response(response, false)?;
        Ok(Stream { send, recv: self.recv, chunks: self.chunks, _lease: None })
    }

    /// Answers with an error status: 400 malformed, 403 denied, 421 other workload, 503 the application refuses. Anything
    /// that is not an error status counts as 500. `reason` is for the far side's operator, cut to 256 bytes.
    pub fn refuse(mut self, status: u16, reason: &str) {
        let mut response = Response::new(());
        *response.status_mut() = match StatusCode::from_u16(status) {
            Ok(status) if status.as_u16() >= 400 => status,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let plain: String = reason
            .chars()
            .take(256)
            .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
            .collect();
        if let Ok(value) = HeaderValue::try_from(plain) {
            response.headers_mut().insert(REFUSAL_REASON, value);
        }
        // Fails only where the stream is gone already.
        let _ = self.respond.send_response(response, true);
    }
}

/// Serves one accepted connection until the peer closes it. `handler` is called for each CONNECT, must not block, and
/// spawns what takes time. When `drain` turns true (or its sender is dropped after that) the peer is told to open no more
/// streams, and this returns when the open ones have ended; so it is when its certificate expires or the roots it was
/// judged by are retired, and none is accepted after that. Dropping the future cuts the tunnel.
pub async fn serve(
    tcp: TcpStream,
    tls: Arc<TlsIdentity>,
    limits: &Limits,
    handler: impl Fn(Incoming) + 'static,
    drain: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    limits.tune((&tcp).into())?;
    let (peer_addr, local_addr) = (canonical(tcp.peer_addr()?), canonical(tcp.local_addr()?));
    let secure = async {
        let session = rustls::ServerConnection::new(tls.server.clone()).map_err(PeerRefused::from)?;
        let io = TlsIo::handshake(tcp, session.into()).await?;
        let (peer, good_until) = io.with_session(peer_of)?;
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(limits.stream_window)
            .initial_connection_window_size(limits.connection_window(limits.max_concurrent_streams as usize))
            .max_frame_size(limits.max_frame)
            .max_header_list_size(limits.max_header_list)
            .max_send_buffer_size(limits.send_buffer)
            .max_concurrent_streams(limits.max_concurrent_streams);
        let handshake = builder.handshake::<_, Bytes>(io.clone());
        let connection = Flushed { io: io.clone(), work: handshake }.await?;
        Ok::<_, ServeError>((io, peer, good_until, connection))
    };
    // A handshake's memory is given back when it is over.
    let secure = Box::pin(timeout(limits.handshake_timeout, secure));
    let (io, peer, good_until, mut connection) = secure.await.map_err(|_| ServeError::Timeout)??;
    let retirement = tls.roots().retirement();
    drop(tls);

    let roots = retirement.clone();
    let mut draining = pin!(async {
        tokio::select! {
            () = drained(drain) => {}
            () = expired(good_until) => {}
            () = retired(roots) => {}
        }
    });
    let mut told = false;
    let chunks = limits.copy_chunk;
    poll_fn(|cx| {
        if !told && draining.as_mut().poll(cx).is_ready() {
            told = true;
            connection.graceful_shutdown();
        }
        let result = loop {
            match connection.poll_accept(cx) {
                // The caller looks at it as not seen (RFC 9113, 8.7), and comes by another tunnel.
                Poll::Ready(Some(Ok((_, mut respond))))
                    if good_until <= SystemTime::now() || *retirement.borrow() =>
                {
                    respond.send_reset(Reason::REFUSED_STREAM);
                }
                Poll::Ready(Some(Ok((request, respond)))) => {
                    handler(incoming(request, respond, &peer, (peer_addr, local_addr), chunks));
                }
                Poll::Ready(Some(Err(e))) => break Poll::Ready(Err(e.into())),
                Poll::Ready(None) => break Poll::Ready(Ok(())),
                Poll::Pending => break Poll::Pending,
            }
        };
        io.flush(cx);
        result
    })
    .await
}

/// Resolves when it is time to drain; never where nobody can say so any more.
async fn drained(mut drain: watch::Receiver<bool>) {
    if drain.wait_for(|drain| *drain).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn incoming(
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    peer: &SpiffeId,
    (peer_addr, local_addr): (SocketAddr, SocketAddr),
    chunks: (usize, usize),
) -> Incoming {
    let (parts, recv) = request.into_parts();
    let mut authority = authority(&parts);
    let destination_uid = match one(&parts.headers, DESTINATION_UID) {
        Ok(uid) => uid,
        Err(malformed) => {
            authority = authority.and(Err(malformed));
            None
        }
    };
    // These describe, they do not decide: what cannot be read is left out.
    let text = |name| one(&parts.headers, name).ok().flatten();
    Incoming {
        peer: peer.clone(),
        peer_addr,
        local_addr,
        authority,
        destination_uid,
        baggage: text("baggage"),
        forwarded: text("forwarded"),
        traceparent: text("traceparent"),
        recv,
        respond,
        chunks,
    }
}

/// Where a request wants to go.
fn authority(parts: &http::request::Parts) -> Result<SocketAddr, Malformed> {
    if parts.method != Method::CONNECT {
        return Err(Malformed::Method(parts.method.to_string()));
    }
    if parts.extensions.get::<h2::ext::Protocol>().is_some() {
        return Err(Malformed::Extended);
    }
    let text = parts.uri.authority().ok_or(Malformed::NoAuthority)?.as_str();
    parse_authority(text).ok_or_else(|| Malformed::Authority(text.chars().take(256).collect()))
}

/// `IP:PORT` or `[IP]:PORT`, with a port, without a scope; IPv4-mapped addresses become IPv4, so that what policy sees
/// is what gets dialled.
fn parse_authority(text: &str) -> Option<SocketAddr> {
    let address: SocketAddr = text.parse().ok()?;
    let scoped = matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0);
    (address.port() != 0 && !scoped).then(|| canonical(address))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A header that must not occur twice.
fn one(headers: &HeaderMap, name: &'static str) -> Result<Option<String>, Malformed> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => {
            value.to_str().map(|v| Some(v.to_owned())).map_err(|_| Malformed::Header(name))
        }
        _ => Err(Malformed::Header(name)),
    }
}
