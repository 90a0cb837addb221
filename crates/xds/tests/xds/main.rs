//! The client and the server against each other, and each against misbehaving peers, over real TCP and TLS.
#![allow(clippy::unwrap_used, reason = "tests")]

mod access;
mod behind;
mod followers;
mod harness;
mod resume;
mod sync;
mod wire;
