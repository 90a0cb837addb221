//! A worker's tunnels, shared by the streams of each (source pod, destination) and built when they are missing.
//!
//! Handshakes run in tasks of their own: streams that need the same tunnel wait for one handshake together, nothing is
//! held across it, and one caller's end does not end it for the others.

use crate::client::{self, ConnectRequest, OpenError};
use crate::limits::Limits;
use crate::roots::retired;
use crate::stream::Stream;
use crate::verify::expired;
use crate::{REFUSAL_REASON, TlsIdentity};
use bytes::Bytes;
use h2::client::SendRequest;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::net::{self, SocketAddr};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::{io, mem};
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout};
use weft_core::SpiffeId;

/// What streams must have in common to share a tunnel. The certificate in use is part of it, too: a renewed one gets
/// tunnels of its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Network namespace cookie of the source pod.
    pub pod: u64,
    pub source: SpiffeId,
    /// The far agent: the workload's address and port 15008.
    pub to: SocketAddr,
    /// Who must be there.
    pub expected: SpiffeId,
}

/// An open stream.
#[derive(Debug)]
pub struct Tunneled {
    pub stream: Stream,
    /// What the far agent says about the destination, where it says something.
    pub baggage: Option<String>,
}

/// Tries for one stream whose tunnel ended before the far side looked at the request.
const TRIES: usize = 3;

/// A worker's tunnels. Clones are the same pool.
#[derive(Clone)]
pub struct Pool(Rc<Shared>);

struct Shared {
    limits: Limits,
    peers: RefCell<HashMap<(TunnelKey, u64), Rc<Peer>>>,
    sweeping: Cell<bool>,
}

/// The tunnels of one key.
#[derive(Default)]
struct Peer {
    tunnels: RefCell<Vec<Rc<Tunnel>>>,
    waiters: RefCell<VecDeque<oneshot::Sender<Granted>>>,
    handshakes: Cell<usize>,
    retired: Cell<bool>,
}

/// What a waiter is told.
enum Granted {
    Place(Lease),
    /// Tunnels take fewer streams than was thought: look again.
    Again,
    Failed(OpenError),
}

struct Tunnel {
    /// None once it takes no new streams; h2 closes a connection that has neither streams nor a handle to make them.
    requests: RefCell<Option<SendRequest<Bytes>>>,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    broke: RefCell<Option<OpenError>>,
}

/// A place for one stream in a tunnel, free again when dropped.
pub(crate) struct Lease {
    tunnel: Rc<Tunnel>,
    peer: Weak<Peer>,
    most: usize,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({} streams)", self.tunnel.streams.get())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.tunnel.streams.set(self.tunnel.streams.get() - 1);
        self.tunnel.idle_since.set(Instant::now());
        if let Some(peer) = self.peer.upgrade() {
            peer.serve_waiters(self.most);
        }
    }
}

impl Tunnel {
    /// Whether it takes another stream. Finds out about a GOAWAY, after which it takes none.
    fn has_place(&self, most: usize) -> bool {
        let mut requests = self.requests.borrow_mut();
        let Some(handle) = requests.as_mut() else { return false };
        let mut cx = Context::from_waker(Waker::noop());
        if let Poll::Ready(Err(_)) = handle.poll_ready(&mut cx) {
            *requests = None;
            return false;
        }
        self.streams.get() < most.min(handle.current_max_send_streams())
    }

    /// Why a stream failed: what broke the whole tunnel, if something did.
    fn error(&self, e: &h2::Error) -> OpenError {
        self.broke.borrow().clone().unwrap_or_else(|| OpenError::Http2(e.to_string()))
    }

    fn is_open(&self) -> bool {
        self.requests.borrow().is_some()
    }

    fn drain(&self) {
        // Dropping the handle may wake the connection's task, never run it.
        drop(self.requests.take());
    }
}

