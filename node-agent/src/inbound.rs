//! Connections that reach an enrolled pod: tunnels from other agents, and plaintext from outside the mesh.

use std::{net::SocketAddr, pin::pin, rc::Rc, sync::Arc};

use tokio::net::TcpStream;
use tracing::warn;
use weft_core::{AddressKind, TUNNEL_PORT};
use weft_transport::{Counters, Incoming, Stream, relay, relay_plain, serve};

use crate::{
    authorization::{self, Admission},
    connection::{Connection, Party, Refusal, carry},
    metrics::{Reporter, Security},
    pod::{Phase, PodHandle},
    state::Snapshot,
    worker::{Worker, connected, spawn_for},
};

/// Serves one connection to the tunnel port.
pub async fn tunnel(
    worker: Rc<Worker>,
    pod: Arc<PodHandle>,
    stream: TcpStream,
    from: SocketAddr,
    to: SocketAddr,
) {
    let refused = |reason: &'static str, detail: String| {
        let mut connection = Connection::new(worker.shared.metrics.clone(), Reporter::destination, from, to);
        connection.destination = Party::workload(pod.workload.clone());
        connection.refused(&Refusal { reason, detail });
    };
    let mut identities = worker.shared.identities.clone();
    let Some(tls) = identities.get(pod.identity(), worker.shared.config.hold_timeout).await else {
        return refused("no_certificate", format!("there is no certificate for {}", pod.identity()));
    };
    let handler = {
        let (worker, pod) = (worker.clone(), pod.clone());
        move |incoming| {
            let (worker, incoming) = (worker.clone(), Box::new(incoming));
            spawn_for(&pod, |pod| tunnelled(worker, pod, incoming));
        }
    };
    let draining = worker.shared.draining.clone();
    if let Err(error) = serve(stream, tls, &worker.shared.limits, handler, draining).await {
        if let weft_transport::ServeError::Tls(peer) = &error {
            worker.shared.metrics.tls_refused(peer.reason());
        }
        refused(error.reason(), error.to_string());
    }
}

/// Serves one stream of a tunnel.
async fn tunnelled(worker: Rc<Worker>, pod: Arc<PodHandle>, incoming: Box<Incoming>) {
    let to = incoming.authority.as_ref().copied().unwrap_or(incoming.local_addr);
    let mut connection =
        Connection::new(worker.shared.metrics.clone(), Reporter::destination, incoming.peer_addr, to);
    connection.security = Security::mutual_tls;
    connection.trace = incoming.traceparent.clone();
    connection.destination = Party::workload(pod.workload.clone());
    let source = worker.snapshot().mesh.workload_at(incoming.peer_addr.ip());
    connection.source = Party {
        workload: source.filter(|w| w.identity == incoming.peer),
        principal: Some(incoming.peer.clone()),
    };
    let Ok(_permit) = pod.permits.try_acquire() else {
        incoming.refuse(503, "too many connections");
        return connection.refused(&Refusal::new("too_many_connections", "the pod's limit is reached"));
    };
    // What is needed to answer is not needed any more once the stream flows.
    match Box::pin(answer(&worker, &pod, &mut connection, incoming)).await {
        Ok((app, stream, admission)) => {
            let counters = Counters::default();
            carry(&mut connection, Some(admission), &counters, pin!(relay(app, stream, &counters))).await;
        }
        Err(refusal) => connection.refused(&refusal),
    }
}

/// Connects to the application and accepts the stream, or refuses it with the reason.
async fn answer(
    worker: &Worker,
    pod: &PodHandle,
    connection: &mut Connection,
    incoming: Box<Incoming>,
) -> Result<(TcpStream, Stream, Admission), Refusal> {
    let to = match check(pod, &incoming) {
        Ok(to) => to,
        Err((status, refusal)) => {
            incoming.refuse(status, &refusal.detail);
            return Err(refusal);
        }
    };
    let (identity, source) = (Some(incoming.peer.clone()), incoming.peer_addr.ip());
    let admitted = authorization::admit(worker, pod, connection, identity, source, to.port()).await;
    let admission = match admitted {
        Ok(admission) => admission,
        Err(refusal) => {
            incoming.refuse(403, &refusal.detail);
            return Err(refusal);
        }
    };
    match deliver(worker, pod, incoming.peer_addr, to).await {
        Ok(app) => {
            let stream = incoming.accept(None).map_err(|e| Refusal::new(e.reason(), e))?;
            Ok((app, stream, admission))
        }
        Err(refusal) => {
            incoming.refuse(503, &refusal.detail);
            Err(refusal)
        }
    }
}

