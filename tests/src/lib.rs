//! The test bed: nodes and pods as network namespaces on one kernel, with the real controller, real agents and
//! third-party programs as processes. Used by the scenarios, the demo and the benchmark.
//!
//! A `main` of this package begins with [`helper::run_if_asked`] and runs the rest inside [`isolated`]; then
//! [`Cluster::new`] builds a cluster, [`programs`] starts workloads in its pods, [`Cluster::capture`] records the wire,
//! and [`Recording`] says what that proves. Nothing here knows how the mesh works inside.
#![allow(clippy::disallowed_methods, reason = "no async runtime runs on the bed's threads: `poll` may sleep")]

pub mod agent;
pub mod bed;
pub mod binaries;
pub mod capture;
pub mod cluster;
pub mod control;
pub mod evidence;
pub mod helper;
pub mod http;
pub mod isolate;
pub mod kubernetes;
pub mod manifest;
pub mod metrics;
pub mod netns;
pub mod packet;
pub mod place;
pub mod pod;
pub mod poll;
pub mod process;
pub mod programs;
pub mod relay;
pub mod servers;
pub mod socket_lb;
pub mod sockets;
pub mod topology;
pub mod traffic;

pub use agent::Agent;
pub use bed::Bed;
pub use capture::{Capture, Moment};
pub use cluster::{Cluster, addresses};
pub use control::Controller;
pub use evidence::Recording;
pub use isolate::isolated;
pub use metrics::Metrics;
pub use netns::Netns;
pub use place::Place;
pub use pod::{Pod, Service};
pub use process::Process;
pub use servers::Server;
pub use socket_lb::SocketLb;
pub use sockets::{Checksum, Dial};
pub use traffic::Traffic;
