//! `mesh.weft.dev/v1alpha1` NodeEnrollment, one a node and named like it: which of the node's pods are enrolled, and
//! which its agent cannot enrol. The controller writes it and reads it back; people look at it. Its definition is in
//! the chart, in `templates/crds.yaml`.

use serde::{Deserialize, Serialize};

use crate::{field, field::Ip, meta::ObjectMeta};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NodeEnrollment {
    pub metadata: ObjectMeta,
    pub status: NodeEnrollmentStatus,
}

impl NodeEnrollment {
    pub const GROUP: &str = "mesh.weft.dev";
    pub const VERSION: &str = "v1alpha1";
    pub const KIND: &str = "NodeEnrollment";
    pub const PLURAL: &str = "nodeenrollments";
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeEnrollmentStatus {
    /// How many pods `enrolled` lists.
    #[serde(default)]
    pub enrolled_pods: usize,
    /// How many pods `failures` lists.
    #[serde(default)]
    pub failed_pods: usize,
    /// The newest bundle of roots that the node has in force: see `weft.node.v1.TrustBundle`.
    #[serde(default)]
    pub trust_serial: u64,
    #[serde(default, deserialize_with = "field::nullable")]
    pub enrolled: Vec<EnrolledPod>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub failures: Vec<FailedPod>,
}

/// A pod that is announced as reachable by tunnel. With another UID or other addresses it would be another pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolledPod {
    /// The workload's: CLUSTER//Pod/NAMESPACE/NAME.
    pub uid: String,
    /// The Pod's `metadata.uid`.
    #[serde(rename = "podUID", default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    pub addresses: Vec<Ip>,
}

/// A pod that labels want in the mesh and that the node's agent cannot enrol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedPod {
    /// The workload's, as in [`EnrolledPod`].
    pub uid: String,
    /// In the agent's words. At most [`FailedPod::MESSAGE_BYTES`].
    pub message: String,
}

impl FailedPod {
    pub const MESSAGE_BYTES: usize = 1024;
}
