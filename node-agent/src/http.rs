//! The agent's three small HTTP servers: metrics and readiness over TCP, admin over a Unix socket that only its owner
//! may open.

use std::{
    convert::Infallible,
    future, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header::CONTENT_TYPE, server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::watch,
};
use tracing::{info, warn};
use weft_api::agent::{AgentStatus, CertificateStatus, KubeletStatus, PluginStatus};

use crate::{
    enroll::Enrollment, identities::Identities, logging, metrics::Metrics, seen::Seen, state::Snapshot, trust,
};

/// A client that sends its request slower than this is cut off.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the servers show and may set off.
#[derive(Clone)]
pub struct Views {
    pub metrics: Arc<Metrics>,
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub enrollment: watch::Receiver<Enrollment>,
    pub identities: Identities,
    pub connected: watch::Receiver<bool>,
    pub trouble: watch::Receiver<String>,
    pub seen: Arc<Seen>,
    pub trust: Arc<trust::Keeper>,
    pub plugin: watch::Receiver<PluginStatus>,
    pub kubelet: watch::Receiver<KubeletStatus>,
    pub node: String,
    pub drain: watch::Sender<bool>,
    pub retire: watch::Sender<bool>,
}

pub type Reply = Response<Full<Bytes>>;

pub fn reply(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    reply(status, "text/plain; charset=utf-8", body)
}

