//! Where objects come from. A source reads them, keeps them valid, and sends what changed; what they mean is decided
//! in `translate`. There are two, a directory of manifests and a cluster's API server.

pub mod directory;
pub mod files;
pub mod kubernetes;
pub mod manifest;
pub mod watch;

use std::collections::BTreeMap;

use weft_api::{Object, ObjectKey};
use weft_xds::VersionVector;

use crate::cluster::enrollment::Heard;

/// What a cluster has told, to be taken in as a whole: who is enrolled first.
#[derive(Debug, Default)]
pub struct News {
    pub heard: Vec<Heard>,
    pub delta: Delta,
    /// Up to where everything has been told, with this.
    pub known: VersionVector,
    /// Where something was last told that makes a difference, with this. What follows from it holds no more than that.
    pub content: VersionVector,
    /// A list that was asked for has shown that this kind is not newer than this.
    pub newest: Option<(&'static str, u64)>,
}

/// What changed between two states of a source, to be applied as a whole. The first one a source sends is its whole
/// content.
#[derive(Debug, Default, PartialEq)]
pub struct Delta {
    pub upserts: Vec<Object>,
    pub deletes: Vec<ObjectKey>,
}

impl Delta {
    /// What makes `new` of `old`.
    pub fn between(old: &BTreeMap<ObjectKey, Object>, new: &BTreeMap<ObjectKey, Object>) -> Self {
        let upserts =
            new.iter().filter(|(key, object)| old.get(key) != Some(object)).map(|(_, object)| object.clone());
        let deletes = old.keys().filter(|key| !new.contains_key(key)).cloned();
        Self { upserts: upserts.collect(), deletes: deletes.collect() }
    }

    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.deletes.is_empty()
    }
}
