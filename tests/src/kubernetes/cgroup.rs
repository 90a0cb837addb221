//! The cgroups of a node: one directory in every hierarchy, which the node sees as the root. They are the only thing of a
//! cluster that the end of the bed's namespaces does not remove, so they carry the bed's process id, and whoever started
//! the bed sweeps those whose bed is gone.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::poll::pause;

const PREFIX: &str = "weft-bed-";

/// One node's directories.
#[derive(Debug)]
pub struct NodeCgroups(Vec<PathBuf>);

impl NodeCgroups {
    /// Makes them below this process's own.
    pub fn create(node: &str) -> Result<NodeCgroups> {
        Self::below(own_directories()?, node)
    }

    /// Makes one in cgroup2 alone, which every machine lets root do: for pods whose processes the bed itself starts.
    pub fn unified(node: &str) -> Result<NodeCgroups> {
        Self::below(vec![crate::isolate::cgroup2_root()?.join(own_path("")?)], node)
    }

    fn below(parents: Vec<PathBuf>, node: &str) -> Result<NodeCgroups> {
        let mut directories = Vec::new();
        for own in parents {
            let directory = own.join(format!("{PREFIX}{}-{node}", crate::isolate::host_pid()));
            std::fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
            // Empty ones admit no process.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if directory.join(file).exists() {
                    let inherited = std::fs::read(own.join(file))?;
                    std::fs::write(directory.join(file), inherited).with_context(|| file.to_owned())?;
                }
            }
            directories.push(directory);
        }
        Ok(NodeCgroups(directories))
    }

    /// Those that pods' are made below, with the first of them.
    pub fn pods(&self) -> impl Iterator<Item = PathBuf> {
        self.0.iter().map(|directory| directory.join("kubepods"))
    }

    /// A pod's, made below them under the name that a kubelet with the cgroupfs driver gives it.
    pub fn pod(&self, uid: &str) -> Result<NodeCgroups> {
        let name = format!("pod{uid}");
        let directories: Vec<_> = self.pods().map(|pods| pods.join(&name)).collect();
        for directory in &directories {
            std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        }
        Ok(NodeCgroups(directories))
    }

    /// Puts `command` into them before it runs, so that a cgroup namespace made by it has them as its root.
    pub fn enter_before(&self, command: &mut Command) {
        let files: Vec<_> =
            self.0.iter().filter_map(|directory| c_path(&directory.join("cgroup.procs"))).collect();
        // SAFETY: system calls only, no allocation, no lock.
        unsafe { command.pre_exec(move || files.iter().try_for_each(|file| join(file))) };
    }

    /// Removes them once the node's processes are gone.
    pub fn remove(&self, limit: Duration) {
        let start = Instant::now();
        while !self.0.iter().all(|directory| remove_tree(directory)) && start.elapsed() < limit {
            pause(Duration::from_millis(50));
        }
    }
}

fn c_path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}

/// Moves this process into the cgroup of that `cgroup.procs`.
fn join(file: &CStr) -> std::io::Result<()> {
    // SAFETY: plain system calls on a path that ends with a zero and a descriptor opened here.
    let written = unsafe {
        let fd = libc::open(file.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let written = libc::write(fd, c"0".as_ptr().cast(), 1);
        libc::close(fd);
        written
    };
    if written == 1 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Why this machine cannot give a node its cgroups, if it cannot. Tried once: scenarios ask side by side.
pub fn obstacle() -> Option<String> {
    static ANSWER: OnceLock<Option<String>> = OnceLock::new();
    ANSWER.get_or_init(try_cgroups).clone()
}

fn try_cgroups() -> Option<String> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    lacking(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo")).or_else(|| {
        match NodeCgroups::create("trial") {
            Ok(trial) => {
                trial.remove(Duration::from_secs(1));
                None
            }
            Err(error) => Some(format!("no cgroup can be made: {error:#}")),
        }
    })
}

/// What the nodes need and this machine has not mounted. A node mounts each hierarchy anew, with its own directory as the
/// root; one that has all controllers in cgroup2 would need them delegated to it, which nobody has built yet.
fn lacking(cgroups: &str, mounts: &str) -> Option<String> {
    let is_there = |wanted: &str| {
        cgroups.lines().filter_map(|line| line.split(':').nth(1)).any(|controllers| {
            controllers.split(',').any(|controller| controller == wanted)
                && mount_of(mounts, controllers).is_some()
        })
    };
    let missing: Vec<_> = ["cpu", "memory", "pids"].into_iter().filter(|wanted| !is_there(wanted)).collect();
    if !missing.is_empty() {
        let missing = missing.join(", ");
        return Some(format!(
            "nodes need cgroup v1's controllers; not mounted: {missing}. cgroup2 alone is not supported"
        ));
    }
    (!is_there("")).then(|| "cgroup2 is not mounted".to_owned())
}

/// This process's directory in each hierarchy.
fn own_directories() -> Result<Vec<PathBuf>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("mountinfo")?;
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
    let mut found = Vec::new();
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            bail!("/proc/self/cgroup has the line {line:?}");
        };
        let Some(point) = mount_of(&mounts, controllers) else { continue };
        found.push(point.join(path.trim_start_matches('/')));
    }
    Ok(found)
}

/// This process's directory in the hierarchy of these controllers, below its mount point.
fn own_path(wanted: &str) -> Result<PathBuf> {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
    let mut lines = cgroups.lines().map(|line| line.splitn(3, ':').skip(1));
    let found = lines.find_map(|mut fields| {
        (fields.next() == Some(wanted))
            .then(|| fields.next().map(|path| path.trim_start_matches('/').into()))?
    });
    found.with_context(|| format!("this process is in no cgroup of the hierarchy {wanted:?}"))
}

