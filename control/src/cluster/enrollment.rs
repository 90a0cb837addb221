//! Who is enrolled, in a cluster: one NodeEnrollment a node, written before what follows from it is published, read back
//! by a controller that starts, and watched by other replicas. Which pods count is decided in `crate::enrollment`.
//!
//! They have no owner: the end of a Node object must not take along what is known of pods that may still run there.
//! One that lists no pod any more, of a node that is gone, is deleted here.

use std::collections::{BTreeMap, BTreeSet};

use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, PostParams, Preconditions},
};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use weft_api::{
    NodeEnrollment,
    field::Ip,
    node_enrollment::{EnrolledPod, FailedPod, NodeEnrollmentStatus},
};

use weft_xds::{NotAVector, VersionVector};

use super::{ClusterError, bounded, code, metadata};
use crate::enrollment::{Failures, Place, Places};

/// Replicas that write at the same time refuse each other; each refusal means that the other got through.
const ATTEMPTS: usize = 5;

/// What to do where the kind does not exist.
pub const REMEDY: &str = "the API server has no such kind; `weft install | kubectl apply -f -` or the Helm chart \
     installs its definition";

/// How the kind is called to people, and in what was read of the cluster.
pub const ENROLLMENT: &str = "nodeenrollments.mesh.weft.dev";
/// What the writer of a NodeEnrollment had read of the objects that it follows from. A replica that has read less takes
/// the pods in it for others.
const SEEN: &str = "mesh.weft.dev/seen";

/// What a node's NodeEnrollment holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    pub version: String,
    pub places: Places,
    pub failures: Failures,
    /// The newest bundle of roots that the node has in force. It never goes back.
    pub trust: u64,
    /// What whoever wrote it had read.
    pub seen: VersionVector,
}

impl Record {
    fn says_nothing(&self) -> bool {
        self.places.is_empty() && self.failures.is_empty()
    }
}

/// A change that was heard of: a node, and what is written down of it, or None if that is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    pub node: String,
    pub record: Option<Record>,
}

impl Heard {
    /// What has to be read before it is believed.
    pub fn seen(&self) -> VersionVector {
        self.record.as_ref().map(|record| record.seen.clone()).unwrap_or_default()
    }
}

/// The NodeEnrollments as they were last seen.
#[derive(Debug)]
pub struct Records {
    objects: Api<DynamicObject>,
    runtime: Handle,
    known: BTreeMap<String, Record>,
    /// Nodes whose record says nothing.
    empty: BTreeSet<String>,
    /// What was read of the objects that decide.
    pub seen: VersionVector,
    /// Up to where own writes reach.
    pub written: VersionVector,
}

/// The NodeEnrollments of a cluster.
pub fn api(client: Client) -> Api<DynamicObject> {
    Api::all_with(client, &resource())
}

fn resource() -> ApiResource {
    let kind = GroupVersionKind::gvk(NodeEnrollment::GROUP, NodeEnrollment::VERSION, NodeEnrollment::KIND);
    ApiResource::from_gvk_with_plural(&kind, NodeEnrollment::PLURAL)
}

impl Records {
    /// Must be called on a runtime, which then does the writing.
    pub fn new(client: Client) -> Self {
        Self {
            objects: api(client),
            runtime: Handle::current(),
            known: BTreeMap::new(),
            empty: BTreeSet::new(),
            seen: VersionVector::default(),
            written: VersionVector::default(),
        }
    }

    fn set(&mut self, node: &str, record: Record) {
        match record.says_nothing() {
            true => self.empty.insert(node.to_owned()),
            false => self.empty.remove(node),
        };
        self.known.insert(node.to_owned(), record);
    }

    fn remove(&mut self, node: &str) -> Option<Record> {
        self.empty.remove(node);
        self.known.remove(node)
    }

    /// Takes in what a watch saw. False if it is older than what is known: the echo of an own write.
    pub fn heard(&mut self, heard: &Heard) -> bool {
        match (&heard.record, self.known.get(&heard.node)) {
            (None, _) => drop(self.remove(&heard.node)),
            (Some(new), Some(known)) if !is_newer(&new.version, &known.version) => return false,
            (Some(new), _) => self.set(&heard.node, new.clone()),
        }
        true
    }

