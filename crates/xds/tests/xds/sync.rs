//! What an agent is told while it is connected.

use weft_proto::type_url::{ADDRESS, LOCAL_WORKLOAD, MESH_CONFIG};

use crate::harness::{Agent, Controller, QUIET, Raw, SOON, digest, eventually, snapshot};

const MULTI: &[(&str, &[crate::harness::Item])] =
    &[("n1", &[(LOCAL_WORKLOAD, "mine", "1")]), ("n2", &[(LOCAL_WORKLOAD, "theirs", "1")])];

#[tokio::test]
async fn the_first_state_arrives_in_order_and_empty_types_say_so() {
    let controller =
        Controller::start(Some(snapshot(&[(ADDRESS, "a", "1"), (ADDRESS, "b", "1")], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    assert_eq!(agent.sync().await, ["config!", "address! +a=1 +b=1", "local!"]);
    agent.nothing().await;
    assert!(*agent.connected.borrow());
    eventually(SOON, || controller.stats.acks() == 3).await;
    assert_eq!(controller.stats.responses(), 3);
}

#[tokio::test]
async fn a_change_arrives_as_one_difference() {
    let controller =
        Controller::start(Some(snapshot(&[(ADDRESS, "a", "1"), (ADDRESS, "b", "1")], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    controller.publish_items(&[(ADDRESS, "b", "2"), (ADDRESS, "c", "1")]);
    assert_eq!(agent.apply().await, "address +b=2 +c=1 -a");
    // Nothing new, although every map is a new one.
    controller.publish_items(&[(ADDRESS, "b", "2"), (ADDRESS, "c", "1")]);
    agent.nothing().await;
    controller.publish_items(&[(MESH_CONFIG, "mesh", "1")]);
    assert_eq!(agent.apply().await, "config +mesh=1");
    assert_eq!(agent.apply().await, "address -b -c");
    agent.nothing().await;
}

#[tokio::test]
async fn types_of_one_snapshot_keep_their_order() {
    let controller = Controller::start(Some(snapshot(&[], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    assert_eq!(agent.sync().await, ["config!", "address!", "local!"]);
    for round in ["1", "2", "3", "4", "5"] {
        let shared = [(MESH_CONFIG, "mesh", round), (ADDRESS, "a", round)];
        controller.publish(snapshot(&shared, &[("n1", &[(LOCAL_WORKLOAD, "l", round)])]));
        let expected = ["config +mesh", "address +a", "local +l"].map(|text| format!("{text}={round}"));
        assert_eq!(agent.sync().await, expected);
    }
}

/// The consumer is still at the addresses of one snapshot when the next one brings both: the agent's own workloads of
/// the next must not arrive before its addresses.
#[tokio::test]
async fn an_unanswered_address_update_holds_back_what_comes_after_it() {
    let controller = Controller::start(Some(snapshot(&[], &[]))).await;
    let mut raw = Raw::open("n1", controller.address).await;
    raw.subscribe(ADDRESS, &[]).await;
    raw.subscribe(LOCAL_WORKLOAD, &[]).await;
    assert_eq!(raw.apply().await, "address");
    assert_eq!(raw.apply().await, "local");
    controller.publish_items(&[(ADDRESS, "a", "1")]);
    let unanswered = raw.receive().await.unwrap();
    controller.publish(snapshot(&[(ADDRESS, "a", "2")], &[("n1", &[(LOCAL_WORKLOAD, "l", "2")])]));
    raw.nothing().await;
    raw.ack(&unanswered).await;
    assert_eq!(raw.apply().await, "address +a=2");
    assert_eq!(raw.apply().await, "local +l=2");
    // Its own workloads alone need not wait.
    controller.publish(snapshot(&[(ADDRESS, "a", "3")], &[("n1", &[(LOCAL_WORKLOAD, "l", "2")])]));
    let unanswered = raw.receive().await.unwrap();
    controller.publish(snapshot(&[(ADDRESS, "a", "3")], &[("n1", &[(LOCAL_WORKLOAD, "l", "3")])]));
    assert_eq!(raw.apply().await, "local +l=3");
    raw.ack(&unanswered).await;
    raw.nothing().await;
}

#[tokio::test]
async fn changes_coalesce_while_an_update_is_unanswered() {
    let controller = Controller::start(Some(snapshot(&[], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    controller.publish_items(&[(ADDRESS, "a", "0"), (ADDRESS, "b", "0")]);
    let held = agent.next().await;
    for round in ["1", "2", "3", "4", "5", "6"] {
        controller.publish_items(&[(ADDRESS, "a", round), (ADDRESS, "c", "0")]);
        tokio::time::sleep(QUIET / 6).await;
    }
    agent.nothing().await;
    assert_eq!(controller.stats.responses(), 4);
    held.ack();
    assert_eq!(agent.apply().await, "address +a=6 +c=0 -b");
    agent.nothing().await;
    assert_eq!(controller.stats.responses(), 5);
}

#[tokio::test]
async fn a_change_undone_while_unanswered_is_never_sent() {
    let controller = Controller::start(Some(snapshot(&[], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    controller.publish_items(&[(ADDRESS, "a", "1")]);
    let held = agent.next().await;
    controller.publish_items(&[]);
    tokio::time::sleep(QUIET).await;
    controller.publish_items(&[(ADDRESS, "a", "1")]);
    held.ack();
    agent.nothing().await;
}

#[tokio::test]
async fn a_rejected_update_returns_with_the_next_change_and_other_types_go_on() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "1")], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    controller.publish_items(&[(ADDRESS, "a", "bad"), (ADDRESS, "b", "1")]);
    let update = agent.next().await;
    assert_eq!(digest(&update), "address +a=bad +b=1");
    update.nack("a makes no sense".to_owned());
    agent.nothing().await;
    eventually(SOON, || controller.stats.nacks() == 1).await;
    // Another type; the same bad content again.
    controller.publish_items(&[(ADDRESS, "a", "bad"), (ADDRESS, "b", "1"), (MESH_CONFIG, "mesh", "1")]);
    assert_eq!(agent.apply().await, "config +mesh=1");
    agent.nothing().await;
    // The repaired one comes with what was lost together with the bad one.
    controller.publish_items(&[(ADDRESS, "a", "2"), (ADDRESS, "b", "1"), (MESH_CONFIG, "mesh", "1")]);
    assert_eq!(agent.apply().await, "address +a=2 +b=1");
    agent.nothing().await;
}

#[tokio::test]
async fn a_rejected_change_that_is_taken_back_leaves_nothing_to_send() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "1")], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    controller.publish_items(&[(ADDRESS, "a", "bad")]);
    agent.next().await.nack("no".to_owned());
    agent.nothing().await;
    controller.publish_items(&[(ADDRESS, "a", "1")]);
    agent.nothing().await;
    controller.publish_items(&[(ADDRESS, "a", "2")]);
    assert_eq!(agent.apply().await, "address +a=2");
}

#[tokio::test]
async fn a_type_stays_first_until_it_is_accepted_and_dropping_an_update_rejects_it() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "bad")], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    assert_eq!(agent.apply().await, "config!");
    drop(agent.next().await);
    assert_eq!(agent.apply().await, "local!");
    eventually(SOON, || controller.stats.nacks() == 1).await;
    controller.publish_items(&[(ADDRESS, "a", "1")]);
    assert_eq!(agent.apply().await, "address! +a=1");
    controller.publish_items(&[(ADDRESS, "a", "2")]);
    assert_eq!(agent.apply().await, "address +a=2");
}

#[tokio::test]
async fn each_node_sees_its_own() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "1")], MULTI))).await;
    let mut agents = ["n1", "n2", "n3"].map(|name| Agent::start(name, controller.address));
    for (agent, own) in agents.iter_mut().zip(["local! +mine=1", "local! +theirs=1", "local!"]) {
        assert_eq!(agent.sync().await, ["config!", "address! +a=1", own]);
    }
    let own = [MULTI[0], ("n2", &[(LOCAL_WORKLOAD, "theirs", "2")] as &[_])];
    controller.publish(snapshot(&[(ADDRESS, "a", "1")], &own));
    assert_eq!(agents[1].apply().await, "local +theirs=2");
    agents[0].nothing().await;
    agents[2].nothing().await;
}

