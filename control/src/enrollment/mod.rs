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
use weft_xds::VersionVector;

use crate::{
    cluster::{
        ClusterError,
        enrollment::{Heard, Record, Records},
    },
    state_dir::{Access, StateDir, StateError},
    trust::Settled,
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

/// Why a node's agent cannot enrol pods, by workload uid.
pub type Failures = BTreeMap<String, String>;

/// What is known of pods, by node and then by workload uid, since that is how it is reported and written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByNode<T>(BTreeMap<String, BTreeMap<String, T>>);

/// Who is enrolled.
pub type Enrolled = ByNode<Place>;

impl<T> Default for ByNode<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Clone> ByNode<T> {
    pub fn len(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn get(&self, node: &str, uid: &str) -> Option<&T> {
        self.0.get(node).and_then(|pods| pods.get(uid))
    }

    /// The pods of a node.
    pub fn of(&self, node: &str) -> BTreeMap<String, T> {
        self.0.get(node).cloned().unwrap_or_default()
    }

    /// With their nodes.
    pub fn all(&self) -> impl Iterator<Item = (&String, &String, &T)> {
        self.0.iter().flat_map(|(node, pods)| pods.iter().map(move |(uid, value)| (node, uid, value)))
    }

    fn insert(&mut self, node: &str, uid: String, value: T) {
        match self.0.get_mut(node) {
            Some(pods) => drop(pods.insert(uid, value)),
            None => drop(self.0.insert(node.to_owned(), [(uid, value)].into())),
        }
    }

    fn remove(&mut self, node: &str, uid: &str) -> Option<T> {
        let pods = self.0.get_mut(node)?;
        let removed = pods.remove(uid);
        if pods.is_empty() {
            self.0.remove(node);
        }
        removed
    }

    /// All pods of a node at once.
    fn set(&mut self, node: &str, pods: BTreeMap<String, T>) {
        match pods.is_empty() {
            true => self.0.remove(node),
            false => self.0.insert(node.to_owned(), pods),
        };
    }
}

impl Enrolled {
    /// Whether the pod is enrolled, as the pod it is at that place.
    pub fn holds(&self, uid: &str, place: &Place) -> bool {
        self.get(&place.node, uid) == Some(place)
    }
}

impl FromIterator<(String, Place)> for Enrolled {
    fn from_iter<T: IntoIterator<Item = (String, Place)>>(pods: T) -> Self {
        let mut enrolled = Self::default();
        for (uid, place) in pods {
            enrolled.insert(&place.node.clone(), uid, place);
        }
        enrolled
    }
}

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
    /// In force. Once objects have been read, only pods that are desired as they were enrolled.
    enrolled: Enrolled,
    /// As written down. Differs from `enrolled` and `pending` only in removals.
    written: Enrolled,
    /// Nodes of which something else may have to be written down.
    untidy: BTreeSet<String>,
    /// In a cluster, what another replica wrote down of pods that are not known here as it knows them, and since when:
    /// its watches may be ahead of ours.
    pending: BTreeMap<String, (Place, Instant)>,
    /// Uids of pods that have come to be enrolled, or ceased to be, since somebody asked.
    changed: BTreeSet<String>,
    /// As agents last reported them, to whatever replica.
    failures: ByNode<String>,
    /// In a cluster they are written down, for other replicas and for people.
    written_failures: ByNode<String>,
    /// Those of `failures` that another replica wrote down of pods that are not known here to be wanted, since when.
    pending_failures: ByNode<Instant>,
    /// Nodes of which `failures` may say something else since somebody asked.
    changed_failures: BTreeSet<String>,
    /// The newest bundle of roots that each node has in force, as agents reported it to whatever replica. In a directory it
    /// is not written down: agents report anew to a controller that starts.
    trust: BTreeMap<String, u64>,
}

impl Enrollment {
    fn new(storage: Storage, enrolled: Enrolled) -> Self {
        Self {
            storage,
            written: enrolled.clone(),
            enrolled,
            untidy: BTreeSet::new(),
            pending: BTreeMap::new(),
            changed: BTreeSet::new(),
            failures: ByNode::default(),
            written_failures: ByNode::default(),
            pending_failures: ByNode::default(),
            changed_failures: BTreeSet::new(),
            trust: BTreeMap::new(),
        }
    }

    /// In a cluster. What earlier controllers left comes with [`Enrollment::heard`].
    pub fn in_cluster(records: Records) -> Self {
        Self::new(Storage::Cluster(Box::new(records)), Enrolled::default())
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
        Ok(Self::new(Storage::Directory(state), enrolled.into_iter().collect()))
    }

    pub fn enrolled(&self) -> &Enrolled {
        &self.enrolled
    }

    /// What has been read of the objects from which `desired` follows; it is written down with who is enrolled.
    pub fn decides_by(&mut self, seen: VersionVector) {
        if let Storage::Cluster(records) = &mut self.storage {
            records.seen = seen;
        }
    }

    /// What has to be read before what was written down may be published: who else was enrolled meanwhile.
    pub fn written_at(&self) -> VersionVector {
        match &self.storage {
            Storage::Cluster(records) => records.written.clone(),
            Storage::Directory(_) => VersionVector::default(),
        }
    }

    pub fn failures(&self) -> &ByNode<String> {
        &self.failures
    }

    /// Whom the nodes believe on which somebody is enrolled.
    pub fn settled(&self) -> Settled {
        let nodes = self.enrolled.0.keys().chain(self.written.0.keys());
        nodes.map(|node| (node.clone(), self.trust.get(node).copied().unwrap_or_default())).collect()
    }

    fn in_directory(&self) -> bool {
        matches!(self.storage, Storage::Directory(_))
    }

    /// Whether there is anything for [`Enrollment::take_changed`].
    pub fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// The pods whose enrolment has changed since the last call, by uid.
    pub fn take_changed(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.changed)
    }

    /// The nodes of which other pods cannot be enrolled, or for other reasons, than at the last call.
    pub fn take_changed_failures(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.changed_failures)
    }

    /// Forgets every pod that `desired` does not list as it was enrolled. A write that fails is logged and made up for
    /// by the next one; forgetting again after a restart costs nothing.
    pub fn retain(&mut self, desired: &Places) {
        let all = self.enrolled.all().map(|(_, uid, place)| (uid.clone(), place.clone()));
        let former = all.filter(|(uid, place)| desired.get(uid) != Some(place)).collect();
        self.leave(&former, desired);
    }

    /// As [`Enrollment::retain`], where all that has changed in `desired` is that pods are no longer what they are in
    /// `former`, or are new.
    pub fn leave(&mut self, former: &Places, desired: &Places) {
        for (uid, place) in former.iter().filter(|(uid, place)| desired.get(*uid) != Some(*place)) {
            if self.enrolled.holds(uid, place) {
                self.enrolled.remove(&place.node, uid);
                self.changed.insert(uid.clone());
                self.untidy.insert(place.node.clone());
            }
        }
        self.promote(desired);
        if self.in_directory() {
            self.tidy_node();
        }
    }

    /// Forgets why pods of `node` could not be enrolled that `is_wanted` does not say are to be, by node and uid. As with
    /// [`Enrollment::retain`], that is written down later. To be asked whenever the answer for a pod there may be another.
    pub fn retain_failures(&mut self, node: &str, is_wanted: impl Fn(&str, &str) -> bool) {
        let Some(failures) = self.failures.0.get(node) else { return };
        let uids: Vec<String> = failures.keys().cloned().collect();
        for uid in uids {
            if is_wanted(node, &uid) {
                self.pending_failures.remove(node, &uid);
            } else if self.pending_failures.get(node, &uid).is_none() {
                self.forget_failure(node, &uid);
            }
        }
    }

    fn forget_failure(&mut self, node: &str, uid: &str) {
        self.failures.remove(node, uid);
        self.changed_failures.insert(node.to_owned());
        if !self.in_directory() {
            self.untidy.insert(node.to_owned());
        }
    }

    /// Pods that another replica knew first count as soon as they are known here.
    fn promote(&mut self, desired: &Places) {
        let known = self.pending.extract_if(.., |uid, (place, _)| desired.get(uid) == Some(place));
        for (uid, (place, _)) in known {
            self.changed.insert(uid.clone());
            self.enrolled.insert(&place.node.clone(), uid, place);
        }
    }

    /// Forgets what another replica knew and what has not come to be known here.
    fn expire(&mut self) {
        let late = self.pending.extract_if(.., |_, (_, since)| since.elapsed() >= PATIENCE);
        self.untidy.extend(late.map(|(_, (place, _))| place.node));
        let late = self.pending_failures.all().filter(|(_, _, since)| since.elapsed() >= PATIENCE);
        let late: Vec<_> = late.map(|(node, uid, _)| (node.clone(), uid.clone())).collect();
        for (node, uid) in late {
            self.pending_failures.remove(&node, &uid);
            self.forget_failure(&node, &uid);
        }
    }

    /// Writes down who was forgotten, on one node in a cluster, since somebody may be waiting. There it is left for when
    /// there is nothing else to do: pods that end are many, and an old entry of one counts for nothing. Nodes that are
    /// not there lose what is empty. Returns whether there may be more to do.
    pub fn tidy(
        &mut self,
        desired: &Places,
        is_wanted: impl Fn(&str, &str) -> bool,
        is_there: impl Fn(&str) -> bool,
    ) -> bool {
        self.expire();
        match self.tidy_node() {
            Tidied::Node(node) => {
                self.promote(desired);
                self.retain_failures(&node, is_wanted);
                true
            }
            Tidied::Nothing => match &mut self.storage {
                Storage::Cluster(records) => records.forget(is_there),
                Storage::Directory(_) => false,
            },
            Tidied::Failed => false,
        }
    }

    fn tidy_node(&mut self) -> Tidied {
        while let Some(node) = self.untidy.first().cloned() {
            let (places, failures) = (self.enrolled.of(&node), self.failures.of(&node));
            let failures_are_written = self.in_directory() || failures == self.written_failures.of(&node);
            if failures_are_written && self.wanted(&node, &places) == self.written.of(&node) {
                self.untidy.remove(&node);
                continue;
            }
            if let Err(error) = self.write(&node, &places, failures, false) {
                tracing::error!(target: "enrollment", "cannot write down who left the mesh: {error}");
                return Tidied::Failed;
            }
            self.untidy.remove(&node);
            return Tidied::Node(node);
        }
        Tidied::Nothing
    }

    /// What is to be written down of a node: what is in force, and what another replica may know better.
    fn wanted(&self, node: &str, places: &Places) -> Places {
        let pending = self.pending.iter().filter(|(_, (place, _))| place.node == node);
        let pending = pending.map(|(uid, (place, _))| (uid.clone(), place.clone()));
        pending.chain(places.clone()).collect()
    }

    /// Takes in what `node` reports: as enrolled, of which only pods that `desired` places on that node count, and a pod
    /// left out stays enrolled; all that it cannot enrol, with why; and the bundle of roots it has in force. On an error
    /// nothing has changed.
    pub fn report(
        &mut self,
        node: &str,
        uids: &BTreeSet<String>,
        failed: Failures,
        trust: u64,
        desired: &Places,
    ) -> Result<(), EnrollmentError> {
        let places = uids.iter().filter_map(|uid| Some((uid, desired.get(uid)?)));
        let new: Vec<(&String, &Place)> =
            places.filter(|(uid, place)| place.node == node && !self.enrolled.holds(uid, place)).collect();
        let failures = failed.into_iter().map(|(uid, mut message)| {
            message.truncate(message.floor_char_boundary(FailedPod::MESSAGE_BYTES));
            (uid, message)
        });
        let failures: Failures = failures.collect();
        let fails_anew = failures != self.failures.of(node);
        let trusts_anew = self.trust.get(node).copied().unwrap_or_default() < trust;
        let mut places = self.enrolled.of(node);
        places.extend(new.iter().map(|(uid, place)| ((*uid).clone(), (*place).clone())));
        let before = self.trust.get(node).copied();
        if trusts_anew {
            self.trust.insert(node.to_owned(), trust);
        }
        // What a node with nobody enrolled believes concerns nobody.
        let says_anew = fails_anew || (trusts_anew && !places.is_empty());
        if (!new.is_empty() || (says_anew && !self.in_directory()))
            && let Err(error) = self.write(node, &places, failures.clone(), true)
        {
            match before {
                Some(before) => self.trust.insert(node.to_owned(), before),
                None => self.trust.remove(node),
            };
            return Err(error);
        }
        if !new.is_empty() {
            self.changed.extend(new.into_iter().map(|(uid, _)| uid.clone()));
            self.enrolled.set(node, places);
        }
        if fails_anew {
            self.failures.set(node, failures);
            self.changed_failures.insert(node.to_owned());
        }
        self.pending_failures.set(node, BTreeMap::new());
        self.promote(desired);
        Ok(())
    }

    /// Takes in what is written down in the cluster: by an earlier controller if `desired` is None, since objects have
    /// not been read yet, else by another replica, and then only pods that are still what they were count. Nothing ends
    /// by it: every replica sees for itself what labels and pods say, of who is not enrolled once
    /// [`Enrollment::retain_failures`] is asked about the node.
    pub fn heard(&mut self, heard: &Heard, desired: Option<&Places>) {
        let Storage::Cluster(records) = &mut self.storage else { return };
        if !records.heard(heard) {
            return;
        }
        let Heard { node, record } = heard;
        let record = record.clone().unwrap_or_default();
        self.written.set(node, record.places.clone());
        self.take_trust(node, record.trust);
        self.take_failures(node, record.failures);
        self.untidy.insert(node.clone());
        let before: BTreeMap<_, _> =
            self.pending.extract_if(.., |_, (place, _)| place.node == *node).collect();
        for (uid, place) in record.places {
            if self.enrolled.holds(&uid, &place) {
                continue;
            }
            if desired.is_none_or(|desired| desired.get(&uid) == Some(&place)) {
                self.changed.insert(uid.clone());
                self.enrolled.insert(node, uid, place);
            } else {
                let since = before.get(&uid).filter(|(known, _)| *known == place).map(|(_, since)| *since);
                self.pending.insert(uid, (place, since.unwrap_or_else(Instant::now)));
            }
        }
    }

    fn take_trust(&mut self, node: &str, trust: u64) {
        let known = self.trust.entry(node.to_owned()).or_default();
        *known = trust.max(*known);
    }

    /// What is written down of who cannot be enrolled on a node: that counts from now on. Of what is new, it has to turn
    /// out here that the pod is wanted.
    fn take_failures(&mut self, node: &str, failures: Failures) {
        let known = self.failures.of(node);
        if failures != known {
            self.changed_failures.insert(node.to_owned());
        }
        let before = self.pending_failures.of(node);
        let pending = failures.keys().filter_map(|uid| {
            let since = before.get(uid).copied();
            let since = since.or_else(|| (!known.contains_key(uid)).then(Instant::now));
            Some((uid.clone(), since?))
        });
        self.pending_failures.set(node, pending.collect());
        self.written_failures.set(node, failures.clone());
        self.failures.set(node, failures);
    }

    /// Writes down that `places` are enrolled on `node`: in a directory with all others, in a cluster alone, with who cannot
    /// be. What another replica turns out to have added there is then pending.
    fn write(
        &mut self,
        node: &str,
        places: &Places,
        failures: Failures,
        reported: bool,
    ) -> Result<(), EnrollmentError> {
        let wanted = self.wanted(node, places);
        let trust = self.trust.get(node).copied().unwrap_or_default();
        match &mut self.storage {
            Storage::Directory(state) => {
                let mut all = self.enrolled.clone();
                all.set(node, wanted);
                let enrolled = all.all().map(|(_, uid, place)| (uid.clone(), place.clone())).collect();
                let text = serde_json::to_vec_pretty(&Persisted { version: VERSION, enrolled })
                    .map_err(|e| StateError::Invalid { path: state.path(FILE), why: e.to_string() })?;
                state.write(FILE, &text, Access::Private)?;
                self.written = all;
            }
            Storage::Cluster(records) => {
                let record = Record { places: wanted.clone(), failures, trust, ..Record::default() };
                let Record { places: written, failures, trust, .. } =
                    records.write(node, record, reported)?;
                for (uid, place) in written.iter().filter(|(uid, _)| !wanted.contains_key(*uid)) {
                    self.pending.insert(uid.clone(), (place.clone(), Instant::now()));
                }
                self.written.set(node, written);
                self.take_trust(node, trust);
                self.take_failures(node, failures);
            }
        }
        Ok(())
    }
}

