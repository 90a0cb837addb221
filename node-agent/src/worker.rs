//! The data path's threads. Each worker is a single-threaded runtime that owns its connections and its tunnels; nothing
//! is locked across workers. A pod's listener lives on one worker, which deals accepted connections by (pod,
//! destination), so that connections that can share a tunnel meet.

use std::{
    cell::RefCell,
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    task::{LocalSet, spawn_local},
};
use tracing::{error, warn};
use weft_core::TUNNEL_PORT;
use weft_transport::{Limits, Pool};

use crate::{
    config::Config,
    connection::{Connection, Refusal},
    identities::Identities,
    inbound,
    metrics::{Metrics, Reporter},
    outbound,
    pod::{Phase, PodHandle},
    state::Snapshot,
};

/// After accept failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What every worker reads.
#[derive(Clone)]
pub struct Shared {
    pub config: Arc<Config>,
    pub metrics: Arc<Metrics>,
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub identities: Identities,
    pub limits: Limits,
    /// Turns true when no new connection is to be taken.
    pub draining: watch::Receiver<bool>,
}

enum Command {
    Listen(Arc<PodHandle>, TcpListener),
    Unlisten(u64),
    Serve(Accepted),
}

/// A connection between accept and its handler, possibly on another worker.
struct Accepted {
    pod: Arc<PodHandle>,
    stream: TcpStream,
    permit: OwnedSemaphorePermit,
    from: SocketAddr,
    to: SocketAddr,
}

/// The workers' mailboxes.
#[derive(Clone)]
pub struct Workers {
    mailboxes: Arc<[mpsc::UnboundedSender<Command>]>,
    next: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts `shared.config.workers` threads. They end when the last [`Workers`] is dropped.
    pub fn start(shared: Shared) -> io::Result<Self> {
        let (mailboxes, inboxes): (Vec<_>, Vec<_>) =
            (0..shared.config.workers).map(|_| mpsc::unbounded_channel()).unzip();
        let workers = Self { mailboxes: mailboxes.into(), next: Arc::default() };
        for (index, inbox) in inboxes.into_iter().enumerate() {
            let (shared, mailboxes) = (shared.clone(), workers.mailboxes.clone());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                // The first use of the random generator on a thread takes tens of milliseconds.
                weft_transport::warm_up();
                let pool = Pool::new(shared.limits.clone());
                let worker = Rc::new(Worker { shared, pool, index, mailboxes, load: RefCell::default() });
                LocalSet::new().block_on(&runtime, worker.run(inbox));
            })?;
        }
        Ok(workers)
    }

    /// Serves the pod's listener until [`Self::unlisten`].
    pub fn listen(&self, pod: &Arc<PodHandle>, listener: TcpListener) {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.mailboxes.len();
        self.send(index, Command::Listen(pod.clone(), listener));
    }

    /// Closes the pod's listener; its tunnels take no new streams.
    pub fn unlisten(&self, pod: &PodHandle) {
        for index in 0..self.mailboxes.len() {
            self.send(index, Command::Unlisten(pod.kernel.cookie()));
        }
    }

    fn send(&self, index: usize, command: Command) {
        if self.mailboxes[index].send(command).is_err() {
            error!(worker = index, "worker has ended");
        }
    }
}

/// One thread's own.
pub struct Worker {
    pub shared: Shared,
    pub pool: Pool,
    /// Open connections by workload UID, for choosing the less loaded endpoint.
    pub load: RefCell<HashMap<Arc<str>, u64>>,
    index: usize,
    mailboxes: Arc<[mpsc::UnboundedSender<Command>]>,
}

impl Worker {
    async fn run(self: Rc<Self>, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut listeners: HashMap<u64, oneshot::Sender<()>> = HashMap::new();
        let mut draining = self.shared.draining.clone();
        loop {
            let command = tokio::select! {
                command = inbox.recv() => command,
                Ok(_) = draining.wait_for(|d| *d), if !listeners.is_empty() => {
                    // Closing a listener empties its slot unless a successor has already put its own there.
                    listeners.clear();
                    self.pool.retire_all();
                    continue;
                }
            };
            match command {
                Some(Command::Listen(pod, listener)) => {
                    let cookie = pod.kernel.cookie();
                    let (keep, stopped) = oneshot::channel();
                    spawn_local(self.clone().accept(pod, listener, stopped));
                    listeners.insert(cookie, keep);
                }
                Some(Command::Unlisten(cookie)) => {
                    listeners.remove(&cookie);
                    self.pool.retire(cookie);
                }
                Some(Command::Serve(accepted)) => self.spawn(accepted),
                None => return,
            }
        }
    }

