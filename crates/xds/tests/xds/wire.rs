//! The server and peers that are not Weft's client.

use tonic::Code;
use weft_proto::discovery::{self, DeltaDiscoveryRequest};
use weft_proto::type_url::{ADDRESS, MESH_CONFIG};

use crate::harness::{Agent, Controller, Raw, SOON, digest_of, eventually, snapshot};

#[tokio::test]
async fn names_can_be_asked_for_and_dropped() {
    let controller = Controller::start(Some(snapshot(
        &[(ADDRESS, "a", "1"), (ADDRESS, "b", "1"), (ADDRESS, "c", "1")],
        &[],
    )))
    .await;
    let mut raw = Raw::open("n1", controller.address).await;
    raw.subscribe(ADDRESS, &["a", "missing"]).await;
    assert_eq!(raw.apply().await, "address +a=1 -missing");
    controller.publish_items(&[(ADDRESS, "a", "2"), (ADDRESS, "b", "2"), (ADDRESS, "missing", "1")]);
    assert_eq!(raw.apply().await, "address +a=2 +missing=1");
    // Asked for again, sent again.
    raw.subscribe(ADDRESS, &["a", "b"]).await;
    assert_eq!(raw.apply().await, "address +b=2 +a=2");
    raw.unsubscribe(ADDRESS, &["a", "missing"]).await;
    raw.nothing().await;
    controller.publish_items(&[(ADDRESS, "a", "3"), (ADDRESS, "b", "3")]);
    assert_eq!(raw.apply().await, "address +b=3");
    // The wildcard beside a name, and without it again.
    raw.subscribe(ADDRESS, &["*"]).await;
    assert_eq!(raw.apply().await, "address +a=3");
    raw.unsubscribe(ADDRESS, &["*"]).await;
    raw.nothing().await;
    controller.publish_items(&[(ADDRESS, "b", "4")]);
    assert_eq!(raw.apply().await, "address +b=4");
    raw.nothing().await;
}

#[tokio::test]
async fn kept_names_are_compared_by_version() {
    let controller =
        Controller::start(Some(snapshot(&[(ADDRESS, "a", "1"), (ADDRESS, "b", "1")], &[]))).await;
    let mut raw = Raw::open("n1", controller.address).await;
    let kept =
        |name: &str, content: &str| (name.to_owned(), weft_xds::Version::of(content.as_bytes()).to_string());
    raw.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.to_owned(),
        resource_names_subscribe: ["a", "b", "gone"].map(str::to_owned).to_vec(),
        initial_resource_versions: [kept("a", "1"), kept("b", "0"), kept("gone", "1")].into(),
        ..Default::default()
    })
    .await;
    assert_eq!(raw.apply().await, "address +b=1 -gone");
    raw.nothing().await;
}

#[tokio::test]
async fn an_unknown_type_is_answered_empty() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "1")], &[]))).await;
    let mut raw = Raw::open("n1", controller.address).await;
    raw.subscribe("type.googleapis.com/istio.security.Authorization", &[]).await;
    assert_eq!(raw.apply().await, "type.googleapis.com/istio.security.Authorization");
    raw.nothing().await;
}

#[tokio::test]
async fn an_old_nonce_answers_nothing() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "1")], &[]))).await;
    let mut raw = Raw::open("n1", controller.address).await;
    raw.subscribe(ADDRESS, &[]).await;
    let first = raw.receive().await.unwrap();
    raw.ack(&first).await;
    controller.publish_items(&[(ADDRESS, "a", "2")]);
    let second = raw.receive().await.unwrap();
    controller.publish_items(&[(ADDRESS, "a", "3")]);
    raw.ack(&first).await;
    raw.send(DeltaDiscoveryRequest {
        type_url: ADDRESS.to_owned(),
        response_nonce: "made up".to_owned(),
        error_detail: Some(discovery::Status::default()),
        ..Default::default()
    })
    .await;
    raw.nothing().await;
    assert_eq!(controller.stats.nacks(), 0);
    raw.ack(&second).await;
    assert_eq!(digest_of(&raw.receive().await.unwrap()), "address +a=3");
}

#[tokio::test]
async fn malformed_requests_end_their_stream_and_no_other() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "1")], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    let no_name = vec![String::new()];
    let address = ADDRESS.to_owned();
    let malformed = [
        DeltaDiscoveryRequest::default(),
        DeltaDiscoveryRequest {
            type_url: address.clone(),
            resource_names_subscribe: no_name.clone(),
            ..Default::default()
        },
        DeltaDiscoveryRequest {
            type_url: address.clone(),
            resource_names_unsubscribe: no_name,
            ..Default::default()
        },
        DeltaDiscoveryRequest {
            type_url: address,
            initial_resource_versions: [(String::new(), "1".to_owned())].into(),
            ..Default::default()
        },
    ];
    for request in malformed {
        let mut raw = Raw::open("n2", controller.address).await;
        raw.send(request.clone()).await;
        assert_eq!(raw.receive().await.unwrap_err().code(), Code::InvalidArgument, "{request:?}");
    }
    // As many types as anybody could make up.
    let mut raw = Raw::open("n2", controller.address).await;
    let ended = loop {
        raw.subscribe(&format!("type {}", rand_name()), &[]).await;
        match raw.receive().await {
            Ok(response) => raw.ack(&response).await,
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::ResourceExhausted);
    controller.streams_become(1).await;
    controller.publish_items(&[(ADDRESS, "a", "2"), (MESH_CONFIG, "mesh", "1")]);
    assert_eq!(agent.apply().await, "config +mesh=1");
    assert_eq!(agent.apply().await, "address +a=2");
    eventually(SOON, || controller.stats.streams() == 1).await;
}

fn rand_name() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
