//! What a pod's application sees when it connects, on a real kernel.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod testbed;

use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::{ErrorKind, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};
use testbed::{
    OUTSIDE, PEER, PEER6, POD, POD6, VIP, VIP6, World, accept, at, ends, established, ip, mark, network,
    read_all, timed, try_accept,
};
use weft_kernel::{MARK_AGENT, MARK_CAPTURED, Target, Verdict};

/// Connects with a socket prepared by `prepare`, and gives back the connected socket.
fn connect_with(
    world: &World,
    domain: Domain,
    protocol: Protocol,
    to: SocketAddr,
    prepare: impl FnOnce(&Socket) + Send + 'static,
) -> std::io::Result<TcpStream> {
    world.pod.run(move || {
        let socket = Socket::new(domain, Type::STREAM, Some(protocol))?;
        prepare(&socket);
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        socket.connect_timeout(&to.into(), Duration::from_secs(3))?;
        Ok(socket.into())
    })
}

#[test]
fn captured_connections_show_true_addresses() {
    let Some(world) = World::new() else { return };
    let (kernel, _pod, listener) = world.published();
    let mapped = format!("::ffff:{VIP}");
    const MPTCP: i32 = 262;
    type Case<'a> = (&'a str, Domain, i32, SocketAddr, fn(&Socket));
    let cases: [Case<'_>; 6] = [
        ("v4", Domain::IPV4, libc::IPPROTO_TCP, at(VIP, 80), |_| {}),
        ("v6", Domain::IPV6, libc::IPPROTO_TCP, at(VIP6, 80), |_| {}),
        ("v4-mapped", Domain::IPV6, libc::IPPROTO_TCP, at(&mapped, 80), |_| {}),
        ("mptcp", Domain::IPV4, MPTCP, at(VIP, 80), |_| {}),
        ("bound", Domain::IPV4, libc::IPPROTO_TCP, at(VIP, 80), |s| s.bind(&at(POD, 0).into()).unwrap()),
        ("bound v6", Domain::IPV6, libc::IPPROTO_TCP, at(VIP6, 80), |s| s.bind(&at(POD6, 0).into()).unwrap()),
    ];
    for (index, (name, domain, protocol, to, prepare)) in cases.into_iter().enumerate() {
        let app = connect_with(&world, domain, protocol.into(), to, prepare)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut agent = accept(&listener);
        let (dialled, caller) = ends(&agent);
        let (app_peer, app_local) = (app.peer_addr().unwrap(), app.local_addr().unwrap());
        assert_eq!(app_peer, to, "{name}: the application sees what it dialled");
        assert_eq!(dialled, SocketAddr::new(to.ip().to_canonical(), to.port()), "{name}: so does the agent");
        assert_eq!(
            caller,
            SocketAddr::new(app_local.ip().to_canonical(), app_local.port()),
            "{name}: and the caller"
        );
        assert_eq!(caller.ip(), if caller.is_ipv4() { ip(POD) } else { ip(POD6) }, "{name}");
        agent.write_all(b"hello").unwrap();
        drop(agent);
        assert_eq!(read_all(&app), "hello", "{name}");
        assert_eq!(kernel.counters().unwrap().captured, index as u64 + 1, "{name}");
    }
}

#[test]
fn a_non_blocking_connect_is_captured() {
    let Some(world) = World::new() else { return };
    let (_kernel, _pod, listener) = world.published();
    let app = world.pod.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
        match socket.connect(&at(VIP, 81).into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => established(Ok(socket.into())),
        }
    });
    assert_eq!(mark(&app.unwrap()), MARK_CAPTURED);
    assert_eq!(ends(&accept(&listener)).0, at(VIP, 81));
}

#[test]
fn marks_of_the_application_do_not_help_it() {
    let Some(world) = World::new() else { return };
    let (_kernel, _pod, listener) = world.published();
    world.peer.serve(at(VIP, 80), "clear");
    for (own, mapped) in [(MARK_AGENT, false), (MARK_CAPTURED, false), (0x1539, false), (MARK_AGENT, true)] {
        let (domain, to) = if mapped {
            (Domain::IPV6, at(&format!("::ffff:{VIP}"), 80))
        } else {
            (Domain::IPV4, at(VIP, 80))
        };
        let app = connect_with(&world, domain, Protocol::TCP, to, move |s| s.set_mark(own).unwrap()).unwrap();
        assert_eq!(mark(&app), MARK_CAPTURED, "{own:#x}");
        assert_eq!(ends(&accept(&listener)).0, at(VIP, 80), "{own:#x} is captured all the same");
    }
}

