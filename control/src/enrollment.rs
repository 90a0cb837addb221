//! Who is enrolled, as agents reported it, remembered over restarts. A pod that was announced as reachable by tunnel
//! only must never be announced as plaintext again because the controller forgot: that ends only with its label or
//! the pod itself. The state is on disk before anything that follows from it is published.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};

use crate::state_dir::{Access, StateDir, StateError};

const FILE: &str = "enrollment.json";
const VERSION: u32 = 1;

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

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Persisted {
    version: u32,
    enrolled: Places,
}

#[derive(Debug)]
pub struct Enrollment {
    state: StateDir,
    /// In force.
    enrolled: Places,
    /// As on disk. Behind `enrolled` only in removals that could not be written.
    written: Places,
}

impl Enrollment {
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
        Ok(Self { state, written: enrolled.clone(), enrolled })
    }

    pub fn enrolled(&self) -> &Places {
        &self.enrolled
    }

    /// Forgets every pod that `desired` does not list as it was enrolled. A write that fails is logged and made up for
    /// by the next one; forgetting again after a restart costs nothing.
    pub fn retain(&mut self, desired: &Places) {
        let before = self.enrolled.len();
        self.enrolled.retain(|uid, place| desired.get(uid) == Some(place));
        if self.enrolled.len() != before
            && let Err(error) = self.write(self.enrolled.clone())
        {
            tracing::error!(target: "enrollment", "cannot write down who left the mesh: {error}");
        }
    }

    /// Takes in what `node` reports as enrolled. Only pods that `desired` places on that node count; a pod left out
    /// stays enrolled. Returns whether anything changed; on an error nothing has.
    pub fn report(
        &mut self,
        node: &str,
        uids: &BTreeSet<String>,
        desired: &Places,
    ) -> Result<bool, StateError> {
        let mut enrolled = self.enrolled.clone();
        for uid in uids {
            if let Some(place) = desired.get(uid).filter(|place| place.node == node) {
                enrolled.insert(uid.clone(), place.clone());
            }
        }
        if enrolled == self.enrolled {
            return Ok(false);
        }
        self.write(enrolled.clone())?;
        self.enrolled = enrolled;
        Ok(true)
    }

    fn write(&mut self, enrolled: Places) -> Result<(), StateError> {
        if enrolled == self.written {
            return Ok(());
        }
        let persisted = Persisted { version: VERSION, enrolled };
        let text = serde_json::to_vec_pretty(&persisted)
            .map_err(|e| StateError::Invalid { path: self.state.path(FILE), why: e.to_string() })?;
        self.state.write(FILE, &text, Access::Private)?;
        self.written = persisted.enrolled;
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
        enrollment.enrolled().keys().map(String::as_str).collect()
    }

    #[test]
    fn is_remembered_over_a_restart() {
        let (_guard, state) = temporary();
        let mut enrollment = Enrollment::load(state.clone()).unwrap();
        assert!(enrollment.report("n1", &uids(&["a"]), &desired()).unwrap());
        assert!(!enrollment.report("n1", &uids(&["a"]), &desired()).unwrap());
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
        enrollment.report("n1", &uids(&["a"]), &desired()).unwrap();
        enrollment.report("n1", &uids(&[]), &desired()).unwrap();
        assert_eq!(names(&enrollment), ["a"]);
    }

    #[test]
    fn a_node_speaks_for_its_own_pods_only() {
        let (_guard, state) = temporary();
        let mut enrollment = Enrollment::load(state).unwrap();
        assert!(!enrollment.report("n1", &uids(&["b", "c"]), &desired()).unwrap());
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
            enrollment.report("n1", &uids(&["a"]), &desired()).unwrap();
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
        assert!(enrollment.report("n1", &uids(&["a"]), &desired()).is_err());
        assert!(names(&enrollment).is_empty());
        std::fs::remove_dir(state.path(FILE)).unwrap();
        assert!(enrollment.report("n1", &uids(&["a"]), &desired()).unwrap());
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
