//! Who is let in, and whom the client trusts.

use weft_proto::type_url::ADDRESS;

use crate::harness::{Agent, Controller, SOON, eventually, node, pki, snapshot};

#[tokio::test]
async fn a_wrong_or_missing_token_is_refused_and_a_right_one_is_picked_up() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "1")], &[]))).await;
    let node = node("n1", controller.address);
    let token = node.endpoint.token.path().to_owned();
    std::fs::write(&token, "guessed").unwrap();
    let mut agent = Agent::with("n1", node);
    eventually(SOON, || controller.stats.refused() >= 2).await;
    agent.nothing().await;
    assert!(!*agent.connected.borrow());
    assert_eq!(controller.stats.streams(), 0);

    // Without a token the controller is not even asked.
    std::fs::remove_file(&token).unwrap();
    agent.nothing().await;
    let refused = controller.stats.refused();
    agent.nothing().await;
    assert_eq!(controller.stats.refused(), refused);

    std::fs::write(&token, "  let-me-in-n1 \n").unwrap();
    assert_eq!(agent.sync().await, ["config!", "address! +a=1", "local!"]);
    assert!(agent.node.directory.path().exists());
}

#[tokio::test]
async fn a_controller_of_another_ca_or_name_is_not_spoken_to() {
    let controller = Controller::start(Some(snapshot(&[(ADDRESS, "a", "1")], &[]))).await;
    let mut other_ca = node("n1", controller.address);
    other_ca.endpoint.ca = pki().ca_pem.into_bytes().into();
    let mut other_name = node("n1", controller.address);
    other_name.endpoint.server_name = "weft-impostor".to_owned();
    for node in [other_ca, other_name] {
        let mut agent = Agent::with("n1", node);
        agent.nothing().await;
        assert!(!*agent.connected.borrow());
        assert_eq!(controller.stats.streams() + controller.stats.refused(), 0);
    }
}
