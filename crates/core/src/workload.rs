//! What the mesh knows of one workload and of one service.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use crate::SpiffeId;

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    /// Not enrolled: plain TCP.
    None,
    /// Enrolled and announced: by tunnel on [`crate::TUNNEL_PORT`], and never otherwise.
    Hbone,
}

/// Whether a workload is to be given connections that services take. In order, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    Ready,
    /// Ending, and still serving.
    Draining,
    Unready,
}

/// Which endpoints of a service a caller is given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Nearness {
    /// All alike.
    #[default]
    Any,
    /// Those of the caller's zone as long as one serves, else any.
    PreferZone,
    /// Those of the caller's node as long as one serves, else of its zone, else any.
    PreferNode,
    /// Those of the caller's node and nobody else: `internalTrafficPolicy: Local`.
    OnlyNode,
}

/// A service's port and where one endpoint serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortMapping {
    pub service_port: u16,
    /// On a [`Service`], 0 where the endpoints differ (a named target port).
    pub target_port: u16,
}

/// One pod, or whatever else has addresses and an identity of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// `CLUSTER/GROUP/KIND/NAMESPACE/NAME`: the key.
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// What manages it (a Deployment, say): the name that metrics carry.
    pub workload_name: Arc<str>,
    pub identity: SpiffeId,
    pub node: Arc<str>,
    /// The node's failure domain, such as a data centre. Empty where it has none.
    pub zone: Arc<str>,
    /// Networks that do not route to each other have different names; addresses may recur between them.
    pub network: Arc<str>,
    /// Shares its node's addresses, so it is never enrolled and no address leads to it.
    pub host_network: bool,
    pub addresses: Vec<IpAddr>,
    pub tunnel: Tunnel,
    pub health: Health,
    /// The services it is an endpoint of, by key.
    pub services: Vec<(Arc<str>, Vec<PortMapping>)>,
    /// The policies in force for connections to it, by name. See [`crate::policy`].
    pub policies: Vec<Arc<str>>,
}

impl Workload {
    /// Where this workload serves `port` of `service`.
    pub fn target_port(&self, service: &str, port: u16) -> Option<u16> {
        let (_, ports) = self.services.iter().find(|(key, _)| &**key == service)?;
        ports.iter().find(|p| p.service_port == port).map(|p| p.target_port)
    }

    /// Whether it can be sent what is for `port` of `service`.
    pub fn serves(&self, service: &str, port: u16) -> bool {
        !self.addresses.is_empty() && self.target_port(service, port).is_some()
    }

    /// Its address of the same family as `like`, else any.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        let same = |a: &&IpAddr| a.is_ipv4() == like.is_ipv4();
        self.addresses.iter().find(same).or(self.addresses.first()).copied()
    }
}

/// A port of every node that leads to a service's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodePort {
    pub service_port: u16,
    pub node_port: u16,
}

/// A name and virtual addresses in front of workloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// `NAMESPACE/HOSTNAME`.
    pub key: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// Its alone: a port of these that it does not have is nobody's.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<PortMapping>,
    /// Where each of `ports` leads to it, and every other port is somebody else's.
    pub external_addresses: Vec<IpAddr>,
    pub node_ports: Vec<NodePort>,
    pub nearness: Nearness,
    /// Endpoints are reached whether they are ready or not: `publishNotReadyAddresses`.
    pub accepts_unready: bool,
    /// How long after its last connection a caller is still given the same endpoint: `sessionAffinity: ClientIP`.
    pub affinity: Option<Duration>,
}

impl Service {
    /// Its ports at its external addresses.
    pub fn external_ports(&self) -> impl Iterator<Item = SocketAddr> {
        let at =
            |ip: &IpAddr| self.ports.iter().map(|p| SocketAddr::new(*ip, p.service_port)).collect::<Vec<_>>();
        self.external_addresses.iter().flat_map(at)
    }

    /// The port that a node's port leads to.
    pub fn service_port(&self, node_port: u16) -> Option<u16> {
        self.node_ports.iter().find(|p| p.node_port == node_port).map(|p| p.service_port)
    }
}
