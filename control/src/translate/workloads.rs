//! Workloads: one for every pod, and one for every endpoint that is no pod.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use bytes::Bytes;
use weft_api::{
    Pod,
    labels::{APPLICATION, NETNS, POD_TEMPLATE_HASH, VERSION},
    mesh_choice,
};
use weft_proto::{
    node::LocalWorkload,
    workload::{NetworkMode, Port, PortList, TunnelProtocol, Workload, WorkloadStatus, WorkloadType},
};

use super::{
    MeshSettings, contains, live_pods, octets,
    services::{Backends, Membership},
};
use crate::store::Store;

pub(super) fn pods(
    store: &Store,
    settings: &MeshSettings,
    backends: &Backends,
    published: &BTreeSet<&str>,
    problems: &mut BTreeMap<String, String>,
) -> Vec<Workload> {
    let none = Membership::default();
    let mut workloads = Vec::new();
    for (uid, namespace, pod) in live_pods(store, settings) {
        let name = &pod.metadata.name;
        let addresses = pod.addresses();
        // In Kubernetes a pod without an address is about to get one; a host network pod is its node's.
        if addresses.is_empty() && !pod.spec.host_network {
            continue;
        }
        let membership = backends.pods.get(&(namespace.to_owned(), name.clone())).unwrap_or(&none);
        let (workload_name, workload_type) = owner(pod);
        let tunnel = published.contains(uid.as_str());
        workloads.push(Workload {
            name: name.clone(),
            namespace: namespace.to_owned(),
            addresses: if pod.spec.host_network { Vec::new() } else { wire_addresses(&addresses) },
            tunnel_protocol: if tunnel { TunnelProtocol::Hbone } else { TunnelProtocol::None }.into(),
            service_account: pod.service_account().to_owned(),
            node: pod.spec.node_name.clone().unwrap_or_default(),
            canonical_name: pod.metadata.first_label(&APPLICATION).unwrap_or(&workload_name).to_owned(),
            canonical_revision: pod.metadata.first_label(&VERSION).unwrap_or("latest").to_owned(),
            workload_type: workload_type.into(),
            workload_name,
            services: wire_services(membership),
            status: wire_status(membership),
            cluster_id: settings.cluster_id.clone(),
            network_mode: network_mode(pod.spec.host_network),
            uid,
            ..Workload::default()
        });
        note_problems(store, settings, namespace, pod, &addresses, problems);
    }
    workloads
}

fn note_problems(
    store: &Store,
    settings: &MeshSettings,
    namespace: &str,
    pod: &Pod,
    addresses: &[IpAddr],
    problems: &mut BTreeMap<String, String>,
) {
    let choice = mesh_choice(store.namespaces.get(namespace).map(|n| &**n), pod);
    let outside = addresses.iter().find(|address| !contains(&settings.pod_networks, **address));
    let problem = match (choice.problem, outside) {
        (Some(problem), _) => problem,
        (None, Some(address)) if choice.wanted => format!(
            "address {address} is outside the pod networks: connections to it are not captured, and refused once it is in the mesh"
        ),
        _ => return,
    };
    problems.insert(format!("Pod {namespace}/{}", pod.metadata.name), problem);
}

pub(super) fn outside_pods(backends: &Backends, settings: &MeshSettings) -> Vec<Workload> {
    let others = backends.others.iter().map(|(uid, other)| Workload {
        uid: uid.clone(),
        name: other.name.clone(),
        namespace: other.namespace.clone(),
        addresses: wire_addresses(&[other.address]),
        tunnel_protocol: TunnelProtocol::None.into(),
        node: other.node.clone(),
        canonical_name: other.name.clone(),
        canonical_revision: "latest".to_owned(),
        workload_type: WorkloadType::Pod.into(),
        workload_name: other.name.clone(),
        services: wire_services(&other.membership),
        status: wire_status(&other.membership),
        cluster_id: settings.cluster_id.clone(),
        network_mode: network_mode(other.shared_address),
        ..Workload::default()
    });
    others.collect()
}

