//! The program against an API server (one in memory): what is served when, who may have what, what survives.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::{process::Command, time::Duration};

use serde_json::json;
use tokio::time::{Instant, sleep};
use tonic::Code;
use weft_xds::ControlEndpoint;

use self::support::{
    Agent, BINARY, UID, WEB, certificate,
    cluster::{
        AGENT, Cluster, OTHER_AGENT, POD, becomes, condition, counts, eventually, is_ready, ready, reviewed,
        terminate,
    },
    get, report, report_failures,
};

#[tokio::test]
async fn nothing_is_served_before_everything_is_listed() {
    let cluster = Cluster::new();
    cluster.api.forbid("pods", true);
    cluster.api.lack("servicecidrs", true);
    let control = cluster.start();
    let line = control.logged("cannot watch pods");
    assert!(line.contains("403") && line.contains("RBAC"), "{line}");
    assert!(!is_ready(&control).await);
    cluster.api.forbid("pods", false);
    // A cluster that does not say where its Services are is not served on a guess.
    control.logged("service networks (--service-networks");
    assert!(!is_ready(&control).await);
}

#[tokio::test]
async fn what_was_deleted_while_nobody_watched_is_gone() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    cluster.pod("db", "10.1.0.3");
    let control = cluster.start();
    ready(&control).await;
    counts(&control, "weft_control_objects{kind=\"Pod\"} 2").await;
    cluster.pod("more", "10.1.0.4");
    counts(&control, "weft_control_objects{kind=\"Pod\"} 3").await;
    cluster.api.lose(|api| {
        api.delete("pods", "shop", "db");
        api.delete("pods", "shop", "more");
        api.put("nodes", json!({"metadata": {"name": "n2"}, "spec": {"podCIDRs": ["10.1.1.0/24"]}}));
    });
    counts(&control, "weft_control_objects{kind=\"Pod\"} 1").await;
    counts(&control, "weft_control_objects{kind=\"Node\"} 2").await;
    // An object that cannot be read stays what it was.
    cluster.pod("web", "not an address");
    counts(&control, "weft_control_source_complaints 1").await;
    counts(&control, "weft_control_objects{kind=\"Pod\"} 1").await;
    cluster.api.delete("pods", "shop", "web");
    counts(&control, "weft_control_objects{kind=\"Pod\"} 0").await;
}

#[tokio::test]
async fn a_pod_enters_the_mesh_and_stays_over_a_restart() {
    let cluster = Cluster::new();
    cluster.pod("web", "");
    let control = cluster.start();
    ready(&control).await;
    let endpoint = cluster.endpoint(&control, AGENT);
    let mut agent = Agent::connect(endpoint.clone(), "n1");
    // Before it has an address: the runtime asks about it then.
    agent.until_known(None, Some(true)).await;
    assert_eq!(agent.pod_uid, "uid-web");
    assert_eq!(report(&endpoint, &[UID]).await, Err(Code::Unavailable), "nobody would report it again");
    cluster.pod("web", "10.1.0.2");
    agent.until(false, true).await;
    assert_eq!(cluster.enrollment(), None);
    report(&endpoint, &[UID]).await.unwrap();
    agent.until(true, true).await;
    let enrolled = json!([{"uid": UID, "podUID": "uid-web", "addresses": ["10.1.0.2"]}]);
    let whole =
        json!({"enrolledPods": 1, "failedPods": 0, "trustSerial": 0, "enrolled": enrolled, "failures": []});
    assert_eq!(cluster.enrollment(), Some(whole));
    let root = endpoint.ca.pem();
    drop(control);

    let control = cluster.start();
    ready(&control).await;
    let endpoint = cluster.endpoint(&control, AGENT);
    assert_eq!(endpoint.ca.pem(), root, "the root of trust changed");
    let mut agent = Agent::connect(endpoint, "n1");
    agent.until(true, true).await;
    cluster.label("disabled");
    agent.until(false, false).await;
    let nothing =
        json!({"enrolledPods": 0, "failedPods": 0, "trustSerial": 0, "enrolled": [], "failures": []});
    eventually("its end is written down", async || cluster.enrollment().as_ref() == Some(&nothing)).await;
    cluster.api.delete("nodes", "", "n1");
    eventually("nothing is kept of a node that is gone", async || cluster.enrollment().is_none()).await;
}

