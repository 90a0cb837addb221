//! Whose connections go straight to the application, on a real kernel: the kubelet's, and nobody's who looks like it.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod testbed;

use aya::maps::{HashMap, Map, MapData};
use nix::sys::socket::{SockaddrStorage, connect};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use testbed::{Cgroup, PEER, PEER6, POD, POD6, World, at, ends, flags, ip, read_all, try_accept};
use weft_ebpf_common::{MAX_PROBES, ProbeKey};
use weft_kernel::{Kernel, Kubelet, LAYOUT_VERSION, Options, Pod, TUNNEL_PORT, kubelet};

const PORT: u16 = 8080;
/// Where no application listens.
const CLOSED: u16 = 9;
/// Where nobody is, so that a connection is neither established nor refused.
const ABSENT: &str = "10.77.0.99";
const NOBODY: u32 = 65534;

/// A pod whose application greets at `PORT`, and a cgroup that is the kubelet's.
struct Scene {
    cgroup: Cgroup,
    kernel: Kernel,
    pod: Pod,
    listener: TcpListener,
    world: World,
    _alone: MutexGuard<'static, ()>,
}

/// A process that is being started has the sockets of all tests for a while, and then they do not end when they should.
static ALONE: Mutex<()> = Mutex::new(());

/// Who calls connect().
#[derive(Clone, Copy)]
enum Who<'a> {
    /// Root's process in this cgroup.
    In(&'a Cgroup),
    /// Nobody's in this cgroup.
    UnprivilegedIn(&'a Cgroup),
    /// Another process of root's.
    Another,
}

impl Scene {
    fn new() -> Option<Scene> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let world = World::new()?;
        let (kernel, pod, listener) = world.published();
        world.pod.serve(at("0.0.0.0", PORT), "application");
        world.pod.serve(at(POD6, PORT), "application");
        let cgroup = Cgroup::new();
        kernel.recognise_kubelet(Some(&kubelet_in(&world, &cgroup))).unwrap();
        Some(Scene { cgroup, kernel, pod, listener, world, _alone: alone })
    }

    /// A socket of the node's that is bound to that port, or to any for zero.
    fn socket(&self, to: SocketAddr, port: u16) -> Socket {
        self.world.peer.run(move || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).unwrap();
            // As somebody would who wants the port of another.
            socket.set_reuse_address(true).unwrap();
            socket.bind(&source(to, port).into()).unwrap();
            socket
        })
    }

    /// Whether it is the application that answers; else it must be the agent, which sees who called.
    fn reaches_application(&self, who: Who<'_>, socket: &Socket, to: SocketAddr) -> bool {
        dial(who, socket, to).unwrap_or_else(|error| panic!("{to}: {error}"));
        if let Some(agent) = try_accept(&self.listener, 100) {
            let own = canonical(source(to, port_of(socket)));
            assert_eq!(ends(&agent), (canonical(to), own));
            return false;
        }
        let stream = TcpStream::from(socket.try_clone().unwrap());
        stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        assert_eq!(read_all(&stream), format!("application {}", source(to, 0).ip().to_canonical()));
        true
    }

    /// As above, with a socket that is gone afterwards.
    fn passes(&self, who: Who<'_>, to: SocketAddr) -> bool {
        self.reaches_application(who, &self.socket(to, 0), to)
    }

    /// A process of root's that uses that source port now must be the agent's.
    fn impostor_is_the_agents(&self, what: &str, to: SocketAddr, port: u16) {
        assert_eq!(self.recorded(), 0, "{what}: still recorded");
        assert!(!self.reaches_application(Who::Another, &self.socket(to, port), to), "{what}: let in");
    }

    fn probes(&self) -> HashMap<MapData, ProbeKey, u32> {
        let instance = self.world.bpffs.path().join("weft").join(&self.world.options.instance);
        let pin = instance.join(format!("v{LAYOUT_VERSION}/PROBES"));
        HashMap::try_from(Map::HashMap(MapData::from_pin(pin).unwrap())).unwrap()
    }

    fn recorded(&self) -> usize {
        self.probes().keys().count()
    }
}

fn kubelet_in(world: &World, cgroup: &Cgroup) -> Kubelet {
    let options = Options { kubelet_cgroup: Some(cgroup.name().into()), ..world.options.clone() };
    kubelet::find(&options, None).unwrap()
}

/// The node's address of that family.
fn source(to: SocketAddr, port: u16) -> SocketAddr {
    match to {
        SocketAddr::V4(_) => at(PEER, port),
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => at(&format!("::ffff:{PEER}"), port),
        SocketAddr::V6(_) => at(PEER6, port),
    }
}

