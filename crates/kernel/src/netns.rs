//! A pod's network namespace: checked once, entered only for moments.

use crate::{Error, sys};
use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    sys::{stat, statfs},
};
use std::{
    cell::{Cell, OnceCell},
    fs::{File, OpenOptions},
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

/// An open network namespace of a pod. Clones share it; it stays alive, though perhaps without processes or devices,
/// while one of them does.
#[derive(Clone, Debug)]
pub struct Netns(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    path: PathBuf,
    inode: u64,
    cookie: u64,
}

thread_local! {
    /// Where this thread goes back to; opened when it first leaves.
    static HOME: OnceCell<File> = const { OnceCell::new() };
    static AWAY: Cell<bool> = const { Cell::new(false) };
}

impl Netns {
    /// Opens what `path` names. Refuses what is no network namespace, and the agent's own and the host's: enrolling
    /// one of those would capture the node.
    pub fn open(path: &Path) -> Result<Netns, Error> {
        let file = OpenOptions::new()
            .read(true)
            // A path from outside could name a FIFO or a terminal.
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(path)
            .map_err(Error::io(format!("the network namespace {} could not be opened", path.display())))?;
        let is_namespace = statfs::fstatfs(&file).is_ok_and(|s| s.filesystem_type() == statfs::NSFS_MAGIC)
            && sys::namespace_kind(file.as_fd()).is_ok_and(|kind| kind == libc::CLONE_NEWNET);
        if !is_namespace {
            return Err(Error::NotNetns(path.to_owned()));
        }
        let stat = stat::fstat(&file).map_err(io::Error::from).map_err(Error::io("fstat of a namespace"))?;
        for forbidden in ["/proc/self/ns/net", "/proc/thread-self/ns/net", "/proc/1/ns/net"] {
            // Without sight of process 1 there is no comparing with the host's; ours is always there.
            if std::fs::metadata(forbidden)
                .is_ok_and(|own| (own.dev(), own.ino()) == (stat.st_dev, stat.st_ino))
            {
                return Err(Error::OwnNetns(path.to_owned()));
            }
        }
        let mut inner = Inner { file, path: path.to_owned(), inode: stat.st_ino, cookie: 0 };
        inner.cookie = inner
            .run(|| {
                std::net::UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| std::net::UdpSocket::bind(("::", 0)))
            })?
            .and_then(|socket| sys::netns_cookie(&socket))
            .map_err(Error::io(format!("the cookie of {} could not be read", path.display())))?;
        Ok(Netns(Arc::new(inner)))
    }

    /// What the kernel calls this namespace: unique until the next boot, never zero.
    pub fn cookie(&self) -> u64 {
        self.0.cookie
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether the path still leads to this namespace. When the pod is gone it does not, or to another one.
    pub fn alive(&self) -> bool {
        std::fs::metadata(&self.0.path).is_ok_and(|found| found.ino() == self.0.inode)
    }

    /// The addresses that others could reach the pod by: neither loopback nor link-local.
    pub fn addresses(&self) -> Result<Vec<IpAddr>, Error> {
        let interfaces = self
            .run(|| nix::ifaddrs::getifaddrs().map(Iterator::collect::<Vec<_>>))?
            .map_err(io::Error::from)
            .map_err(Error::io(format!("the addresses in {} could not be listed", self.0.path.display())))?;
        let ip = |interface: nix::ifaddrs::InterfaceAddress| -> Option<IpAddr> {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        };
        Ok(interfaces.into_iter().filter_map(ip).filter(|ip| is_reachable(*ip)).collect())
    }

    /// Runs `f` on this thread inside the namespace. `f` must not block, await or start a thread: whatever this
    /// thread does meanwhile happens in the pod. Ends the process if the thread cannot get back out, since all that
    /// the agent does would happen in there from then on.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> Result<T, Error> {
        self.0.run(f)
    }

    /// Puts this thread into the namespace for the rest of its life.
    pub(crate) fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.0.file, CloneFlags::CLONE_NEWNET)?)
    }

    /// What `/proc/PID/ns/net` of its processes says.
    pub fn inode(&self) -> u64 {
        self.0.inode
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl Inner {
    fn run<T>(&self, f: impl FnOnce() -> T) -> Result<T, Error> {
        HOME.with(|home| {
            if AWAY.get() {
                return Err(Error::Nested);
            }
            if home.get().is_none() {
                let own = File::open("/proc/thread-self/ns/net")
                    .map_err(Error::io("the agent's own network namespace could not be opened"))?;
                let _ = home.set(own);
            }
            let home = home.get().expect("set above, on this thread");
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .map_err(Error::io(format!("{} could not be entered", self.path.display())))?;
            let way_back = WayBack(home);
            AWAY.set(true);
            let result = f();
            drop(way_back);
            Ok(result)
        })
    }
}

/// Goes back when dropped, also when the closure panics.
struct WayBack<'a>(&'a File);

impl Drop for WayBack<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            eprintln!("the agent cannot leave a pod's network namespace and ends: {error}");
            std::process::abort();
        }
        AWAY.set(false);
    }
}

fn is_reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !(ip.is_loopback() || ip.is_link_local() || ip.is_unspecified()),
        IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_no_pods_namespace() {
        assert!(matches!(Netns::open(Path::new("/proc/self/ns/net")), Err(Error::OwnNetns(_))));
        assert!(matches!(Netns::open(Path::new("/proc/self/ns/mnt")), Err(Error::NotNetns(_))));
        assert!(matches!(Netns::open(Path::new("/proc/self/stat")), Err(Error::NotNetns(_))));
        assert!(matches!(Netns::open(Path::new("/no/such/path")), Err(Error::Io { .. })));
    }
}
