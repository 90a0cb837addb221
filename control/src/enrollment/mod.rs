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

/// Pods by workload uid.
pub type Places = BTreeMap<String, Place>;

/// Who is enrolled, by node, since that is how it is reported and written down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Enrolled(BTreeMap<String, Places>);

impl Enrolled {
    /// Whether the pod is enrolled, as the pod it is at that place.
    pub fn holds(&self, uid: &str, place: &Place) -> bool {
        self.0.get(&place.node).and_then(|places| places.get(uid)) == Some(place)
    }

    pub fn len(&self) -> usize {
        self.0.values().map(Places::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pods of a node.
    fn of(&self, node: &str) -> Places {
        self.0.get(node).cloned().unwrap_or_default()
    }

    fn all(&self) -> impl Iterator<Item = (&String, &Place)> {
        self.0.values().flatten()
    }

    fn insert(&mut self, uid: String, place: Place) {
        self.0.entry(place.node.clone()).or_default().insert(uid, place);
    }

    fn remove(&mut self, uid: &str, place: &Place) {
        if let Some(places) = self.0.get_mut(&place.node) {
            places.remove(uid);
            if places.is_empty() {
                self.0.remove(&place.node);
            }
        }
    }

    /// All pods of a node at once.
    fn set(&mut self, node: &str, places: Places) {
        match places.is_empty() {
            true => self.0.remove(node),
            false => self.0.insert(node.to_owned(), places),
        };
    }
}

impl FromIterator<(String, Place)> for Enrolled {
    fn from_iter<T: IntoIterator<Item = (String, Place)>>(pods: T) -> Self {
        let mut enrolled = Self::default();
        pods.into_iter().for_each(|(uid, place)| enrolled.insert(uid, place));
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

    /// Whether there is anything for [`Enrollment::take_changed`].
    pub fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// The pods whose enrolment has changed since the last call, by uid.
    pub fn take_changed(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.changed)
    }

    /// Forgets every pod that `desired` does not list as it was enrolled. A write that fails is logged and made up for
    /// by the next one; forgetting again after a restart costs nothing.
    pub fn retain(&mut self, desired: &Places) {
        let all = self.enrolled.all().map(|(uid, place)| (uid.clone(), place.clone()));
        let former = all.filter(|(uid, place)| desired.get(uid) != Some(place)).collect();
        self.leave(&former, desired);
    }

    /// As [`Enrollment::retain`], where all that has changed in `desired` is that pods are no longer what they are in
    /// `former`, or are new.
    pub fn leave(&mut self, former: &Places, desired: &Places) {
        for (uid, place) in former.iter().filter(|(uid, place)| desired.get(*uid) != Some(*place)) {
            if self.enrolled.holds(uid, place) {
                self.enrolled.remove(uid, place);
                self.changed.insert(uid.clone());
                self.untidy.insert(place.node.clone());
            }
        }
        self.promote(desired);
        if matches!(self.storage, Storage::Directory(_)) {
            self.tidy(desired);
        }
    }

    /// Pods that another replica knew first count as soon as they are known here.
    fn promote(&mut self, desired: &Places) {
        let known = self.pending.extract_if(.., |uid, (place, _)| desired.get(uid) == Some(place));
        for (uid, (place, _)) in known {
            self.changed.insert(uid.clone());
            self.enrolled.insert(uid, place);
        }
    }

    /// Writes down who was forgotten, on one node in a cluster, since somebody may be waiting. There it is left for when
    /// there is nothing else to do: pods that end are many, and an old entry of one counts for nothing. Returns whether
    /// there may be more to do.
    pub fn tidy(&mut self, desired: &Places) -> bool {
        let late = self.pending.extract_if(.., |_, (_, since)| since.elapsed() >= PATIENCE);
        self.untidy.extend(late.map(|(_, (place, _))| place.node));
        while let Some(node) = self.untidy.first().cloned() {
            let places = self.enrolled.of(&node);
            if self.wanted(&node, &places) == self.written.of(&node) {
                self.untidy.remove(&node);
                continue;
            }
            if let Err(error) = self.write(&node, &places) {
                tracing::error!(target: "enrollment", "cannot write down who left the mesh: {error}");
                return false;
            }
            self.untidy.remove(&node);
            self.promote(desired);
            return true;
        }
        false
    }

    /// What is to be written down of a node: what is in force, and what another replica may know better.
    fn wanted(&self, node: &str, places: &Places) -> Places {
        let pending = self.pending.iter().filter(|(_, (place, _))| place.node == node);
        let pending = pending.map(|(uid, (place, _))| (uid.clone(), place.clone()));
        pending.chain(places.clone()).collect()
    }

    /// Takes in what `node` reports as enrolled. Only pods that `desired` places on that node count; a pod left out
    /// stays enrolled. On an error nothing has changed.
    pub fn report(
        &mut self,
        node: &str,
        uids: &BTreeSet<String>,
        desired: &Places,
    ) -> Result<(), EnrollmentError> {
        let places = uids.iter().filter_map(|uid| Some((uid, desired.get(uid)?)));
        let new: Vec<(&String, &Place)> =
            places.filter(|(uid, place)| place.node == node && !self.enrolled.holds(uid, place)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let mut places = self.enrolled.of(node);
        places.extend(new.iter().map(|(uid, place)| ((*uid).clone(), (*place).clone())));
        self.write(node, &places)?;
        self.changed.extend(new.into_iter().map(|(uid, _)| uid.clone()));
        self.enrolled.set(node, places);
        self.promote(desired);
        Ok(())
    }

    /// Takes in what is written down in the cluster: by an earlier controller if `desired` is None, since objects have
    /// not been read yet, else by another replica, and then only pods that are still what they were count. Nothing ends
    /// by it: every replica sees for itself what labels and pods say.
    pub fn heard(&mut self, heard: &Heard, desired: Option<&Places>) {
        let Storage::Cluster(records) = &mut self.storage else { return };
        if !records.heard(heard) {
            return;
        }
        let recorded = heard.record.as_ref().map(|record| record.places.clone()).unwrap_or_default();
        self.written.set(&heard.node, recorded.clone());
        self.untidy.insert(heard.node.clone());
        let before: BTreeMap<_, _> =
            self.pending.extract_if(.., |_, (place, _)| place.node == heard.node).collect();
        for (uid, place) in recorded {
            if self.enrolled.holds(&uid, &place) {
                continue;
            }
            if desired.is_none_or(|desired| desired.get(&uid) == Some(&place)) {
                self.changed.insert(uid.clone());
                self.enrolled.insert(uid, place);
            } else {
                let since = before.get(&uid).filter(|(known, _)| *known == place).map(|(_, since)| *since);
                self.pending.insert(uid, (place, since.unwrap_or_else(Instant::now)));
            }
        }
    }

    /// Writes down that `places` are enrolled on `node`: in a directory with all others, in a cluster alone. What another
    /// replica turns out to have added there is then pending.
    fn write(&mut self, node: &str, places: &Places) -> Result<(), EnrollmentError> {
        let wanted = self.wanted(node, places);
        match &mut self.storage {
            Storage::Directory(state) => {
                let mut all = self.enrolled.clone();
                all.set(node, wanted);
                let enrolled = all.all().map(|(uid, place)| (uid.clone(), place.clone())).collect();
                let text = serde_json::to_vec_pretty(&Persisted { version: VERSION, enrolled })
                    .map_err(|e| StateError::Invalid { path: state.path(FILE), why: e.to_string() })?;
                state.write(FILE, &text, Access::Private)?;
                self.written = all;
            }
            Storage::Cluster(records) => {
                let written = records.write(node, wanted.clone())?;
                for (uid, place) in written.iter().filter(|(uid, _)| !wanted.contains_key(*uid)) {
                    self.pending.insert(uid.clone(), (place.clone(), Instant::now()));
                }
                self.written.set(node, written);
            }
        }
        Ok(())
    }
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
        enrollment.enrolled().all().map(|(uid, _)| uid.as_str()).collect()
    }

    /// Whether a report changes anything.
    fn report(enrollment: &mut Enrollment, node: &str, reported: &[&str]) -> Result<bool, EnrollmentError> {
        enrollment.take_changed();
        enrollment.report(node, &uids(reported), &desired())?;
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
