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
    /// The root of cgroup2; found in `/proc/self/mountinfo` if not given.
    pub cgroup_root: Option<PathBuf>,
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
        let path = "/proc/self/mountinfo";
        let mounts = std::fs::read_to_string(path).map_err(Error::io(format!("{path} could not be read")))?;
        cgroup2_root(&mounts).ok_or(Error::NoCgroup)
    }
}

/// The mount point of cgroup2 whose root is the hierarchy's own (a bind mount of a sub-directory would leave out
/// every process outside it). See proc_pid_mountinfo(5).
fn cgroup2_root(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        (file_system.split(' ').next() == Some("cgroup2") && root == "/").then(|| unescape(point))
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