impl Peer {
    /// A place in the first tunnel that has one: filling tunnels one after the other makes larger writes, and lets the
    /// others fall idle.
    fn place(self: &Rc<Self>, most: usize) -> Option<Lease> {
        let mut tunnels = self.tunnels.borrow_mut();
        let found = tunnels.iter().find(|tunnel| tunnel.has_place(most)).cloned();
        tunnels.retain(|tunnel| tunnel.is_open());
        found.map(|tunnel| self.lease(tunnel, most))
    }

    fn lease(self: &Rc<Self>, tunnel: Rc<Tunnel>, most: usize) -> Lease {
        tunnel.streams.set(tunnel.streams.get() + 1);
        Lease { tunnel, peer: Rc::downgrade(self), most }
    }

    fn serve_waiters(self: &Rc<Self>, most: usize) {
        loop {
            // Callers that gave up.
            while self.waiters.borrow().front().is_some_and(oneshot::Sender::is_closed) {
                self.waiters.borrow_mut().pop_front();
            }
            if self.waiters.borrow().is_empty() {
                return;
            }
            let Some(lease) = self.place(most) else { return };
            let Some(waiter) = self.waiters.borrow_mut().pop_front() else { return };
            let _ = waiter.send(Granted::Place(lease));
        }
    }

    fn fail_waiters(&self, most: usize, e: &OpenError) {
        // Other handshakes are for those who came later; the last one's failure is everybody's.
        let share = if self.handshakes.get() == 0 { usize::MAX } else { most };
        let mut waiters = self.waiters.borrow_mut();
        let share = share.min(waiters.len());
        for waiter in waiters.drain(..share) {
            let _ = waiter.send(Granted::Failed(e.clone()));
        }
    }
}

impl Pool {
    pub fn new(limits: Limits) -> Self {
        Self(Rc::new(Shared { limits, peers: RefCell::default(), sweeping: Cell::new(false) }))
    }

    /// Opens a stream to `request.authority` through a tunnel of `key`. `dial` returns a socket whose connect to `key.to`
    /// was started; it is called only where a tunnel is missing, at once and at most a few times. Must run inside a
    /// `LocalSet`. [`OpenError::Closed`] where the roots of `tls` are retired: nothing was opened, and another identity may
    /// be tried.
    pub async fn open(
        &self,
        key: TunnelKey,
        tls: &Arc<TlsIdentity>,
        request: ConnectRequest,
        dial: impl Fn() -> io::Result<net::TcpStream>,
    ) -> Result<Tunneled, OpenError> {
        let to = key.to;
        let request = request.build()?;
        let mut tries = 0;
        loop {
            tries += 1;
            let lease = self.lease(&key, tls, &dial).await?;
            let answer = self.connect(&lease, request.clone());
            match timeout(self.0.limits.response_timeout, answer).await {
                Err(_) => return Err(OpenError::Timeout { to, phase: "answer to CONNECT" }),
                Ok(Err(Attempt::Unseen(_))) if tls.roots().are_retired() => return Err(OpenError::Closed),
                Ok(Err(Attempt::Unseen(_))) if tries < TRIES => {}
                Ok(Err(Attempt::Unseen(e) | Attempt::Final(e))) => return Err(e),
                Ok(Ok((send, recv, baggage))) => {
                    let chunks = self.0.limits.copy_chunk;
                    return Ok(Tunneled {
                        stream: Stream { send, recv, chunks, _lease: Some(lease) },
                        baggage,
                    });
                }
            }
        }
    }

