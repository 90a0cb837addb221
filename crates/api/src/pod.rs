//! `v1/Pod`.

use std::net::IpAddr;

use serde::Deserialize;

use crate::{field, field::Ip, labels, meta::ObjectMeta};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Pod {
    pub metadata: ObjectMeta,
    #[serde(default, deserialize_with = "field::nullable")]
    pub spec: PodSpec,
    #[serde(default, deserialize_with = "field::nullable")]
    pub status: PodStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    #[serde(default, deserialize_with = "field::optional_name")]
    pub node_name: Option<String>,
    #[serde(default, deserialize_with = "field::optional_name")]
    pub service_account_name: Option<String>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub host_network: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    #[serde(default)]
    pub phase: Option<Phase>,
    #[serde(default, rename = "podIP", deserialize_with = "field::optional_ip")]
    pub pod_ip: Option<IpAddr>,
    #[serde(default, rename = "podIPs", deserialize_with = "field::nullable")]
    pub pod_ips: Vec<PodIp>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub conditions: Vec<Condition>,
}

/// Absent, as it is in hand-written manifests, means a pod that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct PodIp {
    pub ip: Ip,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
}

impl Pod {
    /// Whether its containers have ended for good: its addresses may belong to another pod by now.
    pub fn is_gone(&self) -> bool {
        matches!(self.status.phase, Some(Phase::Succeeded | Phase::Failed))
    }

    /// Every address the status lists, in its order and without repetitions. Those of a pod on the host's network are
    /// the node's.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for address in self.status.pod_ip.into_iter().chain(self.status.pod_ips.iter().map(|p| p.ip.0)) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }

    pub fn service_account(&self) -> &str {
        self.spec.service_account_name.as_deref().unwrap_or("default")
    }

    /// The `Ready` condition; None where the status does not say.
    pub fn ready(&self) -> Option<bool> {
        self.status.conditions.iter().find(|c| c.kind == "Ready").map(|c| c.status == "True")
    }

    pub fn netns_path(&self) -> Option<&str> {
        self.metadata.annotations.get(labels::NETNS).map(String::as_str).filter(|path| !path.is_empty())
    }
}