/// What came of an attempt to write down who was forgotten.
enum Tidied {
    /// There was nothing to write.
    Nothing,
    Node(String),
    Failed,
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
        enrollment.enrolled().all().map(|(_, uid, _)| uid.as_str()).collect()
    }

    /// Whether a report changes anything.
    fn report(enrollment: &mut Enrollment, node: &str, reported: &[&str]) -> Result<bool, EnrollmentError> {
        enrollment.take_changed();
        enrollment.report(node, &uids(reported), Failures::new(), 0, &desired())?;
        Ok(!enrollment.take_changed().is_empty())
    }

    #[test]
    fn is_remembered_over_a_restart() {
        let (_guard, state) = temporary();
        let mut enrollment = Enrollment::load(state.clone()).unwrap();
        assert!(report(&mut enrollment, "n1", &["a"]).unwrap());
        assert!(!report(&mut enrollment, "n1", &["a"]).unwrap());
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
        report(&mut enrollment, "n1", &["a"]).unwrap();
        report(&mut enrollment, "n1", &[]).unwrap();
        assert_eq!(names(&enrollment), ["a"]);
    }

    #[test]
    fn a_node_speaks_for_its_own_pods_only() {
        let (_guard, state) = temporary();
        let mut enrollment = Enrollment::load(state).unwrap();
        assert!(!report(&mut enrollment, "n1", &["b", "c"]).unwrap());
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
            report(&mut enrollment, "n1", &["a"]).unwrap();
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
        assert!(report(&mut enrollment, "n1", &["a"]).is_err());
        assert!(names(&enrollment).is_empty());
        std::fs::remove_dir(state.path(FILE)).unwrap();
        assert!(report(&mut enrollment, "n1", &["a"]).unwrap());
        // A removal counts even if it could not be written, and is written with the next change.
        std::fs::remove_file(state.path(FILE)).unwrap();
        std::fs::create_dir(state.path(FILE)).unwrap();
        enrollment.retain(&Places::new());
        assert!(names(&enrollment).is_empty());
    }

    fn heard(version: u32, node: &str, failures: &[(&str, &str)]) -> Heard {
        let failures = failures.iter().map(|(uid, why)| ((*uid).to_owned(), (*why).to_owned())).collect();
        let record = Record { version: version.to_string(), failures, ..Record::default() };
        Heard { node: node.to_owned(), record: Some(record) }
    }

    fn failing(enrollment: &Enrollment) -> Vec<String> {
        enrollment.failures().all().map(|(node, uid, why)| format!("{node}/{uid} {why}")).collect()
    }

    #[tokio::test]
    async fn failures_that_another_replica_knew_first_wait_for_their_pods() {
        // Nothing is written in this test, so nobody has to answer.
        let client =
            kube::Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
        let mut enrollment = Enrollment::in_cluster(Records::new(client));
        let is_a = |_: &str, uid: &str| uid == "a";
        let changed = |enrollment: &mut Enrollment| enrollment.take_changed_failures().len();
        enrollment.heard(&heard(1, "n1", &[("a", "why"), ("b", "why")]), None);
        enrollment.heard(&heard(2, "n2", &[("c", "why")]), None);
        assert_eq!(
            (failing(&enrollment), changed(&mut enrollment)),
            (vec!["n1/a why".to_owned(), "n1/b why".into(), "n2/c why".into()], 2)
        );
        // Pods that are not known here may come; one that was there and is not wanted any more does not.
        enrollment.retain_failures("n1", is_a);
        enrollment.retain_failures("n1", |_, _| false);
        assert_eq!(
            (failing(&enrollment), changed(&mut enrollment)),
            (vec!["n1/b why".to_owned(), "n2/c why".into()], 1)
        );
        // Those of a node are as last written down, and wait no longer for being written again.
        let since = enrollment.pending_failures.get("n1", "b").copied().unwrap();
        enrollment.heard(&heard(3, "n1", &[("b", "because")]), Some(&desired()));
        assert_eq!(enrollment.pending_failures.get("n1", "b"), Some(&since));
        enrollment.heard(&heard(4, "n2", &[]), Some(&desired()));
        assert_eq!((failing(&enrollment), changed(&mut enrollment)), (vec!["n1/b because".to_owned()], 2));
        // An echo says nothing, and who waited in vain is forgotten.
        enrollment.heard(&heard(1, "n1", &[]), Some(&desired()));
        let late = Instant::now().checked_sub(PATIENCE).unwrap();
        enrollment.pending_failures.insert("n1", "b".to_owned(), late);
        enrollment.untidy.clear();
        enrollment.expire();
        assert_eq!((failing(&enrollment), changed(&mut enrollment)), (vec![], 1));
        assert!(enrollment.untidy.contains("n1") && enrollment.pending_failures.is_empty());
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