#[tokio::test]
async fn replicas_share_what_agents_report() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    cluster.pod("db", "10.1.0.3");
    let (one, other) = (cluster.start(), cluster.start());
    ready(&one).await;
    ready(&other).await;
    let endpoint = cluster.endpoint(&one, AGENT);
    let mut agent = Agent::connect(cluster.endpoint(&other, OTHER_AGENT), "n2");
    agent.until_known(Some(false), None).await;
    report(&endpoint, &[UID]).await.unwrap();
    agent.until_known(Some(true), None).await;
    // Both write about the same node, one of them without having heard of the last change.
    cluster.api.lose(|_| {});
    report(&cluster.endpoint(&other, AGENT), &["Kubernetes//Pod/shop/db"]).await.unwrap();
    cluster.pod("late", "10.1.0.4");
    counts(&one, "weft_control_objects{kind=\"Pod\"} 3").await;
    report(&endpoint, &["Kubernetes//Pod/shop/late"]).await.unwrap();
    let enrolled = cluster.enrollment().unwrap().to_string();
    assert!(
        ["web", "db", "late"].iter().all(|name| enrolled.contains(&format!("shop/{name}"))),
        "{enrolled}"
    );
    for control in [&one, &other] {
        counts(control, "weft_control_pods_enrolled 3").await;
    }
}

#[tokio::test]
async fn a_damaged_record_of_the_enrolled_stops_the_start() {
    let cluster = Cluster::new();
    let damaged = json!([{"uid": UID, "addresses": ["10.1.0"]}]);
    cluster.api.put("nodeenrollments", json!({"metadata": {"name": "n1"}, "status": {"enrolled": damaged}}));
    let control = cluster.start();
    let line = control.logged("NodeEnrollment n1 is not usable");
    assert!(line.contains("delete it") && line.contains("status.enrolled[0].addresses[0]"), "{line}");
    assert!(!is_ready(&control).await);
    cluster.api.delete("nodeenrollments", "", "n1");
    ready(&control).await;
}

#[tokio::test]
async fn without_its_definition_the_controller_waits_for_it() {
    let cluster = Cluster::new();
    cluster.api.lack("nodeenrollments", true);
    let control = cluster.start();
    let line = control.logged("cannot watch nodeenrollments.mesh.weft.dev");
    assert!(line.contains("weft install"), "{line}");
    assert!(!is_ready(&control).await);
    cluster.api.lack("nodeenrollments", false);
    ready(&control).await;
}

#[tokio::test]
async fn failures_are_written_down_for_every_replica() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    cluster.pod("db", "10.1.0.3");
    let (one, other) = (cluster.start(), cluster.start());
    ready(&one).await;
    ready(&other).await;
    let [db, stranger] = ["db", "stranger"].map(|name| format!("Kubernetes//Pod/shop/{name}"));
    let failures = [(db.as_str(), "no such process"), (stranger.as_str(), "who?")];
    report_failures(&cluster.endpoint(&one, AGENT), &[UID], &failures).await.unwrap();
    let written = cluster.enrollment().unwrap();
    assert_eq!(written["failures"], json!([{"uid": db, "message": "no such process"}]));
    assert_eq!((&written["enrolledPods"], &written["failedPods"]), (&json!(1), &json!(1)));
    for control in [&one, &other] {
        counts(control, "weft_control_enrollment_failures{node=\"n1\"} 1").await;
    }
    // Its agent is with the other one now, and has succeeded.
    report(&cluster.endpoint(&other, AGENT), &[UID, &db]).await.unwrap();
    assert_eq!(cluster.enrollment().unwrap()["failures"], json!([]));
    // What is not wanted any more cannot fail, whoever knew of it.
    let failures = [(db.as_str(), "again")];
    report_failures(&cluster.endpoint(&one, AGENT), &[UID], &failures).await.unwrap();
    cluster.api.delete("pods", "shop", "db");
    eventually("it is forgotten", async || cluster.enrollment().unwrap()["failedPods"] == 0).await;
}

