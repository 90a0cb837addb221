//! Agents that come, die, are replaced and leave, on a real kernel.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod testbed;

use aya::maps::{HashMap, MapData};
use std::{
    collections::HashSet,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::Duration,
};
use testbed::{PEER, PEER6, POD, POD6, VIP, VIP6, World, accept, at, ends, ip, network, try_accept};
use weft_kernel::{Error, Kernel, LAYOUT_VERSION, Netns, Options, PodAddresses, Target, Verdict, preflight};

fn dial(world: &World) -> std::io::Result<TcpStream> {
    world.pod.run(|| {
        let stream = TcpStream::connect_timeout(&at(VIP, 80), Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        Ok(stream)
    })
}

#[test]
fn a_dead_agents_pods_are_refused_until_its_successor_takes_them_over() {
    let Some(world) = World::new() else { return };
    let (kernel, pod, listener) = world.published();
    kernel.refuse_source(ip(PEER)).unwrap();
    let port = Target::Port(at(PEER6, 8080));
    let more = [
        (Target::from(ip(PEER)), Verdict::Node),
        (port, Verdict::Capture),
        (Target::NodePort(30080), Verdict::Capture),
    ];
    for (target, verdict) in more {
        kernel.set_capture(target, verdict).unwrap();
    }
    let (cookie, before) = (pod.cookie(), kernel.pods().unwrap());
    assert_eq!(before.len(), 1);
    assert_eq!(
        (before[0].cookie, before[0].addresses, before[0].published),
        (cookie, World::addresses(), true)
    );
    drop((listener, pod, kernel));
    world.peer.serve(at(VIP, 80), "clear");
    assert_eq!(dial(&world).unwrap_err().kind(), ErrorKind::ConnectionRefused);

    let kernel = Kernel::open(world.options.clone()).unwrap();
    assert_eq!(kernel.pods().unwrap(), before, "what the predecessor left is found");
    let mut capture = kernel.capture_entries().unwrap();
    capture.sort();
    let ranges = ["10.77.0.0/24", "10.96.0.0/12", "fd77::/64", "fd96::/64"];
    let ranges = ranges.map(|range| (Target::Network(network(range)), Verdict::Capture));
    let mut expected = [&ranges[..], &more].concat();
    expected.sort();
    assert_eq!(capture, expected);
    assert_eq!(kernel.refused_sources().unwrap(), [ip(PEER)]);
    assert_eq!(dial(&world).unwrap_err().kind(), ErrorKind::ConnectionRefused, "opening alone serves nobody");

    let (pod, listener) = world.enroll(&kernel);
    assert_eq!(
        (pod.cookie(), pod.published().unwrap()),
        (cookie, true),
        "published it was, published it stays"
    );
    let mut app = dial(&world).unwrap();
    accept(&listener).write_all(b"back").unwrap();
    let mut bytes = [0; 4];
    app.read_exact(&mut bytes).unwrap();
    let refused = world.peer.fetch(at(POD, 8080)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "the refuse set is still in force");
    assert_eq!(kernel.pods().unwrap(), before, "the slot is the same");
}

#[test]
fn a_successor_takes_new_connections_while_the_old_agent_serves_its_own() {
    let Some(world) = World::new() else { return };
    let (_old_kernel, _old_pod, old_listener) = world.published();
    let mut open = dial(&world).unwrap();
    let mut old_side = accept(&old_listener);
    let queued = dial(&world).unwrap();

    let kernel = world.open();
    let (_pod, listener) = world.enroll(&kernel);
    let _new = dial(&world).unwrap();
    let new_side = accept(&listener);
    assert_eq!(ends(&new_side).0, at(VIP, 80));
    assert!(try_accept(&listener, 50).is_none());
    // What was queued on the old listener is still accepted there, and what is open still carries bytes.
    let queued_side = accept(&old_listener);
    assert_eq!(ends(&queued_side).1, queued.local_addr().unwrap());
    old_side.write_all(b"old").unwrap();
    let mut bytes = [0; 3];
    open.read_exact(&mut bytes).unwrap();
    // The old listener goes, without taking the slot with it.
    drop(old_listener);
    let _again = dial(&world).unwrap();
    accept(&listener);
    old_side.write_all(b"yet").unwrap();
    open.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"yet");
}

