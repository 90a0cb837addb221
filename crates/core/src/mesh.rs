//! The agent's picture of the mesh: an immutable snapshot that is cheap to copy and to change.
//!
//! The agent's control task owns the newest [`Mesh`], applies deltas, and hands copies to the workers; maps are
//! persistent, so a copy shares everything that did not change.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::{HashMap, Vector};

use crate::{
    endpoints::{Caller, Endpoints},
    frontends::Frontends,
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
    /// A node's. What is at it depends on the port, which may be a node port.
    Node,
    /// An external address of services, and no node's. What is at it depends on the port.
    External,
}

/// What the capture set can have an entry for, beside whole ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Every port of it; see [`Mesh::kind`].
    Address(IpAddr),
    /// A service's port at an external address; see [`Mesh::is_meshed`].
    Port(SocketAddr),
    /// This port of every node; see [`Mesh::is_meshed`].
    NodePort(u16),
}

/// Who answers at an address and port.
#[derive(Debug, Clone)]
pub enum Destination {
    /// A service, and which of its ports is meant, if it has that.
    Service {
        service: Arc<Service>,
        port: u16,
    },
    Workload(Arc<Workload>),
    /// Claimed by more than one workload or service; nobody gets its identity.
    Conflict,
    /// A known address at a port that does not lead into the mesh.
    Outside,
    Unknown,
}

/// To whom a whole address belongs.
enum Owner<'a> {
    Service(&'a Arc<Service>),
    Workload(&'a Arc<Workload>),
    Conflict,
    Nobody,
}

/// A snapshot of every workload and service of the agent's own network.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    entries: HashMap<Arc<str>, Entry>,
    workloads_at: HashMap<IpAddr, Vector<Arc<Workload>>>,
    services_at: HashMap<IpAddr, Vector<Arc<Service>>>,
    frontends: Frontends,
    endpoints: HashMap<Arc<str>, Endpoints>,
    network: Arc<str>,
}

impl Mesh {
    /// An empty mesh as seen from `network`; addresses of other networks are kept but lead nowhere from here.
    pub fn new(network: &str) -> Self {
        Self { network: network.into(), ..Self::default() }
    }

    /// Takes in a delta. Returns of what [`kind`](Self::kind) or [`is_meshed`](Self::is_meshed) may have changed.
    pub fn apply(
        &mut self,
        upserts: impl IntoIterator<Item = Entry>,
        removed: impl IntoIterator<Item = Arc<str>>,
    ) -> BTreeSet<Target> {
        let mut touched = Touched::default();
        for key in removed {
            self.remove(&key, &mut touched);
        }
        for entry in upserts {
            self.remove(entry.key(), &mut touched);
            self.insert(entry, &mut touched);
        }
        // An endpoint that came, went or changed may have changed what its services' addresses are.
        let Touched { mut targets, services } = touched;
        for key in services {
            if let Some(Entry::Service(service)) = self.entries.get(&key) {
                targets.extend(targets_of(service));
            }
        }
        targets
    }

    /// Takes in what is said of nodes: their addresses by name, or none of one that is gone. Returns as
    /// [`apply`](Self::apply) does.
    pub fn apply_nodes(
        &mut self,
        nodes: impl IntoIterator<Item = (Arc<str>, Option<Vec<IpAddr>>)>,
    ) -> BTreeSet<Target> {
        let mut touched = BTreeSet::new();
        for (name, addresses) in nodes {
            self.frontends.set_node(name, addresses, &mut touched);
        }
        touched
    }

    fn insert(&mut self, entry: Entry, touched: &mut Touched) {
        match &entry {
            Entry::Workload(w) => {
                if self.is_reachable(w) {
                    for ip in &w.addresses {
                        self.workloads_at.entry(*ip).or_default().push_back(w.clone());
                        touched.targets.insert(Target::Address(*ip));
                    }
                }
                for (service, _) in &w.services {
                    self.endpoints.entry(service.clone()).or_default().insert(w.clone());
                    touched.services.insert(service.clone());
                }
            }
            Entry::Service(s) => {
                for ip in &s.addresses {
                    self.services_at.entry(*ip).or_default().push_back(s.clone());
                }
                self.frontends.insert(s);
                touched.targets.extend(targets_of(s));
            }
        }
        self.entries.insert(entry.key().clone(), entry);
    }

