//! The tunnel between agents: mutual TLS with SPIFFE identities, HBONE (CONNECT streams over HTTP/2) as client and server,
//! the client's pool of tunnels, and the copying of bytes between applications and tunnels.
//!
//! Everything here lives on one single-threaded worker (`tokio::task::LocalSet`): a [`Pool`], its tunnels and its streams
//! are `!Send`, and nothing is locked or shared between workers but a [`TlsIdentity`], which does not change, its
//! [`Roots`], and [`Counters`]. Not here: which peer to dial, policy, metrics, sockets in a pod's network namespace. Those are the
//! agent's, which calls this crate.
#![forbid(unsafe_code)]

mod client;
mod identity;
mod limits;
mod pool;
mod relay;
mod roots;
mod scratch;
mod server;
mod stream;
mod tls_io;
mod verify;

pub use client::{ConnectRequest, OpenError};
pub use identity::{TlsError, TlsIdentity, warm_up};
pub use limits::Limits;
pub use pool::{Pool, TunnelKey, Tunneled};
pub use relay::{Counters, RelayError, relay, relay_plain};
pub use roots::Roots;
pub use server::{Incoming, Malformed, ServeError, serve};
pub use stream::{Stream, StreamError};
pub use verify::PeerRefused;

/// Request header that carries the UID of the workload a CONNECT means to reach; a destination that is another one
/// answers 421. A stock ztunnel ignores it.
pub const DESTINATION_UID: &str = "weft-destination-uid";

/// Response header that says, for operators, why a CONNECT was refused.
pub const REFUSAL_REASON: &str = "weft-reason";
