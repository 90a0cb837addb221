//! Objects to what agents are sent. A pure function of the store, of who is enrolled, and of the mesh's settings: no
//! I/O, no clock, and the same result on every replica.
//!
//! It goes over the whole store at every change, which is O(objects). `snapshot` keeps that from encoding, hashing or
//! sending anything that did not change.

mod networks;
mod services;
mod workloads;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use weft_api::{Pod, mesh_choice};
use weft_core::{SpiffeId, TrustDomain};
use weft_proto::{
    node::{LocalWorkload, MeshConfig},
    workload::{Address, address},
};

use crate::{
    enrollment::{Place, Places},
    store::{Name, Store},
};

/// Settings that are the same for the whole mesh.
#[derive(Debug, Clone)]
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
    /// Without it no pod is wanted in the mesh, whatever labels say: for an uninstallation. Read by the cluster's source
    /// alone.
    pub enabled: bool,
}

impl MeshSettings {
    pub fn pod_uid(&self, namespace: &str, name: &str) -> String {
        format!("{}//Pod/{namespace}/{name}", self.cluster_id)
    }

    /// Namespace and name of the pod with that uid.
    pub fn pod_of(&self, uid: &str) -> Option<Name> {
        let (namespace, name) =
            uid.strip_prefix(&self.cluster_id)?.strip_prefix("//Pod/")?.split_once('/')?;
        Some((namespace.to_owned(), name.to_owned()))
    }

    fn hostname(&self, namespace: &str, service: &str) -> String {
        format!("{service}.{namespace}.svc.{}", self.cluster_domain)
    }

    fn service_key(&self, namespace: &str, service: &str) -> String {
        format!("{namespace}/{}", self.hostname(namespace, service))
    }
}

/// What agents are sent, by resource name, and what a person should know.
#[derive(Debug, Default, PartialEq)]
pub struct Translation {
    pub addresses: BTreeMap<String, Address>,
    /// By node.
    pub local: BTreeMap<String, BTreeMap<String, LocalWorkload>>,
    pub mesh: MeshConfig,
    /// By what they are about.
    pub problems: BTreeMap<String, String>,
}

impl Translation {
    /// Which kind of address would not be captured at all, with the setting that mends it.
    pub fn uncaptured(&self) -> Option<&'static str> {
        if self.mesh.pod_networks.is_empty() {
            return Some("pod networks (--pod-networks, or spec.podCIDR of Nodes)");
        }
        let none = self.mesh.service_networks.is_empty();
        none.then_some("service networks (--service-networks, or ServiceCIDR objects)")
    }
}

/// Which identities may be asked for on which node, and whether a pod that labels want in the mesh has it.
#[derive(Debug, Default, PartialEq)]
pub struct Identities(BTreeMap<String, BTreeMap<SpiffeId, bool>>);

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
}

/// Pods that can have a place in the mesh, by uid: those that live.
fn live_pods<'a>(
    store: &'a Store,
    settings: &'a MeshSettings,
) -> impl Iterator<Item = (String, &'a str, &'a Pod)> {
    let live = store.pods.iter().filter(|(_, pod)| !pod.is_gone());
    live.map(|((namespace, name), pod)| (settings.pod_uid(namespace, name), namespace.as_str(), &**pod))
}

fn wanted(store: &Store, namespace: &str, pod: &Pod) -> bool {
    mesh_choice(store.namespaces.get(namespace).map(|n| &**n), pod).wanted
}

/// The pods that labels want in the mesh and that have a node and an address.
pub fn desired(store: &Store, settings: &MeshSettings) -> Places {
    live_pods(store, settings)
        .filter(|(_, namespace, pod)| wanted(store, namespace, pod))
        .filter_map(|(uid, _, pod)| Some((uid, Place::of(pod)?)))
        .collect()
}

/// The pods of `node` that labels want in the mesh and that have no address yet.
pub fn waiting(store: &Store, settings: &MeshSettings, node: &str) -> BTreeSet<String> {
    live_pods(store, settings)
        .filter(|(_, _, pod)| pod.spec.node_name.as_deref() == Some(node) && pod.addresses().is_empty())
        .filter(|(_, namespace, pod)| wanted(store, namespace, pod))
        .map(|(uid, _, _)| uid)
        .collect()
}

/// Whether labels want a pod in the mesh that is on that node, with an address or without.
pub fn is_wanted(store: &Store, settings: &MeshSettings, node: &str, uid: &str) -> bool {
    let Some(name) = settings.pod_of(uid) else { return false };
    let Some(pod) = store.pods.get(&name).filter(|pod| !pod.is_gone()) else { return false };
    pod.spec.node_name.as_deref() == Some(node) && wanted(store, &name.0, pod)
}

/// What the certificate authority may issue. A pod counts before it has an address, so that its certificate can be
/// there when it starts.
pub fn identities(store: &Store, settings: &MeshSettings) -> Identities {
    let mut identities = Identities::default();
    for (_, namespace, pod) in live_pods(store, settings) {
        let Some(node) = &pod.spec.node_name else { continue };
        let Ok(id) = SpiffeId::new(settings.trust_domain.clone(), namespace, pod.service_account()) else {
            continue;
        };
        *identities.0.entry(node.clone()).or_default().entry(id).or_default() |=
            wanted(store, namespace, pod);
    }
    identities
}

/// Everything. `enrolled` is who has been reported as enrolled; a pod is announced as reachable by tunnel if it is
/// among them as the pod it is now, and labels still want it there.
pub fn translate(store: &Store, enrolled: &Places, settings: &MeshSettings) -> Translation {
    let settings = &networks::effective(store, settings);
    let mut problems = BTreeMap::new();
    let backends = services::backends(store, settings, &mut problems);
    let desired = desired(store, settings);
    let published: BTreeSet<&str> = desired
        .iter()
        .filter(|(uid, place)| enrolled.get(*uid) == Some(place))
        .map(|(uid, _)| uid.as_str())
        .collect();

    let pods = workloads::pods(store, settings, &backends, &published, &mut problems);
    let others = workloads::outside_pods(&backends, settings);
    let workloads = pods.into_iter().chain(others);
    let workloads = workloads.map(|w| (w.uid.clone(), Address { r#type: Some(address::Type::Workload(w)) }));
    let services = services::services(store, settings, &mut problems);
    let services =
        services.into_iter().map(|(k, s)| (k, Address { r#type: Some(address::Type::Service(s)) }));

    Translation {
        addresses: workloads.chain(services).collect(),
        local: workloads::local(store, settings, &mut problems),
        mesh: mesh_config(settings),
        problems,
    }
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
pub(crate) mod tests;