    /// Accepts connections until `stopped` or its sender's end.
    async fn accept(
        self: Rc<Self>,
        pod: Arc<PodHandle>,
        listener: TcpListener,
        stopped: oneshot::Receiver<()>,
    ) {
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => return error!(uid = %pod.uid, %error, "listener cannot be used"),
        };
        tokio::select! {
            () = self.accept_all(&pod, &listener) => {}
            _ = stopped => {}
        }
        // What the kernel has established and nobody has accepted would be reset with the listener.
        let Ok(listener) = listener.into_std() else { return };
        while let (Ok(permit), Ok((stream, from))) =
            (pod.permits.clone().try_acquire_owned(), listener.accept())
        {
            if stream.set_nonblocking(true).is_ok() {
                self.accepted(&pod, permit, stream, from);
            }
        }
    }

    async fn accept_all(self: &Rc<Self>, pod: &Arc<PodHandle>, listener: &tokio::net::TcpListener) {
        loop {
            let Ok(permit) = pod.permits.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, from)) => {
                    if let Ok(stream) = stream.into_std() {
                        self.accepted(pod, permit, stream, from);
                    }
                }
                Err(error) => {
                    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
                    {
                        warn!(uid = %pod.uid, %error, "accept");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }

    /// Gives a connection to the worker that is to serve it.
    fn accepted(
        self: &Rc<Self>,
        pod: &Arc<PodHandle>,
        permit: OwnedSemaphorePermit,
        stream: TcpStream,
        from: SocketAddr,
    ) {
        // Until both directions have ended well, an end is a reset: a killed agent must not fake an end of file.
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        let Ok(to) = stream.local_addr() else { return };
        let (from, to) = (canonical(from), canonical(to));
        let accepted = Accepted { pod: pod.clone(), stream, permit, from, to };
        match self.deal(&accepted) {
            index if index == self.index => self.spawn(accepted),
            index => {
                if self.mailboxes[index].send(Command::Serve(accepted)).is_err() {
                    error!(worker = index, "worker has ended");
                }
            }
        }
    }

    /// Which worker serves it: the same for everything that can share a tunnel; tunnels coming in are spread.
    fn deal(&self, accepted: &Accepted) -> usize {
        if self.mailboxes.len() == 1 {
            return 0;
        }
        let mut hasher = DefaultHasher::new();
        accepted.pod.kernel.cookie().hash(&mut hasher);
        accepted.to.hash(&mut hasher);
        if accepted.pod.owns(accepted.to.ip()) {
            accepted.from.hash(&mut hasher);
        }
        hasher.finish() as usize % self.mailboxes.len()
    }

    fn spawn(self: &Rc<Self>, accepted: Accepted) {
        let Accepted { pod, stream, permit, from, to } = accepted;
        let stream = match tokio::net::TcpStream::from_std(stream) {
            Ok(stream) => stream,
            Err(error) => return warn!(uid = %pod.uid, %error, "accepted socket cannot be used"),
        };
        let worker = self.clone();
        match (pod.owns(from.ip()), pod.owns(to.ip())) {
            (true, false) => spawn_for(&pod, move |pod| async move {
                let _permit = permit;
                outbound::serve(worker, pod, stream, from, to).await;
            }),
            (false, true) if to.port() == TUNNEL_PORT => spawn_for(&pod, move |pod| async move {
                let _permit = permit;
                inbound::tunnel(worker, pod, stream, from, to).await;
            }),
            (false, true) if to.port() != pod.kernel.listener_port() => {
                spawn_for(&pod, move |pod| async move {
                    let _permit = permit;
                    inbound::plain(worker, pod, stream, from, to).await;
                })
            }
            _ => {
                let connection =
                    Connection::new(self.shared.metrics.clone(), Reporter::destination, from, to);
                connection
                    .refused(&Refusal::new("own_port", "nobody has business on the agent's own listener"));
            }
        }
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshots.borrow().clone()
    }

    /// Waits until `decide` returns something, asking it again for every snapshot, at most as long as connections are
    /// held.
    pub async fn hold<T>(&self, mut decide: impl FnMut(&Snapshot) -> Option<T>) -> Option<T> {
        if let Some(decision) = decide(&self.snapshot()) {
            return Some(decision);
        }
        let mut snapshots = self.shared.snapshots.clone();
        let wait = async {
            loop {
                let snapshot = snapshots.borrow_and_update().clone();
                if let Some(decision) = decide(&snapshot) {
                    return Some(decision);
                }
                snapshots.changed().await.ok()?;
            }
        };
        tokio::time::timeout(self.shared.config.hold_timeout, wait).await.ok().flatten()
    }

    /// Counts a connection to `uid` until the guard is dropped.
    pub fn load_on(self: &Rc<Self>, uid: &Arc<str>) -> Load {
        *self.load.borrow_mut().entry(uid.clone()).or_default() += 1;
        Load(self.clone(), uid.clone())
    }
}

/// Runs what `start` begins as a task of its own, counted as an open connection of `pod` and cut when the pod is gone.
///
/// Each kind of connection is a task of its own type: a task occupies what the largest of its branches may need.
pub fn spawn_for<F>(pod: &Arc<PodHandle>, start: impl FnOnce(Arc<PodHandle>) -> F + 'static)
where
    F: Future<Output = ()>,
{
    let pod = pod.clone();
    spawn_local(async move {
        let _open = pod.connection();
        let mut phase = pod.phase.subscribe();
        tokio::select! {
            () = start(pod.clone()) => {}
            _ = phase.wait_for(|p| *p == Phase::Gone) => {}
        }
    });
}

/// See [`Worker::load_on`].
pub struct Load(Rc<Worker>, Arc<str>);

impl Drop for Load {
    fn drop(&mut self) {
        let mut load = self.0.load.borrow_mut();
        if let Some(count) = load.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                load.remove(&self.1);
            }
        }
    }
}

/// An IPv4 address where a dual-stack socket says an IPv4-mapped one.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Waits for a connect that was started, at most `timeout`.
pub async fn connected(stream: TcpStream, timeout: Duration) -> io::Result<tokio::net::TcpStream> {
    let stream = tokio::net::TcpStream::from_std(stream)?;
    tokio::time::timeout(timeout, stream.writable()).await.map_err(|_| io::ErrorKind::TimedOut)??;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}
