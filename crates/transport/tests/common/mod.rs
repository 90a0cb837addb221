//! Certificates, a far agent and sockets for the tests: everything over loopback, on one single-threaded runtime.
#![allow(dead_code, reason = "each test file uses a part")]

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{RootCertStore, version};
use std::cell::RefCell;
use std::future::Future;
use std::net::{self, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{LocalSet, spawn_local};
use weft_core::SpiffeId;
use weft_transport::*;

pub const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
pub const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

/// Runs a test as a worker runs: one thread, one LocalSet. A test that hangs fails.
pub fn run<F: Future<Output = ()> + 'static>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs");
    });
}

pub fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub struct Ca {
    pub root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// What is odd about a certificate, if anything.
#[derive(Clone)]
pub struct Leaf {
    pub uris: Vec<&'static str>,
    pub valid: (i64, i64),
}

impl Leaf {
    pub fn of(uri: &'static str) -> Self {
        Self { uris: vec![uri], valid: (-60, 3600) }
    }
}

impl Ca {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { root, issuer: Issuer::new(params, key) }
    }

    pub fn leaf(&self, leaf: &Leaf) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::DnsName("not-an-identity.example".try_into().unwrap())];
        params.subject_alt_names.extend(leaf.uris.iter().map(|u| SanType::URI((*u).try_into().unwrap())));
        let now = OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::seconds(leaf.valid.0);
        params.not_after = now + time::Duration::seconds(leaf.valid.1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    pub fn identity(&self, uri: &'static str) -> Arc<TlsIdentity> {
        self.identity_of(&Leaf::of(uri), &[])
    }

    pub fn identity_of(&self, leaf: &Leaf, more_roots: &[&Ca]) -> Arc<TlsIdentity> {
        let (chain, key) = self.leaf(leaf);
        Arc::new(TlsIdentity::new(id(leaf.uris[0]), chain, key, &self.roots(more_roots)).unwrap())
    }

    pub fn roots(&self, more: &[&Ca]) -> Arc<Roots> {
        let roots = std::iter::once(self).chain(more.iter().copied()).map(|ca| ca.root.clone());
        Arc::new(Roots::new(roots).unwrap())
    }

    pub fn store(&self) -> RootCertStore {
        let mut store = RootCertStore::empty();
        store.add(self.root.clone()).unwrap();
        store
    }
}

/// A rustls server configuration without any of our rules.
pub fn raw_server(
    (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
    alpn: &[&str],
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> Arc<rustls::ServerConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|a| a.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// A rustls client configuration without any of our rules: it believes every server.
pub fn raw_client(
    certificate: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    alpn: &[&str],
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> tokio_rustls::TlsConnector {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Believer));
    let mut config = match certificate {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|a| a.as_bytes().to_vec()).collect();
    Arc::new(config).into()
}

pub const TLS13: &[&rustls::SupportedProtocolVersion] = &[&version::TLS13];
pub const TLS12: &[&rustls::SupportedProtocolVersion] = &[&version::TLS12];

#[derive(Debug)]
struct Believer;

impl rustls::client::danger::ServerCertVerifier for Believer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// An agent that serves tunnels and relays to whatever authority is asked for.
pub struct Far {
    pub address: SocketAddr,
    /// Of the tunnels to come.
    pub identity: Rc<RefCell<Arc<TlsIdentity>>>,
    pub drain: watch::Sender<bool>,
    /// How each tunnel ended: a reason, or "ok".
    pub ended: Rc<RefCell<Vec<&'static str>>>,
    /// How each relay ended.
    pub relays: Rc<RefCell<Vec<&'static str>>>,
    /// Counters of each relay.
    pub counters: Rc<RefCell<Vec<Arc<Counters>>>>,
    /// Tunnels accepted so far.
    pub accepted: Rc<RefCell<usize>>,
}

pub async fn connect_and_relay(incoming: Incoming, counters: Arc<Counters>) -> &'static str {
    let Ok(authority) = incoming.authority.clone() else {
        let _ = incoming.accept(None);
        return "malformed";
    };
    match TcpStream::connect(authority).await {
        Err(e) => {
            incoming.refuse(503, &e.to_string());
            "refused"
        }
        Ok(app) => {
            app.set_nodelay(true).unwrap();
            let stream = match incoming.accept(Some("k8s.cluster.name=test")) {
                Ok(stream) => stream,
                Err(e) => return e.reason(),
            };
            match relay(app, stream, &counters).await {
                Ok(()) => "ok",
                Err(e) => e.reason(),
            }
        }
    }
}