fn json(value: &impl serde::Serialize) -> Reply {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => reply(StatusCode::OK, "application/json", body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn not_found(paths: &str) -> Reply {
    text(StatusCode::NOT_FOUND, format!("not here; try {paths}\n"))
}

impl Views {
    fn metrics(&self, request: &Request<Incoming>) -> Reply {
        if request.uri().path() != "/metrics" {
            return not_found("/metrics");
        }
        match self.metrics.encode() {
            Ok(body) => {
                reply(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", body)
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }

    /// Ready once the first state is in force and every pod that should be enrolled is, or has its failure reported.
    fn ready(&self, request: &Request<Incoming>) -> Reply {
        if !matches!(request.uri().path(), "/readyz" | "/healthz/ready") {
            return not_found("/readyz");
        }
        match self.waiting() {
            None => text(StatusCode::OK, "ready\n"),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        }
    }

    fn waiting(&self) -> Option<&'static str> {
        if *self.drain.borrow() {
            Some("draining")
        } else if !self.snapshots.borrow().synced {
            Some("waiting for the controller's first state")
        } else if !self.enrollment.borrow().settled {
            Some("enrolling pods")
        } else {
            None
        }
    }

    fn status(&self) -> AgentStatus {
        // By their dates alone: keys never leave the process.
        let certificates = self.identities.all();
        let certificates = certificates.iter().map(|(id, certificate)| CertificateStatus {
            identity: id.to_string(),
            not_after: since_epoch(certificate.not_after()).as_secs(),
        });
        AgentStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node.clone(),
            time: since_epoch(SystemTime::now()).as_secs_f64(),
            connected: *self.connected.borrow(),
            trouble: self.trouble.borrow().clone(),
            seen: self.seen.current().to_string(),
            waiting: self.waiting().map(str::to_owned),
            plugin: self.plugin.borrow().clone(),
            kubelet: self.kubelet.borrow().clone(),
            certificates: certificates.collect(),
            pods: self.enrollment.borrow().pods.clone(),
        }
    }

    fn admin(&self, request: &Request<Incoming>) -> Reply {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/config_dump") => json(&self.dump()),
            (&Method::GET, "/status") => json(&self.status()),
            (&Method::GET, "/logging") => text(StatusCode::OK, format!("{}\n", logging::level())),
            (&Method::PUT | &Method::POST, "/logging") => {
                let query = request.uri().query().unwrap_or_default();
                let Some(level) = query.split('&').find_map(|q| q.strip_prefix("level=")) else {
                    return text(StatusCode::BAD_REQUEST, "say which: /logging?level=info,access=off\n");
                };
                match logging::set_level(level) {
                    Ok(()) => text(StatusCode::OK, format!("{level}\n")),
                    Err(error) => text(StatusCode::BAD_REQUEST, format!("{error:#}\n")),
                }
            }
            (&Method::GET, "/readyz") => self.ready(request),
            (&Method::POST, "/drain") => {
                self.drain.send_replace(true);
                text(StatusCode::OK, "draining\n")
            }
            (&Method::POST, "/retire") => self.retire(),
            (&Method::POST, "/forget-versions") => {
                match self.seen.forget().and_then(|()| self.trust.forget()) {
                    Ok(()) => text(StatusCode::OK, "forgotten\n"),
                    Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")),
                }
            }
            _ => not_found(
                "GET /config_dump, GET /status, GET /readyz, GET or PUT /logging?level=FILTER, POST /drain, POST /retire, POST /forget-versions",
            ),
        }
    }

    fn retire(&self) -> Reply {
        let pods = self.enrollment.borrow().pods.len();
        if pods > 0 {
            return text(StatusCode::CONFLICT, format!("{pods} pods of this node are still in the mesh\n"));
        }
        self.retire.send_replace(true);
        text(StatusCode::OK, "retiring\n")
    }

    fn dump(&self) -> serde_json::Value {
        let snapshot = self.snapshots.borrow().clone();
        let workloads = snapshot.mesh.entries().filter_map(|e| match e {
            weft_core::Entry::Workload(w) => Some(serde_json::json!({
                "uid": &*w.uid,
                "identity": w.identity.to_string(),
                "node": &*w.node,
                "addresses": w.addresses,
                "tunnel": format!("{:?}", w.tunnel),
                "health": format!("{:?}", w.health),
                "zone": &*w.zone,
                "services": w.services.iter().map(|(key, _)| &**key).collect::<Vec<_>>(),
                "policies": w.policies.iter().map(|name| &**name).collect::<Vec<_>>(),
            })),
            weft_core::Entry::Service(_) => None,
        });
        let services = snapshot.mesh.entries().filter_map(|e| match e {
            weft_core::Entry::Service(s) => Some(serde_json::json!({
                "key": &*s.key,
                "addresses": s.addresses,
                "ports": s.ports.iter().map(|p| p.service_port).collect::<Vec<_>>(),
                "nearness": format!("{:?}", s.nearness),
                "affinity_seconds": s.affinity.map(|time| time.as_secs()),
                "external_addresses": s.external_addresses,
                "node_ports": s.node_ports.iter().map(|p| p.node_port).collect::<Vec<_>>(),
            })),
            weft_core::Entry::Workload(_) => None,
        });
        let nodes = snapshot
            .mesh
            .nodes()
            .map(|(name, addresses)| serde_json::json!({ "name": &**name, "addresses": addresses }));
        let status = self.status();
        serde_json::json!({
            "connected": status.connected,
            "synced": snapshot.synced,
            "captured": snapshot.settings.as_ref().map(|s| s.captured.iter().map(|n| n.to_string()).collect::<Vec<_>>()),
            "trust_domain": snapshot.settings.as_ref().map(|s| s.trust_domain.to_string()),
            "kubelet": status.kubelet,
            "pods": status.pods,
            "certificates": status.certificates,
            "workloads": workloads.collect::<Vec<_>>(),
            "services": services.collect::<Vec<_>>(),
            "nodes": nodes.collect::<Vec<_>>(),
        })
    }
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Starts all three. Their ports may be shared with a predecessor that drains.
pub fn start(views: Views, metrics: SocketAddr, ready: SocketAddr, admin: &Path) -> anyhow::Result<()> {
    for (address, what, answer) in [
        (metrics, "metrics", Views::metrics as fn(&Views, &Request<Incoming>) -> Reply),
        (ready, "readiness", Views::ready),
    ] {
        let listener = shared_port(address).with_context(|| format!("listening on {address} for {what}"))?;
        let views = views.clone();
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let views = views.clone();
                        serve(stream, HEADER_TIMEOUT, move |request| future::ready(answer(&views, &request)));
                    }
                    Err(error) => pause(&error).await,
                }
            }
        });
    }
    let listener = unix_listener(admin).with_context(|| format!("listening on {}", admin.display()))?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let views = views.clone();
                    serve(stream, HEADER_TIMEOUT, move |request| future::ready(views.admin(&request)));
                }
                Err(error) => pause(&error).await,
            }
        }
    });
    info!(%metrics, %ready, admin = %admin.display(), "serving metrics, readiness and admin");
    Ok(())
}

/// After an accept that failed, for want of descriptors or memory.
pub async fn pause(error: &io::Error) {
    warn!(%error, "accept");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Serves one connection in a task of its own. A client that takes longer than `patience` for a request's head is cut off.
pub fn serve<S, F>(stream: S, patience: Duration, answer: impl Fn(Request<Incoming>) -> F + Send + 'static)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Reply> + Send,
{
    tokio::spawn(async move {
        let service = service_fn(move |request| {
            let reply = answer(request);
            async { Ok::<_, Infallible>(reply.await) }
        });
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(patience);
        // A client that hangs up in the middle is its own business.
        let _ = server.serve_connection(TokioIo::new(stream), service).await;
    });
}

fn shared_port(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM.nonblocking().cloexec(),
        None,
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

/// A socket at `path`, in place of one that a predecessor left.
/// A listener at `path` that only its owner may open; a predecessor's is replaced.
pub fn unix_listener(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