/// Where the hierarchy of these controllers is mounted; that of cgroup2 for none.
fn mount_of(mountinfo: &str, controllers: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let (kind, options) = (file_system.split(' ').next()?, file_system.rsplit(' ').next()?);
        let matches = match controllers {
            "" => kind == "cgroup2",
            _ => {
                kind == "cgroup"
                    && controllers.split(',').all(|c| options.split(',').any(|option| option == c))
            }
        };
        matches.then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Removes what beds have left that ended without removing it themselves. To be called outside of the bed that is
/// about to start, or has ended.
pub(crate) fn sweep() {
    let own = own_directories().unwrap_or_default();
    let mut names: Vec<_> = own
        .iter()
        .filter_map(|directory| std::fs::read_dir(directory).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.starts_with(PREFIX))
        .collect();
    names.sort();
    names.dedup();
    for name in names {
        let directories: Vec<_> = own.iter().map(|directory| directory.join(&name)).collect();
        if !is_starting(&name) && !directories.iter().any(|directory| is_populated(directory)) {
            for directory in directories {
                remove_tree(&directory);
            }
        }
    }
}

/// Whether a process lives in it or below. Only cgroup2 says so for processes of any PID namespace, which counts where a
/// bed is started within another; that the others cannot be removed while in use would not spare the empty ones in them.
fn is_populated(directory: &Path) -> bool {
    std::fs::read_to_string(directory.join("cgroup.events")).is_ok_and(|events| says_populated(&events))
}

fn says_populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// Whether its bed runs, by the process id in its name: a node that is just being made has no process yet. One that has
/// ended and that nobody waited for, as under an init that reaps late, does not run.
fn is_starting(name: &str) -> bool {
    let bed = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
    let stat = bed.and_then(|pid| std::fs::read_to_string(Path::new("/proc").join(pid).join("stat")).ok());
    stat.is_some_and(|stat| runs(&stat))
}

/// Whether the process of that /proc/PID/stat has not ended. The state follows the name, which may hold anything.
fn runs(stat: &str) -> bool {
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Removes a directory with those below it; false while a process is in one.
fn remove_tree(directory: &Path) -> bool {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    match std::fs::remove_dir(directory) {
        Ok(()) => true,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_by_their_controllers() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      33 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        for (controllers, expected) in [
            ("cpu,cpuacct", Some("/sys/fs/cgroup/cpu,cpuacct")),
            ("name=systemd", Some("/sys/fs/cgroup/systemd")),
            ("", Some("/sys/fs/cgroup/unified")),
            ("memory", None),
        ] {
            assert_eq!(mount_of(mounts, controllers), expected.map(PathBuf::from), "{controllers}");
        }
    }

    #[test]
    fn what_a_node_cannot_do_without_is_named() {
        let cgroups = "3:cpu,cpuacct:/\n2:memory:/\n1:pids:/\n0::/\n";
        let mount =
            |kind: &str, options: &str| format!("32 31 0:29 / /{options} rw - {kind} cgroup rw,{options}\n");
        let v1 = mount("cgroup", "cpu,cpuacct") + &mount("cgroup", "memory") + &mount("cgroup", "pids");
        let v2 = mount("cgroup2", "nsdelegate");
        assert_eq!(lacking(cgroups, &(v1.clone() + &v2)), None);
        for (cgroups, mounts, named) in [
            (cgroups, v1, "cgroup2 is not mounted"),
            (
                cgroups,
                mount("cgroup", "cpu,cpuacct") + &mount("cgroup", "memory") + &v2,
                "not mounted: pids.",
            ),
            ("0::/user.slice\n", v2, "not mounted: cpu, memory, pids."),
        ] {
            let why = lacking(cgroups, &mounts);
            assert!(why.as_ref().is_some_and(|why| why.contains(named)), "{named}: {why:?}");
        }
    }

    #[test]
    fn an_ended_process_does_not_run() {
        for (stat, expected) in [
            ("7 (scenarios) S 1 7 7 0", true),
            ("7 (a) Z) R 1 7 7 0", true),
            ("7 (scenarios) Z 1 7 7 0", false),
            ("7 (scenarios) X 1 7 7 0", false),
            ("", false),
        ] {
            assert_eq!(runs(stat), expected, "{stat:?}");
        }
    }

    #[test]
    #[allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "a test; no async runtime runs here")]
    fn only_what_nobody_uses_is_swept() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("not run: making cgroups takes root");
            return;
        }
        let name = format!("test-{}", std::process::id());
        // Outside of a bed: of no bed that runs.
        let cgroups = NodeCgroups::create(&name).unwrap();
        let empty: Vec<_> = cgroups.0.iter().map(|directory| directory.join("empty")).collect();
        for directory in &empty {
            std::fs::create_dir(directory).unwrap();
        }
        let mut command = Command::new("sleep");
        command.arg("60");
        cgroups.enter_before(&mut command);
        let mut process = command.spawn().unwrap();
        sweep();
        let kept = empty.iter().filter(|directory| directory.exists()).count();
        process.kill().unwrap();
        // Not waited for yet: a process that has ended keeps nothing.
        let start = Instant::now();
        while cgroups.0.iter().any(|directory| directory.exists()) && start.elapsed() < Duration::from_secs(5)
        {
            sweep();
            pause(Duration::from_millis(10));
        }
        let left: Vec<_> = cgroups.0.iter().filter(|directory| directory.exists()).collect();
        process.wait().unwrap();
        assert_eq!(kept, empty.len(), "a node's empty cgroups were swept under it");
        assert!(left.is_empty(), "left: {left:?}");
    }
}