impl Far {
    pub async fn start(tls: Arc<TlsIdentity>, limits: Limits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (drain, draining) = watch::channel(false);
        let identity = Rc::new(RefCell::new(tls));
        let far = Self {
            address: listener.local_addr().unwrap(),
            identity: identity.clone(),
            drain,
            ended: Rc::default(),
            relays: Rc::default(),
            counters: Rc::default(),
            accepted: Rc::default(),
        };
        let (ended, relays, all, accepted) =
            (far.ended.clone(), far.relays.clone(), far.counters.clone(), far.accepted.clone());
        spawn_local(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                *accepted.borrow_mut() += 1;
                let (tls, limits, draining) = (identity.borrow().clone(), limits.clone(), draining.clone());
                let (ended, relays, all) = (ended.clone(), relays.clone(), all.clone());
                spawn_local(async move {
                    let handler = move |incoming| {
                        let counters = Arc::new(Counters::default());
                        all.borrow_mut().push(counters.clone());
                        let relays = relays.clone();
                        spawn_local(async move {
                            let how = connect_and_relay(incoming, counters).await;
                            relays.borrow_mut().push(how);
                        });
                    };
                    let how = serve(tcp, tls, &limits, handler, draining).await;
                    ended.borrow_mut().push(how.map_or_else(|e| e.reason(), |()| "ok"));
                });
            }
        });
        far
    }

    /// Waits until a tunnel ended, and says how.
    pub async fn ended(&self) -> &'static str {
        until(|| !self.ended.borrow().is_empty()).await;
        self.ended.borrow()[0]
    }

    pub async fn relay_ended(&self) -> &'static str {
        until(|| !self.relays.borrow().is_empty()).await;
        self.relays.borrow()[0]
    }
}

pub async fn until(done: impl Fn() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A socket whose connect was started, as the kernel part makes them.
pub fn dial(to: SocketAddr) -> impl Fn() -> std::io::Result<net::TcpStream> {
    move || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&to.into()) {
            Err(e) if e.raw_os_error() != Some(115) => Err(e),
            _ => Ok(socket.into()),
        }
    }
}

pub fn key(to: SocketAddr) -> TunnelKey {
    TunnelKey { pod: 1, source: id(CLIENT), to, expected: id(SERVER) }
}

pub fn request(authority: SocketAddr) -> ConnectRequest {
    ConnectRequest {
        authority,
        destination_uid: "Kubernetes//Pod/shop/server".into(),
        baggage: "k8s.namespace.name=shop".into(),
        forwarded: Some("for=\"127.0.0.1:1\"".into()),
        traceparent: None,
    }
}

/// The near agent for one destination: applications that connect to `address` are carried to `app` behind `far`.
pub struct Near {
    pub address: SocketAddr,
    /// Of the connections to come.
    pub identity: Rc<RefCell<Arc<TlsIdentity>>>,
    pub pool: Pool,
    pub relays: Rc<RefCell<Vec<&'static str>>>,
    pub counters: Rc<RefCell<Vec<Arc<Counters>>>>,
}

impl Near {
    pub async fn start(tls: Arc<TlsIdentity>, limits: Limits, far: SocketAddr, app: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let identity = Rc::new(RefCell::new(tls));
        let near = Self {
            address: listener.local_addr().unwrap(),
            identity: identity.clone(),
            pool: Pool::new(limits),
            relays: Rc::default(),
            counters: Rc::default(),
        };
        let (pool, relays, all) = (near.pool.clone(), near.relays.clone(), near.counters.clone());
        spawn_local(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                tcp.set_nodelay(true).unwrap();
                let counters = Arc::new(Counters::default());
                all.borrow_mut().push(counters.clone());
                let (pool, relays, tls) = (pool.clone(), relays.clone(), identity.borrow().clone());
                spawn_local(async move {
                    let how = match pool.open(key(far), &tls, request(app), dial(far)).await {
                        Err(e) => {
                            SockReset::reset(&tcp);
                            e.reason()
                        }
                        Ok(tunneled) => match relay(tcp, tunneled.stream, &counters).await {
                            Ok(()) => "ok",
                            Err(e) => e.reason(),
                        },
                    };
                    relays.borrow_mut().push(how);
                });
            }
        });
        near
    }

    pub async fn relay_ended(&self) -> &'static str {
        until(|| !self.relays.borrow().is_empty()).await;
        self.relays.borrow()[0]
    }
}

/// Makes the coming close of a socket a reset.
pub struct SockReset;

impl SockReset {
    pub fn reset(socket: &TcpStream) {
        socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

/// Both agents, and a listener as the application behind them.
pub async fn pair(limits: Limits) -> (Near, Far, TcpListener) {
    let ca = Ca::new();
    let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let far = Far::start(ca.identity(SERVER), limits.clone()).await;
    let near = Near::start(ca.identity(CLIENT), limits, far.address, app.local_addr().unwrap()).await;
    (near, far, app)
}
