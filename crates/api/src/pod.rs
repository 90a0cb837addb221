//! `v1/Pod`.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize};

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
    pub conditions: Conditions,
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

/// Of the list of conditions, those that Weft reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    /// Whether `Ready` is True.
    pub ready: Option<bool>,
    /// [`Condition::ENROLLED`], which Weft writes itself.
    pub enrolled: Option<Condition>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    #[serde(default, deserialize_with = "field::nullable")]
    pub reason: String,
    #[serde(default, deserialize_with = "field::nullable")]
    pub message: String,
    /// Of the object, when this was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When `status` last changed, as in RFC 3339.
    #[serde(default)]
    pub last_transition_time: Option<String>,
}

impl Condition {
    /// Whether the pod is in the mesh: its agent has enrolled it, and it is reached by tunnel only.
    pub const ENROLLED: &str = "weft.dev/Enrolled";

    pub fn is_true(&self) -> bool {
        self.status == "True"
    }
}

impl<'de> Deserialize<'de> for Conditions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut conditions = Self::default();
        for condition in Vec::<Condition>::deserialize(deserializer)? {
            match condition.kind.as_str() {
                "Ready" => conditions.ready = Some(condition.is_true()),
                Condition::ENROLLED => conditions.enrolled = Some(condition),
                _ => {}
            }
        }
        Ok(conditions)
    }
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
        self.status.conditions.ready
    }

    /// Whether the mesh follows the same from both: what Weft itself writes there counts for nothing.
    pub fn is_same_to_mesh(&self, other: &Self) -> bool {
        let Self { metadata, spec, status } = self;
        let PodStatus { phase, pod_ip, pod_ips, conditions: Conditions { ready, enrolled: _ } } = status;
        let theirs = &other.status;
        (metadata, spec) == (&other.metadata, &other.spec)
            && (phase, pod_ip, pod_ips) == (&theirs.phase, &theirs.pod_ip, &theirs.pod_ips)
            && *ready == theirs.conditions.ready
    }

    pub fn netns_path(&self) -> Option<&str> {
        self.metadata.annotations.get(labels::NETNS).map(String::as_str).filter(|path| !path.is_empty())
    }
}
