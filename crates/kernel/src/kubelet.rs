//! Who the kubelet is. Connections of the cgroup that this finds pass policy (`ebpf/src/probe.rs`), so where anything is in
//! doubt there is no kubelet, and its probes go to the agent as anybody's connections do.
//!
//! Unless a setting names the cgroup, the kubelet is a process
//! * that has a kubelet's name,
//! * that root runs, in all four of its user ids,
//! * in the PID, mount and user namespaces of process 1, which is the node's (a container has a mount namespace of its own;
//!   the kubelet cannot have, or no pod would see the volumes that it mounts),
//! * outside every pod's cgroup, in whatever hierarchy.
//!
//! A name can be had by anybody, but whoever has the rest is root on the node, and needs no name to do as he likes. Its cgroup in cgroup2
//! is what the kernel compares. That counts only if it is not the root, which is where a host that leaves cgroup2 aside for
//! cgroup v1 has everybody, and if every process in it is in the node's mount namespace: with cgroup v1 containers may be
//! in the cgroup2 cgroup of whoever started them, the agent's own among them. The kernel asks for that cgroup itself, not
//! for those below it, and for root's processes alone.
//!
//! Ids of cgroups are never given twice, so an old one lets nobody in. When the kubelet restarts its service manager makes a
//! new cgroup: the agent looks every second, at one process where nothing has changed.

use crate::{Options, locate};
use nix::sched::{CloneFlags, setns};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
};

/// Names of processes that are a kubelet, or have one in them: MicroK8s, k3s. See proc_pid_comm(5).
const NAMES: [&str; 4] = ["kubelet", "kubelite", "k3s-server", "k3s-agent"];
/// The node's first process, in a container that shares the node's PID namespace.
const INIT: &str = "/proc/1";

/// Whose connections are let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubelet {
    /// `None` where a setting names the cgroup.
    process: Option<PathBuf>,
    cgroup: PathBuf,
    cgroup_id: u64,
}

impl Kubelet {
    /// Its cgroup, as the node's `/proc/PID/cgroup` has it.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The cgroup's id.
    pub fn cgroup_id(&self) -> u64 {
        self.cgroup_id
    }
}

/// Why nobody's connections are.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unrecognised {
    #[error("no kubelet runs on this node")]
    NotFound,
    #[error("the kubelet (process {0}) has no cgroup of its own: it is in cgroup2's root")]
    InRoot(String),
    #[error("the kubelet's cgroup {} has processes of containers in it ({process})", cgroup.display())]
    Shared { cgroup: PathBuf, process: String },
    #[error("{} is no cgroup2 cgroup below the root", .0.display())]
    NoCgroup(PathBuf),
    #[error("the node's processes cannot be looked at: {0}")]
    Unreadable(String),
}

impl Unrecognised {
    fn unreadable(error: impl ToString) -> Unrecognised {
        Unrecognised::Unreadable(error.to_string())
    }
}

/// Looks for the kubelet; at `last`, and among all processes only if that is not it any more.
pub fn find(options: &Options, last: Option<&Kubelet>) -> Result<Kubelet, Unrecognised> {
    let root = options.cgroup().map_err(Unrecognised::unreadable)?;
    if let Some(chosen) = &options.kubelet_cgroup {
        return at(&root, chosen, None);
    }
    // A process's cgroup is written as its reader's cgroup namespace shows it: from that of process 1 paths begin at
    // `root`. On a thread of its own, because it never comes back from there.
    let search = || {
        let namespace = File::open(Path::new(INIT).join("ns/cgroup")).map_err(Unrecognised::unreadable)?;
        setns(namespace, CloneFlags::CLONE_NEWCGROUP).map_err(Unrecognised::unreadable)?;
        search(&root, last.and_then(|kubelet| kubelet.process.as_deref()))
    };
    thread::scope(|scope| scope.spawn(search).join())
        .unwrap_or_else(|_| Err(Unrecognised::unreadable("the search ended early")))
}

fn search(root: &Path, last: Option<&Path>) -> Result<Kubelet, Unrecognised> {
    let node = Namespaces::of(Path::new(INIT)).map_err(Unrecognised::unreadable)?;
    let candidates = last.map(Path::to_owned).into_iter().chain(locate::processes());
    let Some((process, cgroup)) = candidates.into_iter().find_map(|process| {
        let cgroup = cgroup_of_kubelet(&process, &node)?;
        Some((process, cgroup))
    }) else {
        return Err(Unrecognised::NotFound);
    };
    if cgroup == Path::new("/") {
        return Err(Unrecognised::InRoot(number(&process)));
    }
    let kubelet = at(root, &cgroup, Some(process))?;
    match stranger(&below(root, &cgroup), &node) {
        Ok(None) => Ok(kubelet),
        Ok(Some(process)) => Err(Unrecognised::Shared { cgroup, process }),
        Err(error) => Err(Unrecognised::unreadable(error)),
    }
}

