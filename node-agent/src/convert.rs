//! From the control plane's wire messages to the mesh model. What cannot be understood is an error with the resource's
//! name, never a guess.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use prost::Message;
use weft_core::{
    Entry, Health, Nearness, NodePort, PortMapping, Service, SpiffeId, TrustDomain, Tunnel, Workload,
};
use weft_proto::{
    extension, node,
    workload::{
        self as wire,
        load_balancing::{HealthPolicy, Mode, Scope},
    },
};

#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error("resource {name}: {source}")]
    Decode { name: String, source: prost::DecodeError },
    #[error("resource {name}: {what}")]
    Invalid { name: String, what: String },
}

/// Mesh-wide settings from the controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshSettings {
    pub trust_domain: TrustDomain,
    pub cluster_id: String,
    /// Pod and service ranges: captured unless known not to need the mesh.
    pub captured: Vec<IpNet>,
    /// Never captured.
    pub external: Vec<IpNet>,
}

impl MeshSettings {
    /// Whether `ip` lies in a captured range, so that "nobody has heard of it" means "hold", not "outside".
    pub fn in_range(&self, ip: IpAddr) -> bool {
        self.captured.iter().any(|n| n.contains(&ip)) && !self.external.iter().any(|n| n.contains(&ip))
    }
}

/// A pod of this node, as the controller wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPod {
    pub enroll: bool,
    /// Where its network namespace is.
    pub netns: NetnsHint,
    /// Whether connections that are older than its enrolment are to be cut.
    pub cut_existing: bool,
}

/// What the controller knows of where a pod's network namespace is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetnsHint {
    /// A path, as a directory of manifests gives it.
    Path(std::path::PathBuf),
    /// The UID that the API server gave the pod, which its processes' cgroups are named after.
    PodUid(String),
    Unknown,
}

fn invalid(name: &str, what: impl ToString) -> ConvertError {
    ConvertError::Invalid { name: name.to_owned(), what: what.to_string() }
}

fn decode<M: Message + Default>(name: &str, value: &[u8]) -> Result<M, ConvertError> {
    M::decode(value).map_err(|source| ConvertError::Decode { name: name.to_owned(), source })
}

fn address(name: &str, bytes: &[u8]) -> Result<IpAddr, ConvertError> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).map(|b| IpAddr::from(b).to_canonical()),
    }
    .map_err(|_| invalid(name, format!("an address of {} bytes", bytes.len())))
}

fn port(name: &str, port: u32) -> Result<u16, ConvertError> {
    u16::try_from(port).map_err(|_| invalid(name, format!("port {port}")))
}

/// A port that can be dialled.
fn dialled_port(name: &str, number: u32) -> Result<u16, ConvertError> {
    port(name, number).and_then(|port| if port == 0 { Err(invalid(name, "port 0")) } else { Ok(port) })
}

fn ports(name: &str, list: &[wire::Port]) -> Result<Vec<PortMapping>, ConvertError> {
    let one = |p: &wire::Port| {
        let service_port = dialled_port(name, p.service_port)?;
        Ok(PortMapping { service_port, target_port: port(name, p.target_port)? })
    };
    list.iter().map(one).collect()
}

/// Reads an `istio.workload.Address`. `trust_domain` is what a workload that names none belongs to.
pub fn entry(name: &str, value: &[u8], trust_domain: &TrustDomain) -> Result<Entry, ConvertError> {
    let address: wire::Address = decode(name, value)?;
    let entry = match address.r#type {
        Some(wire::address::Type::Workload(w)) => Entry::Workload(Arc::new(workload(name, w, trust_domain)?)),
        Some(wire::address::Type::Service(s)) => Entry::Service(Arc::new(service(name, s)?)),
        None => return Err(invalid(name, "neither a workload nor a service")),
    };
    // Removal goes by the resource's name, so an entry under another key could never be removed.
    if &**entry.key() != name {
        return Err(invalid(name, format!("its content is named {}", entry.key())));
    }
    Ok(entry)
}

fn workload(name: &str, w: wire::Workload, trust_domain: &TrustDomain) -> Result<Workload, ConvertError> {
    let trust_domain = match w.trust_domain.as_str() {
        "" => trust_domain.clone(),
        other => TrustDomain::new(other).map_err(|e| invalid(name, e))?,
    };
    let account = if w.service_account.is_empty() { "default" } else { &w.service_account };
    let tunnel = match w.tunnel_protocol() {
        wire::TunnelProtocol::Hbone => Tunnel::Hbone,
        wire::TunnelProtocol::None => Tunnel::None,
        wire::TunnelProtocol::LegacyIstioMtls => {
            return Err(invalid(name, "legacy Istio mTLS is not supported"));
        }
    };
    let host_network = w.network_mode() == wire::NetworkMode::HostNetwork;
    let health = match w.status() {
        wire::WorkloadStatus::Healthy => Health::Ready,
        wire::WorkloadStatus::Unhealthy if extension::is_draining(&w.extensions) => Health::Draining,
        wire::WorkloadStatus::Unhealthy => Health::Unready,
    };
    let mut services = Vec::with_capacity(w.services.len());
    for (key, list) in &w.services {
        services.push((key.as_str().into(), ports(name, &list.ports)?));
    }
    let workload_name = if w.workload_name.is_empty() { &w.name } else { &w.workload_name };
    Ok(Workload {
        identity: SpiffeId::new(trust_domain, &w.namespace, account).map_err(|e| invalid(name, e))?,
        uid: w.uid.into(),
        workload_name: workload_name.as_str().into(),
        name: w.name.into(),
        namespace: w.namespace.into(),
        node: w.node.into(),
        zone: w.locality.map(|at| at.zone).unwrap_or_default().into(),
        network: w.network.into(),
        host_network,
        addresses: w.addresses.iter().map(|a| self::address(name, a)).collect::<Result<_, _>>()?,
        tunnel,
        health,
        services,
        policies: w.authorization_policies.iter().map(|name| name.as_str().into()).collect(),
    })
}

