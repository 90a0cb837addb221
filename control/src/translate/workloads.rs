//! Workloads: one for every pod, and one for every endpoint that is no pod. One at a time.

use std::{collections::BTreeMap, net::IpAddr};

use bytes::Bytes;
use weft_api::{
    MeshChoice, Pod, cut_choice,
    labels::{APPLICATION, NETNS, POD_TEMPLATE_HASH, VERSION},
    mesh_choice,
};
use weft_proto::{
    extension,
    node::LocalWorkload,
    workload::{
        Extension, Locality, NetworkMode, Port, PortList, TunnelProtocol, Workload, WorkloadStatus,
        WorkloadType,
    },
};

use super::{
    MeshSettings, contains, octets,
    policies::{self, InForce, Policy},
    services::{EndpointState, Membership, OtherEndpoint},
};
use crate::store::{Name, Store};

/// What follows from one pod.
#[derive(Debug, Default)]
pub(super) struct TranslatedPod {
    /// For every node.
    pub workload: Option<Workload>,
    /// For the agent of its node.
    pub local: Option<LocalWorkload>,
    /// For a person.
    pub problem: Option<String>,
}

/// The pod of that name, which is nothing if there is none or it has ended. `tunnel` says whether it is announced as
/// reachable by tunnel.
pub(super) fn pod(
    store: &Store,
    settings: &MeshSettings,
    name: &Name,
    membership: &Membership,
    policies: &BTreeMap<Name, Policy>,
    tunnel: bool,
) -> TranslatedPod {
    let Some(pod) = store.pods.get(name).filter(|pod| !pod.is_gone()) else {
        return TranslatedPod::default();
    };
    let choice = mesh_choice(store.namespaces.get(&name.0).map(|namespace| &**namespace), pod);
    let addresses = pod.addresses();
    let locality = locality(store, pod);
    // What is not in the mesh is guarded by nobody.
    let in_force = match choice.wanted {
        true => policies::in_force(store, policies, settings, name, pod, membership),
        false => InForce::default(),
    };
    let workload = workload(settings, name, pod, &addresses, locality, membership, tunnel);
    let workload = workload.map(|w| Workload { authorization_policies: in_force.names, ..w });
    let cut = cut_choice(store.namespaces.get(&name.0).map(|namespace| &**namespace), pod);
    let local = local(settings, name, pod, &addresses, choice.wanted);
    let local = local.map(|local| LocalWorkload { cut_existing_connections: cut.wanted, ..local });
    let problem = workload.as_ref().and_then(|_| address_problem(settings, &choice, &addresses));
    let problem = problem
        .or(in_force.problem)
        .or_else(|| local.as_ref().and_then(|local| netns_problem(settings, local)))
        .or(cut.problem.filter(|_| choice.wanted));
    TranslatedPod { workload, local, problem }
}

fn workload(
    settings: &MeshSettings,
    (namespace, name): &Name,
    pod: &Pod,
    addresses: &[IpAddr],
    locality: Option<Locality>,
    membership: &Membership,
    tunnel: bool,
) -> Option<Workload> {
    // In Kubernetes a pod without an address is about to get one; a host network pod is its node's.
    if addresses.is_empty() && !pod.spec.host_network {
        return None;
    }
    let (workload_name, workload_type) = owner(pod);
    Some(Workload {
        uid: settings.pod_uid(namespace, name),
        name: name.clone(),
        namespace: namespace.clone(),
        addresses: if pod.spec.host_network { Vec::new() } else { wire_addresses(addresses) },
        tunnel_protocol: if tunnel { TunnelProtocol::Hbone } else { TunnelProtocol::None }.into(),
        service_account: pod.service_account().to_owned(),
        node: pod.spec.node_name.clone().unwrap_or_default(),
        canonical_name: pod.metadata.first_label(&APPLICATION).unwrap_or(&workload_name).to_owned(),
        canonical_revision: pod.metadata.first_label(&VERSION).unwrap_or("latest").to_owned(),
        workload_type: workload_type.into(),
        workload_name,
        services: wire_services(membership),
        status: wire_status(membership),
        extensions: wire_extensions(membership),
        cluster_id: settings.cluster_id.clone(),
        locality,
        network_mode: network_mode(pod.spec.host_network),
        ..Workload::default()
    })
}