    /// A place in a tunnel, after waiting for one where it must.
    async fn lease(
        &self,
        key: &TunnelKey,
        tls: &Arc<TlsIdentity>,
        dial: &impl Fn() -> io::Result<net::TcpStream>,
    ) -> Result<Lease, OpenError> {
        let most = self.0.limits.max_streams_per_tunnel.max(1);
        let peer = self.0.peers.borrow_mut().entry((key.clone(), tls.generation())).or_default().clone();
        loop {
            if peer.waiters.borrow().is_empty()
                && let Some(lease) = peer.place(most)
            {
                return Ok(lease);
            }
            if peer.handshakes.get() * most <= peer.waiters.borrow().len() {
                let socket = dial().map_err(|e| OpenError::Dial { to: key.to, source: Arc::new(e) });
                match socket {
                    Ok(socket) => self.start(peer.clone(), socket, key.clone(), tls.clone()),
                    Err(e) => {
                        self.0.forget_if_unused(&peer);
                        return Err(e);
                    }
                }
            }
            let (tell, told) = oneshot::channel();
            peer.waiters.borrow_mut().push_back(tell);
            match told.await {
                Ok(Granted::Place(lease)) => return Ok(lease),
                Ok(Granted::Again) => {}
                Ok(Granted::Failed(e)) => return Err(e),
                Err(_) => return Err(OpenError::Closed),
            }
        }
    }

    /// Starts a handshake, and the tunnel's life after it, as a task.
    fn start(&self, peer: Rc<Peer>, socket: net::TcpStream, key: TunnelKey, tls: Arc<TlsIdentity>) {
        peer.handshakes.set(peer.handshakes.get() + 1);
        let shared = Rc::downgrade(&self.0);
        let limits = self.0.limits.clone();
        self.sweep();
        spawn_local(async move {
            let most = limits.max_streams_per_tunnel.max(1);
            // A handshake's memory is given back when it is over.
            let result = Box::pin(client::establish(socket, &key, &tls, &limits)).await;
            let retirement = tls.roots().retirement();
            drop((tls, limits));
            peer.handshakes.set(peer.handshakes.get() - 1);
            let (requests, driver, good_until) = match result {
                Ok(made) => made,
                Err(e) => {
                    tracing::debug!(to = %key.to, expected = %key.expected, reason = e.reason(), "no tunnel: {e}");
                    peer.fail_waiters(most, &e);
                    if let Some(shared) = shared.upgrade() {
                        shared.forget_if_unused(&peer);
                    }
                    return;
                }
            };
            let tunnel = Rc::new(Tunnel {
                requests: RefCell::new(Some(requests)),
                streams: Cell::new(0),
                idle_since: Cell::new(Instant::now()),
                broke: RefCell::new(None),
            });
            peer.tunnels.borrow_mut().push(tunnel.clone());
            peer.serve_waiters(most);
            if peer.handshakes.get() == 0 {
                for waiter in mem::take(&mut *peer.waiters.borrow_mut()) {
                    let _ = waiter.send(Granted::Again);
                }
            }
            // Retired or dropped meanwhile: for those who waited, and nobody else.
            if peer.retired.get() || shared.strong_count() == 0 {
                tunnel.drain();
            }
            let io = driver.io.clone();
            let mut driver = pin!(driver);
            let ended = tokio::select! {
                ended = &mut driver => ended,
                () = expired(good_until) => {
                    tunnel.drain();
                    driver.await
                }
                () = retired(retirement) => {
                    tunnel.drain();
                    driver.await
                }
            };
            if let Err(e) = ended {
                // In TLS 1.3 a server refuses a caller's certificate only after the caller's handshake is over.
                let e = io.refused().map_or_else(|| OpenError::Http2(e.to_string()), OpenError::Tls);
                tracing::debug!(to = %key.to, expected = %key.expected, reason = e.reason(), "tunnel broke: {e}");
                tunnel.broke.replace(Some(e));
            }
            tunnel.drain();
            peer.tunnels.borrow_mut().retain(|t| !Rc::ptr_eq(t, &tunnel));
            if let Some(shared) = shared.upgrade() {
                shared.forget_if_unused(&peer);
            }
        });
    }