fn service(name: &str, s: wire::Service) -> Result<Service, ConvertError> {
    let traits = extension::traits(&s.extensions)
        .map_err(|source| ConvertError::Decode { name: name.to_owned(), source })?;
    let node_port = |p: &weft_proto::service::NodePort| {
        let (service_port, node_port) =
            (dialled_port(name, p.service_port)?, dialled_port(name, p.node_port)?);
        Ok::<_, ConvertError>(NodePort { service_port, node_port })
    };
    let external = traits.external_addresses.iter().map(|bytes| address(name, bytes));
    let seconds = u64::from(traits.client_affinity_seconds);
    let choice = s.load_balancing.unwrap_or_default();
    Ok(Service {
        key: format!("{}/{}", s.namespace, s.hostname).into(),
        addresses: s.addresses.iter().map(|a| address(name, &a.address)).collect::<Result<_, _>>()?,
        ports: ports(name, &s.ports)?,
        external_addresses: external.collect::<Result<_, _>>()?,
        node_ports: traits.node_ports.iter().map(node_port).collect::<Result<_, _>>()?,
        name: s.name.into(),
        namespace: s.namespace.into(),
        nearness: nearness(&choice),
        accepts_unready: choice.health_policy() == HealthPolicy::AllowAll,
        affinity: (seconds > 0).then(|| Duration::from_secs(seconds)),
    })
}

/// The wire ranks endpoints by how many scopes, from the first on, they share with the caller.
fn nearness(choice: &wire::LoadBalancing) -> Nearness {
    let wants = |scope| choice.routing_preference().any(|wanted| wanted == scope);
    match choice.mode() {
        Mode::Strict if wants(Scope::Node) => Nearness::OnlyNode,
        Mode::Failover if wants(Scope::Node) => Nearness::PreferNode,
        Mode::Failover if wants(Scope::Zone) => Nearness::PreferZone,
        _ => Nearness::Any,
    }
}

/// Reads a `weft.node.v1.Node`: its name and addresses.
pub fn node(name: &str, value: &[u8]) -> Result<(Arc<str>, Option<Vec<IpAddr>>), ConvertError> {
    let node: node::Node = decode(name, value)?;
    let addresses = node.addresses.iter().map(|bytes| address(name, bytes)).collect::<Result<_, _>>()?;
    Ok((name.into(), Some(addresses)))
}

/// Reads a `weft.node.v1.LocalWorkload`.
pub fn local_pod(name: &str, value: &[u8]) -> Result<LocalPod, ConvertError> {
    let local: node::LocalWorkload = decode(name, value)?;
    let netns = if !local.netns_path.is_empty() {
        NetnsHint::Path(local.netns_path.into())
    } else if !local.pod_uid.is_empty() {
        NetnsHint::PodUid(local.pod_uid)
    } else {
        NetnsHint::Unknown
    };
    Ok(LocalPod { enroll: local.enroll, netns, cut_existing: local.cut_existing_connections })
}

/// Reads the `weft.node.v1.MeshConfig`.
pub fn mesh_settings(name: &str, value: &[u8]) -> Result<MeshSettings, ConvertError> {
    let config: node::MeshConfig = decode(name, value)?;
    let parse = |list: &[String]| -> Result<Vec<IpNet>, ConvertError> {
        list.iter().map(|n| n.parse().map_err(|e| invalid(name, format!("{n:?}: {e}")))).collect()
    };
    let mut captured = parse(&config.pod_networks)?;
    captured.extend(parse(&config.service_networks)?);
    Ok(MeshSettings {
        trust_domain: TrustDomain::new(&config.trust_domain).map_err(|e| invalid(name, e))?,
        cluster_id: config.cluster_id,
        captured,
        external: parse(&config.external_networks)?,
    })
}

#[cfg(test)]
mod tests {
    use weft_proto::service::ServiceTraits;

    use super::*;