fn mapped(host: &str, port: u16) -> SocketAddr {
    at(&format!("::ffff:{host}"), port)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn port_of(socket: &Socket) -> u16 {
    socket.local_addr().unwrap().as_socket().unwrap().port()
}

/// A process that calls connect() and does nothing else: the kernel asks whose that process is, not whose the socket.
fn dialling(who: Who<'_>, socket: &Socket, to: SocketAddr, program: &[&str]) -> Command {
    let (cgroup, user) = match who {
        Who::In(cgroup) => (Some(cgroup), 0),
        Who::UnprivilegedIn(cgroup) => (Some(cgroup), NOBODY),
        Who::Another => (None, 0),
    };
    let (procs, fd, to) = (cgroup.map(Cgroup::procs), socket.as_raw_fd(), SockaddrStorage::from(to));
    let begin = move || {
        if let Some(procs) = &procs {
            // SAFETY: the path ends with a zero.
            let fd = unsafe { libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: a new descriptor, which nobody else has.
            nix::unistd::write(unsafe { OwnedFd::from_raw_fd(fd) }, b"0")?;
        }
        if user != 0 {
            nix::unistd::setuid(user.into())?;
        }
        match connect(fd, &to) {
            Err(nix::errno::Errno::EINPROGRESS) => Ok(()),
            result => Ok(result?),
        }
    };
    let mut command = Command::new(program[0]);
    command.args(&program[1..]);
    // SAFETY: system calls only, no allocation, no lock.
    unsafe { command.pre_exec(begin) };
    command
}

fn dial(who: Who<'_>, socket: &Socket, to: SocketAddr) -> io::Result<()> {
    dialling(who, socket, to, &["true"]).status().map(drop)
}

#[test]
fn the_kubelets_connections_reach_the_application_and_nobody_elses() {
    let Some(scene) = Scene::new() else { return };
    let kubelet = Who::In(&scene.cgroup);
    let mut passed = 0;
    for to in [at(POD, PORT), at(POD6, PORT), mapped(POD, PORT)] {
        for _ in 0..5 {
            assert!(scene.passes(kubelet, to), "{to}: the kubelet's connection went to the agent");
            passed += 1;
            assert_eq!(scene.recorded(), 0, "{to}: recorded longer than needed");
        }
        // The same node, the same address, the same socket even.
        assert!(!scene.passes(Who::Another, to), "{to}: another process was let in");
        assert!(!scene.passes(Who::UnprivilegedIn(&scene.cgroup), to), "{to}: it is not root's");
        let below = scene.cgroup.below("child");
        assert!(!scene.passes(Who::In(&below), to), "{to}: it is in a cgroup below the kubelet's");
    }
    let counters = scene.kernel.counters().unwrap();
    assert_eq!((counters.probes, counters.probes_unrecorded), (passed, 0));
    // A closed port is refused by the pod's own kernel, and not by way of the agent.
    let refused = dial(kubelet, &scene.socket(at(POD, CLOSED), 0), at(POD, CLOSED)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert!(try_accept(&scene.listener, 100).is_none());
    // Tunnels are the agent's, whoever comes.
    assert!(!scene.passes(kubelet, at(POD, TUNNEL_PORT)), "the tunnel's port");
    // A pod that is not published yet is probed like any other, and so is one whose node's plaintext is refused.
    scene.pod.set_published(false).unwrap();
    assert!(scene.passes(kubelet, at(POD, PORT)), "on hold");
    scene.pod.set_published(true).unwrap();
    scene.kernel.refuse_source(ip(PEER)).unwrap();
    assert!(scene.passes(kubelet, at(POD, PORT)), "the node's address claimed by a pod");
    // And without an agent.
    drop(scene.listener);
    assert!(dial(kubelet, &scene.world.peer.run(tcp), at(POD, PORT)).is_ok(), "no agent");
}

fn tcp() -> Socket {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap()
}

/// However the kubelet's connection ends, whoever has its port next is not the kubelet.
#[test]
fn the_kubelets_port_is_worth_nothing_after_it() {
    let Some(scene) = Scene::new() else { return };
    let kubelet = Who::In(&scene.cgroup);
    for to in [at(POD, PORT), at(POD6, PORT), mapped(POD, PORT)] {
        let port = |socket: Socket| {
            let port = port_of(&socket);
            drop(socket);
            port
        };
        let socket = scene.socket(to, 0);
        assert!(scene.reaches_application(kubelet, &socket, to));
        assert_eq!(scene.recorded(), 0, "recorded longer than it takes");
        scene.impostor_is_the_agents("closed in order", to, port(socket));

        let socket = scene.socket(to, 0);
        dial(kubelet, &socket, to).unwrap();
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        scene.impostor_is_the_agents("reset by the kubelet", to, port(socket));

        // Not closed yet: the port is free for whoever shares it.
        let closed = SocketAddr::new(to.ip(), CLOSED);
        let socket = scene.socket(closed, 0);
        assert_eq!(dial(kubelet, &socket, closed).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        scene.impostor_is_the_agents("refused", closed, port_of(&socket));
        // The same socket in other hands.
        assert!(
            !scene.reaches_application(Who::Another, &socket, closed),
            "the kubelet's socket, not the kubelet"
        );
    }
}

/// A connection that is not to be ends with its socket, and with the process that has the socket.
#[test]
fn a_connection_that_was_not_established_is_forgotten() {
    let Some(scene) = Scene::new() else { return };
    let nowhere = at(ABSENT, PORT);
    let socket = scene.socket(nowhere, 0);
    socket.set_nonblocking(true).unwrap();
    dial(Who::In(&scene.cgroup), &socket, nowhere).unwrap();
    assert_eq!(scene.recorded(), 1, "under way");
    drop(socket);
    assert_eq!(scene.recorded(), 0, "closed while under way");

    let socket = scene.socket(nowhere, 0);
    socket.set_nonblocking(true).unwrap();
    socket.set_cloexec(false).unwrap();
    let mut holder = dialling(Who::In(&scene.cgroup), &socket, nowhere, &["sleep", "60"]).spawn().unwrap();
    drop(socket);
    assert_eq!(scene.recorded(), 1, "held by another process");
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(scene.recorded(), 0, "killed");

    // Nobody answers for the neighbour's link-layer address: the kernel gives up.
    let socket = scene.socket(nowhere, 0);
    dial(Who::In(&scene.cgroup), &socket, nowhere).unwrap_err();
    assert_eq!(scene.recorded(), 0, "given up, and not closed");
}

/// Should another program on the node have turned off what we hear of a socket's end by.
#[test]
fn notifications_that_another_program_turned_off_are_not_missed() {
    let Some(scene) = Scene::new() else { return };
    let (kubelet, to, closed) = (Who::In(&scene.cgroup), at(POD, PORT), at(POD, CLOSED));
    let cookie = weft_kernel::Netns::open(&scene.world.peer.path()).unwrap().cookie();
    let _other = flags::turn_off(cookie, scene.cgroup.root());
    let socket = scene.socket(to, 0);
    assert!(scene.reaches_application(kubelet, &socket, to));
    assert_eq!(scene.recorded(), 0, "established");
    let socket = scene.socket(closed, 0);
    dial(kubelet, &socket, closed).unwrap_err();
    assert_eq!(scene.recorded(), 1, "the other program changes nothing, so this shows nothing");
    drop(socket);
    assert_eq!(scene.recorded(), 0, "closed");
}

#[test]
fn what_cannot_be_recorded_goes_to_the_agent() {
    let Some(scene) = Scene::new() else { return };
    let kubelet = Who::In(&scene.cgroup);
    let mut probes = scene.probes();
    let other = |n: u32| ProbeKey::new(ip(PEER6).into(), (n >> 16) as u16, ip(PEER6).into(), n as u16);
    for n in 1..=MAX_PROBES {
        probes.insert(other(n), 1, 0).unwrap();
    }
    assert!(!scene.passes(kubelet, at(POD, PORT)), "with a full map");
    let counters = scene.kernel.counters().unwrap();
    assert_eq!((counters.probes, counters.probes_unrecorded), (0, 1));
    probes.remove(&other(1)).unwrap();
    assert!(scene.passes(kubelet, at(POD, PORT)), "with room for one");
    assert_eq!(scene.recorded(), MAX_PROBES as usize - 1, "somebody else's entry was taken");
}

#[test]
fn a_kubelet_that_restarts_is_another_cgroup() {
    let Some(mut scene) = Scene::new() else { return };
    let to = at(POD, PORT);
    let before = kubelet_in(&scene.world, &scene.cgroup);
    assert!(scene.passes(Who::In(&scene.cgroup), to));
    // Under the same name.
    scene.cgroup.renew();
    assert!(!scene.passes(Who::In(&scene.cgroup), to), "a cgroup that has its name");
    let after = kubelet_in(&scene.world, &scene.cgroup);
    assert_eq!(after.cgroup(), before.cgroup());
    assert_ne!(after.cgroup_id(), before.cgroup_id());
    scene.kernel.recognise_kubelet(Some(&after)).unwrap();
    assert!(scene.passes(Who::In(&scene.cgroup), to), "restarted");
    // A successor of the agent goes on with it until it has looked for itself.
    let kernel = scene.world.open();
    assert!(scene.passes(Who::In(&scene.cgroup), to), "another agent");
    kernel.recognise_kubelet(None).unwrap();
    assert!(!scene.passes(Who::In(&scene.cgroup), to), "no kubelet");
}
