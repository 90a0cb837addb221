//! The agent's picture of the mesh: an immutable snapshot that is cheap to copy and to change.
//!
//! The agent's control task owns the newest [`Mesh`], applies deltas, and hands copies to the workers; maps are
//! persistent, so a copy shares everything that did not change.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
};

use imbl::{HashMap, Vector};

use crate::{
    endpoints::{Caller, Endpoints},
    workload::{Health, Nearness, Service, Tunnel, Workload},
};

/// One resource of the mesh-wide state.
#[derive(Debug, Clone)]
pub enum Entry {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
}

impl Entry {
    /// The resource's name on the wire.
    pub fn key(&self) -> &Arc<str> {
        match self {
            Entry::Workload(w) => &w.uid,
            Entry::Service(s) => &s.key,
        }
    }
}

/// What an address is, as far as capture and refusal are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressKind {
    /// Nobody has heard of it yet.
    Unknown,
    /// Known, and nothing behind it is enrolled.
    Unmeshed,
    /// A service with at least one enrolled endpoint, or an address that two workloads claim.
    Meshed,
    /// The address of exactly one workload, which is enrolled: it never sends plaintext, and never accepts any.
    Enrolled,
}

/// Who answers at an address.
#[derive(Debug, Clone)]
pub enum Destination {
    Service(Arc<Service>),
    Workload(Arc<Workload>),
    /// Claimed by more than one workload or service; nobody gets its identity.
    Conflict,
    Unknown,
}

/// A snapshot of every workload and service of the agent's own network.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    entries: HashMap<Arc<str>, Entry>,
    workloads_at: HashMap<IpAddr, Vector<Arc<Workload>>>,
    services_at: HashMap<IpAddr, Vector<Arc<Service>>>,
    endpoints: HashMap<Arc<str>, Endpoints>,
    network: Arc<str>,
}

impl Mesh {
    /// An empty mesh as seen from `network`; addresses of other networks are kept but lead nowhere from here.
    pub fn new(network: &str) -> Self {
        Self { network: network.into(), ..Self::default() }
    }

    /// Takes in a delta. Returns the addresses whose [`kind`](Self::kind) may have changed.
    pub fn apply(
        &mut self,
        upserts: impl IntoIterator<Item = Entry>,
        removed: impl IntoIterator<Item = Arc<str>>,
    ) -> BTreeSet<IpAddr> {
        let mut touched = HashSet::new();
        for key in removed {
            self.remove(&key, &mut touched);
        }
        for entry in upserts {
            self.remove(entry.key(), &mut touched);
            self.insert(entry, &mut touched);
        }
        // An endpoint that came, went or changed may have changed what its services' addresses are.
        let (mut addresses, mut services) = (BTreeSet::new(), HashSet::new());
        for touch in touched {
            match touch {
                Touched::Address(ip) => {
                    addresses.insert(ip);
                }
                Touched::Service(key) => {
                    services.insert(key);
                }
            }
        }
        for key in services {
            if let Some(Entry::Service(service)) = self.entries.get(&key) {
                addresses.extend(&service.addresses);
            }
        }
        addresses
    }

    fn insert(&mut self, entry: Entry, touched: &mut HashSet<Touched>) {
        match &entry {
            Entry::Workload(w) => {
                if self.is_reachable(w) {
                    for ip in &w.addresses {
                        self.workloads_at.entry(*ip).or_default().push_back(w.clone());
                        touched.insert(Touched::Address(*ip));
                    }
                }
                for (service, _) in &w.services {
                    self.endpoints.entry(service.clone()).or_default().insert(w.clone());
                    touched.insert(Touched::Service(service.clone()));
                }
            }
            Entry::Service(s) => {
                for ip in &s.addresses {
                    self.services_at.entry(*ip).or_default().push_back(s.clone());
                    touched.insert(Touched::Address(*ip));
                }
            }
        }
        self.entries.insert(entry.key().clone(), entry);
    }

    fn remove(&mut self, key: &Arc<str>, touched: &mut HashSet<Touched>) {
        match self.entries.remove(key) {
            Some(Entry::Workload(w)) => {
                for ip in &w.addresses {
                    remove_from(&mut self.workloads_at, ip, |at| at.uid == w.uid);
                    touched.insert(Touched::Address(*ip));
                }
                for (service, _) in &w.services {
                    if let Some(endpoints) = self.endpoints.get_mut(service) {
                        endpoints.remove(&w);
                        if endpoints.is_empty() {
                            self.endpoints.remove(service);
                        }
                    }
                    touched.insert(Touched::Service(service.clone()));
                }
            }
            Some(Entry::Service(s)) => {
                for ip in &s.addresses {
                    remove_from(&mut self.services_at, ip, |at| at.key == s.key);
                    touched.insert(Touched::Address(*ip));
                }
            }
            None => {}
        }
    }