    fn read(w: wire::Workload, name: &str) -> Result<Entry, ConvertError> {
        let address = wire::Address { r#type: Some(wire::address::Type::Workload(w)) };
        entry(name, &address.encode_to_vec(), &TrustDomain::new("cluster.local").expect("valid"))
    }

    fn pod() -> wire::Workload {
        wire::Workload {
            uid: "c//Pod/shop/web".into(),
            name: "web".into(),
            namespace: "shop".into(),
            addresses: vec![vec![10, 0, 0, 1].into()],
            ..Default::default()
        }
    }

    #[test]
    fn fills_in_what_may_be_elided() {
        let Ok(Entry::Workload(w)) = read(pod(), "c//Pod/shop/web") else { panic!("not a workload") };
        assert_eq!(w.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/default");
        assert_eq!(w.addresses, ["10.0.0.1".parse::<IpAddr>().expect("valid")]);
        assert_eq!((w.tunnel, w.health), (Tunnel::None, Health::Ready));
    }

    fn read_service(service: wire::Service) -> Result<Service, ConvertError> {
        let service = wire::Service { namespace: "shop".into(), hostname: "web".into(), ..service };
        let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
        let trust = TrustDomain::new("cluster.local").expect("valid");
        let Entry::Service(service) = entry("shop/web", &address.encode_to_vec(), &trust)? else {
            panic!("not a service")
        };
        Ok((*service).clone())
    }

    #[test]
    fn which_endpoints_a_service_prefers() {
        for (mode, scopes, expected) in [
            (Mode::UnspecifiedMode, &[][..], Nearness::Any),
            (Mode::Strict, &[Scope::Node], Nearness::OnlyNode),
            (Mode::Failover, &[Scope::Zone], Nearness::PreferZone),
            (Mode::Failover, &[Scope::Zone, Scope::Node], Nearness::PreferNode),
            (Mode::Failover, &[Scope::Network], Nearness::Any),
        ] {
            let choice = wire::LoadBalancing {
                routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
                mode: mode.into(),
                ..Default::default()
            };
            let service = wire::Service { load_balancing: Some(choice), ..Default::default() };
            assert_eq!(read_service(service).expect("valid").nearness, expected, "{mode:?} {scopes:?}");
        }
    }

    #[test]
    fn what_extensions_say() {
        let traits = ServiceTraits { client_affinity_seconds: 60, ..Default::default() };
        let mut service = wire::Service {
            extensions: extension::from_traits(&traits).into_iter().collect(),
            ..Default::default()
        };
        let affinity = |service: &wire::Service| read_service(service.clone()).map(|s| s.affinity);
        assert_eq!(affinity(&service).expect("valid"), Some(Duration::from_secs(60)));
        service.extensions[0].name = "somebody.else/service".into();
        assert_eq!(affinity(&service).expect("valid"), None);
        service.extensions[0].name = "weft.dev/service".into();
        service.extensions[0].config.as_mut().expect("there").value = vec![0xff];
        assert!(affinity(&service).is_err());

        for (status, extensions, expected) in [
            (0, vec![], Health::Ready),
            (1, vec![], Health::Unready),
            (1, vec![extension::draining()], Health::Draining),
        ] {
            let Ok(Entry::Workload(w)) =
                read(wire::Workload { status, extensions, ..pod() }, "c//Pod/shop/web")
            else {
                panic!("not a workload")
            };
            assert_eq!(w.health, expected);
        }
    }

    #[test]
    fn refuses_what_it_cannot_understand() {
        assert!(read(pod(), "another").is_err(), "content under another name");
        assert!(
            read(wire::Workload { addresses: vec![vec![1, 2, 3].into()], ..pod() }, "c//Pod/shop/web")
                .is_err()
        );
        assert!(read(wire::Workload { tunnel_protocol: 2, ..pod() }, "c//Pod/shop/web").is_err());
        assert!(read(wire::Workload { trust_domain: "Bad/".into(), ..pod() }, "c//Pod/shop/web").is_err());
        let trust = TrustDomain::new("cluster.local").expect("valid");
        assert!(entry("x", &[0xff, 0xff], &trust).is_err());
        assert!(node("n", &node::Node { addresses: vec![vec![1, 2, 3]] }.encode_to_vec()).is_err());
    }

    #[test]
    fn a_service_with_its_traits() {
        let traits = |service_port, node_port| ServiceTraits {
            node_ports: vec![weft_proto::service::NodePort { service_port, node_port }],
            external_addresses: vec![vec![192, 0, 2, 1]],
            ..Default::default()
        };
        let read = |traits: &ServiceTraits| {
            let extensions = extension::from_traits(traits).into_iter().collect();
            read_service(wire::Service { extensions, ..Default::default() })
        };
        let s = read(&traits(80, 30080)).expect("valid");
        assert_eq!(s.external_addresses, ["192.0.2.1".parse::<IpAddr>().expect("valid")]);
        assert_eq!(s.node_ports, [NodePort { service_port: 80, node_port: 30080 }]);
        let s = read(&ServiceTraits::default()).expect("valid");
        assert!(s.external_addresses.is_empty() && s.node_ports.is_empty());
        for wrong in [traits(80, 0), traits(0, 30080), traits(80, 65536)] {
            assert!(read(&wrong).is_err(), "{wrong:?}");
        }
    }
}
