//! Metadata that every object has.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::field;

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectMeta {
    #[serde(deserialize_with = "field::name")]
    pub name: String,
    /// None for cluster-scoped objects. See [`crate::Object::key`] for what an absent one means.
    #[serde(default, deserialize_with = "field::optional_name")]
    pub namespace: Option<String>,
    /// Set by the API server; usually absent in a directory of manifests.
    #[serde(default)]
    pub uid: Option<String>,
    /// Which version of the specification it is, where the API server counts them.
    #[serde(default)]
    pub generation: Option<i64>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "field::nullable")]
    pub owner_references: Vec<OwnerReference>,
}

impl ObjectMeta {
    /// The first of `names` that is a label with a value.
    pub fn first_label(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| self.labels.get(*name)).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// The owner that manages this object, if it has one.
    pub fn controller(&self) -> Option<&OwnerReference> {
        self.owner_references.iter().find(|owner| owner.controller).or(self.owner_references.first())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OwnerReference {
    pub kind: String,
    pub name: String,
    #[serde(default, deserialize_with = "field::nullable")]
    pub controller: bool,
}
