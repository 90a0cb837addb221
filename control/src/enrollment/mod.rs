//! Who is enrolled, as agents reported it, remembered over restarts. A pod that was announced as reachable by tunnel
//! only must never be announced as plaintext again because the controller forgot: that ends only with its label or
//! the pod itself. It is written down, in the state directory or in the cluster, before anything that follows from it is
//! published.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use weft_api::{Pod, node_enrollment::FailedPod};

use crate::{
    cluster::{
        ClusterError,
        enrollment::{Heard, Records},
    },
    state_dir::{Access, StateDir, StateError},
};

const FILE: &str = "enrollment.json";
const VERSION: u32 = 1;
/// How far another replica's view of the cluster may be ahead of ours.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a pod must keep to stay the pod that was enrolled. Another node, address or object UID is another pod of the
/// same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub node: String,
    pub addresses: Vec<IpAddr>,
    /// The object's `metadata.uid`, where it has one.
    pub pod_uid: Option<String>,
}

impl Place {
    /// The pod's; None as long as it has no node or no address.
    pub fn of(pod: &Pod) -> Option<Self> {
        let (node, addresses) = (pod.spec.node_name.clone()?, pod.addresses());
        (!addresses.is_empty()).then(|| Self { node, addresses, pod_uid: pod.metadata.uid.clone() })
    }
}

/// Pods by workload uid.
pub type Places = BTreeMap<String, Place>;

/// Why a node's agent cannot enrol a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub node: String,
    pub message: String,
}

/// By workload uid.
pub type Failures = BTreeMap<String, Failure>;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Persisted {
    version: u32,
    enrolled: Places,
}

/// Why nothing could be written down.
#[derive(Debug, thiserror::Error)]
pub enum EnrollmentError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

#[derive(Debug)]
enum Storage {
    Directory(StateDir),
    Cluster(Box<Records>),
}

#[derive(Debug)]
pub struct Enrollment {
    storage: Storage,
    /// In force.
    enrolled: Places,
    /// As written down. Differs from `enrolled` and `pending` only in removals.
    written: Places,
    /// In a cluster, what another replica wrote down of pods that are not known here as it knows them, and since when:
    /// its watches may be ahead of ours.
    pending: BTreeMap<String, (Place, Instant)>,
    /// As agents last reported them, to whatever replica.
    failures: Failures,
    /// In a cluster they are written down, for other replicas and for people.
    written_failures: Failures,
    /// Those of `failures` that another replica wrote down of pods that are not known here as it knows them, since when.
    pending_failures: BTreeMap<String, Instant>,
}

impl Enrollment {
    /// In a cluster. What earlier controllers left comes with [`Enrollment::heard`].
    pub fn in_cluster(records: Records) -> Self {
        Self::new(Storage::Cluster(Box::new(records)), Places::new())
    }

    fn new(storage: Storage, enrolled: Places) -> Self {
        let (written, pending) = (enrolled.clone(), BTreeMap::new());
        let (failures, written_failures) = (Failures::new(), Failures::new());
        let pending_failures = BTreeMap::new();
        Self { storage, enrolled, written, pending, failures, written_failures, pending_failures }
    }