/// What the agent of the pod's node needs to know of it.
fn local(
    settings: &MeshSettings,
    (namespace, name): &Name,
    pod: &Pod,
    addresses: &[IpAddr],
    enroll: bool,
) -> Option<LocalWorkload> {
    // Where the runtime asks before it starts a pod, the answer must be there before the address.
    let too_early = settings.netns_annotations && addresses.is_empty();
    if pod.spec.node_name.is_none() || pod.spec.host_network || too_early {
        return None;
    }
    let netns_path = pod.netns_path().filter(|_| settings.netns_annotations).unwrap_or_default().to_owned();
    let pod_uid = pod.metadata.uid.clone().unwrap_or_default();
    let uid = settings.pod_uid(namespace, name);
    Some(LocalWorkload { uid, enroll, netns_path, pod_uid, ..LocalWorkload::default() })
}

fn address_problem(settings: &MeshSettings, choice: &MeshChoice, addresses: &[IpAddr]) -> Option<String> {
    if choice.problem.is_some() {
        return choice.problem.clone();
    }
    let outside = addresses.iter().find(|address| !contains(&settings.pod_networks, **address));
    outside.filter(|_| choice.wanted).map(|address| format!(
        "address {address} is outside the pod networks: connections to it are not captured, and refused once it is in the mesh"
    ))
}

fn netns_problem(settings: &MeshSettings, local: &LocalWorkload) -> Option<String> {
    let lacks = settings.netns_annotations && local.enroll && local.netns_path.is_empty();
    lacks.then(|| format!("is to be in the mesh but has no annotation {NETNS}, so its agent cannot find it"))
}

/// An endpoint that is no pod. Where its address is not its own, no workload is to be found by it.
pub(super) fn outside_pod(
    settings: &MeshSettings,
    slice: &Name,
    address: IpAddr,
    other: &OtherEndpoint,
    membership: &Membership,
    shared_address: bool,
) -> Workload {
    let (namespace, name) = slice;
    Workload {
        uid: settings.endpoint_uid(slice, address),
        name: name.clone(),
        namespace: namespace.clone(),
        addresses: wire_addresses(&[address]),
        tunnel_protocol: TunnelProtocol::None.into(),
        node: other.node.clone(),
        canonical_name: name.clone(),
        canonical_revision: "latest".to_owned(),
        workload_type: WorkloadType::Pod.into(),
        workload_name: name.clone(),
        services: wire_services(membership),
        status: wire_status(membership),
        extensions: wire_extensions(membership),
        cluster_id: settings.cluster_id.clone(),
        locality: wire_locality("", &other.zone),
        network_mode: network_mode(shared_address),
        ..Workload::default()
    }
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
    match membership.state {
        EndpointState::Ready => WorkloadStatus::Healthy,
        EndpointState::Draining | EndpointState::Unready => WorkloadStatus::Unhealthy,
    }
    .into()
}

fn wire_extensions(membership: &Membership) -> Vec<Extension> {
    (membership.state == EndpointState::Draining).then(extension::draining).into_iter().collect()
}

/// Where the pod's node is.
fn locality(store: &Store, pod: &Pod) -> Option<Locality> {
    let (region, zone) = store.nodes.get(pod.spec.node_name.as_ref()?)?.locality();
    wire_locality(region, zone)
}

fn wire_locality(region: &str, zone: &str) -> Option<Locality> {
    let locality = Locality { region: region.to_owned(), zone: zone.to_owned(), subzone: String::new() };
    (locality != Locality::default()).then_some(locality)
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
