//! Services, and what EndpointSlices put behind them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use weft_api::{
    EndpointSlice, Service,
    discovery::AddressType,
    field::{IntOrString, Protocol},
    service::ServiceType,
};
use weft_proto::workload::{self as wire, LoadBalancing, NetworkAddress, load_balancing};

use super::{MeshSettings, contains, octets};
use crate::store::{Name, Store};

/// What is behind Services.
#[derive(Debug, Default)]
pub(super) struct Backends {
    /// By the pod's namespace and name.
    pub pods: BTreeMap<Name, Membership>,
    /// Endpoints with no pod of their own, by uid.
    pub others: BTreeMap<String, OtherEndpoint>,
}

/// The services something is an endpoint of.
#[derive(Debug, Default)]
pub(super) struct Membership {
    /// By service key, service port to target port.
    pub services: BTreeMap<String, BTreeMap<u16, u16>>,
    /// Some service says it is not ready.
    pub unready: bool,
}

/// An endpoint that is no pod (a machine outside the cluster), or a pod on its node's network.
#[derive(Debug)]
pub(super) struct OtherEndpoint {
    pub name: String,
    pub namespace: String,
    pub address: IpAddr,
    pub node: String,
    /// Its address is not its own, so that no workload is to be found by it.
    pub shared_address: bool,
    pub membership: Membership,
}

/// What the target of an endpoint turned out to be.
enum Target<'a> {
    Pod(&'a Name),
    /// No pod, or one that has only its node's address.
    Other {
        host_network: bool,
    },
    /// A pod that is not, or no longer, at this address.
    Stale,
}

pub(super) fn backends(
    store: &Store,
    settings: &MeshSettings,
    problems: &mut BTreeMap<String, String>,
) -> Backends {
    let by_address = pods_by_address(store, problems);
    let mut backends = Backends::default();
    let mut claimed = BTreeSet::new();
    for ((namespace, name), slice) in &store.slices {
        if slice.address_type == AddressType::Fqdn {
            continue;
        }
        let service_name = slice.service_name().unwrap_or_default();
        let service = store.services.get(&(namespace.clone(), service_name.to_owned()));
        let ports = service.map(|service| target_ports(service, slice)).unwrap_or_default();
        let lenient = service.is_some_and(|service| service.spec.publish_not_ready_addresses);
        for endpoint in &slice.endpoints {
            let Some(address) = endpoint.address() else { continue };
            let membership = match target(store, &by_address, namespace, endpoint, address) {
                Target::Stale => continue,
                Target::Pod(name) => backends.pods.entry(name.clone()).or_default(),
                Target::Other { host_network } => {
                    let uid = format!(
                        "{}/discovery.k8s.io/EndpointSlice/{namespace}/{name}/{address}",
                        settings.cluster_id
                    );
                    let other = backends.others.entry(uid).or_insert_with(|| OtherEndpoint {
                        name: name.clone(),
                        namespace: namespace.clone(),
                        address,
                        node: endpoint.node_name.clone().unwrap_or_default(),
                        // The first slice to name an address has it; others would look like a dispute over it.
                        shared_address: host_network || !claimed.insert(address),
                        membership: Membership::default(),
                    });
                    &mut other.membership
                }
            };
            if service.is_some() {
                let key = settings.service_key(namespace, service_name);
                membership.services.entry(key).or_default().extend(&ports);
                membership.unready |= !endpoint.is_ready() && !lenient;
            }
        }
    }
    backends
}

/// Live pods by the addresses that are theirs alone. An address that two claim is nobody's here, and reported.
fn pods_by_address<'a>(
    store: &'a Store,
    problems: &mut BTreeMap<String, String>,
) -> BTreeMap<IpAddr, Vec<&'a Name>> {
    let mut by_address: BTreeMap<IpAddr, Vec<&Name>> = BTreeMap::new();
    for (name, pod) in store.pods.iter().filter(|(_, pod)| !pod.is_gone() && !pod.spec.host_network) {
        for address in pod.addresses() {
            by_address.entry(address).or_default().push(name);
        }
    }
    for (address, names) in by_address.iter().filter(|(_, names)| names.len() > 1) {
        let names: Vec<String> =
            names.iter().map(|(namespace, name)| format!("{namespace}/{name}")).collect();
        let problem =
            format!("pods {} all claim it, so it is the identity of none of them", names.join(", "));
        problems.insert(format!("address {address}"), problem);
    }
    by_address
}

