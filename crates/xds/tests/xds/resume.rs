//! What an agent is told after its stream broke.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use weft_proto::type_url::{ADDRESS, MESH_CONFIG};
use weft_xds::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};

use crate::harness::{Agent, Controller, QUIET, SOON, digest, eventually, node, snapshot};

#[tokio::test]
async fn the_same_content_after_a_restart_is_not_sent_again() {
    let state = || Some(snapshot(&[(ADDRESS, "a", "1"), (MESH_CONFIG, "mesh", "1")], &[]));
    let controller = Controller::start(state()).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    let address = controller.address;
    drop(controller);
    agent.connected_becomes(false).await;
    let controller = Controller::start_at(address, state()).await;
    agent.connected_becomes(true).await;
    // The type without resources has nothing to resume from; it is told again that it is empty.
    assert_eq!(agent.apply().await, "local");
    agent.nothing().await;
    controller.publish_items(&[(ADDRESS, "a", "2"), (MESH_CONFIG, "mesh", "1")]);
    assert_eq!(agent.apply().await, "address +a=2");
}

#[tokio::test]
async fn what_changed_while_away_arrives_as_a_difference_with_removals() {
    let before = [
        (ADDRESS, "gone", "1"),
        (ADDRESS, "kept", "1"),
        (ADDRESS, "changed", "1"),
        (MESH_CONFIG, "mesh", "1"),
    ];
    let controller = Controller::start(Some(snapshot(&before, &[]))).await;
    let mut agent = Agent::start("n1", controller.address);
    agent.sync().await;
    // Also what came after the first sync is remembered.
    let [gone, kept, changed, mesh] = before;
    controller.publish_items(&[gone, kept, changed, mesh, (ADDRESS, "late", "1")]);
    assert_eq!(agent.apply().await, "address +late=1");
    let address = controller.address;
    drop(controller);
    agent.connected_becomes(false).await;
    // The new controller has nothing to say until it knows something.
    let controller = Controller::start_at(address, None).await;
    agent.connected_becomes(true).await;
    agent.nothing().await;
    assert_eq!(agent.state.len(), 5);
    controller.publish_items(&[kept, (ADDRESS, "changed", "2"), (ADDRESS, "new", "1")]);
    assert_eq!(agent.apply().await, "config -mesh");
    assert_eq!(agent.apply().await, "address +changed=2 +new=1 -gone -late");
    assert_eq!(agent.apply().await, "local");
    agent.nothing().await;
    let names: Vec<_> = agent.state.keys().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["changed", "kept", "new"]);
}

/// The stream breaks while the consumer works on an update: its verdict counts for the next stream.
#[tokio::test]
async fn a_verdict_given_after_the_break_is_remembered() {
    for accept in [true, false] {
        let state = || Some(snapshot(&[(ADDRESS, "a", "1")], &[]));
        let controller = Controller::start(state()).await;
        let mut agent = Agent::start("n1", controller.address);
        assert_eq!(agent.apply().await, "config!");
        let held = agent.next().await;
        eventually(SOON, || controller.stats.responses() == 3).await;
        tokio::time::sleep(QUIET).await;
        assert_eq!(digest(&held), "address! +a=1");
        let address = controller.address;
        drop(controller);
        agent.connected_becomes(false).await;
        let _controller = Controller::start_at(address, state()).await;
        agent.nothing().await;
        if accept {
            held.ack();
        } else {
            held.nack("not yet".to_owned());
        }
        // This had come before the break.
        assert_eq!(agent.apply().await, "local!");
        assert_eq!(agent.apply().await, "config");
        if !accept {
            assert_eq!(agent.apply().await, "address! +a=1");
        }
        assert_eq!(agent.apply().await, "local");
        agent.nothing().await;
    }
}

/// A path that passes bytes until it is told to swallow them, without closing anything.
async fn path_to(controller: SocketAddr) -> (SocketAddr, Arc<AtomicBool>) {
    let dead = Arc::new(AtomicBool::new(false));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let swallow = dead.clone();
    tokio::spawn(async move {
        while let Ok((from_client, _)) = listener.accept().await {
            let (client_read, client_write) = from_client.into_split();
            let (server_read, server_write) = TcpStream::connect(controller).await.unwrap().into_split();
            tokio::spawn(pass(client_read, server_write, swallow.clone()));
            tokio::spawn(pass(server_read, client_write, swallow.clone()));
        }
    });
    (address, dead)
}

async fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    swallow: Arc<AtomicBool>,
) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if !swallow.load(Ordering::Relaxed) && to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
    if swallow.load(Ordering::Relaxed) {
        // Not even the end gets through.
        std::future::pending::<()>().await;
    }
}

/// Takes as long as the keepalive does, half a minute.
#[tokio::test]
async fn both_sides_notice_a_peer_that_vanished() {
    let controller = Controller::start(Some(snapshot(&[], &[]))).await;
    let (address, dead) = path_to(controller.address).await;
    let mut agent = Agent::with("n1", node("n1", address));
    agent.sync().await;
    controller.streams_become(1).await;
    dead.store(true, Ordering::Relaxed);
    let limit = KEEPALIVE_INTERVAL + KEEPALIVE_TIMEOUT + Duration::from_secs(5);
    let connected = agent.connected.clone();
    let (client, server) = tokio::join!(
        tokio::time::timeout(limit, async { eventually(limit, || !*connected.borrow()).await }),
        tokio::time::timeout(limit, async { eventually(limit, || controller.stats.streams() == 0).await }),
    );
    client.expect("the client noticed nothing");
    server.expect("the server noticed nothing");
}
