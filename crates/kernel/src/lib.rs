//! The kernel's part of the mesh, seen from user space.
//!
//! Here live: loading the programs of `ebpf/` and pinning them, the maps they share, what one pod needs inside its
//! network namespace (policy route, sysctls, listener, socket lookup), and the sockets the agent opens there.
//! Not here: what to capture and whom to refuse, which `weft-core` decides, and every byte of traffic, which
//! `weft-transport` carries. The node agent is the only caller.
//!
//! A process that ends leaves everything pinned in place: pods stay captured and are refused until a successor opens
//! the same instance. Nothing here is undone by dropping a value.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod debug_log;
mod diag;
mod error;
mod kernel;
pub mod kubelet;
mod link;
pub mod locate;
mod maps;
mod netns;
mod object;
mod options;
mod pins;
mod pod;
pub mod preflight;
mod routes;
mod save;
mod sockets;
mod sys;
mod sysctl;
mod target;

pub use diag::Connection;
pub use error::Error;
pub use kernel::{Counters, Kernel, PodRecord};
pub use kubelet::Kubelet;
pub use netns::Netns;
pub use options::Options;
pub use pod::{Pod, PodAddresses};
pub use target::Target;
pub use weft_ebpf_common::{LAYOUT_VERSION, MARK_AGENT, MARK_CAPTURED, MARK_MASK, TUNNEL_PORT, Verdict};
