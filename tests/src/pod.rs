//! What scenarios hold of the objects they made: a pod and a service, with their names and addresses. Made by `cluster`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::place::Place;

/// A pod: a place, and who it is.
#[derive(Clone, Debug)]
pub struct Pod {
    pub(crate) place: Place,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) service_account: String,
}

impl std::ops::Deref for Pod {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

impl Pod {
    /// The workload's uid, as the controller makes it.
    pub fn uid(&self) -> String {
        format!("Kubernetes//Pod/{}/{}", self.namespace, self.name)
    }

    /// Name of its node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Name of its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its SPIFFE identity in the default trust domain.
    pub fn identity(&self) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{}", self.namespace, self.service_account)
    }
}

/// A service and its cluster addresses.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub port: u16,
    pub target_port: u16,
}

impl Service {
    /// Its cluster address over IPv4, with the port.
    pub fn at(&self) -> SocketAddr {
        (self.v4, self.port).into()
    }

    /// Its cluster address over IPv6, with the port.
    pub fn at_v6(&self) -> SocketAddr {
        (self.v6, self.port).into()
    }
}
