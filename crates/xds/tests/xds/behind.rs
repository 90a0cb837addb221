//! A replica that has seen less than its client says nothing to it.

use std::time::Duration;

use weft_proto::type_url::ADDRESS;

use crate::harness::{Agent, Controller, SOON, eventually};

const OLD: (&str, &str, &str) = (ADDRESS, "a", "old");
const NEW: (&str, &str, &str) = (ADDRESS, "a", "new");

/// An agent that has seen the new state, and whose replica is gone. The next one is at the same address.
async fn orphan() -> (Agent, std::net::SocketAddr) {
    let controller = Controller::start(None).await;
    controller.publish_as_of("pods=5,services=2", &[OLD]);
    let mut agent = Agent::start("n1", controller.address);
    assert_eq!(agent.sync().await[1], "address! +a=old");
    controller.publish_as_of("pods=7,services=2", &[NEW]);
    assert_eq!(agent.apply().await, "address +a=new");
    let address = controller.address;
    drop(controller);
    agent.connected_becomes(false).await;
    (agent, address)
}

#[tokio::test]
async fn a_replica_that_is_behind_says_nothing_until_it_has_caught_up() {
    let (mut agent, address) = orphan().await;
    let mut controller = Controller::start_at(address, None).await;
    controller.publish_as_of("nodes=9,pods=6,services=2", &[OLD]);
    let wanted = tokio::time::timeout(SOON, controller.wanted.recv()).await.unwrap().unwrap();
    assert_eq!(wanted.to_string(), "pods=7,services=2");
    agent.nothing().await;
    assert!(!*agent.connected.borrow());
    // It sees more, and still not enough.
    controller.publish_as_of("nodes=9,pods=6,services=3", &[OLD]);
    agent.nothing().await;
    controller.publish_as_of("nodes=9,pods=7,services=3", &[NEW, (ADDRESS, "b", "1")]);
    assert_eq!(agent.apply().await, "config");
    assert_eq!(agent.apply().await, "address +b=1");
    assert_eq!(controller.stats.behind(), 0, "it was not worth sending away");
}

#[tokio::test]
async fn what_nothing_followed_from_counts_as_seen() {
    let (mut agent, address) = orphan().await;
    let controller = Controller::start_at(address, None).await;
    // Its content is older than the agent's label, as where the agent's replica had just listed; but it knows as much.
    controller.publish_as_of("pods=6,services=1", &[NEW]);
    agent.nothing().await;
    controller.know("pods=7,services=2".parse().unwrap());
    agent.connected_becomes(true).await;
    controller.publish_as_of("pods=8,services=2", &[OLD]);
    let mut news = agent.apply().await;
    while !news.starts_with("address") {
        news = agent.apply().await;
    }
    assert_eq!(news, "address +a=old");
}

/// Takes as long as a replica is given, some seconds.
#[tokio::test]
async fn a_replica_that_stays_behind_sends_its_clients_away() {
    let (mut agent, address) = orphan().await;
    let lagging = Controller::start_at(address, None).await;
    lagging.publish_as_of("pods=6,services=2", &[OLD]);
    eventually(Duration::from_secs(20), || lagging.stats.behind() >= 2).await;
    agent.nothing().await;
    assert_eq!(lagging.stats.streams(), 0);
    drop(lagging);
    let healthy = Controller::start_at(address, None).await;
    healthy.publish_as_of("pods=7,services=2", &[NEW, (ADDRESS, "b", "1")]);
    assert_eq!(agent.apply().await, "config");
    assert_eq!(agent.apply().await, "address +b=1");
}

/// What an agent had seen before it was restarted counts for its successor, which has nothing else.
#[tokio::test]
async fn a_client_without_a_state_is_held_as_well() {
    let controller = Controller::start(None).await;
    controller.publish_as_of("pods=6", &[OLD]);
    let node = crate::harness::node("n1", controller.address);
    node.seen.send_replace("pods=7".parse().unwrap());
    let mut agent = Agent::with("n1", node);
    agent.nothing().await;
    controller.publish_as_of("pods=7", &[NEW]);
    assert_eq!(agent.sync().await[1], "address! +a=new");
}