    /// Writes down who is enrolled on a node, who cannot be, and whom it believes. Returns what is there then, which is more
    /// if another replica wrote meanwhile; unless the failures are what the node's agent has just `reported`, since that
    /// is whole. Versions in `record` do not count.
    /// Waits for the API server: not to be called on a runtime's thread.
    pub fn write(&mut self, node: &str, record: Record, reported: bool) -> Result<Record, ClusterError> {
        let runtime = self.runtime.clone();
        runtime.block_on(bounded(&what(node), self.put(node, record, reported)))
    }

    async fn put(&mut self, node: &str, mut record: Record, reported: bool) -> Result<Record, ClusterError> {
        let (what, params) = (what(node), PostParams::default());
        let failed = |error: &kube::Error| ClusterError::request(&what, error);
        for _ in 0..ATTEMPTS {
            let known = self.known.get(node);
            let (version, is_new) = (known.map(|known| known.version.clone()), known.is_none());
            // Beside what is written now stays what others wrote.
            record.seen = self.seen.clone();
            if let Some(known) = known {
                record.seen.merge(&known.seen);
                record.trust = record.trust.max(known.trust);
            }
            let object = object(node, &record, version);
            let outcome = match is_new {
                false => self.objects.replace(node, &params, &object).await,
                true => self.objects.create(&params, &object).await,
            };
            match outcome {
                Ok(object) => {
                    record.version = object.metadata.resource_version.unwrap_or_default();
                    // A number, or nothing of the kind could be read.
                    self.written.raise(ENROLLMENT, record.version.parse().unwrap_or(u64::MAX));
                    self.set(node, record.clone());
                    return Ok(record);
                }
                Err(error) if is_new && code(&error) == 404 => {
                    return Err(ClusterError::Request { what, why: REMEDY.to_owned() });
                }
                // Not as we know it: there already, changed, or gone.
                Err(error) if matches!(code(&error), 404 | 409) => {
                    let theirs = self.objects.get_opt(node).await.map_err(|error| failed(&error))?;
                    let theirs = theirs.map(|object| read(&object)).transpose()?;
                    let known = self.remove(node).unwrap_or_default();
                    if let Some((_, theirs)) = theirs {
                        add_new(&mut record.places, &known.places, &theirs.places);
                        if !reported {
                            take_back(&mut record.failures, &known.failures, &theirs.failures);
                            add_new(&mut record.failures, &known.failures, &theirs.failures);
                        }
                        self.set(node, theirs);
                    }
                }
                Err(error) => return Err(failed(&error)),
            }
        }
        Err(ClusterError::Request { what, why: format!("changed by others {ATTEMPTS} times in a row") })
    }

    /// Deletes a record that says nothing, of a node that is not there any more. Returns whether there may be another.
    /// What cannot be deleted now is tried again with the next call.
    pub fn forget(&mut self, is_there: impl Fn(&str) -> bool) -> bool {
        let Some(node) = self.empty.iter().find(|node| !is_there(node)).cloned() else { return false };
        let version = self.known.get(&node).map(|record| record.version.clone());
        let preconditions = Preconditions { resource_version: version, uid: None };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        let deleted = async {
            match self.objects.delete(&node, &params).await {
                // Gone already, or changed: then its watch says how.
                Err(error) if !matches!(code(&error), 404 | 409) => {
                    Err(ClusterError::request(&what(&node), &error))
                }
                _ => Ok(()),
            }
        };
        match self.runtime.block_on(bounded(&what(&node), deleted)) {
            Ok(()) => {
                self.remove(&node);
                true
            }
            Err(error) => {
                tracing::warn!(target: "enrollment", "its node is gone, and it cannot be deleted: {error}");
                false
            }
        }
    }
}

/// Adds what `theirs` has and `known` did not.
fn add_new<T: Clone>(
    ours: &mut BTreeMap<String, T>,
    known: &BTreeMap<String, T>,
    theirs: &BTreeMap<String, T>,
) {
    for (uid, value) in theirs.iter().filter(|(uid, _)| !known.contains_key(*uid)) {
        ours.entry(uid.clone()).or_insert_with(|| value.clone());
    }
}

/// Removes what was `known` and `theirs` has no longer, where `ours` still says the same. Not for who is enrolled: that ends
/// for each replica when it sees so itself.
fn take_back<T: PartialEq>(
    ours: &mut BTreeMap<String, T>,
    known: &BTreeMap<String, T>,
    theirs: &BTreeMap<String, T>,
) {
    ours.retain(|uid, value| theirs.contains_key(uid) || known.get(uid) != Some(value));
}