fn target<'a>(
    store: &'a Store,
    by_address: &BTreeMap<IpAddr, Vec<&'a Name>>,
    namespace: &str,
    endpoint: &weft_api::discovery::Endpoint,
    address: IpAddr,
) -> Target<'a> {
    if let Some(reference) = endpoint.target_ref.as_ref().filter(|reference| reference.kind == "Pod") {
        let name = (reference.namespace.as_deref().unwrap_or(namespace).to_owned(), reference.name.clone());
        return match store.pods.get_key_value(&name) {
            Some((_, pod)) if pod.is_gone() => Target::Stale,
            Some((_, pod)) if pod.spec.host_network => Target::Other { host_network: true },
            Some((name, pod)) if pod.addresses().contains(&address) => Target::Pod(name),
            // Unknown or elsewhere: nothing is said about the address, so agents hold back instead of trusting it.
            _ => Target::Stale,
        };
    }
    match by_address.get(&address).map(Vec::as_slice) {
        Some([name]) => Target::Pod(name),
        Some(_) => Target::Stale,
        None => Target::Other { host_network: false },
    }
}

/// Service port to target port, for the TCP ports that the slice serves.
fn target_ports(service: &Service, slice: &EndpointSlice) -> BTreeMap<u16, u16> {
    let mut ports = BTreeMap::new();
    for port in service.tcp_ports() {
        let served = slice.ports.iter().find(|p| p.protocol == Protocol::Tcp && p.name == port.name);
        let Some(served) = served else { continue };
        let target = match (&served.port, &port.target_port) {
            (Some(number), _) => number.get(),
            (None, Some(IntOrString::Int(number))) => *number,
            (None, Some(IntOrString::String(_))) => continue,
            (None, None) => port.port.get(),
        };
        ports.insert(port.port.get(), target);
    }
    ports
}

/// Services by resource name.
pub(super) fn services(
    store: &Store,
    settings: &MeshSettings,
    problems: &mut BTreeMap<String, String>,
) -> BTreeMap<String, wire::Service> {
    let mut services = BTreeMap::new();
    for ((namespace, name), service) in &store.services {
        if service.spec.service_type == Some(ServiceType::ExternalName) {
            continue;
        }
        let ranges = [settings.service_networks.as_slice(), &settings.external_networks].concat();
        let cluster_ips = std::iter::once(&service.spec.cluster_ip).chain(&service.spec.cluster_ips);
        if let Some(address) = cluster_ips.filter_map(|ip| ip.0).find(|ip| !contains(&ranges, *ip)) {
            problems.insert(
                format!("Service {namespace}/{name}"),
                format!("cluster IP {address} is outside the service networks, so connections to it are not captured"),
            );
        }
        let addresses = service
            .addresses()
            .into_iter()
            .map(|address| NetworkAddress { address: octets(address).into(), ..NetworkAddress::default() });
        let ports = service.tcp_ports().map(|port| wire::Port {
            service_port: port.port.get().into(),
            target_port: match &port.target_port {
                None => port.port.get().into(),
                Some(IntOrString::Int(number)) => (*number).into(),
                // A name, which every endpoint may give another port.
                Some(IntOrString::String(_)) => 0,
            },
            ..wire::Port::default()
        });
        let load_balancing = service.spec.publish_not_ready_addresses.then(|| LoadBalancing {
            health_policy: load_balancing::HealthPolicy::AllowAll.into(),
            ..LoadBalancing::default()
        });
        let wire = wire::Service {
            name: name.clone(),
            namespace: namespace.clone(),
            hostname: settings.hostname(namespace, name),
            addresses: addresses.collect(),
            ports: ports.collect(),
            load_balancing,
            ..wire::Service::default()
        };
        services.insert(settings.service_key(namespace, name), wire);
    }
    services
}
