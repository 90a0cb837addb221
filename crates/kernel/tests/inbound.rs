//! What arrives in a pod, on a real kernel.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod testbed;

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};
use testbed::{
    OUTSIDE, PEER, PEER6, POD, POD6, World, accept, at, ends, established, ip, mark, read_all, timed,
    try_accept,
};
use weft_kernel::MARK_CAPTURED;

fn connect(world: &World, to: SocketAddr) -> std::io::Result<TcpStream> {
    world.peer.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(3)))
}

#[test]
fn the_agent_gets_what_comes_from_the_network_with_true_addresses() {
    let Some(world) = World::new() else { return };
    let (_kernel, pod, listener) = world.published();
    // The application is there, and does not get it; nor does it matter whether it is.
    world.pod.serve(at("0.0.0.0", 8080), "application");
    for (to, from) in
        [(at(POD, 8080), PEER), (at(POD6, 8080), PEER6), (at(POD, 15008), PEER), (at(POD6, 9), PEER6)]
    {
        let mut client = connect(&world, to).unwrap();
        let mut agent = accept(&listener);
        assert_eq!(ends(&agent), (to, SocketAddr::new(ip(from), client.local_addr().unwrap().port())));
        assert_eq!(mark(&agent), 0, "{to}");
        client.write_all(b"ping").unwrap();
        let mut bytes = [0; 4];
        agent.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping");
    }
    // The listener's own port is nobody's: not from outside, not from inside.
    let port = pod.listener_port();
    for to in [at(POD, port), at(POD6, port)] {
        assert_eq!(connect(&world, to).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        assert_eq!(world.pod.fetch(to).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
    }
    assert_eq!(world.pod.fetch(at("127.0.0.1", port)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(try_accept(&listener, 100).is_none());
}

#[test]
fn the_application_sees_the_client() {
    let Some(world) = World::new() else { return };
    let (_kernel, pod, listener) = world.published();
    world.pod.serve(at("0.0.0.0", 8080), "hello");
    world.pod.serve(at(POD6, 8081), "hello6");
    // A client that is far away, one on the pod's own link, and one without a route.
    for (client, to, text) in [
        (OUTSIDE, at(POD, 8080), format!("hello {OUTSIDE}")),
        (PEER, at(POD, 8080), format!("hello {PEER}")),
        ("198.51.100.7", at(POD, 8080), "hello 198.51.100.7".into()),
        (PEER6, at(POD6, 8081), format!("hello6 {PEER6}")),
        ("2001:db8::7", at(POD6, 8081), "hello6 2001:db8::7".into()),
    ] {
        let stream =
            established(pod.inbound_socket(ip(client), to)).unwrap_or_else(|e| panic!("{client}: {e}"));
        assert_eq!(mark(&stream), MARK_CAPTURED);
        assert_eq!(stream.local_addr().unwrap().ip(), ip(client));
        assert!((1024..=32767).contains(&stream.local_addr().unwrap().port()), "outside the ephemeral range");
        assert_eq!(read_all(&stream), text);
    }
    assert!(try_accept(&listener, 100).is_none(), "the agent's leg does not come back to the agent");
    // v4-mapped addresses, as the dual-stack listener hands them out.
    let mapped =
        pod.inbound_socket(format!("::ffff:{PEER}").parse().unwrap(), at(&format!("::ffff:{POD}"), 8080));
    assert_eq!(read_all(&established(mapped).unwrap()), format!("hello {PEER}"));
}

#[test]
fn a_closed_port_of_the_application_is_refused_at_once() {
    let Some(world) = World::new() else { return };
    let (_kernel, pod, _listener) = world.published();
    for (client, to) in [(OUTSIDE, at(POD, 9)), (PEER6, at(POD6, 9))] {
        let (result, milliseconds) = timed(|| established(pod.inbound_socket(ip(client), to)));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        assert!(milliseconds < 500, "{to}: {milliseconds} ms");
    }
    for (client, to) in [
        (PEER, at(PEER, 80)),
        (PEER, at(POD, pod.listener_port())),
        (PEER6, at(POD, 80)),
        (PEER, at(POD6, 80)),
    ] {
        assert_eq!(
            pod.inbound_socket(ip(client), to).unwrap_err().kind(),
            ErrorKind::InvalidInput,
            "{client} {to}"
        );
    }
}

#[test]
fn a_whole_relay_from_client_to_application() {
    let Some(world) = World::new() else { return };
    let (_kernel, pod, listener) = world.published();
    world.pod.serve(at("0.0.0.0", 8080), "hello");
    let client = connect(&world, at(POD, 8080)).unwrap();
    let mut agent = accept(&listener);
    let (dialled, caller) = ends(&agent);
    // As it happens in a relay: the client's connection is open while the leg is made.
    let application = established(pod.inbound_socket(caller.ip(), dialled)).unwrap();
    agent.write_all(read_all(&application).as_bytes()).unwrap();
    drop(agent);
    assert_eq!(read_all(&client), format!("hello {PEER}"));
}

#[test]
fn an_application_can_still_bind_its_port() {
    let Some(world) = World::new() else { return };
    let (_kernel, pod, listener) = world.published();
    let _client = connect(&world, at(POD, 8080)).unwrap();
    let _agent = accept(&listener);
    let _leg = pod.inbound_socket(ip(PEER), at(POD, 8080));
    world.pod.run(|| TcpListener::bind(at("0.0.0.0", 8080))).unwrap();
}

#[test]
fn an_empty_slot_refuses_at_once() {
    let Some(world) = World::new() else { return };
    let (kernel, _pod, listener) = world.published();
    world.pod.serve(at("0.0.0.0", 8080), "clear");
    world.pod.serve(at(POD6, 8080), "clear");
    drop(listener);
    for to in [at(POD, 8080), at(POD6, 8080), at(POD, 15008)] {
        let (result, milliseconds) = timed(|| connect(&world, to));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        assert!(milliseconds < 500, "{to}: {milliseconds} ms");
    }
    assert_eq!(kernel.counters().unwrap().refused_no_agent, 3);
    // What stays inside the pod needs no agent.
    assert_eq!(world.pod.fetch(at("127.0.0.1", 8080)).unwrap(), "clear 127.0.0.1");
}

#[test]
fn plaintext_of_an_enrolled_source_is_refused_once_the_pod_is_published() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let (pod, listener) = world.enroll(&kernel);
    for source in [PEER, PEER6] {
        kernel.refuse_source(ip(source)).unwrap();
    }
    assert!(!pod.published().unwrap(), "a new pod is on hold");
    for to in [at(POD, 8080), at(POD6, 8080)] {
        drop(connect(&world, to).expect("on hold, plaintext still comes in through the agent"));
        assert_eq!(ends(&accept(&listener)).0, to);
    }
    pod.set_published(true).unwrap();
    for to in [at(POD, 8080), at(POD6, 8080)] {
        let (result, milliseconds) = timed(|| connect(&world, to));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        assert!(milliseconds < 500, "{to}: {milliseconds} ms");
        // Tunnels are what it is to use.
        drop(connect(&world, SocketAddr::new(to.ip(), 15008)).unwrap());
        assert_eq!(ends(&accept(&listener)).0, SocketAddr::new(to.ip(), 15008));
    }
    assert_eq!(kernel.counters().unwrap().refused_plaintext, 2);
    let mut refused = kernel.refused_sources().unwrap();
    refused.sort();
    assert_eq!(refused, [ip(PEER), ip(PEER6)]);
    // Taken back, and on hold again: both let it in.
    kernel.allow_source(ip(PEER)).unwrap();
    drop(connect(&world, at(POD, 8080)).unwrap());
    pod.set_published(false).unwrap();
    drop(connect(&world, at(POD6, 8080)).unwrap());
}
