//! The cgroups of a node: one directory in every hierarchy, which the node sees as the root. They are the only thing of a
//! cluster that the end of the bed's namespaces does not remove, so they carry the bed's process id, and the next run
//! sweeps those whose bed is gone.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
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
        let mut directories = Vec::new();
        for own in own_directories()? {
            sweep(&own);
            let directory = own.join(format!("{PREFIX}{}{node}", crate::isolate::host_pid()));
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

/// Removes what beds that were killed have left.
fn sweep(own: &Path) {
    for entry in std::fs::read_dir(own).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        let pid: String = rest.chars().take_while(char::is_ascii_digit).collect();
        // The machine's own list of processes is not to be seen from inside the bed; a directory that is in use cannot
        // be removed anyway.
        if pid != crate::isolate::host_pid().to_string() {
            remove_tree(&entry.path());
        }
    }
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
}