    fn remove(&mut self, key: &Arc<str>, touched: &mut Touched) {
        match self.entries.remove(key) {
            Some(Entry::Workload(w)) => {
                for ip in &w.addresses {
                    remove_from(&mut self.workloads_at, ip, |at| at.uid == w.uid);
                    touched.targets.insert(Target::Address(*ip));
                }
                for (service, _) in &w.services {
                    if let Some(endpoints) = self.endpoints.get_mut(service) {
                        endpoints.remove(&w);
                        if endpoints.is_empty() {
                            self.endpoints.remove(service);
                        }
                    }
                    touched.services.insert(service.clone());
                }
            }
            Some(Entry::Service(s)) => {
                for ip in &s.addresses {
                    remove_from(&mut self.services_at, ip, |at| at.key == s.key);
                }
                self.frontends.remove(&s);
                touched.targets.extend(targets_of(&s));
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

    /// Every node's name and addresses, in no order.
    pub fn nodes(&self) -> impl Iterator<Item = (&Arc<str>, &[IpAddr])> {
        self.frontends.nodes()
    }

    /// Everything that may need an entry in the capture set, in no order and with repetitions.
    pub fn targets(&self) -> impl Iterator<Item = Target> {
        let of_entry = |entry: &Entry| match entry {
            Entry::Workload(w) => w.addresses.iter().copied().map(Target::Address).collect(),
            Entry::Service(s) => targets_of(s).collect::<Vec<_>>(),
        };
        self.entries().flat_map(of_entry).chain(self.frontends.node_addresses().map(Target::Address))
    }

    /// An enrolled workload's address and a service's cluster address are its own, whatever ports others claim there.
    /// What else nodes and external addresses coincide with yields to them, as it does to kube-proxy's rules: the API
    /// server's endpoint, for one, has its node's address.
    pub fn kind(&self, ip: IpAddr) -> AddressKind {
        match self.owner(ip) {
            Owner::Conflict => AddressKind::Meshed,
            Owner::Workload(w) if w.tunnel == Tunnel::Hbone => AddressKind::Enrolled,
            Owner::Service(s) if self.has_enrolled(s) => AddressKind::Meshed,
            Owner::Service(_) => AddressKind::Unmeshed,
            _ if self.frontends.is_node(ip) => AddressKind::Node,
            _ if self.frontends.is_external(ip) => AddressKind::External,
            Owner::Workload(_) => AddressKind::Unmeshed,
            Owner::Nobody => AddressKind::Unknown,
        }
    }

    /// Whether a port of an external address, or of all nodes, leads to a service with an enrolled endpoint.
    pub fn is_meshed(&self, target: Target) -> bool {
        match target {
            Target::Address(ip) => matches!(self.kind(ip), AddressKind::Meshed | AddressKind::Enrolled),
            Target::Port(at) => self.frontends.external(at).any(|s| self.has_enrolled(s)),
            Target::NodePort(port) => self.frontends.node_port(port).any(|s| self.has_enrolled(s)),
        }
    }

    fn has_enrolled(&self, service: &Service) -> bool {
        self.endpoints.get(&service.key).is_some_and(Endpoints::has_enrolled)
    }

    fn owner(&self, ip: IpAddr) -> Owner<'_> {
        let (services, workloads) = (self.services_at.get(&ip), self.workloads_at.get(&ip));
        let mut services = services.into_iter().flatten();
        let mut workloads = workloads.into_iter().flatten();
        match (services.next(), services.next(), workloads.next(), workloads.next()) {
            (None, _, None, _) => Owner::Nobody,
            (Some(service), None, None, _) => Owner::Service(service),
            (None, _, Some(workload), None) => Owner::Workload(workload),
            _ => Owner::Conflict,
        }
    }

    /// Who is meant by `to`.
    pub fn destination(&self, to: SocketAddr) -> Destination {
        let owner = self.owner(to.ip());
        match owner {
            Owner::Conflict => return Destination::Conflict,
            Owner::Service(service) => {
                return Destination::Service { service: service.clone(), port: to.port() };
            }
            Owner::Workload(w) if w.tunnel == Tunnel::Hbone => return Destination::Workload(w.clone()),
            Owner::Workload(_) | Owner::Nobody => {}
        }
        let claims = self.frontends.claims(to);
        if claims.iter().any(|(service, _)| self.has_enrolled(service)) {
            return match claims[..] {
                [(service, port)] => Destination::Service { service: service.clone(), port },
                _ => Destination::Conflict,
            };
        }
        match owner {
            Owner::Workload(workload) => Destination::Workload(workload.clone()),
            _ if self.frontends.is_node(to.ip()) || self.frontends.is_external(to.ip()) => {
                Destination::Outside
            }
            _ => Destination::Unknown,
        }
    }

    /// The workload at `ip`, if exactly one claims it.
    pub fn workload_at(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        match self.owner(ip) {
            Owner::Workload(w) => Some(w.clone()),
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
        let is_near = caller.nearness(service) != Nearness::OnlyNode || &*workload.node == caller.node;
        let is_well = workload.health == Health::Ready || service.accepts_unready;
        let port = workload.target_port(&service.key, port)?;
        (is_near && is_well && !workload.addresses.is_empty()).then(|| (workload.clone(), port))
    }
}

/// What a delta may have changed.
#[derive(Default)]
struct Touched {
    targets: BTreeSet<Target>,
    /// Services of which an endpoint changed.
    services: HashSet<Arc<str>>,
}

/// Everything that leads to a service.
fn targets_of(service: &Service) -> impl Iterator<Item = Target> {
    let addresses = service.addresses.iter().chain(&service.external_addresses).copied().map(Target::Address);
    let node_ports = service.node_ports.iter().map(|p| Target::NodePort(p.node_port));
    addresses.chain(service.external_ports().map(Target::Port)).chain(node_ports)
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
pub(crate) mod tests;