#[test]
fn no_connection_is_refused_or_leaks_while_agents_take_turns() {
    let Some(world) = World::new() else { return };
    let (kernel, pod, listener) = world.published();
    world.peer.serve(at(VIP, 80), "clear");
    let results = world.pod.spawn(|| {
        let mut results = Vec::new();
        for _ in 0..400 {
            results.push(TcpStream::connect_timeout(&at(VIP, 80), Duration::from_secs(3)));
            std::thread::sleep(Duration::from_millis(1));
        }
        results
    });
    let mut agents = vec![(kernel, pod, listener)];
    for _ in 0..4 {
        let kernel = world.open();
        let (pod, listener) = world.enroll(&kernel);
        agents.push((kernel, pod, listener));
    }
    let results = results.join().unwrap();
    let failed: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert!(failed.is_empty(), "{failed:?}");
    let accepted: usize =
        agents.iter().map(|(_, _, listener)| std::iter::from_fn(|| try_accept(listener, 50)).count()).sum();
    assert_eq!(accepted, 400, "every connection is at one of the agents");
}

#[test]
fn leaving_the_mesh_keeps_open_connections() {
    let Some(world) = World::new() else { return };
    let (kernel, pod, listener) = world.published();
    world.peer.serve(at(VIP, 80), "clear");
    world.pod.serve(at("0.0.0.0", 8080), "application");
    let mut open = dial(&world).unwrap();
    let mut agent = accept(&listener);
    pod.stop_capture().unwrap();
    assert_eq!(world.pod.fetch(at(VIP, 80)).unwrap(), format!("clear {POD}"));
    assert_eq!(world.peer.fetch(at(POD, 8080)).unwrap(), format!("application {PEER}"));
    assert!(try_accept(&listener, 50).is_none());
    let mut bytes = [0; 4];
    for _ in 0..3 {
        agent.write_all(b"ping").unwrap();
        open.read_exact(&mut bytes).unwrap();
        open.write_all(b"pong").unwrap();
        agent.read_exact(&mut bytes).unwrap();
    }
    assert!(kernel.pods().unwrap().is_empty());
    assert!(matches!(pod.set_published(true), Err(Error::NotEnrolled(_))));
    pod.stop_capture().expect("twice is no error");

    assert!(world.pod.ip("rule").contains("fwmark 0x111/0xfff lookup 100"));
    pod.remove_routes().unwrap();
    for (family, table) in [("-4", "route show table 100"), ("-6", "-6 route show table 100")] {
        assert!(!world.pod.ip(&format!("{family} rule")).contains("0x111"), "{family}");
        assert_eq!(world.pod.ip(table).trim(), "", "{family}");
    }
    pod.remove_routes().expect("twice is no error");

    // And back in.
    let (_pod, listener) = world.enroll(&kernel);
    let _app = dial(&world).unwrap();
    accept(&listener);
}

#[test]
fn enrolling_sets_up_the_namespace_once() {
    let Some(world) = World::new() else { return };
    world.pod.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "3").unwrap());
    let kernel = world.open();
    let (pod, _listener) = world.enroll(&kernel);
    for (name, value) in [
        ("ipv4/tcp_fwmark_accept", "1"),
        ("ipv4/fwmark_reflect", "1"),
        ("ipv6/fwmark_reflect", "1"),
        // The client's bit is off, the server's is the application's business.
        ("ipv4/tcp_fastopen", "2"),
    ] {
        assert_eq!(world.pod.sysctl(name), value, "{name}");
    }
    let rules = |family: &str| world.pod.ip(&format!("{family} rule show pref 32764")).lines().count();
    let routes = |family: &str| world.pod.ip(&format!("{family} route show table 100"));
    let (_again, _listener) = world.enroll(&kernel);
    assert_eq!((rules("-4"), rules("-6")), (1, 1));
    // By lo, and by the pod's device for sockets that were bound to it too late.
    for (routes, source) in [(routes("-4"), POD), (routes("-6"), POD6)] {
        for device in ["lo", "eth0"] {
            let found: Vec<_> =
                routes.lines().filter(|r| r.starts_with(&format!("local default dev {device} "))).collect();
            assert!(matches!(found[..], [route] if route.contains(&format!("src {source} "))), "{routes}");
        }
    }
    let netns = pod.netns();
    assert!(netns.alive());
    let mut found = netns.addresses().unwrap();
    found.sort();
    assert_eq!(PodAddresses::from_ips(found), World::addresses());
}