#[tokio::test]
async fn only_agents_speak_for_others() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    cluster.pod("db", "10.1.0.3");
    let control = cluster.start();
    ready(&control).await;
    let agent = cluster.endpoint(&control, AGENT);
    for _ in 0..5 {
        certificate(&agent, WEB).await.unwrap();
    }
    assert_eq!(cluster.api.reviews(), 1, "one answer serves a burst of requests");
    let other_node = cluster.endpoint(&control, OTHER_AGENT);
    assert_eq!(certificate(&other_node, WEB).await, Err(Code::PermissionDenied));

    // An ordinary pod: its own identity, and nothing else.
    let pod = cluster.endpoint(&control, POD);
    certificate(&pod, WEB).await.unwrap();
    for identity in ["ns/shop/sa/db", "ns/weft-system/sa/weft-agent", "ns/default/sa/web"] {
        let identity = format!("spiffe://cluster.local/{identity}");
        assert_eq!(certificate(&pod, &identity).await, Err(Code::PermissionDenied), "{identity}");
    }
    assert_eq!(report(&pod, &[UID]).await, Err(Code::PermissionDenied));
    let mut stream = Agent::connect(pod, "n1");
    let update = tokio::time::timeout(Duration::from_millis(500), stream.updates.recv()).await;
    assert!(update.is_err(), "an ordinary pod was sent the state of the mesh");

    for invented in ["invented.token.x", "notoken", "weft.v1.bjE.99999999999.AAAA"] {
        let endpoint = cluster.endpoint(&control, invented);
        assert_eq!(certificate(&endpoint, WEB).await, Err(Code::Unauthenticated), "{invented}");
        assert_eq!(report(&endpoint, &[UID]).await, Err(Code::Unauthenticated), "{invented}");
    }
    // Not being able to ask is not a no.
    cluster.api.forbid("tokenreviews", true);
    cluster.api.token("agent.token.later", reviewed("weft-system", "weft-agent", "n1"));
    let later = cluster.endpoint(&control, "agent.token.later");
    assert_eq!(certificate(&later, WEB).await, Err(Code::Unavailable));
    cluster.api.forbid("tokenreviews", false);
    certificate(&later, WEB).await.unwrap();
}

#[tokio::test]
async fn the_root_is_made_once_and_a_damaged_one_is_not_replaced() {
    let cluster = Cluster::new();
    let controls = [cluster.start(), cluster.start(), cluster.start()];
    let endpoint = cluster.endpoint(&controls[0], POD);
    for control in &controls {
        let address = control.agents.clone();
        certificate(&ControlEndpoint { address, ..endpoint.clone() }, WEB).await.unwrap();
    }
    drop(controls);
    let secret =
        json!({"metadata": {"name": "weft-ca", "namespace": "weft-system"}, "data": {"root.pem": "AA=="}});
    cluster.api.put("secrets", secret);
    let output = Command::new(BINARY).arg("--kubernetes").env("KUBECONFIG", cluster.kubeconfig()).output();
    let error = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(error.contains("Secret weft-system/weft-ca is not usable: has no trust.json"), "{error}");
}

#[tokio::test]
async fn one_replica_leads_and_hands_over() {
    let cluster = Cluster::new();
    let mut one = cluster.start();
    counts(&one, "weft_control_leader 1").await;
    let other = cluster.start();
    ready(&other).await;
    let lease = || cluster.api.get("leases", "weft-system", "weft-control").unwrap()["spec"].clone();
    let first = lease();
    assert_eq!((&first["leaseDurationSeconds"], &first["leaseTransitions"]), (&json!(15), &json!(0)));
    assert!(get(&other.metrics, "/metrics").await.contains("weft_control_leader 0"));
    terminate(&mut one);
    assert_eq!(lease()["holderIdentity"], "", "not given up");
    counts(&other, "weft_control_leader 1").await;
    assert_ne!(lease()["holderIdentity"], first["holderIdentity"]);
}