/// No snapshot, no word; and a snapshot that goes away takes nothing with it.
#[tokio::test]
async fn a_server_without_a_snapshot_holds_its_streams() {
    let controller = Controller::start(None).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.connected_becomes(true).await;
    agent.nothing().await;
    controller.publish_items(&[(ADDRESS, "a", "1")]);
    assert_eq!(agent.sync().await, ["config!", "address! +a=1", "local!"]);
    controller.unpublish();
    agent.nothing().await;
    assert!(*agent.connected.borrow());
    controller.publish_items(&[(ADDRESS, "a", "1"), (ADDRESS, "b", "1")]);
    assert_eq!(agent.apply().await, "address +b=1");
}

#[tokio::test]
async fn slow_clients_cost_others_nothing() {
    // More than the flow-control windows hold.
    let big: &'static str = "x".repeat(24 << 20).leak();
    let controller =
        Controller::start(Some(snapshot(&[(ADDRESS, "a", "0"), (ADDRESS, "big", big)], &[]))).await;
    // One does not read what it is sent, one reads and never answers.
    let mut stalled = Raw::open("stalled", controller.address).await;
    stalled.subscribe(ADDRESS, &[]).await;
    let mut silent = Raw::open("silent", controller.address).await;
    silent.subscribe(ADDRESS, &[]).await;
    let unanswered = silent.receive().await.unwrap();
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    for round in ["1", "2", "3", "4", "5"] {
        controller.publish_items(&[(ADDRESS, "a", round), (ADDRESS, "big", big)]);
        assert_eq!(agent.apply().await, format!("address +a={round}"));
    }
    // They catch up in one step once they want to.
    silent.ack(&unanswered).await;
    assert_eq!(silent.apply().await, "address +a=5");
    let late = stalled.receive().await.unwrap();
    assert_eq!(late.resources.len(), 2);
    stalled.ack(&late).await;
    assert_eq!(stalled.apply().await, "address +a=5");
}

#[tokio::test]
async fn a_stream_ends_with_its_connection_and_a_client_with_its_consumer() {
    let controller = Controller::start(Some(snapshot(&[], &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    let raw = Raw::open("n2", controller.address).await;
    agent.sync().await;
    controller.streams_become(2).await;
    drop(raw);
    controller.streams_become(1).await;
    agent.updates.close();
    tokio::time::timeout(SOON, &mut agent.task)
        .await
        .expect("the client goes on without a consumer")
        .unwrap();
    controller.streams_become(0).await;
}