/// The cgroup at a path as the node's `/proc/PID/cgroup` writes it.
fn at(root: &Path, cgroup: &Path, process: Option<PathBuf>) -> Result<Kubelet, Unrecognised> {
    let no_cgroup = || Unrecognised::NoCgroup(cgroup.to_owned());
    let directory = below(root, cgroup);
    // An inode's number is a cgroup's id in cgroup2 alone.
    let kind = nix::sys::statfs::statfs(&directory).map_err(|_| no_cgroup())?.filesystem_type();
    let id = |path: &Path| fs::metadata(path).map(|directory| directory.ino()).map_err(|_| no_cgroup());
    let cgroup_id = id(&directory)?;
    if kind != nix::sys::statfs::CGROUP2_SUPER_MAGIC || cgroup_id == id(root)? {
        return Err(no_cgroup());
    }
    Ok(Kubelet { process, cgroup: cgroup.to_owned(), cgroup_id })
}

fn below(root: &Path, cgroup: &Path) -> PathBuf {
    root.join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

/// The namespaces that a process of the node itself has.
#[derive(PartialEq, Eq)]
struct Namespaces([u64; 3]);

impl Namespaces {
    fn of(process: &Path) -> io::Result<Namespaces> {
        let inode = |name: &str| Ok::<_, io::Error>(fs::metadata(process.join("ns").join(name))?.ino());
        Ok(Namespaces([inode("mnt")?, inode("pid")?, inode("user")?]))
    }

    fn mount(&self) -> u64 {
        self.0[0]
    }
}

/// The cgroup2 cgroup of a process, if that is a kubelet. One that ends meanwhile is none.
fn cgroup_of_kubelet(process: &Path, node: &Namespaces) -> Option<PathBuf> {
    let name = fs::read_to_string(process.join("comm")).ok()?;
    if !NAMES.contains(&name.trim_end()) || !is_roots(&fs::read_to_string(process.join("status")).ok()?) {
        return None;
    }
    if Namespaces::of(process).ok()? != *node {
        return None;
    }
    cgroup2_outside_pods(&fs::read_to_string(process.join("cgroup")).ok()?)
}

/// Whether a process is root's by all its user ids; see proc_pid_status(5).
fn is_roots(status: &str) -> bool {
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.is_some_and(|uids| uids.split_whitespace().eq(["0"; 4]))
}

/// The cgroup2 line of a `/proc/PID/cgroup`, unless that process is a pod's.
fn cgroup2_outside_pods(cgroups: &str) -> Option<PathBuf> {
    if locate::pod_uid(cgroups).is_some() {
        return None;
    }
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    // Above what is seen from here, or removed.
    let unfit = path.ends_with(" (deleted)") || path.split('/').any(|part| part == "..");
    (!unfit).then(|| path.into())
}

/// A process in the cgroup that is not in the node's mount namespace, if there is one.
fn stranger(cgroup: &Path, node: &Namespaces) -> io::Result<Option<String>> {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    for process in processes.lines() {
        // Zero is one of another PID namespace.
        match fs::metadata(Path::new("/proc").join(process).join("ns/mnt")) {
            Ok(namespace) if namespace.ino() == node.mount() => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && process != "0" => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Ok(_) | Err(_) => return Ok(Some(format!("process {process}"))),
        }
    }
    Ok(None)
}

fn number(process: &Path) -> String {
    process.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_roots_process_is_the_kubelet() {
        for (uids, expected) in [
            ("Name:\tkubelet\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n", true),
            ("Uid:\t1000\t0\t0\t0\n", false),
            ("Uid:\t0\t0\t0\t1000\n", false),
            ("Uid:\t0\t0\t0\n", false),
            ("Gid:\t0\t0\t0\t0\n", false),
        ] {
            assert_eq!(is_roots(uids), expected, "{uids:?}");
        }
    }

    #[test]
    fn a_pods_process_has_no_cgroup_that_counts() {
        let uid = "0f6ba4ce-7b2b-4cbb-a1ef-0b3f2a1f8f3e";
        for (cgroups, expected) in [
            ("0::/system.slice/kubelet.service\n".to_owned(), Some("/system.slice/kubelet.service")),
            ("4:memory:/x\n0::/kubelet\n".to_owned(), Some("/kubelet")),
            ("4:memory:/x\n0::/\n".to_owned(), Some("/")),
            (format!("0::/kubepods/pod{uid}/x\n"), None),
            // With cgroup v1 only the other hierarchies may say so.
            (format!("4:memory:/kubepods/pod{uid}/x\n0::/system.slice/kubelet.service\n"), None),
            ("0::/../kubelet.service\n".to_owned(), None),
            ("0::/system.slice/kubelet.service (deleted)\n".to_owned(), None),
            ("4:memory:/x\n".to_owned(), None),
        ] {
            assert_eq!(cgroup2_outside_pods(&cgroups), expected.map(PathBuf::from), "{cgroups:?}");
        }
    }
}
