//! Delta xDS between the controller and everything it configures: a client and a server over `weft-proto`.
//!
//! Resources are opaque bytes with a name and a version here; what they mean is the business of the callers, the
//! controller (server) and the node agent (client). Also here is how a caller reaches the controller at all, because
//! the CA and the node service are on the same port behind the same token: [`channel`].
//!
//! What both sides hold to:
//!
//! * The whole difference of one type travels in one response, so a consumer never sees half a change.
//! * At most one response of a type is unanswered; what changes meanwhile is coalesced into the next one.
//! * Within one snapshot types are sent in a fixed order, settings first and a node's own workloads last, and the
//!   client hands updates to its consumer one at a time in the order of the stream.
//! * A server that has nothing to serve yet says nothing: an empty answer would tell clients to forget all they know.
//! * A server that has seen less than a client says nothing to it either, and ends the stream if that lasts ([`Progress`]).
#![forbid(unsafe_code)]

mod backoff;
mod channel;
mod client;
mod followers;
mod order;
mod server;
mod snapshot;
mod subscription;
mod update;
mod vector;
mod version;
mod wire;

pub use backoff::Backoff;
pub use channel::{
    AuthenticatedChannel, CaSource, CallerMetadata, ConfigError, ControlEndpoint, TokenSource, channel,
};
pub use client::{ClientConfig, run};
pub use followers::Followers;
pub use server::{Authenticate, Authentication, NodeName, Server, Stats, with_keepalive};
pub use snapshot::{Resources, Snapshot, resource};
pub use update::{Resource, Update};
pub use vector::{METADATA_KEY, NotAVector, Progress, VersionVector};
pub use version::Version;
pub use wire::Service;

use std::time::Duration;

/// An idle HTTP/2 connection is pinged this often, by both sides.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A peer that leaves a ping unanswered for this long is gone.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Upper bound of one response in bytes: the full state of a very large mesh comes in a single one.
pub const MAX_RESPONSE_BYTES: usize = 256 << 20;
/// Upper bound of one request in bytes: after a reconnect it lists every name and version the client kept.
pub const MAX_REQUEST_BYTES: usize = 64 << 20;
