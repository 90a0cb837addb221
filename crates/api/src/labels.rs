//! Names of the labels and annotations Weft reads. The ones of its own are in the domain `weft.dev`.

/// Label on a Namespace or Pod, [`ENABLED`] or [`DISABLED`]: whether its pods are in the mesh. The Pod's wins.
pub const MESH: &str = "weft.dev/mesh";
pub const ENABLED: &str = "enabled";
pub const DISABLED: &str = "disabled";

/// Annotation on a Namespace or Pod, a [`crate::DefaultInbound`]: who may call where no policy speaks.
pub const DEFAULT_INBOUND: &str = "policy.weft.dev/default-inbound";

/// Annotation on a Namespace or Pod, `true` or `false`: whether connections that are older than a pod's enrolment are cut
/// once both their ends are in the mesh. The Pod's wins.
pub const CUT_EXISTING: &str = "weft.dev/cut-existing-connections";

/// Annotation on a Pod: the path of its network namespace. It counts only where a directory is read; whoever may write
/// Pods in a cluster could name another pod's namespace.
pub const NETNS: &str = "weft.dev/netns";

/// Label on an EndpointSlice: the Service of its namespace it belongs to.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label on a Pod: the hash that a Deployment appended to the name of the pod's ReplicaSet.
pub const POD_TEMPLATE_HASH: &str = "pod-template-hash";

/// Labels of a Node: its failure domain, and what that is part of.
pub const ZONE: &str = "topology.kubernetes.io/zone";
pub const REGION: &str = "topology.kubernetes.io/region";

/// Labels that name the application, the first one present wins.
pub const APPLICATION: [&str; 2] = ["app.kubernetes.io/name", "app"];
/// Labels that name the application's version, the first one present wins.
pub const VERSION: [&str; 2] = ["app.kubernetes.io/version", "version"];