/// What each node's agent needs to know of its own pods, by node and uid.
pub(super) fn local(
    store: &Store,
    settings: &MeshSettings,
    problems: &mut BTreeMap<String, String>,
) -> BTreeMap<String, BTreeMap<String, LocalWorkload>> {
    let mut local: BTreeMap<String, BTreeMap<String, LocalWorkload>> = BTreeMap::new();
    for (uid, namespace, pod) in live_pods(store, settings) {
        let Some(node) = &pod.spec.node_name else { continue };
        // Where the runtime asks before it starts a pod, the answer must be there before the address.
        let too_early = settings.netns_annotations && pod.addresses().is_empty();
        if pod.spec.host_network || too_early {
            continue;
        }
        let enroll = super::wanted(store, namespace, pod);
        let netns_path =
            pod.netns_path().filter(|_| settings.netns_annotations).unwrap_or_default().to_owned();
        if enroll && netns_path.is_empty() && settings.netns_annotations {
            problems.entry(format!("Pod {namespace}/{}", pod.metadata.name)).or_insert_with(|| {
                format!("is to be in the mesh but has no annotation {NETNS}, so its agent cannot find it")
            });
        }
        let pod_uid = pod.metadata.uid.clone().unwrap_or_default();
        let workload = LocalWorkload { uid: uid.clone(), enroll, netns_path, pod_uid };
        local.entry(node.clone()).or_default().insert(uid, workload);
    }
    local
}

fn wire_addresses(addresses: &[IpAddr]) -> Vec<Bytes> {
    addresses.iter().map(|address| Bytes::from(octets(*address))).collect()
}

fn wire_services(membership: &Membership) -> std::collections::HashMap<String, PortList> {
    let list = |ports: &BTreeMap<u16, u16>| PortList {
        ports: ports
            .iter()
            .map(|(service, target)| Port {
                service_port: (*service).into(),
                target_port: (*target).into(),
                ..Port::default()
            })
            .collect(),
    };
    membership.services.iter().map(|(key, ports)| (key.clone(), list(ports))).collect()
}

fn wire_status(membership: &Membership) -> i32 {
    if membership.unready { WorkloadStatus::Unhealthy } else { WorkloadStatus::Healthy }.into()
}

fn network_mode(shared_address: bool) -> i32 {
    if shared_address { NetworkMode::HostNetwork } else { NetworkMode::Standard }.into()
}

/// What manages the pod, by the name a person gave it.
fn owner(pod: &Pod) -> (String, WorkloadType) {
    let Some(owner) = pod.metadata.controller() else {
        return (pod.metadata.name.clone(), WorkloadType::Pod);
    };
    match owner.kind.as_str() {
        "ReplicaSet" => {
            let hash = pod.metadata.labels.get(POD_TEMPLATE_HASH).map(String::as_str);
            (deployment(&owner.name, hash).unwrap_or(&owner.name).to_owned(), WorkloadType::Deployment)
        }
        "Job" => match owner.name.rsplit_once('-') {
            // A CronJob appends the scheduled time in minutes since 1970 (in seconds, before Kubernetes 1.21).
            Some((name, time))
                if (8..=10).contains(&time.len()) && time.bytes().all(|b| b.is_ascii_digit()) =>
            {
                (name.to_owned(), WorkloadType::Cronjob)
            }
            _ => (owner.name.clone(), WorkloadType::Job),
        },
        _ => (owner.name.clone(), WorkloadType::Deployment),
    }
}

/// The Deployment's name in that of its ReplicaSet: what comes before the hash. A ReplicaSet that somebody made by hand
/// has none.
fn deployment<'a>(replica_set: &'a str, hash: Option<&str>) -> Option<&'a str> {
    /// The characters that Kubernetes encodes hashes in.
    const ALPHABET: &str = "bcdfghjklmnpqrstvwxz2456789";
    let (name, suffix) = replica_set.rsplit_once('-')?;
    let is_hash = match hash {
        Some(hash) => suffix == hash,
        None => (5..=10).contains(&suffix.len()) && suffix.chars().all(|c| ALPHABET.contains(c)),
    };
    (is_hash && !name.is_empty()).then_some(name)
}
