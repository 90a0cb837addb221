//! Connections that an enrolled pod opened: find out who is meant, then carry the bytes there, through a tunnel to
//! whoever is enrolled, as they are to whoever is known not to be.

use std::{
    fmt::Write,
    io,
    net::{IpAddr, SocketAddr},
    pin::pin,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use rand::Rng;
use tokio::{net::TcpStream, time::Instant};
use weft_core::{Caller, Mesh, Service, TUNNEL_PORT, Tunnel, Workload, mesh::Destination};
use weft_transport::{ConnectRequest, Counters, OpenError, Stream, TunnelKey, relay, relay_plain};

use crate::{
    affinity,
    connection::{Connection, Party, Refusal, carry},
    metrics::{Reporter, Security},
    pod::{Phase, PodHandle},
    state::Snapshot,
    worker::{Load, Worker, connected},
};

/// How much later than this agent others may hear the same: less than a pod that leaves goes on by its agent.
const NEWS_SPREAD: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(20);

/// Where a connection goes.
enum Route {
    Workload {
        workload: Arc<Workload>,
        to: SocketAddr,
        service: Option<Arc<Service>>,
    },
    /// To nobody of the mesh: where the application dialled.
    Outside,
}

pub async fn serve(
    worker: Rc<Worker>,
    pod: Arc<PodHandle>,
    app: TcpStream,
    from: SocketAddr,
    to: SocketAddr,
) {
    let mut connection = Connection::new(worker.shared.metrics.clone(), Reporter::source, from, to);
    connection.source = Party::workload(pod.workload.clone());
    let counters = Counters::default();
    // Opening needs several times the memory that carrying does, and is over soon.
    match Box::pin(open(&worker, &pod, &mut connection)).await {
        Ok((Far::Tunnel(stream), _load)) => {
            carry(&mut connection, None, &counters, pin!(relay(app, stream, &counters))).await;
        }
        Ok((Far::Socket(socket), _load)) => {
            carry(&mut connection, None, &counters, pin!(relay_plain(app, socket, &counters))).await;
        }
        Err(refusal) => connection.refused(&refusal),
    }
}

/// The other side of a connection.
enum Far {
    Tunnel(Stream),
    Socket(TcpStream),
}

/// Connects to whoever is meant by the dialled address.
async fn open(
    worker: &Rc<Worker>,
    pod: &Arc<PodHandle>,
    connection: &mut Connection,
) -> Result<(Far, Option<Load>), Refusal> {
    wait_for_publication(worker, pod).await?;
    let (workload, to) = match route(worker, pod, connection.to).await? {
        Route::Outside => (None, connection.to),
        Route::Workload { workload, to, service } => {
            connection.service = service;
            connection.destination = Party { workload: Some(workload.clone()), principal: None };
            (Some(workload), to)
        }
    };
    connection.via = Some(to);
    match workload {
        // Unless it is the pod itself, by way of a service: that never leaves the pod and needs no tunnel. Another pod that
        // was made under its name on another node is not itself.
        Some(workload) if workload.tunnel == Tunnel::Hbone && !pod.owns(to.ip()) => {
            let load = worker.load_on(&workload.uid);
            connection.security = Security::mutual_tls;
            connection.destination.principal = Some(workload.identity.clone());
            let stream = through_tunnel(worker, pod, &workload, to, connection).await?;
            Ok((Far::Tunnel(stream), Some(load)))
        }
        workload => {
            let load = workload.map(|w| worker.load_on(&w.uid));
            Ok((Far::Socket(as_it_is(worker, pod, to).await?), load))
        }
    }
}

async fn wait_for_publication(worker: &Worker, pod: &PodHandle) -> Result<(), Refusal> {
    if pod.phase() != Phase::Hold {
        return Ok(());
    }
    let mut phase = pod.phase.subscribe();
    match tokio::time::timeout(worker.shared.config.hold_timeout, phase.wait_for(|p| *p != Phase::Hold)).await
    {
        Ok(Ok(_)) => Ok(()),
        _ => Err(Refusal::new("not_published", "the controller has not announced this pod as a member yet")),
    }
}

/// Who answers at `to`, waiting for news while nobody has heard of it.
async fn route(worker: &Rc<Worker>, pod: &PodHandle, to: SocketAddr) -> Result<Route, Refusal> {
    let decide = |snapshot: &Snapshot| match snapshot.mesh.destination(to) {
        Destination::Workload(workload) => Some(Ok(Route::Workload { workload, to, service: None })),
        Destination::Service { service, port } => {
            let found = endpoint(worker, pod, &snapshot.mesh, &service, port, to.ip());
            let endpoint = found.and_then(|(w, port)| Some((w.address_like(to.ip())?, port, w)));
            Some(match endpoint {
                Some((ip, port, workload)) => {
                    Ok(Route::Workload { workload, to: SocketAddr::new(ip, port), service: Some(service) })
                }
                None => Err(Refusal::new(
                    "no_endpoint",
                    format!("service {} has no healthy endpoint for port {port}", service.key),
                )),
            })
        }
        Destination::Conflict => {
            Some(Err(Refusal::new("address_conflict", "two workloads or services claim the address or port")))
        }
        Destination::Unknown if snapshot.in_range(to.ip()) => None,
        Destination::Unknown | Destination::Outside => Some(Ok(Route::Outside)),
    };
    worker.hold(decide).await.unwrap_or_else(|| {
        Err(Refusal::new("unknown_destination", "no workload or service at that address is known"))
    })
}

/// The endpoint of `service` that the pod is given, and its port there.
fn endpoint(
    worker: &Worker,
    pod: &PodHandle,
    mesh: &Mesh,
    service: &Service,
    port: u16,
    dialled: IpAddr,
) -> Option<(Arc<Workload>, u16)> {
    let own = mesh.workload(&pod.uid).unwrap_or(&pod.workload);
    let caller = Caller { node: &worker.shared.config.node, zone: &own.zone, dialled };
    let Some(timeout) = service.affinity else {
        let load = worker.load.borrow();
        let load = |w: &Workload| load.get(&w.uid).copied().unwrap_or(0);
        return mesh.endpoint(service, port, caller, |n| rand::rng().random_range(0..n), load);
    };
    let again = pod.affinity.endpoint(&service.key);
    let again = again.and_then(|uid| mesh.endpoint_again(service, port, caller, &uid));
    let found = again.or_else(|| {
        let mut choice = affinity::first_choice(&pod.uid, &service.key);
        mesh.endpoint(service, port, caller, |n| choice.random_range(0..n), |_| 0)
    })?;
    pod.affinity.keep(&service.key, found.0.uid.clone(), timeout);
    Some(found)
}

async fn through_tunnel(
    worker: &Rc<Worker>,
    pod: &Arc<PodHandle>,
    workload: &Workload,
    to: SocketAddr,
    connection: &mut Connection,
) -> Result<Stream, Refusal> {
    let tunnel = SocketAddr::new(to.ip(), TUNNEL_PORT);
    connection.via = Some(tunnel);
    let key = TunnelKey {
        pod: pod.kernel.cookie(),
        source: pod.identity().clone(),
        to: tunnel,
        expected: workload.identity.clone(),
    };
    let trace = traceparent();
    connection.trace = Some(trace.clone());
    let request = ConnectRequest {
        authority: to,
        destination_uid: workload.uid.to_string(),
        baggage: pod.baggage.clone(),
        forwarded: Some(format!("for=\"{}\"", connection.from)),
        traceparent: Some(trace),
    };
    let timeout = worker.shared.config.hold_timeout;
    let mut identities = worker.shared.identities.clone();
    let mut tries = 0;
    let opened = loop {
        let tls = identities.get(pod.identity(), timeout).await.ok_or_else(|| {
            Refusal::new("no_certificate", format!("there is no certificate for {}", pod.identity()))
        })?;
        let dial = || pod.kernel.outbound_socket(tunnel);
        let opened = worker.pool.open(key.clone(), &tls, request.clone(), dial).await;
        tries += 1;
        match &opened {
            // Nothing was asked of the peer, and what stood between is not in use any more.
            Err(OpenError::Tls(_) | OpenError::Closed)
                if tries < 2 && identities.has_changed(pod.identity(), &tls) => {}
            _ => break opened,
        }
    };
    let opened = opened.map_err(|error| {
        if let OpenError::Tls(refused) = &error {
            worker.shared.metrics.tls_refused(refused.reason());
        }
        Refusal::new(error.reason(), &error)
    })?;
    Ok(opened.stream)
}

/// Plain TCP from the pod's own address. Whoever has not heard yet that the pod leaves the mesh refuses that from it, so it is
/// tried again while that may be.
async fn as_it_is(worker: &Rc<Worker>, pod: &Arc<PodHandle>, to: SocketAddr) -> Result<TcpStream, Refusal> {
    let started = Instant::now();
    let is_leaving = || {
        let own = worker.snapshot().mesh.workload(&pod.uid).map(|own| own.tunnel);
        own != Some(Tunnel::Hbone) && started.elapsed() < NEWS_SPREAD
    };
    loop {
        let dial = async {
            let socket = pod.kernel.outbound_socket(to)?;
            connected(socket, worker.shared.limits.connect_timeout).await
        };
        match dial.await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_leaving() => {
                tokio::time::sleep(RETRY).await;
            }
            result => return result.map_err(|error| Refusal::new("dial", format!("{to}: {error}"))),
        }
    }
}

/// A new W3C trace context, not sampled: it ties the two agents' access log lines together.
fn traceparent() -> String {
    let (trace, span): (u128, u64) = rand::rng().random();
    let mut text = String::with_capacity(55);
    // Writing to a String cannot fail. All-zero ids are invalid.
    let _ = write!(text, "00-{:032x}-{:016x}-00", trace.max(1), span.max(1));
    text
}
