//! Services, and what EndpointSlices put behind them. One Service, and one slice, at a time; what several slices say of
//! the same pod is put together in `incremental`.

use std::{collections::BTreeMap, net::IpAddr};

use weft_api::{
    EndpointSlice, Service,
    discovery::Endpoint,
    field::{IntOrString, Protocol},
    service::{
        InternalTrafficPolicy, PREFER_CLOSE, PREFER_SAME_NODE, PREFER_SAME_ZONE, ServicePort, ServiceSpec,
        ServiceType,
    },
};
use weft_proto::{
    extension,
    service::{NodePort, ServiceTraits},
    workload::{
        self as wire, LoadBalancing, NetworkAddress,
        load_balancing::{HealthPolicy, Mode, Scope},
    },
};

use super::{MeshSettings, contains, octets};
use crate::store::{Name, Store, endpoints, referred_pod};

/// What one EndpointSlice puts behind its Service.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Slice {
    /// The Service, if there is one.
    pub service: Option<Served>,
    /// Endpoints that are pods.
    pub pods: BTreeMap<Name, EndpointState>,
    /// Endpoints with no pod of their own.
    pub others: BTreeMap<IpAddr, OtherEndpoint>,
}

/// What all endpoints of a slice serve.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Served {
    /// The Service's key.
    pub service: String,
    /// Service port to target port.
    pub ports: BTreeMap<u16, u16>,
}

/// What a slice says of one endpoint. In order, the best first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum EndpointState {
    #[default]
    Ready,
    /// Ending; serves where nobody else does.
    Draining,
    /// Not to be sent anything now.
    Unready,
}

/// An endpoint that is no pod (a machine outside the cluster), or a pod on its node's network.
#[derive(Debug, PartialEq)]
pub(super) struct OtherEndpoint {
    pub node: String,
    pub zone: String,
    /// A pod that has only its node's address.
    pub host_network: bool,
    pub state: EndpointState,
}

/// The services something is an endpoint of, as all slices together say it.
#[derive(Debug, Default)]
pub(super) struct Membership {
    /// By service key, service port to target port.
    pub services: BTreeMap<String, BTreeMap<u16, u16>>,
    /// The worst that any service says.
    pub state: EndpointState,
}

impl Membership {
    /// What another slice says. Slices come in the order of their names: the last one wins a port.
    pub fn add(&mut self, served: Option<&Served>, state: EndpointState) {
        let Some(Served { service, ports }) = served else { return };
        self.services.entry(service.clone()).or_default().extend(ports);
        self.state = self.state.max(state);
    }
}

/// What the target of an endpoint turned out to be.
enum Target {
    Pod(Name),
    /// No pod, or one that has only its node's address.
    Other {
        host_network: bool,
    },
    /// A pod that is not, or no longer, at this address.
    Stale,
}

/// The slice of that name. None if there is none, or none with addresses.
pub(super) fn slice(store: &Store, settings: &MeshSettings, name: &Name) -> Option<Slice> {
    let slice = store.slices.get(name)?;
    let namespace = name.0.as_str();
    let service_name = slice.service_name().unwrap_or_default();
    let service = store.services.get(&(namespace.to_owned(), service_name.to_owned()));
    let mut translated = Slice {
        service: service.map(|service| Served {
            service: settings.service_key(namespace, service_name),
            ports: target_ports(service, slice),
        }),
        ..Slice::default()
    };
    for endpoint in endpoints(slice) {
        let Some(address) = endpoint.address() else { continue };
        let said = endpoint_state(service.map(|service| &**service), endpoint);
        let state = match target(store, namespace, endpoint, address) {
            Target::Stale => continue,
            Target::Pod(pod) => translated.pods.entry(pod).or_default(),
            Target::Other { host_network } => {
                let node = endpoint.node_name.clone().unwrap_or_default();
                let zone = endpoint.zone.clone().unwrap_or_default();
                let other = OtherEndpoint { node, zone, host_network, state: EndpointState::default() };
                &mut translated.others.entry(address).or_insert(other).state
            }
        };
        // A slice may name a pod twice, by two addresses.
        *state = said.max(*state);
    }
    Some(translated)
}

fn endpoint_state(service: Option<&Service>, endpoint: &Endpoint) -> EndpointState {
    let lenient = service.is_some_and(|service| service.spec.publish_not_ready_addresses);
    match endpoint {
        endpoint if endpoint.is_ready() || lenient => EndpointState::Ready,
        endpoint if endpoint.is_draining() => EndpointState::Draining,
        _ => EndpointState::Unready,
    }
}

