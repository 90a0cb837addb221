//! Objects to what agents are sent. A pure function of the store, of who is enrolled, and of the mesh's settings: no
//! I/O, no clock, and the same result on every replica.
//!
//! What one pod, one Service or one EndpointSlice means is in [`workloads`] and [`services`]. Which of them have to be
//! asked again after a change is known in [`incremental`], so that a change costs as much as it touches, however large
//! the cluster is.

pub mod incremental;
mod networks;
pub mod policies;
mod services;
mod workloads;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use weft_api::{DefaultInbound, Kind, Pod, mesh_choice};
use weft_core::{SpiffeId, TrustDomain};
use weft_proto::node::MeshConfig;

use crate::{
    enrollment::Place,
    store::{Name, Store},
};

/// Settings that are the same for the whole mesh.
#[derive(Debug, Clone, PartialEq)]
pub struct MeshSettings {
    pub trust_domain: TrustDomain,
    pub cluster_id: String,
    /// The domain of Services' host names, such as `cluster.local`.
    pub cluster_domain: String,
    pub pod_networks: Vec<IpNet>,
    pub service_networks: Vec<IpNet>,
    pub external_networks: Vec<IpNet>,
    /// Whether the annotation with a pod's network namespace counts: only where a directory is read. Elsewhere agents
    /// find the namespace themselves, also of a pod that has no address yet.
    pub netns_annotations: bool,
    /// Who may call where no policy speaks.
    pub inbound: Inbound,
    /// Without it no pod is wanted in the mesh, whatever labels say: for an uninstallation. Read by the cluster's source
    /// alone.
    pub enabled: bool,
}

/// Who may call a pod that no policy speaks of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Inbound {
    /// Unless its namespace says something else.
    pub default: DefaultInbound,
    /// The least that namespaces can say. That callers have to prove who they are holds also for whom a policy allows.
    pub floor: DefaultInbound,
}

impl MeshSettings {
    pub fn pod_uid(&self, namespace: &str, name: &str) -> String {
        format!("{}//Pod/{namespace}/{name}", self.cluster_id)
    }

    /// Namespace and name of the pod with that uid.
    pub fn pod_of(&self, uid: &str) -> Option<Name> {
        let name = uid.strip_prefix(&self.cluster_id)?.strip_prefix("//Pod/")?;
        name.split_once('/').map(|(namespace, name)| (namespace.to_owned(), name.to_owned()))
    }

    fn endpoint_uid(&self, (namespace, slice): &Name, address: IpAddr) -> String {
        format!("{}/discovery.k8s.io/EndpointSlice/{namespace}/{slice}/{address}", self.cluster_id)
    }

    fn hostname(&self, namespace: &str, service: &str) -> String {
        format!("{service}.{namespace}.svc.{}", self.cluster_domain)
    }

    fn service_key(&self, namespace: &str, service: &str) -> String {
        format!("{namespace}/{}", self.hostname(namespace, service))
    }
}

/// Which kind of address would not be captured at all, with the setting that mends it.
pub fn uncaptured(mesh: &MeshConfig) -> Option<&'static str> {
    if mesh.pod_networks.is_empty() {
        return Some("pod networks (--pod-networks, or spec.podCIDR of Nodes)");
    }
    let none = mesh.service_networks.is_empty();
    none.then_some("service networks (--service-networks, or ServiceCIDR objects)")
}

/// Which identities may be asked for on which node, and whether a pod that labels want in the mesh has it. Copies share
/// what they have in common.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Identities(imbl::OrdMap<String, Arc<BTreeMap<SpiffeId, bool>>>);

/// What a node's claim to an identity is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// A live pod of that account on that node is to be in the mesh.
    Granted,
    /// The account's pods on that node are not to be in the mesh.
    Unlabelled,
    /// No live pod of that account is on that node.
    NotOnNode,
}

impl Identities {
    pub fn claim(&self, node: &str, identity: &SpiffeId) -> Claim {
        match self.0.get(node).and_then(|identities| identities.get(identity)) {
            Some(true) => Claim::Granted,
            Some(false) => Claim::Unlabelled,
            None => Claim::NotOnNode,
        }
    }

    /// Reads a node's pods again. A pod counts before it has an address, so that its certificate can be there when it
    /// starts.
    fn update(&mut self, store: &Store, settings: &MeshSettings, node: &str) {
        let mut identities: BTreeMap<SpiffeId, bool> = BTreeMap::new();
        for (name, pod) in live_pods_on(store, node) {
            if let Ok(id) = SpiffeId::new(settings.trust_domain.clone(), &name.0, pod.service_account()) {
                *identities.entry(id).or_default() |= wanted(store, name, pod);
            }
        }
        match identities.is_empty() {
            true => self.0.remove(node),
            false => self.0.insert(node.to_owned(), Arc::new(identities)),
        };
    }
}

/// The pods of a node that can have a place in the mesh: those that live.
fn live_pods_on<'a>(store: &'a Store, node: &str) -> impl Iterator<Item = (&'a Name, &'a Pod)> {
    let names: Vec<&Name> = store.indexes.pods_by_node.get(&node.to_owned()).collect();
    let pods = names.into_iter().filter_map(|name| store.pods.get(name).map(|pod| (name, &**pod)));
    pods.filter(|(_, pod)| !pod.is_gone())
}

fn wanted(store: &Store, (namespace, _): &Name, pod: &Pod) -> bool {
    mesh_choice(store.namespaces.get(namespace).map(|n| &**n), pod).wanted
}

/// The kinds of object that say who is to be in the mesh.
pub fn deciding() -> [&'static str; 2] {
    [Kind::Namespace.plural(), Kind::Pod.plural()]
}

/// Where a pod is that labels want in the mesh and that has a node and an address. None for every other.
fn place(store: &Store, name: &Name) -> Option<Place> {
    let pod = store.pods.get(name).filter(|pod| !pod.is_gone() && wanted(store, name, pod))?;
    Place::of(pod)
}

/// The pods of `node` that labels want in the mesh and that have no address yet.
pub fn waiting(store: &Store, settings: &MeshSettings, node: &str) -> BTreeSet<String> {
    live_pods_on(store, node)
        .filter(|(name, pod)| pod.addresses().is_empty() && wanted(store, name, pod))
        .map(|((namespace, name), _)| settings.pod_uid(namespace, name))
        .collect()
}

/// Whether labels want a pod in the mesh that is on that node, with an address or without.
pub fn is_wanted(store: &Store, settings: &MeshSettings, node: &str, uid: &str) -> bool {
    let Some(name) = settings.pod_of(uid) else { return false };
    let Some(pod) = store.pods.get(&name).filter(|pod| !pod.is_gone()) else { return false };
    pod.spec.node_name.as_deref() == Some(node) && wanted(store, &name, pod)
}

fn mesh_config(settings: &MeshSettings) -> MeshConfig {
    let texts = |networks: &[IpNet]| networks.iter().map(IpNet::to_string).collect();
    MeshConfig {
        trust_domain: settings.trust_domain.to_string(),
        cluster_id: settings.cluster_id.clone(),
        pod_networks: texts(&settings.pod_networks),
        service_networks: texts(&settings.service_networks),
        external_networks: texts(&settings.external_networks),
    }
}

/// An address as the wire has it: 4 or 16 bytes.
fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn contains(networks: &[IpNet], ip: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&ip))
}

#[cfg(test)]
mod policy_rows;
#[cfg(test)]
pub(crate) mod tests;
