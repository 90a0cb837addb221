//! What an agent says of itself when it is asked: `weft-agent status` prints it, `weft check` reads it. Agents and the
//! command line may be of different versions, so fields are only ever added, each with a default.

use serde::{Deserialize, Serialize};

/// The state of one node's agent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentStatus {
    pub version: String,
    pub node: String,
    /// The node's clock, in seconds since 1970.
    pub time: f64,
    /// Whether it hears the controller right now.
    pub connected: bool,
    /// Why it last did not.
    pub trouble: String,
    /// What it has seen of the cluster: `KIND=RESOURCEVERSION,...`. A controller that has seen less is not believed.
    pub seen: String,
    /// Why it is not ready; `None` where it is.
    pub waiting: Option<String>,
    pub plugin: PluginStatus,
    pub kubelet: KubeletStatus,
    pub certificates: Vec<CertificateStatus>,
    /// The pods of this node that are in the mesh, or should be.
    pub pods: Vec<PodStatus>,
}

/// Whether the CNI plugin is in the node's network configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum PluginStatus {
    /// The agent was not told to put one there.
    #[default]
    NotManaged,
    /// It has not looked yet.
    Unknown,
    InPlace,
    Failed {
        error: String,
    },
}

/// Whether the kernel recognises the kubelet's probes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum KubeletStatus {
    /// The agent has not looked yet, or is of a version that does not say.
    #[default]
    Unknown,
    Recognised {
        /// As the node's `/proc/PID/cgroup` has it.
        cgroup: String,
    },
    Unrecognised {
        why: String,
    },
}

/// A workload certificate, by its dates alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CertificateStatus {
    pub identity: String,
    /// Seconds since 1970.
    pub not_after: u64,
}

/// One pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    /// The workload's uid: cluster, kind, namespace and name.
    pub uid: String,
    pub identity: Option<String>,
    /// How far its enrolment is: `hold`, `published`, `leaving`; `None` where it is not enrolled.
    pub phase: Option<String>,
    pub open_connections: usize,
    /// Why it cannot be enrolled.
    pub failure: Option<String>,
    /// Connections with others in the mesh that are older than its enrolment, and so in the clear.
    pub connections_before_enrollment: usize,
    /// Why those could not be counted, or not be cut where that was asked for.
    pub connections_problem: Option<String>,
}
