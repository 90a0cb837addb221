//! The controller's own port: TLS with a certificate of its own, renewed while it runs. Callers prove themselves with
//! tokens inside, so none is asked for a certificate.

use std::{
    pin::Pin,
    sync::{Arc, RwLock},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures_util::Stream;
use rcgen::{KeyPair, SanType};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    metrics::Metrics,
    trust::{
        keeper::Trust,
        root::{Root, Usage},
    },
};

/// The name agents expect the controller to have, whatever address they reach it at.
pub const SERVER_NAME: &str = "weft-control";
const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Half of the lifetime: a controller that was suspended for hours still has a valid certificate when it wakes.
const RENEW_AFTER: Duration = Duration::from_secs(12 * 3600);
/// After a renewal that failed.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// A peer that has not finished its handshake by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at a time; what comes on top waits in the kernel's queue.
const MAX_HANDSHAKES: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("making the controller's certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("the controller's certificate or TLS settings: {0}")]
    Tls(#[from] rustls::Error),
}

/// The certificate in use.
pub struct ServerIdentity {
    trust: Trust,
    current: RwLock<Arc<CertifiedKey>>,
}

impl std::fmt::Debug for ServerIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerIdentity")
    }
}

impl ResolvesServerCert for ServerIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.read().ok().map(|current| current.clone())
    }
}

impl ServerIdentity {
    pub fn new(trust: Trust) -> Result<Arc<Self>, TlsError> {
        let current = RwLock::new(Arc::new(certify(&trust.borrow().authorities.signer)?));
        Ok(Arc::new(Self { trust, current }))
    }

    /// Renews the certificate in good time, and when another root signs, forever.
    pub async fn keep_fresh(self: Arc<Self>) {
        let mut trust = self.trust.clone();
        let mut wait = RENEW_AFTER;
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                Ok(()) = trust.changed() => {}
            }
            let authorities = trust.borrow_and_update().authorities.clone();
            wait = match certify(&authorities.signer) {
                Ok(fresh) => {
                    if let Ok(mut current) = self.current.write() {
                        *current = Arc::new(fresh);
                    }
                    RENEW_AFTER
                }
                Err(error) => {
                    tracing::error!(target: "tls", "{error}");
                    RETRY_AFTER
                }
            };
        }
    }
}

fn certify(root: &Root) -> Result<CertifiedKey, TlsError> {
    let key = KeyPair::generate()?;
    let name = SanType::DnsName(SERVER_NAME.try_into()?);
    let (leaf, _) = root.sign(&key, name, Usage::Server, LIFETIME, SystemTime::now())?;
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signer = aws_lc_rs::sign::any_supported_type(&private)?;
    let chain = [leaf.der().clone()].into_iter().chain(root.chain().iter().cloned());
    Ok(CertifiedKey::new(chain.chain([root.der().clone()]).collect(), signer))
}

/// Connections that finished their handshake.
pub struct Incoming(mpsc::Receiver<TlsStream<TcpStream>>);

impl Stream for Incoming {
    type Item = std::io::Result<TlsStream<TcpStream>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|stream| stream.map(Ok))
    }
}

/// Accepts on `listener` until the result is dropped. Handshakes run beside each other, so that a slow peer holds up
/// nobody.
pub fn accept(
    listener: TcpListener,
    identity: Arc<ServerIdentity>,
    metrics: Metrics,
) -> Result<Incoming, TlsError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(identity);
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(accept_loop(listener, acceptor, sender, metrics));
    Ok(Incoming(receiver))
}

async fn accept_loop(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    sender: mpsc::Sender<TlsStream<TcpStream>>,
    metrics: Metrics,
) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = sender.closed() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(target: "tls", "accepting a connection: {error}");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let (acceptor, sender, metrics) = (acceptor.clone(), sender.clone(), metrics.clone());
        tokio::spawn(async move {
            // Small messages in both directions; waiting to fill a segment only delays them.
            let _ = stream.set_nodelay(true);
            let result = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await;
            drop(permit);
            match result {
                Ok(Ok(stream)) => drop(sender.send(stream).await),
                Ok(Err(error)) => {
                    metrics.tls_failed.inc();
                    tracing::info!(target: "tls", %peer, "handshake failed: {error}");
                }
                Err(_) => {
                    metrics.tls_failed.inc();
                    tracing::info!(target: "tls", %peer, "handshake not finished within {HANDSHAKE_TIMEOUT:?}");
                }
            }
        });
    }
}
