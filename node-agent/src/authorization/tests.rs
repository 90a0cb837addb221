//! What is in force, as policies, workloads and pods come in whatever order.

use prost::Message;
use weft_core::{Entry, Mesh};
use weft_proto::security::Authorization;

use super::*;
use crate::convert;

const UID: &str = "c//Pod/shop/web";

/// The agent's state, fed piece by piece.
#[derive(Default)]
struct Agent {
    guards: Guards,
    snapshot: Snapshot,
}

impl Agent {
    fn follow(&mut self, type_url: &str, new: &[&str], removed: &[&str]) {
        self.snapshot.guarded = self.guards.follow(&self.snapshot, type_url, new, removed);
    }

    fn policy(&mut self, name: &str, denies: bool) {
        let rules = if denies { vec![Default::default()] } else { Vec::new() };
        let policy = Authorization { action: i32::from(denies), rules, ..Default::default() };
        let policy = read(name, &policy.encode_to_vec());
        self.guards.apply([(name, policy)].into_iter(), &[]);
        self.follow(type_url::AUTHORIZATION, &[name], &[]);
    }

    fn no_policy(&mut self, name: &str) {
        self.guards.apply([].into_iter(), &[name.to_owned()]);
        self.follow(type_url::AUTHORIZATION, &[], &[name]);
    }

    /// The workload, and the policies that it names.
    fn workload(&mut self, policies: &[&str]) {
        let workload = weft_proto::workload::Workload {
            uid: UID.to_owned(),
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            authorization_policies: policies.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        };
        let address = weft_proto::workload::Address {
            r#type: Some(weft_proto::workload::address::Type::Workload(workload)),
        };
        let trust = weft_core::TrustDomain::new("cluster.local").expect("valid");
        let entry: Entry = convert::entry(UID, &address.encode_to_vec(), &trust).expect("valid");
        self.snapshot.mesh.apply([entry], []);
        self.follow(type_url::ADDRESS, &[UID], &[]);
    }

    fn no_workload(&mut self) {
        self.snapshot.mesh = Mesh::default();
        self.follow(type_url::ADDRESS, &[], &[UID]);
    }

    fn local(&mut self) {
        let pod = convert::local_pod(UID, &[]).expect("valid");
        self.snapshot.local.insert(UID.into(), pod);
        self.follow(type_url::LOCAL_WORKLOAD, &[UID], &[]);
    }

    fn not_local(&mut self) {
        self.snapshot.local.remove(UID);
        self.follow(type_url::LOCAL_WORKLOAD, &[], &[UID]);
    }

    /// What workers find: whether a caller would be let in, or None where nobody can say.
    fn admits(&self) -> Option<bool> {
        let guard = self.snapshot.guarded.0.get(UID)?.borrow().clone()?;
        let attempt = Attempt { identity: None, source: [10, 0, 0, 1].into(), port: 80 };
        Some(guard.decide(&attempt).verdict != Verdict::Denied)
    }
}

#[test]
fn nothing_is_known_before_everything_is() {
    let mut agent = Agent::default();
    agent.local();
    assert_eq!(agent.admits(), None, "a pod without a workload");
    agent.workload(&[]);
    assert_eq!(agent.admits(), Some(true), "a workload that names no policy");
    agent.workload(&["shop/a", "shop/b"]);
    assert_eq!(agent.admits(), None, "policies that have not come");
    agent.policy("shop/a", false);
    assert_eq!(agent.admits(), None, "one that has not come");
    agent.policy("shop/b", true);
    assert_eq!(agent.admits(), Some(false));
    agent.no_policy("shop/b");
    assert_eq!(agent.admits(), None, "one that went before its name");
    agent.no_workload();
    assert_eq!(agent.admits(), None);
    agent.workload(&[]);
    assert_eq!(agent.admits(), Some(true));
}

#[test]
fn whatever_comes_first() {
    let mut agent = Agent::default();
    agent.policy("shop/a", true);
    agent.workload(&["shop/a"]);
    assert_eq!(agent.admits(), None, "a pod of another node");
    agent.local();
    assert_eq!(agent.admits(), Some(false));
    agent.policy("shop/a", false);
    assert_eq!(agent.admits(), Some(false), "an Allow of nobody");
    agent.workload(&[]);
    assert_eq!(agent.admits(), Some(true));
}

#[test]
fn what_is_open_follows_a_pod_that_comes_back() {
    let mut agent = Agent::default();
    agent.local();
    agent.workload(&[]);
    let mut open = agent.snapshot.guarded.0[UID].clone();
    assert!(open.borrow_and_update().is_some());
    agent.not_local();
    assert_eq!(agent.admits(), None);
    agent.local();
    agent.policy("shop/a", true);
    agent.workload(&["shop/a"]);
    assert!(open.has_changed().expect("the same channel"));
    let guard = open.borrow_and_update().clone().expect("known again");
    let attempt = Attempt { identity: None, source: [10, 0, 0, 1].into(), port: 80 };
    assert_eq!(guard.decide(&attempt).verdict, Verdict::Denied);
    drop(open);
    agent.not_local();
    agent.snapshot.guarded = Guarded::default();
    agent.follow(type_url::LOCAL_WORKLOAD, &[], &[]);
    assert!(agent.guards.pods.is_empty(), "what nobody looks at any more is forgotten");
}

#[test]
fn only_a_change_of_what_it_names_wakes_a_pod() {
    let mut agent = Agent::default();
    agent.local();
    agent.policy("shop/a", false);
    agent.workload(&["shop/a"]);
    let mut open = agent.snapshot.guarded.0[UID].clone();
    open.borrow_and_update();
    agent.policy("shop/other", true);
    agent.workload(&["shop/a"]);
    agent.local();
    assert!(!open.has_changed().expect("there"));
    agent.policy("shop/a", true);
    assert!(open.has_changed().expect("there"));
}

#[test]
fn what_cannot_be_understood_denies() {
    let mut agent = Agent::default();
    agent.local();
    agent.guards.apply([("shop/a", read("shop/a", &[0xff]))].into_iter(), &[]);
    agent.workload(&["shop/a"]);
    assert_eq!(agent.admits(), Some(false));
    assert_eq!(read("shop/a@12345678", &[]).name, "shop/a".into(), "people know it without its tag");
}

#[test]
fn a_policy_is_there_under_whatever_tag() {
    let mut agent = Agent::default();
    for name in ["shop/a@1", "shop/a-b@1", "shop/c", "shop/d0@1"] {
        agent.policy(name, true);
    }
    for name in ["shop/a", "shop/a-b", "shop/c", "shop/d0"] {
        assert!(agent.guards.has(name), "{name}");
    }
    for name in ["shop", "shop/", "shop/b", "shop/d", "shop/a-"] {
        assert!(!agent.guards.has(name), "{name}");
    }
    agent.policy("shop/a@2", true);
    agent.no_policy("shop/a@1");
    assert!(agent.guards.has("shop/a"), "as another action");
    agent.no_policy("shop/a@2");
    assert!(!agent.guards.has("shop/a"));
}