    /// Sends the CONNECT and waits for the answer.
    async fn connect(
        &self,
        lease: &Lease,
        request: http::Request<()>,
    ) -> Result<(h2::SendStream<Bytes>, h2::RecvStream, Option<String>), Attempt> {
        let handle = lease.tunnel.requests.borrow().clone();
        let handle = handle.ok_or(Attempt::Unseen(OpenError::Closed))?;
        let failed = |e: h2::Error| {
            // Streams beyond a GOAWAY's last, and refused ones, were not looked at (RFC 9113, 8.7).
            let unseen = e.reason() == Some(h2::Reason::REFUSED_STREAM)
                || (e.is_go_away() && e.reason() == Some(h2::Reason::NO_ERROR));
            let error = lease.tunnel.error(&e);
            if unseen { Attempt::Unseen(error) } else { Attempt::Final(error) }
        };
        let mut handle = handle.ready().await.map_err(|e| Attempt::Unseen(lease.tunnel.error(&e)))?;
        let (answer, send) = handle.send_request(request, false).map_err(failed)?;
        drop(handle);
        let answer = answer.await.map_err(failed)?;
        let header = |name| answer.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        if answer.status() != http::StatusCode::OK {
            let (status, reason) = (answer.status().as_u16(), header(REFUSAL_REASON));
            return Err(Attempt::Final(OpenError::Refused { status, reason }));
        }
        let baggage = header("baggage");
        Ok((send, answer.into_body(), baggage))
    }

    /// Tunnels of this pod take no new streams, and close when theirs have ended.
    pub fn retire(&self, pod: u64) {
        self.0.retire(|(key, _)| key.pod == pod);
    }

    /// The same for tunnels made with this certificate, for instance when it was renewed.
    pub fn retire_identity(&self, tls: &TlsIdentity) {
        self.0.retire(|(_, generation)| *generation == tls.generation());
    }

    /// The same for all tunnels, for instance before the agent exits.
    pub fn retire_all(&self) {
        self.0.retire(|_| true);
    }

    /// Tunnels that take streams.
    pub fn len(&self) -> usize {
        self.0.peers.borrow().values().map(|peer| peer.tunnels.borrow().len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Keeps one task alive, while there are tunnels, that closes idle ones.
    fn sweep(&self) {
        if self.0.sweeping.replace(true) {
            return;
        }
        let idle = self.0.limits.tunnel_idle;
        let shared = Rc::downgrade(&self.0);
        spawn_local(async move {
            loop {
                sleep(idle / 4).await;
                let Some(shared) = shared.upgrade() else { return };
                shared.close_idle(Instant::now());
                if shared.peers.borrow().is_empty() {
                    shared.sweeping.set(false);
                    return;
                }
            }
        });
    }
}

/// Streams that are open go on; nothing else keeps a tunnel once its worker's pool is gone.
impl Drop for Shared {
    fn drop(&mut self) {
        self.retire(|_| true);
    }
}

impl Shared {
    fn retire(&self, chosen: impl Fn(&(TunnelKey, u64)) -> bool) {
        self.peers.borrow_mut().retain(|key, peer| {
            if chosen(key) {
                peer.retired.set(true);
                for tunnel in peer.tunnels.borrow_mut().drain(..) {
                    tunnel.drain();
                }
            }
            !chosen(key)
        });
    }

    fn close_idle(&self, now: Instant) {
        for peer in self.peers.borrow().values() {
            peer.tunnels.borrow_mut().retain(|tunnel| {
                let idle = tunnel.streams.get() == 0
                    && now.duration_since(tunnel.idle_since.get()) >= self.limits.tunnel_idle;
                if idle {
                    tunnel.drain();
                }
                !idle
            });
        }
        self.peers.borrow_mut().retain(|_, peer| !peer.is_unused());
    }

    fn forget_if_unused(&self, unused: &Rc<Peer>) {
        if unused.is_unused() {
            self.peers.borrow_mut().retain(|_, peer| !Rc::ptr_eq(peer, unused));
        }
    }
}

impl Peer {
    fn is_unused(&self) -> bool {
        self.handshakes.get() == 0 && self.tunnels.borrow().is_empty() && self.waiters.borrow().is_empty()
    }
}

/// How one try for a stream failed.
enum Attempt {
    /// The far side did not look at the request, so that another try is safe.
    Unseen(OpenError),
    Final(OpenError),
}
