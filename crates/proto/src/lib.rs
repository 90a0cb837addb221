//! Wire messages and gRPC stubs of the control plane.
//!
//! Field numbers and names are those of Envoy's xDS transport and of Istio's workload and CA APIs, so that a stock
//! ztunnel can be configured by Weft's controller; what those lack travels in `weft.*` messages.
#![forbid(unsafe_code)]
#![allow(clippy::all, clippy::unwrap_used, reason = "generated code")]

/// Delta xDS.
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}

/// Workloads and services.
pub mod workload {
    tonic::include_proto!("istio.workload");
}

/// Who may call whom.
pub mod security {
    tonic::include_proto!("istio.security");
}

/// The certificate authority.
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}

/// Controller and agent of one node.
pub mod node {
    tonic::include_proto!("weft.node.v1");
}

/// What [`workload`] has no field for.
pub mod service {
    tonic::include_proto!("weft.service.v1");
}

pub mod authorization;
pub mod extension;

/// Type URLs of the resources that travel over delta xDS.
pub mod type_url {
    /// [`crate::workload::Address`], the same for every node.
    pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
    /// [`crate::security::Authorization`], the same for every node.
    pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
    /// [`crate::node::LocalWorkload`], the node's own.
    pub const LOCAL_WORKLOAD: &str = "type.googleapis.com/weft.node.v1.LocalWorkload";
    /// [`crate::node::MeshConfig`], one resource.
    pub const MESH_CONFIG: &str = "type.googleapis.com/weft.node.v1.MeshConfig";
    /// [`crate::node::Node`], the same for every node.
    pub const NODE: &str = "type.googleapis.com/weft.node.v1.Node";
    /// [`crate::node::TrustBundle`], one resource.
    pub const TRUST_BUNDLE: &str = "type.googleapis.com/weft.node.v1.TrustBundle";
}

/// Name of the one [`node::MeshConfig`] resource.
pub const MESH_CONFIG_NAME: &str = "mesh";
/// Name of the one [`node::TrustBundle`] resource.
pub const TRUST_BUNDLE_NAME: &str = "trust";
