//! What the CNI plugin and the agent have in common: what they say to each other ([`protocol`]), the file in which the
//! agent tells the plugin what it must know ([`settings`]), and how the plugin gets into a node's network configuration
//! ([`conflist`], [`install`]). The plugin itself is the binary beside it.
//!
//! The plugin is chained after the one that gives a pod its address. For a pod of the mesh it returns when the agent has
//! protected the pod, so before its first process starts.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

pub mod conflist;
pub mod http;
pub mod install;
pub mod protocol;
pub mod settings;
pub mod token;

/// The plugin's name, in network configurations and as a file.
pub const PLUGIN: &str = "weft-cni";
/// The versions of the CNI specification that the plugin speaks. Before them plugins were not chained.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