    /// What an earlier run left. A file that cannot be understood is an error: to start without it would announce
    /// enrolled pods as plaintext.
    pub fn load(state: StateDir) -> Result<Self, StateError> {
        let enrolled = match state.read_private(FILE)? {
            None => Places::new(),
            Some(text) => {
                let invalid = |why: String| StateError::Invalid { path: state.path(FILE), why };
                let persisted: Persisted =
                    serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))?;
                if persisted.version != VERSION {
                    return Err(invalid(format!(
                        "has version {}, this program reads {VERSION}",
                        persisted.version
                    )));
                }
                persisted.enrolled
            }
        };
        Ok(Self::new(Storage::Directory(state), enrolled))
    }

    pub fn enrolled(&self) -> &Places {
        &self.enrolled
    }

    pub fn failures(&self) -> &Failures {
        &self.failures
    }

    fn in_directory(&self) -> bool {
        matches!(self.storage, Storage::Directory(_))
    }

    /// Forgets every pod that `desired` does not list as it was enrolled. A write that fails is logged and made up for
    /// by the next one; forgetting again after a restart costs nothing.
    pub fn retain(&mut self, desired: &Places) {
        let before = self.enrolled.len();
        self.enrolled.retain(|uid, place| desired.get(uid) == Some(place));
        self.promote(desired);
        if self.enrolled.len() != before && self.in_directory() {
            self.tidy(|_| true);
        }
    }

    /// Forgets why pods could not be enrolled that `is_wanted` does not say are to be, by node and uid. As with
    /// [`Enrollment::retain`], that is written down later.
    pub fn retain_failures(&mut self, is_wanted: impl Fn(&str, &str) -> bool) {
        let pending = &mut self.pending_failures;
        self.failures.retain(|uid, failure| {
            if is_wanted(&failure.node, uid) {
                pending.remove(uid);
                return true;
            }
            pending.get(uid).is_some_and(|since| since.elapsed() < PATIENCE)
        });
        pending.retain(|uid, _| self.failures.contains_key(uid));
    }

    /// Pods that another replica knew first count as soon as they are known here.
    fn promote(&mut self, desired: &Places) {
        let known = self.pending.extract_if(.., |uid, (place, _)| desired.get(uid) == Some(place));
        self.enrolled.extend(known.map(|(uid, (place, _))| (uid, place)));
    }

    /// Writes down who was forgotten. In a cluster that is left for when there is nothing else to do, since pods that
    /// end are many and an old entry of one counts for nothing. Returns whether another replica was found to have
    /// written more; [`Enrollment::retain`] then says what counts. Nodes that are not there lose what is empty.
    pub fn tidy(&mut self, is_there: impl Fn(&str) -> bool) -> bool {
        self.pending.retain(|_, (_, since)| since.elapsed() < PATIENCE);
        let wanted = self.wanted(&self.enrolled);
        let mut nodes = differing(&self.written, &wanted, |place| &place.node);
        nodes.append(&mut differing(&self.written_failures, &self.failures, |failure| &failure.node));
        let before = self.pending.len();
        for node in nodes {
            if let Err(error) = self.write(&node, self.enrolled.clone(), self.failures.clone(), false) {
                tracing::error!(target: "enrollment", "cannot write down who left the mesh: {error}");
                return self.pending.len() != before;
            }
        }
        if let Storage::Cluster(records) = &mut self.storage {
            records.forget(is_there);
        }
        self.pending.len() != before
    }

    /// What is to be written down: what is in force, and what another replica may know better.
    fn wanted(&self, enrolled: &Places) -> Places {
        let pending = self.pending.iter().map(|(uid, (place, _))| (uid.clone(), place.clone()));
        pending.chain(enrolled.clone()).collect()
    }

    /// Takes in what `node` reports: as enrolled, of which only pods that `desired` places on that node count, and a pod
    /// left out stays enrolled; and all that it cannot enrol, with why. Returns whether more is enrolled; on an error
    /// nothing has changed.
    pub fn report(
        &mut self,
        node: &str,
        uids: &BTreeSet<String>,
        failed: BTreeMap<String, String>,
        desired: &Places,
    ) -> Result<bool, EnrollmentError> {
        let mut enrolled = self.enrolled.clone();
        for uid in uids {
            if let Some(place) = desired.get(uid).filter(|place| place.node == node) {
                enrolled.insert(uid.clone(), place.clone());
            }
        }
        let mut failures = self.failures.clone();
        failures.retain(|_, failure| failure.node != node);
        failures.extend(failed.into_iter().map(|(uid, message)| {
            let message = message[..message.floor_char_boundary(FailedPod::MESSAGE_BYTES)].to_owned();
            (uid, Failure { node: node.to_owned(), message })
        }));
        let more = enrolled != self.enrolled;
        if more || (failures != self.failures && !self.in_directory()) {
            self.write(node, enrolled.clone(), failures.clone(), true)?;
        }
        if self.in_directory() {
            self.written_failures = failures.clone();
        }
        (self.enrolled, self.failures) = (enrolled, failures);
        self.promote(desired);
        Ok(more)
    }

    /// Takes in what is written down in the cluster: by an earlier controller if `desired` is None, since objects have
    /// not been read yet, else by another replica, and then only pods that are still what they were count. Nothing ends
    /// by it: every replica sees for itself what labels and pods say. Returns whether anything changed.
    pub fn heard(&mut self, heard: &Heard, desired: Option<&Places>) -> bool {
        let Storage::Cluster(records) = &mut self.storage else { return false };
        if !records.heard(heard) {
            return false;
        }
        self.written.retain(|_, place| place.node != heard.node);
        let before = std::mem::take(&mut self.pending);
        self.pending =
            before.clone().into_iter().filter(|(_, (place, _))| place.node != heard.node).collect();
        for uid in heard.record.iter().flat_map(|record| record.failures.keys()) {
            if !self.failures.contains_key(uid) {
                self.pending_failures.insert(uid.clone(), Instant::now());
            }
        }
        for failures in [&mut self.failures, &mut self.written_failures] {
            failures.retain(|_, failure| failure.node != heard.node);
            failures.extend(heard.record.iter().flat_map(|record| record.failures.clone()));
        }
        let mut changed = false;
        for (uid, place) in heard.record.iter().flat_map(|record| &record.places) {
            self.written.insert(uid.clone(), place.clone());
            if self.enrolled.get(uid) == Some(place) {
                continue;
            }
            if desired.is_none_or(|desired| desired.get(uid) == Some(place)) {
                self.enrolled.insert(uid.clone(), place.clone());
                changed = true;
            } else {
                let since = before.get(uid).filter(|(known, _)| known == place).map(|(_, since)| *since);
                self.pending.insert(uid.clone(), (place.clone(), since.unwrap_or_else(Instant::now)));
            }
        }
        changed
    }

    /// Writes down who is enrolled: in a directory all of it, in a cluster what concerns `node`, and who cannot be. What
    /// another replica turns out to have added there is then pending.
    fn write(
        &mut self,
        node: &str,
        enrolled: Places,
        failures: Failures,
        reported: bool,
    ) -> Result<(), EnrollmentError> {
        let wanted = self.wanted(&enrolled);
        match &mut self.storage {
            Storage::Directory(state) => {
                let persisted = Persisted { version: VERSION, enrolled: wanted };
                let text = serde_json::to_vec_pretty(&persisted)
                    .map_err(|e| StateError::Invalid { path: state.path(FILE), why: e.to_string() })?;
                state.write(FILE, &text, Access::Private)?;
                (self.written, self.written_failures) = (persisted.enrolled, failures);
            }
            Storage::Cluster(records) => {
                let wanted: Places = wanted.into_iter().filter(|(_, place)| place.node == node).collect();
                let failures = failures.into_iter().filter(|(_, failure)| failure.node == node).collect();
                let (written, failures) = records.write(node, wanted.clone(), failures, reported)?;
                self.written.retain(|_, place| place.node != node);
                for (uid, place) in written {
                    if !wanted.contains_key(&uid) {
                        self.pending.insert(uid.clone(), (place.clone(), Instant::now()));
                    }
                    self.written.insert(uid, place);
                }
                for known in [&mut self.written_failures, &mut self.failures] {
                    known.retain(|_, failure| failure.node != node);
                    known.extend(failures.clone());
                }
            }
        }
        Ok(())
    }
}

