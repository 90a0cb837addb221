//! What leads where, as news come and go. The makers of workloads and services serve other tests, too.

use super::*;
use crate::{NodePort, PortMapping, SpiffeId, TrustDomain};

pub(crate) fn ip(s: &str) -> IpAddr {
    s.parse().expect("an address")
}

pub(crate) fn workload(
    name: &str,
    addresses: &[&str],
    tunnel: Tunnel,
    services: &[(&str, u16, u16)],
) -> Entry {
    let trust = TrustDomain::new("cluster.local").expect("valid");
    Entry::Workload(Arc::new(Workload {
        uid: format!("c//Pod/ns/{name}").into(),
        name: name.into(),
        namespace: "ns".into(),
        workload_name: name.into(),
        identity: SpiffeId::new(trust, "ns", name).expect("valid"),
        node: "n".into(),
        zone: "".into(),
        network: "".into(),
        host_network: false,
        addresses: addresses.iter().map(|a| ip(a)).collect(),
        tunnel,
        health: Health::Ready,
        services: services
            .iter()
            .map(|&(s, service_port, target_port)| {
                (s.into(), vec![PortMapping { service_port, target_port }])
            })
            .collect(),
        policies: Vec::new(),
    }))
}

fn service(key: &str, addresses: &[&str]) -> Entry {
    outer_service(key, addresses, 80, &[], None)
}

/// One that also takes connections to external addresses, and to a port of every node.
pub(crate) fn outer_service(
    key: &str,
    addresses: &[&str],
    port: u16,
    external: &[&str],
    node_port: Option<u16>,
) -> Entry {
    Entry::Service(Arc::new(Service {
        key: key.into(),
        name: key.into(),
        namespace: "ns".into(),
        addresses: addresses.iter().map(|a| ip(a)).collect(),
        ports: vec![PortMapping { service_port: port, target_port: 8080 }],
        external_addresses: external.iter().map(|a| ip(a)).collect(),
        node_ports: node_port
            .map(|node_port| NodePort { service_port: port, node_port })
            .into_iter()
            .collect(),
        nearness: Nearness::Any,
        accepts_unready: false,
        affinity: None,
    }))
}

/// Who answers there, in few words.
pub(crate) fn at(mesh: &Mesh, to: &str) -> String {
    match mesh.destination(to.parse().expect("an address and a port")) {
        Destination::Service { service, port } => format!("{} port {port}", service.key),
        Destination::Workload(workload) => workload.name.to_string(),
        Destination::Conflict => "conflict".to_owned(),
        Destination::Outside => "outside".to_owned(),
        Destination::Unknown => "unknown".to_owned(),
    }
}

pub(crate) fn address(text: &str) -> Target {
    Target::Address(ip(text))
}

#[test]
fn kinds_follow_enrollment() {
    let mut mesh = Mesh::new("");
    assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Unknown);
    let touched = mesh.apply(
        [service("ns/s", &["10.96.0.1"]), workload("a", &["10.0.0.1"], Tunnel::None, &[("ns/s", 80, 8080)])],
        [],
    );
    assert_eq!(touched, BTreeSet::from([address("10.0.0.1"), address("10.96.0.1")]));
    assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Unmeshed);
    assert_eq!(mesh.kind(ip("10.96.0.1")), AddressKind::Unmeshed);

    let touched = mesh.apply([workload("a", &["10.0.0.1"], Tunnel::Hbone, &[("ns/s", 80, 8080)])], []);
    assert!(touched.contains(&address("10.96.0.1")), "the service's address changed with its endpoint");
    assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Enrolled);
    assert_eq!(mesh.kind(ip("10.96.0.1")), AddressKind::Meshed);

    let touched = mesh.apply([], ["c//Pod/ns/a".into()]);
    assert!(touched.contains(&address("10.0.0.1")));
    assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Unknown);
    assert_eq!(mesh.kind(ip("10.96.0.1")), AddressKind::Unmeshed);
}

#[test]
fn an_address_two_workloads_claim_belongs_to_nobody_until_one_leaves() {
    let mut mesh = Mesh::new("");
    mesh.apply([workload("old", &["10.0.0.1"], Tunnel::Hbone, &[])], []);
    mesh.apply([workload("new", &["10.0.0.1"], Tunnel::None, &[])], []);
    assert_eq!(at(&mesh, "10.0.0.1:80"), "conflict");
    assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Meshed);
    mesh.apply([], ["c//Pod/ns/old".into()]);
    assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Unmeshed);
}