#[tokio::test]
async fn pods_say_whether_they_are_in_the_mesh() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    let (one, other) = (cluster.start(), cluster.start());
    ready(&one).await;
    ready(&other).await;
    let waiting = "the agent of node n1 has not reported it; does it run there?";
    becomes(&cluster, "web", ["False", "Waiting", waiting]).await;
    let time =
        || cluster.api.patches().last().unwrap()["status"]["conditions"][0]["lastTransitionTime"].clone();
    let since = time();

    // Whichever replica is told, the one that leads writes it.
    for control in [&one, &other] {
        let endpoint = cluster.endpoint(control, AGENT);
        let message = format!("cannot, says {}", control.agents);
        report_failures(&endpoint, &[], &[(UID, &message)]).await.unwrap();
        becomes(&cluster, "web", ["False", "Failed", &message]).await;
        assert_eq!(time(), since, "its status did not change");
    }
    // Beside what others write there.
    let mut pod = cluster.api.get("pods", "shop", "web").unwrap();
    pod["status"]["conditions"].as_array_mut().unwrap().push(json!({"type": "Ready", "status": "True"}));
    cluster.api.put("pods", pod);
    report(&cluster.endpoint(&one, AGENT), &[UID]).await.unwrap();
    becomes(&cluster, "web", ["True", "Enrolled", ""]).await;
    assert_eq!(cluster.api.get("pods", "shop", "web").unwrap()["status"]["conditions"][0]["type"], "Ready");

    // All of that was written once, by one of them.
    sleep(Duration::from_secs(1)).await;
    let patches = cluster.api.patches();
    assert_eq!(patches.len(), 4, "{patches:?}");

    cluster.label("disabled");
    becomes(&cluster, "web", ["False", "NotInMesh", "labels do not want it in the mesh"]).await;
    // A pod that has nothing to do with the mesh is left alone.
    cluster.pod("db", "10.1.0.3");
    sleep(Duration::from_secs(1)).await;
    assert_eq!(condition(&cluster, "db"), None);
    assert_eq!(cluster.api.patches().len(), 5);
}

#[tokio::test]
async fn who_begins_to_lead_writes_what_is_missing() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    cluster.api.forbid("pods/status", true);
    let mut one = cluster.start();
    counts(&one, "weft_control_leader 1").await;
    let other = cluster.start();
    ready(&other).await;
    report(&cluster.endpoint(&one, AGENT), &[UID]).await.unwrap();
    let line = one.logged("cannot write condition");
    assert!(line.contains("403") && line.contains("RBAC"), "{line}");
    terminate(&mut one);
    counts(&other, "weft_control_leader 1").await;
    assert_eq!(condition(&cluster, "web"), None);
    cluster.api.forbid("pods/status", false);
    // It has been refused, too, and tries again.
    becomes(&cluster, "web", ["True", "Enrolled", ""]).await;
    // Somebody who takes the condition away is put right.
    cluster.pod("web", "10.1.0.2");
    becomes(&cluster, "web", ["True", "Enrolled", ""]).await;
}

#[tokio::test]
async fn conditions_are_written_at_a_bounded_rate() {
    let cluster = Cluster::new();
    let names: Vec<String> = (0..45).map(|n| format!("p{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        cluster.pod(name, &format!("10.1.0.{}", n + 2));
    }
    let control = cluster.start();
    counts(&control, "weft_control_leader 1").await;
    let uids: Vec<String> = names.iter().map(|name| format!("Kubernetes//Pod/shop/{name}")).collect();
    let uids: Vec<&str> = uids.iter().map(String::as_str).collect();
    let start = Instant::now();
    report(&cluster.endpoint(&control, AGENT), &uids).await.unwrap();
    eventually("all are written", async || cluster.api.patches().len() >= names.len()).await;
    assert!(start.elapsed() > Duration::from_millis(44 * 50 - 100), "{:?}", start.elapsed());
    counts(&control, "weft_control_pod_conditions_written_total 45").await;
}

#[tokio::test]
async fn a_replica_out_of_touch_is_not_one_to_send_agents_to() {
    let cluster = Cluster::new();
    let control = cluster.start();
    counts(&control, "weft_control_leader 1").await;
    cluster.api.silence(true);
    sleep(Duration::from_secs(5)).await;
    counts(&control, "weft_control_leader 0").await;
    assert!(is_ready(&control).await, "a short silence is no reason");
    eventually("not ready", async || {
        get(&control.ready, "/readyz").await.contains("the API server does not answer")
    })
    .await;
    cluster.api.silence(false);
    ready(&control).await;
    counts(&control, "weft_control_leader 1").await;
}
