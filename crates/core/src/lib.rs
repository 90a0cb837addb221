//! The mesh model and every decision that is pure: who a workload is, where a service's endpoints are, which addresses
//! the kernel hands to the agent. No I/O, no async, no clock of its own; the agent and the controller bring those.
#![forbid(unsafe_code)]

pub mod identity;

pub use identity::{SpiffeId, TrustDomain};
