//! `v1/Service`.

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU16};

use serde::{Deserialize, Deserializer};

use crate::{
    field::{self, IntOrString, Ip, Protocol},
    meta::ObjectMeta,
};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Service {
    pub metadata: ObjectMeta,
    #[serde(default, deserialize_with = "field::nullable")]
    pub spec: ServiceSpec,
    #[serde(default, deserialize_with = "field::nullable")]
    pub status: ServiceStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    #[serde(default, rename = "type")]
    pub service_type: Option<ServiceType>,
    #[serde(default, rename = "clusterIP")]
    pub cluster_ip: ClusterIp,
    #[serde(default, rename = "clusterIPs", deserialize_with = "field::nullable")]
    pub cluster_ips: Vec<ClusterIp>,
    #[serde(default, rename = "externalIPs", deserialize_with = "field::nullable")]
    pub external_ips: Vec<Ip>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub ports: Vec<ServicePort>,
    /// Labels of the pods behind it. Without any, somebody else says which those are.
    #[serde(default, deserialize_with = "field::nullable")]
    pub selector: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub publish_not_ready_addresses: bool,
    #[serde(default)]
    pub internal_traffic_policy: Option<InternalTrafficPolicy>,
    /// Which endpoints are preferred; what Weft does not know counts as none.
    #[serde(default)]
    pub traffic_distribution: Option<String>,
    #[serde(default)]
    pub session_affinity: Option<SessionAffinity>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub session_affinity_config: SessionAffinityConfig,
}

/// Which endpoints callers within the cluster reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum InternalTrafficPolicy {
    Cluster,
    /// Those on the caller's own node, and nobody where there is none.
    Local,
}

/// Values of [`ServiceSpec::traffic_distribution`]. The first two are the same.
pub const PREFER_CLOSE: &str = "PreferClose";
pub const PREFER_SAME_ZONE: &str = "PreferSameZone";
pub const PREFER_SAME_NODE: &str = "PreferSameNode";

/// Whether a caller is given the same endpoint again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum SessionAffinity {
    None,
    ClientIP,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct SessionAffinityConfig {
    #[serde(default, rename = "clientIP", deserialize_with = "field::nullable")]
    pub client_ip: ClientIpConfig,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientIpConfig {
    /// How long after its last connection. Absent means three hours.
    #[serde(default)]
    pub timeout_seconds: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum ServiceType {
    ClusterIP,
    NodePort,
    LoadBalancer,
    /// An alias in DNS, without addresses or endpoints of its own.
    ExternalName,
}

/// An address, or none: the string `None` of a headless Service, an empty string, or no field at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClusterIp(pub Option<IpAddr>);

impl<'de> Deserialize<'de> for ClusterIp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
        if text.is_empty() || text == "None" {
            return Ok(Self(None));
        }
        let address: IpAddr = text.parse().map_err(|_| {
            serde::de::Error::custom(format_args!("{text:?} is neither an IP address nor \"None\""))
        })?;
        Ok(Self(Some(address.to_canonical())))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    #[serde(default, deserialize_with = "field::nullable")]
    pub name: String,
    pub port: NonZeroU16,
    #[serde(default)]
    pub target_port: Option<IntOrString>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub protocol: Protocol,
    /// A port of every node that leads here; 0 where there is none.
    #[serde(default, deserialize_with = "field::nullable")]
    pub node_port: u16,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    #[serde(default, deserialize_with = "field::nullable")]
    pub load_balancer: LoadBalancerStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct LoadBalancerStatus {
    #[serde(default, deserialize_with = "field::nullable")]
    pub ingress: Vec<LoadBalancerIngress>,
}

/// A load balancer's address, or its name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancerIngress {
    #[serde(default, deserialize_with = "field::optional_ip")]
    pub ip: Option<IpAddr>,
    /// What the load balancer does with connections: `VIP` delivers them as they are; with `Proxy` they must get to it,
    /// since it may end TLS or speak the PROXY protocol. Absent means `VIP`.
    #[serde(default)]
    pub ip_mode: Option<String>,
}

impl LoadBalancerIngress {
    fn vip(&self) -> Option<IpAddr> {
        self.ip.filter(|_| self.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"))
    }
}

impl Service {
    /// Its addresses within the cluster, which are its alone, without repetitions.
    pub fn cluster_addresses(&self) -> Vec<IpAddr> {
        let addresses = std::iter::once(&self.spec.cluster_ip).chain(&self.spec.cluster_ips);
        distinct(addresses.filter_map(|ip| ip.0))
    }

    /// Addresses at which kube-proxy takes connections to its ports from anywhere, pods included, without repetitions.
    /// It does so only for a Service that has an address within the cluster.
    pub fn external_addresses(&self) -> Vec<IpAddr> {
        if self.cluster_addresses().is_empty() {
            return Vec::new();
        }
        let is_load_balancer = self.spec.service_type == Some(ServiceType::LoadBalancer);
        let ingress = self.status.load_balancer.ingress.iter().filter(|_| is_load_balancer);
        let ingress = ingress.filter_map(LoadBalancerIngress::vip);
        distinct(self.spec.external_ips.iter().map(|ip| ip.0).chain(ingress))
    }

    /// Its TCP ports that every node takes connections for, with the nodes' port.
    pub fn node_ports(&self) -> impl Iterator<Item = (&ServicePort, u16)> {
        let has = matches!(self.spec.service_type, Some(ServiceType::NodePort | ServiceType::LoadBalancer))
            && !self.cluster_addresses().is_empty();
        self.tcp_ports().filter(move |port| has && port.node_port != 0).map(|port| (port, port.node_port))
    }

    /// How many seconds after its last connection a caller is still given the same endpoint; None without affinity.
    pub fn client_affinity(&self) -> Option<u32> {
        const THREE_HOURS: u32 = 10_800;
        let wanted = self.spec.session_affinity == Some(SessionAffinity::ClientIP);
        wanted.then(|| self.spec.session_affinity_config.client_ip.timeout_seconds.unwrap_or(THREE_HOURS))
    }

    pub fn tcp_ports(&self) -> impl Iterator<Item = &ServicePort> {
        self.spec.ports.iter().filter(|port| port.protocol == Protocol::Tcp)
    }
}

fn distinct(all: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for address in all {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}