/// What is wrong with an address: that two live pods claim it. It is nobody's then.
pub(super) fn address_problem(store: &Store, address: IpAddr) -> Option<String> {
    let pods = store.indexes.pods_by_address.get(&address);
    let names: Vec<String> = pods.map(|(namespace, name)| format!("{namespace}/{name}")).collect();
    (names.len() > 1)
        .then(|| format!("pods {} all claim it, so it is the identity of none of them", names.join(", ")))
}

fn target(store: &Store, namespace: &str, endpoint: &Endpoint, address: IpAddr) -> Target {
    if let Some(name) = referred_pod(namespace, endpoint) {
        return match store.pods.get(&name) {
            Some(pod) if pod.is_gone() => Target::Stale,
            Some(pod) if pod.spec.host_network => Target::Other { host_network: true },
            Some(pod) if pod.addresses().contains(&address) => Target::Pod(name),
            // Unknown or elsewhere: nothing is said about the address, so agents hold back instead of trusting it.
            _ => Target::Stale,
        };
    }
    let mut pods = store.indexes.pods_by_address.get(&address);
    match (pods.next(), pods.next()) {
        (Some(name), None) => Target::Pod(name.clone()),
        (Some(_), Some(_)) => Target::Stale,
        (None, _) => Target::Other { host_network: false },
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

/// The Service of that name, and what a person should know of it. None where nothing is to be known of it by agents.
pub(super) fn service(
    store: &Store,
    settings: &MeshSettings,
    name: &Name,
) -> Option<(wire::Service, Option<String>)> {
    let service = store.services.get(name)?;
    if service.spec.service_type == Some(ServiceType::ExternalName) {
        return None;
    }
    let (namespace, name) = name;
    let addresses = service
        .cluster_addresses()
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
    let wire = wire::Service {
        name: name.clone(),
        namespace: namespace.clone(),
        hostname: settings.hostname(namespace, name),
        addresses: addresses.collect(),
        ports: ports.collect(),
        load_balancing: load_balancing(&service.spec),
        extensions: extension::from_traits(&traits(service)).into_iter().collect(),
        ..wire::Service::default()
    };
    Some((wire, service_problem(settings, service)))
}

/// What is not as usual about the choice of an endpoint. Endpoints rank by how many of the scopes, from the first on,
/// they share with the caller.
fn load_balancing(spec: &ServiceSpec) -> Option<LoadBalancing> {
    let local = spec.internal_traffic_policy == Some(InternalTrafficPolicy::Local);
    let (mode, scopes) = match spec.traffic_distribution.as_deref() {
        _ if local => (Mode::Strict, &[Scope::Node][..]),
        Some(PREFER_CLOSE | PREFER_SAME_ZONE) => (Mode::Failover, &[Scope::Zone][..]),
        Some(PREFER_SAME_NODE) => (Mode::Failover, &[Scope::Zone, Scope::Node][..]),
        _ => (Mode::UnspecifiedMode, &[][..]),
    };
    let health_policy = match spec.publish_not_ready_addresses {
        true => HealthPolicy::AllowAll,
        false => HealthPolicy::OnlyHealthy,
    };
    let unusual = LoadBalancing {
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        health_policy: health_policy.into(),
    };
    (unusual != LoadBalancing::default()).then_some(unusual)
}

fn traits(service: &Service) -> ServiceTraits {
    let node_port = |(port, node): (&ServicePort, u16)| NodePort {
        service_port: port.port.get().into(),
        node_port: node.into(),
    };
    ServiceTraits {
        client_affinity_seconds: service.client_affinity().unwrap_or_default(),
        node_ports: service.node_ports().map(node_port).collect(),
        external_addresses: service.external_addresses().into_iter().map(octets).collect(),
    }
}

fn service_problem(settings: &MeshSettings, service: &Service) -> Option<String> {
    let captured = |ip| contains(&settings.service_networks, ip) || contains(&settings.external_networks, ip);
    let mut cluster_ips =
        std::iter::once(&service.spec.cluster_ip).chain(&service.spec.cluster_ips).filter_map(|ip| ip.0);
    let address = cluster_ips.find(|ip| !captured(*ip))?;
    Some(format!(
        "cluster IP {address} is outside the service networks, so connections to it are not captured"
    ))
}