/// Whether the request means this pod, and a port of its own.
fn check(pod: &PodHandle, incoming: &Incoming) -> Result<SocketAddr, (u16, Refusal)> {
    let to = match &incoming.authority {
        Ok(to) => *to,
        Err(malformed) => return Err((400, Refusal::new("malformed", malformed))),
    };
    if !pod.owns(to.ip()) {
        let detail = format!("{} is not an address of the pod that was reached", to.ip());
        return Err((400, Refusal::new("not_this_pod", detail)));
    }
    if to.port() == TUNNEL_PORT || to.port() == pod.kernel.listener_port() {
        return Err((403, Refusal::new("own_port", format!("port {} is the agent's own", to.port()))));
    }
    match &incoming.destination_uid {
        Some(uid) if !uid.is_empty() && **uid != *pod.uid => {
            let detail = format!("this is {}, not {uid}: the address changed hands", pod.uid);
            Err((421, Refusal::new("other_workload", detail)))
        }
        _ => Ok(to),
    }
}

/// Serves a plaintext connection: let in if policies admit callers without identity, and its source is not enrolled, which
/// would never send plaintext.
pub async fn plain(
    worker: Rc<Worker>,
    pod: Arc<PodHandle>,
    stream: TcpStream,
    from: SocketAddr,
    to: SocketAddr,
) {
    let mut connection = Connection::new(worker.shared.metrics.clone(), Reporter::destination, from, to);
    connection.destination = Party::workload(pod.workload.clone());
    match Box::pin(admit(&worker, &pod, &mut connection)).await {
        Ok((app, admission)) => {
            let counters = Counters::default();
            carry(&mut connection, Some(admission), &counters, pin!(relay_plain(app, stream, &counters)))
                .await;
        }
        Err(refusal) => connection.refused(&refusal),
    }
}

/// Connects to the application for a plaintext caller that may come in.
async fn admit(
    worker: &Worker,
    pod: &PodHandle,
    connection: &mut Connection,
) -> Result<(TcpStream, Admission), Refusal> {
    let (from, to) = (connection.from, connection.to);
    let decide = |snapshot: &Snapshot| match snapshot.mesh.kind(from.ip()) {
        AddressKind::Unknown if snapshot.in_range(from.ip()) && !is_node_address(from) => None,
        kind => Some(kind),
    };
    let unknown = || Refusal::new("unknown_source", "nobody has heard of the caller's address");
    let kind = worker.hold(decide).await.ok_or_else(unknown)?;
    if matches!(kind, AddressKind::Enrolled | AddressKind::Meshed) && pod.phase() == Phase::Published {
        return Err(Refusal::new(
            "plaintext_from_enrolled",
            "the caller is in the mesh and must use its tunnel",
        ));
    }
    // Whoever it says it is, nothing proves it: the workload is named, no principal is.
    connection.source = Party { workload: worker.snapshot().mesh.workload_at(from.ip()), principal: None };
    let admission = authorization::admit(worker, pod, connection, None, from.ip(), to.port()).await?;
    Ok((deliver(worker, pod, from, to).await?, admission))
}

/// Connects to the application from the caller's own address.
async fn deliver(
    worker: &Worker,
    pod: &PodHandle,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<TcpStream, Refusal> {
    let refusal = |error: std::io::Error| Refusal::new("application_refused", format!("{to}: {error}"));
    let socket = pod.kernel.inbound_socket(from.ip(), to).map_err(refusal)?;
    connected(socket, worker.shared.limits.connect_timeout).await.map_err(refusal)
}

/// Whether the caller is this node itself: its bridge may have an address in the pods' range that no workload claims.
fn is_node_address(from: SocketAddr) -> bool {
    let addresses = match nix::ifaddrs::getifaddrs() {
        Ok(addresses) => addresses,
        Err(error) => {
            warn!(%error, "listing the node's addresses");
            return false;
        }
    };
    addresses.filter_map(|i| i.address).any(|a| {
        let v4 = a.as_sockaddr_in().map(|a| std::net::IpAddr::from(a.ip()));
        v4.or_else(|| a.as_sockaddr_in6().map(|a| a.ip().into())) == Some(from.ip())
    })
}
