//! Who is enrolled, in a cluster: one ConfigMap a node, written before what follows from it is published, read back by
//! a controller that starts, and watched by other replicas. Which pods count is decided in `crate::enrollment`.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::{ClusterError, bounded, code};
use crate::enrollment::{Place, Places};

/// The label by which they are found, with the value `true`.
pub const LABEL: &str = "weft.dev/enrollment";
const PREFIX: &str = "weft-enrollment-";
const DATA: &str = "enrolled";
/// Replicas that write at the same time refuse each other; each refusal means that the other got through.
const ATTEMPTS: usize = 5;

/// What a node's ConfigMap holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    pub version: String,
    pub places: Places,
}

/// A change that was heard of: a node, and what its ConfigMap holds, or None if it is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    pub node: String,
    pub record: Option<Record>,
}

/// One pod of `data.enrolled`, which is a JSON list of them.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// The workload's.
    uid: String,
    /// The pod's `metadata.uid`: a pod of the same name that comes later is another one.
    pod_uid: Option<String>,
    addresses: Vec<IpAddr>,
}

/// The ConfigMaps as they were last seen.
#[derive(Debug)]
pub struct Records {
    maps: Api<ConfigMap>,
    runtime: Handle,
    known: BTreeMap<String, Record>,
}

impl Records {
    /// Must be called on a runtime, which then does the writing.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { maps: Api::namespaced(client, namespace), runtime: Handle::current(), known: BTreeMap::new() }
    }

    /// Takes in what a watch saw. False if it is older than what is known: the echo of an own write.
    pub fn heard(&mut self, heard: &Heard) -> bool {
        match (&heard.record, self.known.get(&heard.node)) {
            (None, _) => drop(self.known.remove(&heard.node)),
            (Some(new), Some(known)) if !is_newer(&new.version, &known.version) => return false,
            (Some(new), _) => drop(self.known.insert(heard.node.clone(), new.clone())),
        }
        true
    }

    /// Writes down who is enrolled on a node. Returns who is, which is more if another replica wrote meanwhile. Waits
    /// for the API server: not to be called on a runtime's thread.
    pub fn write(&mut self, node: &str, places: Places) -> Result<Places, ClusterError> {
        let runtime = self.runtime.clone();
        runtime.block_on(bounded(&what(node), self.put(node, places)))
    }

    async fn put(&mut self, node: &str, mut places: Places) -> Result<Places, ClusterError> {
        let (name, params) = (format!("{PREFIX}{node}"), PostParams::default());
        let what = what(node);
        let failed = |error: &kube::Error| ClusterError::request(&what, error);
        for _ in 0..ATTEMPTS {
            let outcome = match self.known.get(node) {
                Some(known) => {
                    self.maps.replace(&name, &params, &map(&name, &places, Some(&known.version))?).await
                }
                None => self.maps.create(&params, &map(&name, &places, None)?).await,
            };
            match outcome {
                Ok(map) => {
                    let version = map.metadata.resource_version.unwrap_or_default();
                    self.known.insert(node.to_owned(), Record { version, places: places.clone() });
                    return Ok(places);
                }
                // Not as we know it: there already, changed, or gone.
                Err(error) if matches!(code(&error), 404 | 409) => {
                    let theirs = self.maps.get_opt(&name).await.map_err(|error| failed(&error))?;
                    let theirs = theirs.map(|map| read(node, &map)).transpose()?;
                    let known = self.known.remove(node).unwrap_or_default();
                    if let Some(theirs) = theirs {
                        let added = theirs.places.iter().filter(|(uid, _)| !known.places.contains_key(*uid));
                        for (uid, place) in added {
                            places.entry(uid.clone()).or_insert_with(|| place.clone());
                        }
                        self.known.insert(node.to_owned(), theirs);
                    }
                }
                Err(error) => return Err(failed(&error)),
            }
        }
        Err(ClusterError::Request { what, why: format!("changed by others {ATTEMPTS} times in a row") })
    }
}

fn what(node: &str) -> String {
    format!("ConfigMap {PREFIX}{node}")
}

fn is_newer(version: &str, than: &str) -> bool {
    match (version.parse::<u64>(), than.parse::<u64>()) {
        (Ok(version), Ok(than)) => version > than,
        _ => version != than,
    }
}

fn map(name: &str, places: &Places, version: Option<&str>) -> Result<ConfigMap, ClusterError> {
    let entries = places.iter().map(|(uid, place)| Entry {
        uid: uid.clone(),
        pod_uid: place.pod_uid.clone(),
        addresses: place.addresses.clone(),
    });
    let text = serde_json::to_string(&entries.collect::<Vec<_>>())
        .map_err(|error| ClusterError::Invalid { what: name.to_owned(), why: error.to_string() })?;
    let labels = [(LABEL, "true"), ("app.kubernetes.io/part-of", "weft")];
    Ok(ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some(labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into()),
            resource_version: version.map(str::to_owned),
            ..ObjectMeta::default()
        },
        data: Some([(DATA.to_owned(), text)].into()),
        ..ConfigMap::default()
    })
}

/// The node whose ConfigMap has that name.
pub fn node(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX)
}

/// Reads a node's ConfigMap. One that cannot be understood is an error: to go on without it would announce enrolled pods
/// as plaintext.
pub fn read(node: &str, map: &ConfigMap) -> Result<Record, ClusterError> {
    let invalid = |why: String| ClusterError::Invalid { what: what(node), why };
    let text = map.data.as_ref().and_then(|data| data.get(DATA));
    let text = text.ok_or_else(|| invalid(format!("has no data.{DATA}")))?;
    let entries: Vec<Entry> =
        serde_json::from_str(text).map_err(|error| invalid(format!("data.{DATA}: {error}")))?;
    let places = entries.into_iter().map(|entry| {
        let place = Place { node: node.to_owned(), addresses: entry.addresses, pod_uid: entry.pod_uid };
        (entry.uid, place)
    });
    let version = map.metadata.resource_version.clone().unwrap_or_default();
    Ok(Record { version, places: places.collect() })
}
