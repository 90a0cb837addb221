//! What the condition says, as a table; when it is written, as the program does it, is in the crate's tests.

use super::*;
use crate::{
    source::manifest::{Format, parse},
    translate::tests::settings,
};

const UID: &str = "Kubernetes//Pod/shop/web";
const OLD: &str = "2001-01-01T00:00:00Z";
const RUNNING: &str = "spec: {nodeName: n1}\nstatus: {podIP: 10.1.0.2}";

fn objects(delta: Delta) -> Input {
    Input::Objects { delta, policies_read: None }
}

fn name() -> Name {
    ("shop".to_owned(), "web".to_owned())
}

/// A pod of a namespace with that label; `carried` are status and reason of its condition.
fn known(label: &str, pod: &str, carried: Option<(&str, &str)>) -> Known {
    let ours = carried.map(|(status, reason)| {
        format!(
            ", {{type: weft.dev/Enrolled, status: '{status}', reason: {reason}, lastTransitionTime: '{OLD}'}}"
        )
    });
    let conditions = format!("[{{type: Ready, status: 'True'}}{}]", ours.unwrap_or_default());
    let pod = pod.replace("status: {", &format!("status: {{conditions: {conditions}, "));
    let text = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{weft.dev/mesh: {label}}}}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, uid: u}}\n{pod}\n",
    );
    let (namespaces, pods, records) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut known = Known { settings: settings(), namespaces, pods, records };
    let upserts = parse(&text, Format::Yaml).unwrap().objects;
    assert_eq!(known.apply(objects(Delta { upserts, deletes: Vec::new() })), [name()].into());
    known
}

/// What is written down of node n1: the pod as enrolled with an address, and its failure.
fn written_down(address: Option<&str>, failure: Option<&str>) -> Input {
    let node = || "n1".to_owned();
    let place = |address: &str| Place {
        node: node(),
        addresses: vec![address.parse().unwrap()],
        pod_uid: Some("u".to_owned()),
    };
    let record = Record {
        version: "1".to_owned(),
        places: address.map(|address| (UID.to_owned(), place(address))).into_iter().collect(),
        failures: failure.map(|message| (UID.to_owned(), message.to_owned())).into_iter().collect(),
        ..Record::default()
    };
    Input::Enrollment(Heard { node: node(), record: Some(record) })
}

#[test]
fn says_whether_a_pod_is_in_the_mesh_and_why_not() {
    let here = Some("10.1.0.2");
    let ended = "spec: {nodeName: n1}\nstatus: {phase: Succeeded, podIP: 10.1.0.2}";
    let on_host = "spec: {nodeName: n1, hostNetwork: true}\nstatus: {podIP: 10.1.0.2}";
    let (yes, no) = (Some(("True", "Enrolled")), Some(("False", "Waiting")));
    for (label, pod, carried, address, failure, expected) in [
        ("enabled", RUNNING, None, here, None, "True Enrolled "),
        ("enabled", RUNNING, None, None, None, "False Waiting the agent of node n1"),
        ("enabled", RUNNING, None, Some("10.1.0.9"), None, "False Waiting the agent of node n1"),
        ("enabled", RUNNING, None, None, Some("no such process"), "False Failed no such process"),
        ("enabled", RUNNING, yes, here, Some("the map is full"), "False Failed the map is full"),
        (
            "enabled",
            "spec: {nodeName: n1}\nstatus: {}",
            None,
            None,
            None,
            "False Waiting the pod has no address",
        ),
        ("enabled", "spec: {}\nstatus: {}", None, None, None, "False Waiting the pod has no node"),
        ("enabled", ended, yes, here, None, "False Completed"),
        ("enabled", ended, no, here, None, "nothing"),
        ("enabled", ended, None, here, None, "nothing"),
        ("enabled", on_host, None, None, None, "nothing"),
        ("disabled", RUNNING, None, None, None, "nothing"),
        ("disabled", RUNNING, yes, here, None, "False NotInMesh labels"),
        ("disabled", RUNNING, no, None, Some("late news"), "False NotInMesh labels"),
    ] {
        let mut known = known(label, pod, carried);
        known.apply(written_down(address, failure));
        let says = match known.wanted(&name()) {
            Some((_, Wanted { enrolled: true, reason, message })) => format!("True {reason} {message}"),
            Some((_, Wanted { enrolled: false, reason, message })) => format!("False {reason} {message}"),
            None => "nothing".to_owned(),
        };
        assert!(says.starts_with(expected), "{label}, {pod}, {carried:?}, {address:?}, {failure:?}: {says}");
    }
}

#[test]
fn only_what_differs_is_written_and_its_time_is_the_statuss() {
    let now: Timestamp = "2026-01-02T03:04:05.678Z".parse().unwrap();
    for (carried, time) in [
        (None, "2026-01-02T03:04:05Z"),
        (Some(("False", "Failed")), "2026-01-02T03:04:05Z"),
        (Some(("True", "Other")), OLD),
    ] {
        let mut known = known("enabled", RUNNING, carried);
        known.apply(written_down(Some("10.1.0.2"), None));
        let (pod, wanted) = known.wanted(&name()).unwrap();
        let carried = pod.status.conditions.enrolled.as_ref();
        assert!(!carried.is_some_and(|carried| wanted.is_said_by(carried)));
        let condition = condition(wanted, carried, now);
        assert_eq!(condition.last_transition_time.as_deref(), Some(time));
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("True", "Enrolled"));
    }
    let mut known = known("enabled", RUNNING, Some(("True", "Enrolled")));
    known.apply(written_down(Some("10.1.0.2"), None));
    let (pod, wanted) = known.wanted(&name()).unwrap();
    assert!(wanted.is_said_by(pod.status.conditions.enrolled.as_ref().unwrap()));
}

#[test]
fn changes_concern_the_pods_they_are_about() {
    let mut known = known("enabled", RUNNING, None);
    let nobody = BTreeSet::new();
    let web: BTreeSet<Name> = [name()].into();
    assert_eq!(known.apply(written_down(Some("10.1.0.2"), None)), web);
    assert_eq!(known.apply(written_down(Some("10.1.0.2"), None)), nobody);
    assert_eq!(known.apply(written_down(None, Some("a"))), web);
    assert_eq!(known.apply(written_down(None, Some("b"))), web);
    assert_eq!(known.apply(Input::Enrollment(Heard { node: "n1".to_owned(), record: None })), web);
    let key = |kind, namespace: &str, name: &str| ObjectKey {
        kind,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    let gone = |key| objects(Delta { upserts: Vec::new(), deletes: vec![key] });
    assert_eq!(known.apply(gone(key(Kind::Namespace, "", "shop"))), web);
    assert_eq!(known.apply(gone(key(Kind::Namespace, "", "shoppers"))), nobody);
    assert_eq!(known.apply(gone(key(Kind::Pod, "shop", "web"))), web);
    assert!(known.wanted(&name()).is_none() && known.pods_of("shop").is_empty());
}
