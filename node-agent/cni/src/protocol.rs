//! What the plugin and the agent of its node say to each other: JSON over HTTP over a Unix socket.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// POST an [`AddRequest`]; 200 with an [`AddReply`], or another status with an [`ErrorReply`].
pub const ADD: &str = "/v1/add";

/// A pod whose network is made and whose processes have not started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddRequest {
    /// `metadata.uid` of the pod.
    pub pod_uid: String,
    /// `namespace/name`, for people.
    pub pod: String,
    /// Path of its network namespace, as the node sees it.
    pub netns: String,
    /// What the plugins before gave it.
    pub addresses: Vec<IpAddr>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddReply {
    /// Whether the pod belongs to the mesh, and is protected now.
    pub enrolled: bool,
}

/// Why the agent cannot say, for a person to act on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorReply {
    pub error: String,
}