fn what(node: &str) -> String {
    format!("{} {node}", NodeEnrollment::KIND)
}

fn is_newer(version: &str, than: &str) -> bool {
    match (version.parse::<u64>(), than.parse::<u64>()) {
        (Ok(version), Ok(than)) => version > than,
        _ => version != than,
    }
}

fn object(
    node: &str,
    Record { places, failures, trust, seen, .. }: &Record,
    version: Option<String>,
) -> DynamicObject {
    let enrolled = places.iter().map(|(uid, place)| EnrolledPod {
        uid: uid.clone(),
        pod_uid: place.pod_uid.clone(),
        addresses: place.addresses.iter().copied().map(Ip).collect(),
    });
    let failures =
        failures.iter().map(|(uid, message)| FailedPod { uid: uid.clone(), message: message.clone() });
    let (enrolled, failures): (Vec<_>, Vec<_>) = (enrolled.collect(), failures.collect());
    let (enrolled_pods, failed_pods) = (enrolled.len(), failures.len());
    let trust_serial = *trust;
    let status = NodeEnrollmentStatus { enrolled_pods, failed_pods, trust_serial, enrolled, failures };
    let mut object = DynamicObject::new(node, &resource()).data(json!({ "status": status }));
    object.metadata = metadata(node);
    object.metadata.annotations = Some([(SEEN.to_owned(), seen.to_string())].into());
    object.metadata.resource_version = version;
    object
}

/// Reads a NodeEnrollment: the node, and what is written down of it. One that cannot be understood is an error: to go on
/// without it would announce enrolled pods as plaintext.
pub fn read(object: &DynamicObject) -> Result<(String, Record), ClusterError> {
    let name = object.metadata.name.clone().unwrap_or_default();
    let mut value = match &object.data {
        Value::Object(fields) => fields.clone(),
        _ => serde_json::Map::new(),
    };
    value.insert("metadata".to_owned(), json!({ "name": name }));
    let read = serde_path_to_error::deserialize::<_, NodeEnrollment>(Value::Object(value));
    let NodeEnrollment { metadata, status } = read.map_err(|error| ClusterError::Invalid {
        what: what(&name),
        why: format!("field {}: {}", error.path(), error.inner()),
    })?;
    let node = metadata.name;
    let places = status.enrolled.into_iter().map(|pod| {
        let addresses = pod.addresses.into_iter().map(|address| address.0).collect();
        (pod.uid, Place { node: node.clone(), addresses, pod_uid: pod.pod_uid })
    });
    let failures = status.failures.into_iter().map(|pod| (pod.uid, pod.message));
    let (places, failures, trust) = (places.collect(), failures.collect(), status.trust_serial);
    let version = object.metadata.resource_version.clone().unwrap_or_default();
    let seen = object.metadata.annotations.as_ref().and_then(|annotations| annotations.get(SEEN));
    let seen = seen.map_or(Ok(VersionVector::default()), |seen| seen.parse());
    let invalid = |error: NotAVector| ClusterError::Invalid {
        what: what(&node),
        why: format!("annotation {SEEN}: {error}"),
    };
    let seen = seen.map_err(invalid)?;
    Ok((node, Record { version, places, failures, trust, seen }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_meanwhile() {
        let map = |entries: &[(&str, &str)]| {
            entries.iter().map(|(uid, why)| ((*uid).to_owned(), (*why).to_owned())).collect::<Failures>()
        };
        let known = map(&[("a", "1"), ("b", "1"), ("c", "1")]);
        // They took back a and b and added d and e; of these we have something newer to say of b, and of e.
        let theirs = map(&[("c", "2"), ("d", "1"), ("e", "1")]);
        let mut ours = map(&[("a", "1"), ("b", "2"), ("c", "1"), ("e", "2")]);
        take_back(&mut ours, &known, &theirs);
        add_new(&mut ours, &known, &theirs);
        assert_eq!(ours, map(&[("b", "2"), ("c", "1"), ("d", "1"), ("e", "2")]));
        // What we took back they cannot bring back by having left it there.
        let mut ours = map(&[]);
        take_back(&mut ours, &known, &known);
        add_new(&mut ours, &known, &known);
        assert_eq!(ours, map(&[]));
    }
}
