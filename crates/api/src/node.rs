//! `v1/Node`: which addresses its pods get, and which are its own.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

use crate::{field, labels, meta::ObjectMeta};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Node {
    pub metadata: ObjectMeta,
    #[serde(default, deserialize_with = "field::nullable")]
    pub spec: NodeSpec,
    #[serde(default, deserialize_with = "field::nullable")]
    pub status: NodeStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct NodeSpec {
    /// Absent where the network plugin gives out addresses by itself.
    #[serde(default, rename = "podCIDR", deserialize_with = "field::optional_network")]
    pub pod_cidr: Option<IpNet>,
    #[serde(default, rename = "podCIDRs", deserialize_with = "field::networks")]
    pub pod_cidrs: Vec<IpNet>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct NodeStatus {
    #[serde(default, deserialize_with = "field::nullable")]
    pub addresses: Vec<NodeAddress>,
}

/// An address, or a name where `kind` says so.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NodeAddress {
    #[serde(rename = "type")]
    pub kind: String,
    pub address: String,
}

impl Node {
    pub fn pod_networks(&self) -> impl Iterator<Item = IpNet> {
        self.spec.pod_cidr.into_iter().chain(self.spec.pod_cidrs.iter().copied())
    }

    /// Region and zone, either of them empty where it is in none.
    pub fn locality(&self) -> (&str, &str) {
        let label = |name| self.metadata.labels.get(name).map_or("", String::as_str);
        (label(labels::REGION), label(labels::ZONE))
    }

    /// Its own addresses, within the cluster and outside; names are left out.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let ips =
            self.status.addresses.iter().filter(|a| matches!(a.kind.as_str(), "InternalIP" | "ExternalIP"));
        ips.filter_map(|a| a.address.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical())
    }
}
