//! Kubernetes objects as Weft reads them, and the labels and annotations that speak to it.
//!
//! Only the fields Weft uses are here: unknown fields are ignored, `null` means absent as it does to Kubernetes, and a
//! wrong type or an impossible value is an error at the field that has it. Nothing here does I/O or knows where an
//! object came from; the controller's sources do.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

pub mod agent;
pub mod authorization_policy;
pub mod discovery;
pub mod enrollment;
pub mod existing;
pub mod field;
pub mod inbound;
pub mod labels;
pub mod meta;
pub mod namespace;
pub mod node;
pub mod node_enrollment;
pub mod object;
pub mod pod;
pub mod service;
pub mod service_cidr;
pub mod trust;

pub use authorization_policy::AuthorizationPolicy;
pub use discovery::EndpointSlice;
pub use enrollment::{MeshChoice, mesh_choice};
pub use existing::{CutChoice, cut_choice};
pub use inbound::{DefaultInbound, inbound_choice};
pub use meta::ObjectMeta;
pub use namespace::Namespace;
pub use node::Node;
pub use node_enrollment::NodeEnrollment;
pub use object::{FieldError, Kind, Object, ObjectKey};
pub use pod::Pod;
pub use service::Service;
pub use service_cidr::ServiceCidr;
