//! Where an instance lives, and where the kernel's file systems are.

use crate::Error;
use std::path::{Path, PathBuf};

/// How the kernel's part is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Two instances on one kernel share nothing. Letters, digits, `-` and `_`.
    pub instance: String,
    /// A mounted bpffs; pins go to `weft/INSTANCE` below it.
    pub bpffs: PathBuf,
    /// The root of cgroup2; found among the mounts if not given.
    pub cgroup_root: Option<PathBuf>,
    /// The cgroup below which all pods' processes are; a kubelet's is found if not given. It may come later than this.
    pub pods_cgroup: Option<PathBuf>,
    /// An object file instead of the embedded one, for developing the programs.
    pub object: Option<PathBuf>,
    /// One line for each connection captured or refused, as `tracing` events of the target `weft_ebpf`.
    pub debug_log: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            instance: "weft".into(),
            bpffs: "/sys/fs/bpf".into(),
            cgroup_root: None,
            pods_cgroup: None,
            object: None,
            debug_log: false,
        }
    }
}

impl Options {
    /// The directory of the instance, above the layout version.
    pub(crate) fn instance_dir(&self) -> Result<PathBuf, Error> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        // Also keeps dots out, which bpffs does not allow in names.
        if self.instance.is_empty() || self.instance.len() > 64 || !self.instance.chars().all(allowed) {
            return Err(Error::InstanceName(self.instance.clone()));
        }
        Ok(self.bpffs.join("weft").join(&self.instance))
    }

    /// The cgroup2 root that the connect hooks are attached to.
    pub(crate) fn cgroup(&self) -> Result<PathBuf, Error> {
        if let Some(root) = &self.cgroup_root {
            return Ok(root.clone());
        }
        let root_of = |process: &str| {
            let path = format!("{process}/mountinfo");
            let mounts =
                std::fs::read_to_string(&path).map_err(Error::io(format!("{path} could not be read")))?;
            Ok::<_, Error>(cgroup2_root(&mounts))
        };
        // A container may have a cgroup namespace of its own, whose root is the container's cgroup.
        let nested = std::fs::read_to_string("/proc/1/cgroup").is_ok_and(|cgroups| is_above(&cgroups));
        if !nested && let Some(root) = root_of("/proc/self")? {
            return Ok(root);
        }
        // Then what process 1 has mounted counts, which is the node's where the container is in its PID namespace.
        let root = root_of("/proc/1")?.ok_or(Error::NoCgroup)?;
        Ok(Path::new("/proc/1/root").join(root.strip_prefix("/").unwrap_or(&root)))
    }
}

/// Whether a process is outside the part of cgroup2 that this one's cgroup namespace shows, by its `/proc/PID/cgroup`.
fn is_above(cgroups: &str) -> bool {
    cgroups.lines().any(|line| line.starts_with("0::/.."))
}

/// The mount point of cgroup2 whose root is the hierarchy's own (a bind mount of a sub-directory would leave out
/// every process outside it). Seen from a cgroup namespace further down, a root above it is written with `/..`. See
/// proc_pid_mountinfo(5) and cgroup_namespaces(7).
fn cgroup2_root(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        let whole = root.split('/').all(|part| part.is_empty() || part == "..");
        (file_system.split(' ').next() == Some("cgroup2") && whole).then(|| unescape(point))
    })
}

/// Blanks and such are written as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut text = field.to_owned();
    for (escaped, plain) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        text = text.replace(escaped, plain);
    }
    Path::new(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_root_of_cgroup2() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:5 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_root(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let bound = "50 1 0:38 /kubepods /mnt rw - cgroup2 none rw\n51 1 0:38 / /with\\040blank rw - cgroup2 none rw\n";
        assert_eq!(cgroup2_root(bound), Some("/with blank".into()));
        let from_below = "50 1 0:38 /../x /mnt rw - cgroup2 none rw\n51 1 0:38 /../.. /sys/fs/cgroup rw - cgroup2 none rw\n";
        assert_eq!(cgroup2_root(from_below), Some("/sys/fs/cgroup".into()));
        for (cgroups, above) in
            [("1:cpu:/..\n0::/../../init.scope\n", true), ("0::/init.scope\n", false), ("0::/\n", false)]
        {
            assert_eq!(is_above(cgroups), above, "{cgroups}");
        }
        assert_eq!(cgroup2_root("1 2 0:3 / / rw - ext4 /dev/a rw\nbroken"), None);
    }

    #[test]
    fn an_instance_name_is_one_path_component() {
        for (name, ok) in
            [("weft", true), ("node-1_b", true), ("", false), ("..", false), ("a/b", false), ("a.b", false)]
        {
            let options = Options { instance: name.into(), ..Options::default() };
            assert_eq!(options.instance_dir().is_ok(), ok, "{name:?}");
        }
    }
}
