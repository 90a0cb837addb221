//! What is kept of the address that an application dialled, on a real kernel. That it counts beside another program that
//! rewrites addresses is shown by the scenario `socket_load_balancing`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod testbed;

use socket2::{Domain, Socket, Type};
use std::{
    net::SocketAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};
use testbed::{PEER, VIP, World, accept, at, ends, output};
use weft_kernel::{Kernel, LAYOUT_VERSION};

/// A cgroup of this test's, with this process in it until the value is dropped: a socket belongs to the cgroup of the
/// process that makes it.
struct Cgroup {
    path: PathBuf,
    before: PathBuf,
}

impl Cgroup {
    fn enter() -> Cgroup {
        let root = PathBuf::from(output("findmnt -n -o TARGET -t cgroup2 | head -1").trim());
        let own = output("sed -n 's/^0:://p' /proc/self/cgroup");
        let before = root.join(own.trim().trim_start_matches('/'));
        let path = before.join(format!("weft-test-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        move_to(&path);
        Cgroup { path, before }
    }

    /// How many programs are attached to it.
    fn programs(&self) -> usize {
        output(&format!("bpftool cgroup show {}", self.path.display())).matches("save").count()
    }

    fn wait_for_programs(&self, count: usize) {
        for _ in 0..300 {
            if self.programs() == count {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{} programs instead of {count}", self.programs());
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        move_to(&self.before);
        let _ = std::fs::remove_dir(&self.path);
    }
}

fn move_to(cgroup: &Path) {
    std::fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
}

fn connect(world: &World, socket: &Socket, to: SocketAddr) {
    let socket = socket.try_clone().unwrap();
    world.pod.run(move || socket.connect_timeout(&to.into(), Duration::from_secs(3))).unwrap();
}

/// connect(AF_UNSPEC)
fn dissolve(socket: &Socket) {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: the address outlives the call and its size is given.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, size_of_val(&nowhere) as u32) };
    assert_eq!(done, 0);
}

/// One test, since a process is in one cgroup.
#[test]
fn what_was_dialled_counts_for_one_call() {
    let Some(mut world) = World::new() else { return };
    let cgroup = Cgroup::enter();
    world.options.pods_cgroup = Some(cgroup.path.clone());
    let (_kernel, _pod, listener) = world.published();
    assert_eq!(cgroup.programs(), 2, "one for each family");

    let socket = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    connect(&world, &socket, at(VIP, 80));
    assert_eq!(ends(&accept(&listener)).0, at(VIP, 80));
    dissolve(&socket);
    // Were it still attached, it would save the second destination, and the first would be gone anyway.
    for name in ["save4", "save6"] {
        let instance = world.bpffs.path().join("weft").join(&world.options.instance);
        std::fs::remove_file(instance.join(format!("v{LAYOUT_VERSION}")).join(name)).unwrap();
    }
    cgroup.wait_for_programs(0);
    connect(&world, &socket, at(PEER, 90));
    assert_eq!(ends(&accept(&listener)).0, at(PEER, 90), "the destination of an earlier call was used");

    // A successor attaches it again, and its end detaches it.
    let kernel = world.open();
    assert_eq!(cgroup.programs(), 2);
    drop(kernel);
    Kernel::break_glass(&world.options).unwrap();
    assert_eq!(cgroup.programs(), 0, "freed, the pods' sockets still have a hook");
}
