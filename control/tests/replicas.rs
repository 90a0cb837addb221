//! Several replicas that have not read equally much: what an agent that changes between them is told, and what is published
//! when.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::{collections::BTreeMap, time::Duration};

use prost::Message;
use serde_json::json;
use tokio::time::{Instant, timeout};
use tonic::Code;
use weft_proto::{
    type_url,
    workload::{Address, TunnelProtocol, address},
};

use self::support::{
    Agent, LONG, UID, WEB,
    api::KINDS,
    certificate,
    cluster::{AGENT, Cluster, OTHER_AGENT, POD, condition, counts, eventually, ready},
    report,
};

/// How long nothing may be told where nothing must.
const QUIET: Duration = Duration::from_millis(1500);

/// Takes in what comes until `enough`, and returns in order what is said of `uid`: whether it is reached by tunnel.
async fn told(agent: &mut Agent, uid: &str, enough: Duration) -> Vec<bool> {
    let (end, mut told) = (Instant::now() + enough, Vec::new());
    while let Ok(update) = tokio::time::timeout_at(end, agent.updates.recv()).await {
        let update = update.unwrap();
        let addresses = update.upserts.iter().filter(|_| update.type_url == type_url::ADDRESS);
        for resource in addresses.filter(|resource| resource.name == uid) {
            if let Some(address::Type::Workload(w)) = Address::decode(resource.value.clone()).unwrap().r#type
            {
                told.push(w.tunnel_protocol() == TunnelProtocol::Hbone);
            }
        }
        update.ack();
    }
    told
}

#[tokio::test]
async fn an_agent_that_comes_to_a_replica_behind_is_told_nothing_older() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    let door = cluster.api.door();
    let (one, other) = (cluster.start(), cluster.start_behind(&door));
    ready(&one).await;
    ready(&other).await;
    door.hold(&KINDS);
    let mut agent = Agent::connect(cluster.endpoint(&one, OTHER_AGENT), "n2");
    agent.until_known(Some(false), None).await;
    report(&cluster.endpoint(&one, AGENT), &[UID]).await.unwrap();
    agent.until_known(Some(true), None).await;
    let seen = agent.seen.borrow().clone();
    drop((agent, one));

    // Another agent is told what there is: to it that is not older than anything.
    let mut stranger = Agent::connect(cluster.endpoint(&other, AGENT), "n1");
    assert_eq!(told(&mut stranger, UID, QUIET).await, [false]);
    let mut agent = Agent::having_seen(cluster.endpoint(&other, OTHER_AGENT), "n2", seen);
    assert_eq!(told(&mut agent, UID, QUIET).await, [false; 0]);
    counts(&other, "weft_control_xds_behind_total 1").await;
    // It is sent away, and comes back until the replica has caught up.
    door.hold(&[]);
    assert_eq!(told(&mut agent, UID, Duration::from_secs(8)).await, [true]);
}

/// A report is judged by what its agent knows: a replica behind could take its pods for others of their name. So is a
/// request for a certificate.
#[tokio::test]
async fn a_replica_behind_takes_no_report_and_issues_nothing() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    let door = cluster.api.door();
    let (one, other) = (cluster.start(), cluster.start_behind(&door));
    ready(&one).await;
    ready(&other).await;
    door.hold(&KINDS);
    let mut agent = Agent::connect(cluster.endpoint(&one, AGENT), "n1");
    agent.until(false, true).await;
    let before = agent.seen.borrow().get("pods");
    cluster.pod("web", "10.1.0.9");
    while agent.seen.borrow().get("pods") == before {
        let update = timeout(LONG, agent.updates.recv()).await.unwrap().unwrap();
        agent.seen.send_if_modified(|seen| seen.merge(&update.seen));
        update.ack();
    }
    let mut endpoint = cluster.endpoint(&other, AGENT);
    endpoint.seen = Some(agent.seen.subscribe());
    let refused = tokio::join!(report(&endpoint, &[UID]), certificate(&endpoint, WEB));
    assert_eq!(refused, (Err(Code::Unavailable), Err(Code::Unavailable)));
    assert_eq!(cluster.enrollment(), None);
    // Whoever has seen nothing is not behind, and asks for itself.
    certificate(&cluster.endpoint(&other, POD), WEB).await.unwrap();
    door.hold(&[]);
    report(&endpoint, &[UID]).await.unwrap();
    certificate(&endpoint, WEB).await.unwrap();
    assert_eq!(cluster.enrollment().unwrap()["enrolled"][0]["addresses"], json!(["10.1.0.9"]));
}

/// A replica that has just started has listed everything as of now; others are told nothing of kinds in which nothing
/// happens, since their watches have nothing to say.
#[tokio::test]
async fn a_replica_that_only_lacks_silence_lists() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    let one = cluster.start();
    ready(&one).await;
    // Nothing more happens to the pod after that: whatever happens of a kind ends its silence.
    eventually("the pod's condition is there", async || condition(&cluster, "web").is_some()).await;
    cluster.api.put("leases", json!({"metadata": {"name": "unwatched", "namespace": "shop"}}));
    let other = cluster.start();
    ready(&other).await;
    let mut agent = Agent::connect(cluster.endpoint(&other, OTHER_AGENT), "n2");
    agent.until_known(Some(false), None).await;
    let seen = agent.seen.borrow().clone();
    let mut agent = Agent::having_seen(cluster.endpoint(&one, OTHER_AGENT), "n2", seen);
    let start = Instant::now();
    agent.until_known(Some(false), None).await;
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    let lines: Vec<_> = (0..KINDS.len()).map(|_| one.logged("anew: others have seen")).collect();
    assert!(KINDS.iter().all(|kind| lines.iter().any(|line| line.contains(kind))), "{lines:?}");
}

