//! How far clients have followed: as far as they have accepted everything, and no further.

use weft_proto::type_url::{ADDRESS, LOCAL_WORKLOAD, MESH_CONFIG};

use crate::harness::{Agent, Controller, Item, QUIET, SOON, eventually, snapshot};

fn publish(controller: &Controller, version: u64, items: &[Item]) {
    controller.publish(weft_xds::Snapshot { version, ..snapshot(items, &[]) });
}

async fn follows(controller: &Controller, expected: &[(&str, u64)]) {
    let expected: Vec<_> = expected.iter().map(|(node, version)| ((*node).to_owned(), *version)).collect();
    eventually(SOON, || controller.followers.each() == expected).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(controller.followers.each(), expected);
}

#[tokio::test]
async fn a_client_has_followed_when_it_has_accepted_all() {
    let controller = Controller::start(None).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.connected_becomes(true).await;
    follows(&controller, &[("n1", 0)]).await;
    publish(&controller, 7, &[(ADDRESS, "a", "1")]);
    agent.apply().await;
    agent.apply().await;
    follows(&controller, &[("n1", 0)]).await;
    agent.apply().await;
    follows(&controller, &[("n1", 7)]).await;
    // Two types change; the client takes its time with the second.
    publish(&controller, 8, &[(ADDRESS, "a", "2"), (LOCAL_WORKLOAD, "a", "2")]);
    agent.apply().await;
    let second = agent.next().await;
    follows(&controller, &[("n1", 7)]).await;
    second.ack();
    follows(&controller, &[("n1", 8)]).await;
    // What it need not be told of it has.
    publish(&controller, 9, &[(ADDRESS, "a", "2"), (LOCAL_WORKLOAD, "a", "2")]);
    follows(&controller, &[("n1", 9)]).await;
    agent.nothing().await;
    // What it rejects it does not have, nor what comes then, until that is mended.
    publish(&controller, 10, &[(ADDRESS, "a", "bad"), (LOCAL_WORKLOAD, "a", "2")]);
    agent.next().await.nack("no".to_owned());
    follows(&controller, &[("n1", 9)]).await;
    publish(&controller, 11, &[(ADDRESS, "a", "bad"), (LOCAL_WORKLOAD, "a", "3")]);
    agent.apply().await;
    follows(&controller, &[("n1", 9)]).await;
    publish(&controller, 12, &[(ADDRESS, "a", "good"), (LOCAL_WORKLOAD, "a", "3")]);
    agent.apply().await;
    follows(&controller, &[("n1", 12)]).await;
}

#[tokio::test]
async fn a_client_that_comes_back_has_not_followed_before_it_has_accepted_what_is_new() {
    let controller = Controller::start(None).await;
    let state = |address| [(MESH_CONFIG, "m", "1"), (ADDRESS, "a", address), (LOCAL_WORKLOAD, "a", "1")];
    publish(&controller, 1, &state("1"));
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    let address = controller.address;
    drop(controller);
    agent.connected_becomes(false).await;
    let controller = Controller::start_at(address, None).await;
    publish(&controller, 5, &state("2"));
    let news = agent.next().await;
    follows(&controller, &[("n1", 0)]).await;
    news.ack();
    follows(&controller, &[("n1", 5)]).await;
}

#[tokio::test]
async fn a_client_follows_however_restless_the_world_is() {
    let controller = Controller::start(None).await;
    publish(&controller, 1, &[(ADDRESS, "a", "1")]);
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    publish(&controller, 2, &[(ADDRESS, "a", "even")]);
    for version in 2..20 {
        let update = agent.next().await;
        // When it is accepted there is something newer already.
        let content = if version % 2 == 0 { "odd" } else { "even" };
        publish(&controller, version + 1, &[(ADDRESS, "a", content)]);
        update.ack();
        eventually(SOON, || controller.followers.each() == [("n1".to_owned(), version)]).await;
    }
}

#[tokio::test]
async fn a_node_is_known_by_its_newest_stream() {
    let controller = Controller::start(None).await;
    publish(&controller, 1, &[]);
    let mut old = Agent::start("n1", controller.address);
    old.sync().await;
    follows(&controller, &[("n1", 1)]).await;
    let mut new = Agent::start("n1", controller.address);
    new.connected_becomes(true).await;
    follows(&controller, &[("n1", 0)]).await;
    new.sync().await;
    let mut other = Agent::start("n2", controller.address);
    other.sync().await;
    drop(old);
    follows(&controller, &[("n1", 1), ("n2", 1)]).await;
    drop(new);
    follows(&controller, &[("n2", 1)]).await;
}
