//! A small world for one test: a bpffs of its own, a pod and a peer in network namespaces joined by a veth pair, and
//! an instance of its own. Everything goes away with the value.
#![allow(dead_code, clippy::unwrap_used, clippy::disallowed_methods)]

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};
use weft_kernel::{Error, Kernel, Netns, Options, Pod, PodAddresses};

pub const POD: &str = "10.77.0.2";
pub const POD6: &str = "fd77::2";
pub const PEER: &str = "10.77.0.1";
pub const PEER6: &str = "fd77::1";
/// In the capture set, and nobody's address.
pub const VIP: &str = "10.96.0.10";
pub const VIP6: &str = "fd96::10";
/// On the peer, outside the capture set.
pub const OUTSIDE: &str = "192.0.2.1";

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn at(host: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(host), port)
}

pub fn network(text: &str) -> ipnet::IpNet {
    text.parse().unwrap()
}

/// A named network namespace, removed when dropped. Names begin with `wt-`.
pub struct Space {
    pub name: String,
}

impl Space {
    pub fn new(name: String) -> Space {
        sh(&format!("ip netns add {name} && ip -n {name} link set lo up"));
        Space { name }
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `f` on a thread of its own inside the namespace.
    pub fn spawn<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let file = File::open(self.path()).unwrap();
        thread::spawn(move || {
            nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            f()
        })
    }

    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(f).join().unwrap()
    }

    pub fn sysctl(&self, name: &str) -> String {
        let path = format!("/proc/sys/net/{name}");
        self.run(move || std::fs::read_to_string(path).unwrap().trim().to_owned())
    }

    pub fn ip(&self, command: &str) -> String {
        output(&format!("ip -n {} {command}", self.name))
    }

    /// A server that answers each connection with `text` and the address it came from, then closes.
    pub fn serve(&self, address: SocketAddr, text: &'static str) {
        let listener = self.run(move || TcpListener::bind(address).unwrap());
        thread::spawn(move || {
            for connection in listener.incoming() {
                let Ok(mut connection) = connection else { return };
                let Ok(peer) = connection.peer_addr() else { continue };
                let _ = write!(
                    connection,
                    "{text} {}",
                    SocketAddr::new(peer.ip().to_canonical(), peer.port()).ip()
                );
            }
        });
    }

    /// Connects and reads to the end.
    pub fn fetch(&self, to: SocketAddr) -> io::Result<String> {
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))?;
            stream.set_read_timeout(Some(Duration::from_secs(3)))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// bpffs in a temporary directory.
pub struct Bpffs(tempfile::TempDir);

impl Bpffs {
    pub fn mount() -> Bpffs {
        let dir = tempfile::tempdir().unwrap();
        sh(&format!("mount -t bpf bpf {}", dir.path().display()));
        Bpffs(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

pub struct World {
    pub options: Options,
    pub pod: Space,
    pub peer: Space,
    // Last, so that links go after the namespaces.
    pub bpffs: Bpffs,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl World {
    /// `None`, with the reason printed, where the kernel cannot be used.
    pub fn new() -> Option<World> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let bpffs = Bpffs::mount();
        let options = Options {
            instance: format!("wt-{id}"),
            bpffs: bpffs.path().to_owned(),
            // To try a changed or deliberately broken object without building everything again.
            object: std::env::var_os("WEFT_TEST_EBPF_OBJECT").map(PathBuf::from),
            ..Options::default()
        };
        match Kernel::open(options.clone()) {
            Err(Error::NoObject) => {
                eprintln!("skipped: {}", Error::NoObject);
                return None;
            }
            result => drop(result.unwrap()),
        }
        let (pod, peer) = (Space::new(format!("wt-pod-{id}")), Space::new(format!("wt-peer-{id}")));
        let (a, b) = (&pod.name, &peer.name);
        sh(&format!(
            "ip -n {a} link add eth0 type veth peer name eth0 netns {b}
             ip -n {a} addr add {POD}/24 dev eth0
             ip -n {b} addr add {PEER}/24 dev eth0
             ip -n {b} addr add {OUTSIDE}/32 dev lo
             ip -n {b} addr add {VIP}/32 dev lo
             ip -n {a} addr add {POD6}/64 dev eth0 nodad
             ip -n {b} addr add {PEER6}/64 dev eth0 nodad
             ip -n {b} addr add {VIP6}/128 dev lo nodad
             ip -n {a} link set eth0 up
             ip -n {b} link set eth0 up
             ip -n {a} route add default via {PEER}
             ip -n {a} -6 route add default via {PEER6}
             ip netns exec {a} sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1 net.ipv4.conf.lo.rp_filter=1"
        ));
        Some(World { options, pod, peer, bpffs })
    }

    pub fn open(&self) -> Kernel {
        let kernel = Kernel::open(self.options.clone()).unwrap();
        for net in ["10.77.0.0/24", "10.96.0.0/12", "fd77::/64", "fd96::/64"] {
            kernel.set_capture(network(net), weft_kernel::Verdict::Capture).unwrap();
        }
        kernel
    }

    pub fn addresses() -> PodAddresses {
        PodAddresses::from_ips([ip(POD), ip(POD6)])
    }

    pub fn enroll(&self, kernel: &Kernel) -> (Pod, TcpListener) {
        let netns = Netns::open(&self.pod.path()).unwrap();
        let mut pod = kernel.enroll(netns, World::addresses()).unwrap();
        let listener = pod.take_listener().unwrap();
        // As the hooks hand them over: blocking is simpler here.
        listener.set_nonblocking(false).unwrap();
        (pod, listener)
    }

    /// An open instance with the pod enrolled and published.
    pub fn published(&self) -> (Kernel, Pod, TcpListener) {
        let kernel = self.open();
        let (pod, listener) = self.enroll(&kernel);
        pod.set_published(true).unwrap();
        (kernel, pod, listener)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = Kernel::break_glass(&self.options);
    }
}

/// Both ends of an accepted connection, canonical: (dialled, caller).
pub fn ends(stream: &TcpStream) -> (SocketAddr, SocketAddr) {
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    (canonical(stream.local_addr().unwrap()), canonical(stream.peer_addr().unwrap()))
}

/// Accepts with a deadline, so that a test which loses its connection fails instead of hanging.
pub fn accept(listener: &TcpListener) -> TcpStream {
    try_accept(listener, 3000).expect("the agent's listener got no connection")
}

pub fn try_accept(listener: &TcpListener, milliseconds: i32) -> Option<TcpStream> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let count = poll(&mut ready, PollTimeout::try_from(milliseconds).unwrap()).unwrap();
    let (stream, _) = (count > 0).then(|| listener.accept().unwrap())?;
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    Some(stream)
}

/// Waits until a connection that was started is there, as its relay would.
pub fn established(stream: io::Result<TcpStream>) -> io::Result<TcpStream> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let stream = stream?;
    let mut ready = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut ready, PollTimeout::from(3000u16)).unwrap() == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    Ok(stream)
}

/// The SO_MARK of a socket.
pub fn mark(socket: &impl AsFd) -> u32 {
    nix::sys::socket::getsockopt(&socket.as_fd(), nix::sys::socket::sockopt::Mark).unwrap()
}

pub fn read_all(mut stream: &TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Runs `f` and says how long it took, in milliseconds.
pub fn timed<T>(f: impl FnOnce() -> T) -> (T, u128) {
    let start = std::time::Instant::now();
    (f(), start.elapsed().as_millis())
}

fn sh(script: &str) {
    let status = Command::new("sh").args(["-ec", script]).status().unwrap();
    assert!(status.success(), "failed: {script}");
}

pub fn output(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}