#[test]
fn changed_addresses_replace_the_old_ones_and_hold_the_pod() {
    let Some(world) = World::new() else { return };
    let (kernel, _pod, _listener) = world.published();
    // So that the second address stays when the first goes.
    world.pod.run(|| std::fs::write("/proc/sys/net/ipv4/conf/eth0/promote_secondaries", "1").unwrap());
    world.pod.ip("addr add 10.77.0.9/24 dev eth0");
    world.pod.ip("addr del 10.77.0.2/24 dev eth0");
    world.pod.ip("route add default via 10.77.0.1");
    let netns = Netns::open(&world.pod.path()).unwrap();
    let mut pod = kernel.enroll(netns, PodAddresses::from_ips([ip("10.77.0.9")])).unwrap();
    assert!(!pod.published().unwrap());
    let listener = pod.take_listener().unwrap();
    let _app = dial(&world).unwrap();
    assert_eq!(ends(&accept(&listener)).1.ip(), ip("10.77.0.9"));
    assert_eq!(kernel.pods().unwrap()[0].addresses, pod.addresses());
}

#[test]
fn a_failed_enrolment_leaves_the_pod_as_it_was() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    world.peer.serve(at(VIP, 80), "clear");
    let enroll = |ips: &[&str]| {
        let netns = Netns::open(&world.pod.path()).unwrap();
        kernel.enroll(netns, PodAddresses::from_ips(ips.iter().map(|text| ip(text)))).map(drop)
    };
    assert!(matches!(enroll(&["10.77.0.77"]), Err(Error::NotInPod { .. })));
    assert!(matches!(enroll(&[]), Err(Error::PodAddress(_))));
    assert!(matches!(enroll(&["127.0.0.1"]), Err(Error::PodAddress(_))));
    assert!(kernel.pods().unwrap().is_empty());
    assert_eq!(world.pod.fetch(at(VIP, 80)).unwrap(), format!("clear {POD}"));
    assert_eq!(world.pod.ip("rule show pref 32764"), "");
}

#[test]
fn enrolling_and_opening_are_quick() {
    let Some(world) = World::new() else { return };
    let (kernel, opened) = testbed::timed(|| world.open());
    let (_pod, enrolled) = testbed::timed(|| world.enroll(&kernel));
    println!("opened in {opened} ms, enrolled in {enrolled} ms");
    // Generous: a busy machine. A node with 250 pods restarts within seconds.
    assert!(opened < 2000 && enrolled < 1000, "{opened} ms, {enrolled} ms");
}

#[test]
fn pods_that_are_gone_are_swept() {
    let Some(world) = World::new() else { return };
    let (kernel, pod, listener) = world.published();
    let gone = testbed::Space::new(format!("{}-gone", world.pod.name));
    gone.ip("addr add 10.77.9.9/32 dev lo");
    let netns = Netns::open(&gone.path()).unwrap();
    let gone_pod = kernel.enroll(netns, PodAddresses::from_ips([ip("10.77.9.9")])).unwrap();
    let gone_cookie = gone_pod.cookie();
    assert_eq!(kernel.pods().unwrap().len(), 2);
    let keep = HashSet::from([pod.cookie()]);
    assert!(kernel.remove_stale(&keep).unwrap().is_empty(), "a namespace that is still there was let go");
    drop((gone_pod, gone));
    // The kernel takes a moment to end a namespace.
    let swept = (0..100).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        Some(kernel.remove_stale(&keep).unwrap()).filter(|swept| !swept.is_empty())
    });
    assert_eq!(swept.unwrap_or_default(), [gone_cookie]);
    assert_eq!(kernel.pods().unwrap().len(), 1);
    assert!(kernel.remove_stale(&HashSet::from([pod.cookie()])).unwrap().is_empty());
    let _app = dial(&world).unwrap();
    accept(&listener);
}

#[test]
fn what_a_predecessor_enrolled_can_be_released() {
    let Some(world) = World::new() else { return };
    drop(world.published());
    world.peer.serve(at(VIP, 80), "clear");
    let kernel = Kernel::open(world.options.clone()).unwrap();
    kernel.release(&Netns::open(&world.pod.path()).unwrap()).unwrap();
    assert!(kernel.pods().unwrap().is_empty());
    assert_eq!(world.pod.fetch(at(VIP, 80)).unwrap(), format!("clear {POD}"));
    assert_eq!(world.pod.ip("rule show pref 32764"), "");
}