/// The nodes of what is in one of the maps and not the same in the other.
fn differing<T: PartialEq>(
    one: &BTreeMap<String, T>,
    other: &BTreeMap<String, T>,
    node: impl Fn(&T) -> &String,
) -> BTreeSet<String> {
    let missing = |one: &BTreeMap<String, T>, other: &BTreeMap<String, T>| -> BTreeSet<String> {
        let values = one.iter().filter(|(uid, value)| other.get(*uid) != Some(value));
        values.map(|(_, value)| node(value).clone()).collect()
    };
    missing(one, other).union(&missing(other, one)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::tests::temporary;

    fn place(node: &str, address: &str) -> Place {
        Place { node: node.to_owned(), addresses: vec![address.parse().unwrap()], pod_uid: None }
    }

    fn desired() -> Places {
        [("a", place("n1", "10.0.0.1")), ("b", place("n2", "10.0.0.2"))]
            .map(|(u, p)| (u.to_owned(), p))
            .into()
    }

    fn uids(uids: &[&str]) -> BTreeSet<String> {
        uids.iter().map(|uid| (*uid).to_owned()).collect()
    }

    fn names(enrollment: &Enrollment) -> Vec<&str> {
        enrollment.enrolled().keys().map(String::as_str).collect()
    }

    #[test]
    fn is_remembered_over_a_restart() {
        let (_guard, state) = temporary();
        let mut enrollment = Enrollment::load(state.clone()).unwrap();
        assert!(enrollment.report("n1", &uids(&["a"]), BTreeMap::new(), &desired()).unwrap());
        assert!(!enrollment.report("n1", &uids(&["a"]), BTreeMap::new(), &desired()).unwrap());
        let mut enrollment = Enrollment::load(state.clone()).unwrap();
        assert_eq!(names(&enrollment), ["a"]);
        // The pod goes; a restart must not bring it back.
        enrollment.retain(&Places::new());
        assert!(names(&enrollment).is_empty());
        assert!(names(&Enrollment::load(state).unwrap()).is_empty());
    }

    #[test]
    fn a_pod_left_out_of_a_report_stays() {
        let (_guard, state) = temporary();
        let mut enrollment = Enrollment::load(state).unwrap();
        enrollment.report("n1", &uids(&["a"]), BTreeMap::new(), &desired()).unwrap();
        enrollment.report("n1", &uids(&[]), BTreeMap::new(), &desired()).unwrap();
        assert_eq!(names(&enrollment), ["a"]);
    }

    #[test]
    fn a_node_speaks_for_its_own_pods_only() {
        let (_guard, state) = temporary();
        let mut enrollment = Enrollment::load(state).unwrap();
        assert!(!enrollment.report("n1", &uids(&["b", "c"]), BTreeMap::new(), &desired()).unwrap());
        assert!(names(&enrollment).is_empty());
    }

    #[test]
    fn another_pod_of_the_same_name_starts_anew() {
        let changes: [fn(&mut Place); 3] = [
            |p| p.node = "n2".to_owned(),
            |p| p.addresses = vec!["10.0.0.9".parse().unwrap()],
            |p| p.pod_uid = Some("new".to_owned()),
        ];
        for change in changes {
            let (_guard, state) = temporary();
            let mut enrollment = Enrollment::load(state).unwrap();
            enrollment.report("n1", &uids(&["a"]), BTreeMap::new(), &desired()).unwrap();
            let mut moved = desired();
            change(moved.get_mut("a").unwrap());
            enrollment.retain(&moved);
            assert!(names(&enrollment).is_empty(), "{moved:?}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_not_in_force() {
        let (_guard, state) = temporary();
        let mut enrollment = Enrollment::load(state.clone()).unwrap();
        // A directory in the file's place makes the rename fail, also for root.
        std::fs::create_dir(state.path(FILE)).unwrap();
        assert!(enrollment.report("n1", &uids(&["a"]), BTreeMap::new(), &desired()).is_err());
        assert!(names(&enrollment).is_empty());
        std::fs::remove_dir(state.path(FILE)).unwrap();
        assert!(enrollment.report("n1", &uids(&["a"]), BTreeMap::new(), &desired()).unwrap());
        // A removal counts even if it could not be written, and is written with the next change.
        std::fs::remove_file(state.path(FILE)).unwrap();
        std::fs::create_dir(state.path(FILE)).unwrap();
        enrollment.retain(&Places::new());
        assert!(names(&enrollment).is_empty());
    }

    #[test]
    fn a_damaged_file_stops_the_start() {
        for text in
            ["", "{}", "{\"version\": 2, \"enrolled\": {}}", "{\"version\": 1, \"enrolled\": {\"a\": 1}}"]
        {
            let (_guard, state) = temporary();
            state.write(FILE, text.as_bytes(), Access::Private).unwrap();
            assert!(matches!(Enrollment::load(state), Err(StateError::Invalid { .. })), "{text}");
        }
    }
}