/// A kind that the API server does not have any more, as after a return to an older one, keeps nobody waiting.
#[tokio::test]
async fn an_agent_that_saw_a_kind_that_is_gone_is_served() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    cluster.api.lack("servicecidrs", true);
    let control = cluster.start_with_flags(&["--service-networks", "10.96.0.0/16"]);
    ready(&control).await;
    let seen = || "servicecidrs=1000000".parse().unwrap();
    let mut agent = Agent::having_seen(cluster.endpoint(&control, OTHER_AGENT), "n2", seen());
    agent.until_known(Some(false), None).await;
    assert!(!agent.seen.borrow().to_string().contains(&u64::MAX.to_string()));
    // When it is there after all, its numbers count.
    cluster.api.lack("servicecidrs", false);
    counts(&control, "weft_control_objects{kind=\"ServiceCIDR\"} 1").await;
    let mut agent = Agent::having_seen(cluster.endpoint(&control, OTHER_AGENT), "n2", seen());
    assert_eq!(told(&mut agent, UID, QUIET).await, [false; 0]);
}

/// What a later version of Weft wrote down may speak of kinds that this one does not read.
#[tokio::test]
async fn a_record_that_speaks_of_an_unknown_kind_keeps_nothing_back() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    cluster.api.put(
        "nodeenrollments",
        json!({"metadata": {"name": "n2", "annotations": {"mesh.weft.dev/seen": "gadgets=7"}}, "status": {}}),
    );
    let control = cluster.start();
    ready(&control).await;
    report(&cluster.endpoint(&control, AGENT), &[UID]).await.unwrap();
    let mut agent = Agent::connect(cluster.endpoint(&control, OTHER_AGENT), "n2");
    agent.until_known(Some(true), None).await;
}

/// No number is believed against the API server's own list.
#[tokio::test]
async fn a_store_that_was_restored_is_named_and_nothing_is_told() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    let control = cluster.start();
    ready(&control).await;
    let seen = "pods=1000000".parse().unwrap();
    let mut agent = Agent::having_seen(cluster.endpoint(&control, OTHER_AGENT), "n2", seen);
    assert_eq!(told(&mut agent, UID, 2 * QUIET).await, [false; 0]);
    let line = control.logged("was it restored");
    assert!(line.contains("version 1000000 of pods"), "{line}");
}

/// Two replicas that each write down a pod at the same time must not each publish its own without the other.
#[tokio::test]
async fn what_a_replica_wrote_it_publishes_when_it_has_read_up_to_there() {
    let cluster = Cluster::new();
    cluster.pod("web", "10.1.0.2");
    let door = cluster.api.door();
    let other = cluster.start_behind(&door);
    ready(&other).await;
    let mut agent = Agent::connect(cluster.endpoint(&other, OTHER_AGENT), "n2");
    agent.until_known(Some(false), None).await;
    door.hold(&["nodeenrollments"]);
    report(&cluster.endpoint(&other, AGENT), &[UID]).await.unwrap();
    assert_eq!(cluster.enrollment().unwrap()["enrolledPods"], 1);
    assert_eq!(told(&mut agent, UID, QUIET).await, [false; 0]);
    door.hold(&[]);
    agent.until_known(Some(true), None).await;
}

/// Who is enrolled follows from labels, which come by another watch. A replica that has read of a pod's enrolment and not of
/// its label would publish another pod meanwhile, and take the first one for one outside the mesh.
#[tokio::test]
async fn who_is_enrolled_is_not_known_before_the_labels_it_follows_from() {
    let cluster = Cluster::new();
    cluster.label("disabled");
    cluster
        .api
        .put("namespaces", json!({"metadata": {"name": "bank", "labels": {"weft.dev/mesh": "enabled"}}}));
    cluster.pod("web", "10.1.0.2");
    cluster.api.put(
        "pods",
        json!({"metadata": {"name": "db", "namespace": "bank", "uid": "uid-db"}, "spec": {"nodeName": "n2"},
            "status": {"podIP": "10.1.1.2"}}),
    );
    let door = cluster.api.door();
    let (one, other) = (cluster.start(), cluster.start_behind(&door));
    ready(&one).await;
    ready(&other).await;
    let mut agent = Agent::connect(cluster.endpoint(&other, OTHER_AGENT), "n2");
    assert_eq!(told(&mut agent, UID, QUIET).await, [false]);

    door.hold(&["namespaces"]);
    cluster.label("enabled");
    counts(&one, "weft_control_pods_desired 2").await;
    report(&cluster.endpoint(&one, AGENT), &[UID]).await.unwrap();
    // The other one reads of that, and then writes down its own.
    report(&cluster.endpoint(&other, OTHER_AGENT), &["Kubernetes//Pod/bank/db"]).await.unwrap();
    eventually("both are written down", async || {
        let written = |node| cluster.api.get("nodeenrollments", "", node);
        written("n1").is_some() && written("n2").is_some()
    })
    .await;
    let first_told = timeout(QUIET, agent.updates.recv()).await;
    assert!(first_told.is_err(), "published before the label was read: {first_told:?}");

    door.hold(&[]);
    let mut tunnels = BTreeMap::new();
    let first = timeout(LONG, agent.updates.recv()).await.unwrap().unwrap();
    for resource in first.upserts.iter().filter(|_| first.type_url == type_url::ADDRESS) {
        if let Some(address::Type::Workload(w)) = Address::decode(resource.value.clone()).unwrap().r#type {
            tunnels.insert(resource.name.clone(), w.tunnel_protocol() == TunnelProtocol::Hbone);
        }
    }
    let both = [("Kubernetes//Pod/bank/db".to_owned(), true), (UID.to_owned(), true)];
    assert_eq!(tunnels, both.into(), "not both at once");
    first.ack();
}