#[test]
fn our_mark_does_not_send_a_plain_connection_in_a_loop() {
    let Some(world) = World::new() else { return };
    let (_kernel, _pod, listener) = world.published();
    world.peer.serve(at(OUTSIDE, 80), "outside");
    for (own, left) in [(MARK_CAPTURED, 0), (0x5111, 0), (0x77, 0x77)] {
        let to = at(OUTSIDE, 80);
        let app =
            connect_with(&world, Domain::IPV4, Protocol::TCP, to, move |s| s.set_mark(own).unwrap()).unwrap();
        assert_eq!(mark(&app), left, "{own:#x}");
        assert_eq!(read_all(&app), format!("outside {POD}"));
    }
    assert!(try_accept(&listener, 100).is_none());
}

#[test]
fn a_socket_bound_to_a_device_is_refused() {
    let Some(world) = World::new() else { return };
    let (kernel, _pod, listener) = world.published();
    world.peer.serve(at(VIP, 80), "clear");
    world.peer.serve(at(OUTSIDE, 80), "outside");
    for (domain, to) in [(Domain::IPV4, at(VIP, 80)), (Domain::IPV6, at(VIP6, 80))] {
        let bound = |s: &Socket| s.bind_device(Some(b"eth0")).unwrap();
        let error = connect_with(&world, domain, Protocol::TCP, to, bound).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
    assert_eq!(kernel.counters().unwrap().refused_bound_device, 2);
    // Where nothing is captured, it is the application's own business.
    let bound = |s: &Socket| s.bind_device(Some(b"eth0")).unwrap();
    let app = connect_with(&world, Domain::IPV4, Protocol::TCP, at(OUTSIDE, 80), bound).unwrap();
    assert_eq!(read_all(&app), format!("outside {POD}"));
    assert!(try_accept(&listener, 100).is_none());
}

#[test]
fn an_empty_slot_refuses_at_once() {
    let Some(world) = World::new() else { return };
    let (kernel, _pod, listener) = world.published();
    world.peer.serve(at(VIP, 80), "clear");
    world.peer.serve(at(VIP6, 80), "clear");
    drop(listener);
    for to in [at(VIP, 80), at(VIP6, 80), at(&format!("::ffff:{VIP}"), 80)] {
        let (result, milliseconds) = timed(|| world.pod.fetch(to));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        assert!(milliseconds < 500, "{to} took {milliseconds} ms");
    }
    assert_eq!(kernel.counters().unwrap().refused_no_agent, 3);
}

#[test]
fn what_is_not_captured_is_plain_kernel_tcp() {
    let Some(world) = World::new() else { return };
    let (kernel, pod, listener) = world.published();
    // A node inside the pods' range, and a pod known to be outside the mesh: the longest prefix counts.
    world.peer.serve(at(PEER, 80), "peer");
    for verdict in [Verdict::Exempt, Verdict::LetGo] {
        kernel.set_capture(ip(PEER), verdict).unwrap();
        let app = connect_with(&world, Domain::IPV4, Protocol::TCP, at(PEER, 80), |_| {}).unwrap();
        assert_eq!(mark(&app), 0, "{verdict:?}");
        assert_eq!(read_all(&app), format!("peer {POD}"), "{verdict:?}");
    }
    // On hold, what is known to be outside is held as well; what is exempt never is.
    pod.set_published(false).unwrap();
    let app = connect_with(&world, Domain::IPV4, Protocol::TCP, at(PEER, 80), |_| {}).unwrap();
    assert_eq!((mark(&app), ends(&accept(&listener)).0), (MARK_CAPTURED, at(PEER, 80)));
    kernel.set_capture(ip(PEER), Verdict::Exempt).unwrap();
    assert_eq!(world.pod.fetch(at(PEER, 80)).unwrap(), format!("peer {POD}"));
    // Back in the range's own verdict.
    kernel.clear_capture(ip(PEER)).unwrap();
    let _app = connect_with(&world, Domain::IPV4, Protocol::TCP, at(PEER, 80), |_| {}).unwrap();
    assert_eq!(ends(&accept(&listener)).0, at(PEER, 80));
    // A plain refusal is the peer's, at once, not the agent's.
    let error = world.pod.fetch(at(OUTSIDE, 9)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(kernel.counters().unwrap().captured, 2);
}

#[test]
fn of_a_nodes_address_only_some_ports_are_captured() {
    let Some(world) = World::new() else { return };
    let (kernel, pod, listener) = world.published();
    // One of these is in a captured range and one is not; both families.
    let nodes = [OUTSIDE, PEER, PEER6];
    for address in nodes {
        world.peer.serve(at(address, 22), "node");
        world.peer.serve(at(address, 30080), "node");
        world.peer.serve(at(address, 8080), "node");
        kernel.set_capture(ip(address), Verdict::Node).unwrap();
    }
    let plain = |to| {
        let text = world.pod.fetch(to).unwrap();
        assert!(text.starts_with("node "), "{to}: {text}");
    };
    let captured = |to: SocketAddr| {
        let app = connect_with(&world, Domain::for_address(to), Protocol::TCP, to, |_| {}).unwrap();
        assert_eq!((mark(&app), ends(&accept(&listener)).0), (MARK_CAPTURED, to));
    };
    kernel.set_capture(Target::NodePort(30080), Verdict::Capture).unwrap();
    kernel.set_capture(Target::Port(at(OUTSIDE, 8080)), Verdict::Capture).unwrap();
    for address in nodes {
        plain(at(address, 22));
        captured(at(address, 30080));
    }
    captured(at(OUTSIDE, 8080));
    plain(at(PEER, 8080));
    plain(at(PEER6, 8080));
    // v4-mapped, as a dual-stack socket dials it.
    let mapped = at(&format!("::ffff:{PEER}"), 30080);
    let _app = connect_with(&world, Domain::IPV6, Protocol::TCP, mapped, |_| {}).unwrap();
    assert_eq!(ends(&accept(&listener)).0, at(PEER, 30080));

    // An external address has no node ports.
    kernel.set_capture(ip(OUTSIDE), Verdict::ByPort).unwrap();
    plain(at(OUTSIDE, 30080));
    captured(at(OUTSIDE, 8080));
    // On hold nobody knows yet which ports are whose.
    pod.set_published(false).unwrap();
    captured(at(OUTSIDE, 22));
    captured(at(PEER6, 22));
    pod.set_published(true).unwrap();
    plain(at(OUTSIDE, 22));

    kernel.clear_capture(Target::NodePort(30080)).unwrap();
    kernel.clear_capture(Target::Port(at(OUTSIDE, 8080))).unwrap();
    plain(at(PEER, 30080));
    plain(at(OUTSIDE, 8080));
    assert!(try_accept(&listener, 100).is_none());
}

#[test]
fn a_pod_talks_to_itself_without_the_agent() {
    let Some(world) = World::new() else { return };
    let (kernel, _pod, listener) = world.published();
    // Even where everything there is would be captured.
    for net in ["0.0.0.0/0", "::/0"] {
        kernel.set_capture(network(net), Verdict::Capture).unwrap();
    }
    world.pod.serve(at("0.0.0.0", 8080), "self");
    world.pod.serve(at("::1", 8081), "self6");
    world.pod.serve(at(POD6, 8082), "self6");
    for (to, text) in [
        (at(POD, 8080), format!("self {POD}")),
        (at("127.0.0.1", 8080), "self 127.0.0.1".into()),
        (at("0.0.0.0", 8080), "self 127.0.0.1".into()),
        (at(&format!("::ffff:{POD}"), 8080), format!("self {POD}")),
        (at("::1", 8081), "self6 ::1".into()),
        (at(POD6, 8082), format!("self6 {POD6}")),
    ] {
        assert_eq!(world.pod.fetch(to).unwrap(), text, "{to}");
    }
    // From loopback to its own address, which looks like traffic from outside.
    let bound = |s: &Socket| s.bind(&at("127.0.0.1", 0).into()).unwrap();
    let app = connect_with(&world, Domain::IPV4, Protocol::TCP, at(POD, 8080), bound).unwrap();
    assert_eq!(read_all(&app), "self 127.0.0.1");
    assert!(try_accept(&listener, 100).is_none());
    assert_eq!(kernel.counters().unwrap().captured, 0);
}

#[test]
fn the_agents_own_socket_passes() {
    let Some(world) = World::new() else { return };
    let (kernel, pod, listener) = world.published();
    world.peer.serve(at(VIP, 80), "peer");
    world.peer.serve(at(PEER6, 80), "peer6");
    for (to, text) in [(at(VIP, 80), format!("peer {POD}")), (at(PEER6, 80), format!("peer6 {POD6}"))] {
        let stream = established(pod.outbound_socket(to)).unwrap();
        assert_eq!(mark(&stream), MARK_AGENT);
        assert!(stream.nodelay().unwrap());
        assert_eq!(read_all(&stream), text);
    }
    let (result, milliseconds) = timed(|| established(pod.outbound_socket(at(PEER, 9))));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(milliseconds < 500);
    assert!(try_accept(&listener, 50).is_none());
    assert_eq!(kernel.counters().unwrap(), Default::default());
}

#[test]
fn a_family_without_an_address_is_refused_not_leaked() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let netns = weft_kernel::Netns::open(&world.pod.path()).unwrap();
    let v4_only = weft_kernel::PodAddresses::from_ips([ip(POD)]);
    let _pod = kernel.enroll(netns, v4_only).unwrap();
    world.peer.serve(at(VIP6, 80), "clear");
    let error = world.pod.fetch(at(VIP6, 80)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENETUNREACH));
    assert_eq!(kernel.counters().unwrap().refused_no_address, 1);
}

#[test]
fn other_namespaces_are_left_alone() {
    let Some(world) = World::new() else { return };
    let (kernel, _pod, _listener) = world.published();
    world.pod.serve(at(POD, 15008), "unreached");
    world.peer.serve(at(VIP, 80), "peer");
    let text = world.peer.fetch(at(VIP, 80)).unwrap();
    assert_eq!(text, format!("peer {VIP}"));
    assert_eq!(kernel.counters().unwrap().captured, 0);
}
