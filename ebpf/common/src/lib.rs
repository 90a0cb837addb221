//! What the kernel programs and user space must agree on: map layouts, constants and counters.
//!
//! Everything here has one memory layout on both sides. Addresses are kept in network byte order from end to end,
//! so that no reader has to ask. Called by the hooks in `ebpf/src` and by the crate `weft-kernel`; knows neither
//! maps nor system calls. A change of any layout here needs a new [`LAYOUT_VERSION`].
#![cfg_attr(not(test), no_std)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod address;
mod capture;
mod dialled;
mod maps;
mod pod;

pub use address::Address;
pub use capture::{CaptureKey, CaptureTarget, LpmKey, Verdict};
pub use dialled::Dialled;
pub use maps::{MAPS, MapShape, MapType, PINNED};
pub use pod::PodEntry;

/// Names the directory under which everything is pinned. An agent refuses pins of another version, because its
/// programs would read those maps wrongly.
pub const LAYOUT_VERSION: u32 = 1;

/// Set on captured sockets and on the agent's leg to the application; the policy rule matches it.
pub const MARK_CAPTURED: u32 = 0x111;
/// Set on the agent's leg to the network, for those who look at packets. Proves nothing: the hooks trust only
/// sockets registered in the map `OWN`.
pub const MARK_AGENT: u32 = 0x539;
/// The bits of a mark that are ours; others belong to the application and the CNI.
pub const MARK_MASK: u32 = 0xfff;
/// Where tunnels arrive (HBONE).
pub const TUNNEL_PORT: u16 = 15008;
/// `lo` is the first device of every network namespace (LOOPBACK_IFINDEX in the kernel).
pub const LOOPBACK_IFINDEX: u32 = 1;

/// Most pods one node can enrol, which is also the number of listener slots.
pub const MAX_PODS: u32 = 4096;
/// Most prefixes in the capture set. Every address known not to need the mesh is one.
pub const MAX_CAPTURE: u32 = 1 << 18;
/// Most addresses whose plaintext is refused: the enrolled pods of the whole mesh.
pub const MAX_SOURCES: u32 = 1 << 18;
/// Room in the counters map; more than [`Counter`] has, so that a new one is no new layout.
pub const MAX_COUNTERS: u32 = 32;

/// Index of each counter in the map `COUNTERS`. The numbers are part of the layout: never reuse one.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Outbound connections handed to the agent.
    Captured = 0,
    /// Connections refused because no agent listens in the pod's slot, in either direction.
    RefusedNoAgent = 1,
    /// Outbound connections refused because the socket is bound to a device, which would go round the agent.
    RefusedBoundDevice = 2,
    /// Plaintext connections refused at the SYN because their source is enrolled and must use the tunnel.
    RefusedPlaintext = 3,
    /// Outbound connections refused because the pod has no address of that family, so nothing could capture them.
    RefusedNoAddress = 4,
}
