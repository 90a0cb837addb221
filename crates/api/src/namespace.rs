//! `v1/Namespace`: nothing but its labels matter.

use serde::Deserialize;

use crate::meta::ObjectMeta;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Namespace {
    pub metadata: ObjectMeta,
}