    /// Whether its addresses mean something from here.
    fn is_reachable(&self, workload: &Workload) -> bool {
        !workload.host_network && workload.network == self.network
    }

    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        match self.entries.get(uid) {
            Some(Entry::Workload(w)) => Some(w),
            _ => None,
        }
    }

    /// Everything that is known, in no order.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn kind(&self, ip: IpAddr) -> AddressKind {
        match self.destination(ip) {
            Destination::Unknown => AddressKind::Unknown,
            Destination::Conflict => AddressKind::Meshed,
            Destination::Workload(w) if w.tunnel == Tunnel::Hbone => AddressKind::Enrolled,
            Destination::Service(s) if self.endpoints.get(&s.key).is_some_and(Endpoints::has_enrolled) => {
                AddressKind::Meshed
            }
            Destination::Workload(_) | Destination::Service(_) => AddressKind::Unmeshed,
        }
    }

    pub fn destination(&self, ip: IpAddr) -> Destination {
        let none = Vector::new();
        let services = self.services_at.get(&ip);
        let workloads = self.workloads_at.get(&ip).unwrap_or(&none);
        match (services.and_then(|s| s.front()), services.map_or(0, |s| s.len()), workloads.len()) {
            (Some(service), 1, 0) => Destination::Service(service.clone()),
            (None, _, 1) => Destination::Workload(workloads[0].clone()),
            (None, _, 0) => Destination::Unknown,
            _ => Destination::Conflict,
        }
    }

    /// The workload at `ip`, if exactly one claims it.
    pub fn workload_at(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        match self.destination(ip) {
            Destination::Workload(w) => Some(w),
            _ => None,
        }
    }

    /// An endpoint of `service` for `port`, and the port it serves there. `load` is compared between two candidates;
    /// `random(n)` returns a uniform number below n.
    pub fn endpoint(
        &self,
        service: &Service,
        port: u16,
        caller: Caller<'_>,
        random: impl FnMut(usize) -> usize,
        load: impl Fn(&Workload) -> u64,
    ) -> Option<(Arc<Workload>, u16)> {
        self.endpoints.get(&service.key)?.choose(service, port, caller, random, load)
    }

    /// As [`endpoint`](Self::endpoint), but the workload `uid` and nobody else, if it may still be given to the caller.
    pub fn endpoint_again(
        &self,
        service: &Service,
        port: u16,
        caller: Caller<'_>,
        uid: &str,
    ) -> Option<(Arc<Workload>, u16)> {
        let workload = self.workload(uid)?;
        let is_near = service.nearness != Nearness::OnlyNode || &*workload.node == caller.node;
        let is_well = workload.health == Health::Ready || service.accepts_unready;
        let port = workload.target_port(&service.key, port)?;
        (is_near && is_well && !workload.addresses.is_empty()).then(|| (workload.clone(), port))
    }
}

#[derive(PartialEq, Eq, Hash)]
enum Touched {
    Address(IpAddr),
    Service(Arc<str>),
}

fn remove_from<T: Clone>(map: &mut HashMap<IpAddr, Vector<T>>, ip: &IpAddr, is: impl Fn(&T) -> bool) {
    if let Some(at) = map.get_mut(ip) {
        at.retain(|t| !is(t));
        if at.is_empty() {
            map.remove(ip);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PortMapping, SpiffeId, TrustDomain};

    fn ip(s: &str) -> IpAddr {
        s.parse().expect("an address")
    }

    fn workload(name: &str, addresses: &[&str], tunnel: Tunnel, services: &[(&str, u16, u16)]) -> Entry {
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
        }))
    }

    fn service(key: &str, addresses: &[&str]) -> Entry {
        Entry::Service(Arc::new(Service {
            key: key.into(),
            name: key.into(),
            namespace: "ns".into(),
            addresses: addresses.iter().map(|a| ip(a)).collect(),
            ports: vec![PortMapping { service_port: 80, target_port: 8080 }],
            nearness: Nearness::Any,
            accepts_unready: false,
            affinity: None,
        }))
    }

    #[test]
    fn kinds_follow_enrollment() {
        let mut mesh = Mesh::new("");
        assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Unknown);
        let touched = mesh.apply(
            [
                service("ns/s", &["10.96.0.1"]),
                workload("a", &["10.0.0.1"], Tunnel::None, &[("ns/s", 80, 8080)]),
            ],
            [],
        );
        assert_eq!(touched, BTreeSet::from([ip("10.0.0.1"), ip("10.96.0.1")]));
        assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Unmeshed);
        assert_eq!(mesh.kind(ip("10.96.0.1")), AddressKind::Unmeshed);

        let touched = mesh.apply([workload("a", &["10.0.0.1"], Tunnel::Hbone, &[("ns/s", 80, 8080)])], []);
        assert!(touched.contains(&ip("10.96.0.1")), "the service's address changed with its endpoint");
        assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Enrolled);
        assert_eq!(mesh.kind(ip("10.96.0.1")), AddressKind::Meshed);

        let touched = mesh.apply([], ["c//Pod/ns/a".into()]);
        assert!(touched.contains(&ip("10.0.0.1")));
        assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Unknown);
        assert_eq!(mesh.kind(ip("10.96.0.1")), AddressKind::Unmeshed);
    }

    #[test]
    fn an_address_two_workloads_claim_belongs_to_nobody_until_one_leaves() {
        let mut mesh = Mesh::new("");
        mesh.apply([workload("old", &["10.0.0.1"], Tunnel::Hbone, &[])], []);
        mesh.apply([workload("new", &["10.0.0.1"], Tunnel::None, &[])], []);
        assert!(matches!(mesh.destination(ip("10.0.0.1")), Destination::Conflict));
        assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Meshed);
        mesh.apply([], ["c//Pod/ns/old".into()]);
        assert_eq!(mesh.kind(ip("10.0.0.1")), AddressKind::Unmeshed);
    }

    #[test]
    fn an_address_changes_hands_within_one_delta() {
        let mut mesh = Mesh::new("");
        mesh.apply([workload("a", &["10.0.0.1"], Tunnel::Hbone, &[])], []);
        mesh.apply(
            [
                workload("a", &["10.0.0.2"], Tunnel::Hbone, &[]),
                workload("b", &["10.0.0.1"], Tunnel::None, &[]),
            ],
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
        let Destination::Service(s) = mesh.destination(ip("10.96.0.1")) else { panic!("no service") };
        let here = Caller { node: "n", zone: "" };
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
        let (here, elsewhere) = (Caller { node: "n", zone: "" }, Caller { node: "m", zone: "" });
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
}
