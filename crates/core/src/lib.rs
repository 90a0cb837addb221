//! The mesh model and every decision that is pure: who a workload is, where a service's endpoints are, which addresses
//! the kernel hands to the agent, who may call whom. No I/O, no async, no clock of its own; the agent and the controller
//! bring those.
#![forbid(unsafe_code)]

pub mod balance;
mod endpoints;
mod frontends;
pub mod identity;
pub mod mesh;
pub mod policy;
pub mod workload;

pub use endpoints::Caller;
pub use identity::{SpiffeId, TrustDomain};
pub use mesh::{AddressKind, Entry, Mesh, Target};
pub use workload::{Health, Nearness, NodePort, PortMapping, Service, Tunnel, Workload};

/// Port on which an enrolled workload is reached by tunnel (HBONE's, as in Istio).
pub const TUNNEL_PORT: u16 = 15008;