#[test]
fn breaking_the_glass_frees_the_pods_without_an_object() {
    let Some(world) = World::new() else { return };
    drop(world.published());
    world.peer.serve(at(VIP, 80), "clear");
    world.pod.serve(at("0.0.0.0", 8080), "application");
    assert!(world.pod.fetch(at(VIP, 80)).is_err());
    Kernel::break_glass(&world.options).unwrap();
    assert_eq!(world.pod.fetch(at(VIP, 80)).unwrap(), format!("clear {POD}"));
    assert_eq!(world.peer.fetch(at(POD, 8080)).unwrap(), format!("application {PEER}"));
    assert!(!world.bpffs.path().join("weft").join(&world.options.instance).exists());
    Kernel::break_glass(&world.options).expect("twice is no error");
}

#[test]
fn another_layout_is_refused_before_anything_is_touched() {
    let Some(world) = World::new() else { return };
    let instance = world.bpffs.path().join("weft").join(&world.options.instance);
    let next = instance.join(format!("v{}", LAYOUT_VERSION + 1));
    std::fs::create_dir(&next).unwrap();
    assert!(matches!(Kernel::open(world.options.clone()), Err(Error::Layout(path)) if path == next));
    std::fs::remove_dir(&next).unwrap();

    // A map of another shape in our own layout. The one it replaces stays away: nothing was made in its stead.
    let dir = instance.join(format!("v{LAYOUT_VERSION}"));
    let (pods, sources) = (dir.join("PODS"), dir.join("SOURCES"));
    std::fs::remove_file(&pods).unwrap();
    std::fs::remove_file(&sources).unwrap();
    HashMap::<MapData, u64, u64>::create(16, 0).unwrap().pin(&pods).unwrap();
    let error = Kernel::open(world.options.clone()).unwrap_err();
    assert!(matches!(&error, Error::MapShape { path, .. } if *path == pods), "{error}");
    assert!(!sources.exists());
}

#[test]
fn a_directory_that_is_no_bpffs_is_named() {
    let Some(world) = World::new() else { return };
    let elsewhere = tempfile::tempdir().unwrap();
    let options = Options { bpffs: elsewhere.path().to_owned(), ..world.options.clone() };
    assert!(matches!(Kernel::open(options.clone()), Err(Error::NotBpffs(_))));
    let report = preflight::run(&options);
    assert!(!report.ok(), "{report}");
    let report = preflight::run(&world.options);
    assert!(report.ok(), "{report}");
}

#[test]
fn counters_and_capture_work_over_v6_as_well() {
    let Some(world) = World::new() else { return };
    let (kernel, _pod, listener) = world.published();
    let before = kernel.counters().unwrap();
    let _app = world.pod.run(|| TcpStream::connect_timeout(&at(VIP6, 80), Duration::from_secs(3))).unwrap();
    accept(&listener);
    assert_eq!(kernel.counters().unwrap().captured, before.captured + 1);
}

#[test]
fn the_programs_say_what_they_do_when_asked() {
    use std::sync::{Arc, Mutex};
    use tracing::field::{Field, Visit};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<String>>>);
    impl Visit for Lines {
        fn record_debug(&mut self, _: &Field, value: &dyn std::fmt::Debug) {
            self.0.lock().unwrap().push(format!("{value:?}"));
        }
    }
    impl tracing::Subscriber for Lines {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            metadata.target() == "weft_ebpf"
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::Id {
            tracing::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::Id, _: &tracing::Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            event.record(&mut self.clone());
        }
        fn enter(&self, _: &tracing::Id) {}
        fn exit(&self, _: &tracing::Id) {}
    }

    let Some(mut world) = World::new() else { return };
    let lines = Lines::default();
    // Only this test opens an instance with the log, so what is heard is its own.
    tracing::subscriber::set_global_default(lines.clone()).unwrap();
    world.options.debug_log = true;
    let (_kernel, _pod, listener) = world.published();
    let _app = dial(&world).unwrap();
    drop(listener);
    dial(&world).unwrap_err();
    world.peer.fetch(at(POD, 8080)).unwrap_err();
    let expected = [
        format!("captured connection to ::ffff:{VIP}"),
        format!("refused connection to ::ffff:{VIP}, errno 111"),
        format!("refused connection from ::ffff:{PEER}: no agent listens"),
    ];
    for _ in 0..40 {
        if lines.0.lock().unwrap().len() >= expected.len() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(*lines.0.lock().unwrap(), expected);
}