#[test]
fn an_address_changes_hands_within_one_delta() {
    let mut mesh = Mesh::new("");
    mesh.apply([workload("a", &["10.0.0.1"], Tunnel::Hbone, &[])], []);
    mesh.apply(
        [workload("a", &["10.0.0.2"], Tunnel::Hbone, &[]), workload("b", &["10.0.0.1"], Tunnel::None, &[])],
        [],
    );
    assert_eq!(mesh.workload_at(ip("10.0.0.1")).map(|w| w.name.clone()), Some("b".into()));
    assert_eq!(mesh.kind(ip("10.0.0.2")), AddressKind::Enrolled);
}

#[test]
fn host_network_pods_claim_no_address() {
    let mut mesh = Mesh::new("");
    let Entry::Workload(w) = workload("h", &["10.0.0.9"], Tunnel::None, &[]) else { unreachable!() };
    mesh.apply([Entry::Workload(Arc::new(Workload { host_network: true, ..(*w).clone() }))], []);
    assert_eq!(mesh.kind(ip("10.0.0.9")), AddressKind::Unknown);
}

#[test]
fn endpoints_serve_the_port_and_are_healthy() {
    let mut mesh = Mesh::new("");
    let Entry::Workload(sick) = workload("sick", &["10.0.0.3"], Tunnel::None, &[("ns/s", 80, 1)]) else {
        unreachable!()
    };
    mesh.apply(
        [
            service("ns/s", &["10.96.0.1"]),
            workload("a", &["10.0.0.1"], Tunnel::None, &[("ns/s", 80, 8080)]),
            workload("other", &["10.0.0.2"], Tunnel::None, &[("ns/s", 443, 8443)]),
            Entry::Workload(Arc::new(Workload { health: Health::Unready, ..(*sick).clone() })),
        ],
        [],
    );
    let Destination::Service { service: s, port: 80 } =
        mesh.destination(SocketAddr::new(ip("10.96.0.1"), 80))
    else {
        panic!("no service")
    };
    let here = Caller { node: "n", zone: "", dialled: ip("10.96.0.1") };
    let mut n = 0;
    for _ in 0..100 {
        let random = |len: usize| {
            n += 1;
            n % len
        };
        let (w, port) = mesh.endpoint(&s, 80, here, random, |_| 0).expect("an endpoint");
        assert_eq!((&*w.name, port), ("a", 8080));
    }
    assert!(mesh.endpoint(&s, 81, here, |_| 0, |_| 0).is_none());
}

#[test]
fn the_same_endpoint_again_while_it_may_be_given() {
    let mut mesh = Mesh::new("");
    let Entry::Workload(a) = workload("a", &["10.0.0.1"], Tunnel::None, &[("ns/s", 80, 8080)]) else {
        unreachable!()
    };
    mesh.apply([Entry::Workload(a.clone())], []);
    let Entry::Service(any) = service("ns/s", &["10.96.0.1"]) else { unreachable!() };
    let local = Service { nearness: Nearness::OnlyNode, ..(*any).clone() };
    let (here, elsewhere) = (
        Caller { node: "n", zone: "", dialled: ip("10.96.0.1") },
        Caller { node: "m", zone: "", dialled: ip("10.96.0.1") },
    );
    let again = |mesh: &Mesh, service: &Service, port, caller| {
        mesh.endpoint_again(service, port, caller, "c//Pod/ns/a").map(|(_, port)| port)
    };
    assert_eq!(again(&mesh, &any, 80, elsewhere), Some(8080));
    assert_eq!(again(&mesh, &any, 81, here), None);
    assert_eq!(again(&mesh, &local, 80, here), Some(8080));
    assert_eq!(again(&mesh, &local, 80, elsewhere), None);
    mesh.apply([Entry::Workload(Arc::new(Workload { health: Health::Unready, ..(*a).clone() }))], []);
    assert_eq!(again(&mesh, &any, 80, here), None);
    assert_eq!(again(&mesh, &Service { accepts_unready: true, ..(*any).clone() }, 80, here), Some(8080));
    mesh.apply([], ["c//Pod/ns/a".into()]);
    assert_eq!(again(&mesh, &any, 80, here), None);
}
