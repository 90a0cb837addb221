//! The life of a pod in the mesh, as the history of published states tells it.

use prost::Message;
use weft_proto::{
    node::LocalWorkload,
    type_url,
    workload::{Address, TunnelProtocol, address},
};

use super::*;
use crate::{
    cluster::enrollment::Record,
    state_dir::{StateDir, tests::temporary},
    translate::tests::{objects, settings},
};

const UID: &str = "Kubernetes//Pod/shop/web";

struct Fixture {
    controller: Controller,
    published: Published,
}

fn start(state: &StateDir) -> Fixture {
    let (controller, published) =
        Controller::new(settings(), Enrollment::load(state.clone()).unwrap(), Metrics::default());
    Fixture { controller, published }
}

impl Fixture {
    fn apply(&mut self, label: &str, ip: &str) {
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{weft.dev/mesh: {label}}}}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, annotations: {{weft.dev/netns: /n}}}}\n\
             spec: {{nodeName: n1}}\nstatus: {{podIP: {ip}}}\n"
        );
        self.controller.objects(Delta { upserts: objects(&text), deletes: Vec::new() });
    }

    fn report(&mut self, node: &str, uids: &[&str]) -> Result<(), String> {
        let (done, mut result) = oneshot::channel();
        let enrolled = uids.iter().map(|uid| (*uid).to_owned()).collect();
        let node = node.to_owned();
        self.controller.report(Report { node, enrolled, failures: BTreeMap::new(), trust: 0, done });
        result.try_recv().unwrap()
    }

    /// What a cluster tells: how far it has been read, how far the writer of a NodeEnrollment had read, and up to where a
    /// list of Pods that was asked for has shown them.
    fn news(&mut self, known: &str, written: &str, listed: Option<u64>) {
        let record = Record { seen: written.parse().unwrap(), ..Record::default() };
        let heard = (!written.is_empty()).then(|| Heard { node: "n2".to_owned(), record: Some(record) });
        let known: VersionVector = known.parse().unwrap();
        let news = News {
            heard: heard.into_iter().collect(),
            content: known.clone(),
            known,
            newest: listed.map(|version| ("pods", version)),
            ..News::default()
        };
        self.controller.take(Input::News(news), &mut Vec::new());
        self.controller.catch_up();
    }

    /// Version of the state, whether the pod is announced as reachable by tunnel, and whether its agent is to enrol it.
    fn state(&self) -> (u64, bool, bool) {
        let snapshot = self.published.snapshots.borrow().clone().expect("a state");
        let address = &snapshot.view("n1", type_url::ADDRESS)[UID].1;
        let Some(address::Type::Workload(workload)) = Address::decode(address.clone()).unwrap().r#type else {
            panic!()
        };
        let local =
            LocalWorkload::decode(snapshot.view("n1", type_url::LOCAL_WORKLOAD)[UID].1.clone()).unwrap();
        (snapshot.version, workload.tunnel_protocol() == TunnelProtocol::Hbone, local.enroll)
    }
}

#[test]
fn desired_then_reported_then_published_and_back() {
    let (_guard, state) = temporary();
    let mut f = start(&state);
    f.apply("disabled", "10.1.0.2");
    assert_eq!(f.state(), (1, false, false));
    f.report("n1", &[UID]).unwrap();
    assert_eq!(
        f.state(),
        (1, false, false),
        "a report cannot put a pod into the mesh that labels do not want there"
    );
    f.apply("enabled", "10.1.0.2");
    assert_eq!(f.state(), (2, false, true), "announced before it is enrolled");
    f.report("n2", &[UID]).unwrap();
    assert_eq!(f.state(), (2, false, true), "another node's report counts");
    f.report("n1", &[UID]).unwrap();
    assert_eq!(f.state(), (3, true, true));
    f.report("n1", &[]).unwrap();
    assert_eq!(f.state(), (3, true, true), "only the label ends it");
    f.apply("disabled", "10.1.0.2");
    assert_eq!(f.state(), (4, false, false));
    f.apply("enabled", "10.1.0.2");
    assert_eq!(f.state(), (5, false, true), "an old report counts for a new enrolment");
}

#[test]
fn nothing_is_published_before_what_others_had_read_is_read() {
    let (_guard, state) = temporary();
    let mut f = start(&state);
    f.news("namespaces=5,pods=5", "", None);
    f.apply("disabled", "10.1.0.2");
    assert_eq!(f.state(), (1, false, false));
    f.news("namespaces=5,pods=5", "gadgets=7,pods=9", None);
    f.apply("enabled", "10.1.0.2");
    assert_eq!(f.state().0, 1);
    assert_eq!(f.published.wanted.try_recv().unwrap().to_string(), "pods=9");
    f.news("namespaces=5,pods=8", "", None);
    assert_eq!(f.state().0, 1);
    f.news("namespaces=5,pods=9", "", None);
    assert_eq!(f.state(), (2, false, true));
}

/// One list may have begun before the number was written that it seems to disprove.
#[test]
fn what_others_had_read_is_disproved_by_two_lists() {
    let (_guard, state) = temporary();
    let mut f = start(&state);
    f.apply("disabled", "10.1.0.2");
    f.news("pods=5", "pods=9", None);
    f.apply("enabled", "10.1.0.2");
    f.news("pods=6", "", Some(6));
    assert_eq!(f.state().0, 1);
    f.news("pods=6", "pods=11", None);
    f.news("pods=7", "", Some(7));
    assert_eq!(f.state().0, 1, "it is another number that this list is the second for");
    f.news("pods=7", "", Some(7));
    assert_eq!(f.state(), (2, false, true));
}

#[test]
fn a_restart_announces_nobody_as_plaintext() {
    let (_guard, state) = temporary();
    let mut f = start(&state);
    f.apply("enabled", "10.1.0.2");
    f.report("n1", &[UID]).unwrap();
    drop(f);
    let mut f = start(&state);
    assert!(f.controller.remembers_pods());
    assert!(f.published.snapshots.borrow().is_none());
    f.apply("enabled", "10.1.0.2");
    assert_eq!(f.state(), (1, true, true), "the first state a restarted controller serves");
}

#[test]
fn a_pod_that_changed_while_the_controller_was_down_starts_anew() {
    let (_guard, state) = temporary();
    let mut f = start(&state);
    f.apply("enabled", "10.1.0.2");
    f.report("n1", &[UID]).unwrap();
    drop(f);
    let mut f = start(&state);
    f.apply("enabled", "10.1.0.3");
    assert_eq!(f.state(), (1, false, true));
}

#[test]
fn a_report_before_the_objects_is_to_be_repeated() {
    let (_guard, state) = temporary();
    let mut f = start(&state);
    assert!(f.report("n1", &[UID]).is_err());
    assert!(f.published.snapshots.borrow().is_none(), "nothing is served before the objects are read");
}

#[test]
fn what_cannot_be_written_down_is_not_published() {
    let (_guard, state) = temporary();
    let mut f = start(&state);
    f.apply("enabled", "10.1.0.2");
    std::fs::create_dir(state.path("enrollment.json")).unwrap();
    assert!(f.report("n1", &[UID]).is_err());
    assert_eq!(f.state(), (1, false, true));
    std::fs::remove_dir(state.path("enrollment.json")).unwrap();
    f.report("n1", &[UID]).unwrap();
    assert_eq!(f.state(), (2, true, true));
}

#[test]
fn nothing_new_is_nothing_published() {
    let (_guard, state) = temporary();
    let mut f = start(&state);
    f.apply("enabled", "10.1.0.2");
    f.apply("enabled", "10.1.0.2");
    assert_eq!(f.state().0, 1);
}
