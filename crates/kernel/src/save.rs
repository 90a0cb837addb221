//! The hook that saves what applications dial: where it belongs, which only the node's kubelet decides, and keeping it
//! attached there.
//!
//! It is for Services beside another program's load-balancing, and nothing else rests on it. So what is missing here is
//! said and does not stop the agent: then connections are judged by the destination that the other program chose.

use crate::{
    Error, link, object,
    pins::Pins,
    sys::{self, AttachType},
};
use aya::{Ebpf, programs::ProgramFd};
use std::{
    collections::BTreeSet,
    fs::File,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Cgroups that kubelets put all pods below, in the root of cgroup2: with either cgroup driver, and in the root that
/// kind's nodes have.
const KUBEPODS: [&str; 4] =
    ["kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods"];

/// The programs, and the cgroup they were last attached to.
pub struct Save {
    programs: [(&'static str, AttachType, ProgramFd); 2],
    cgroup_root: PathBuf,
    pods_cgroup: Option<PathBuf>,
    /// Its id. One try each: what fails once fails at every pod.
    last: Mutex<Option<u64>>,
}

impl Save {
    pub fn load(ebpf: &mut Ebpf, cgroup_root: PathBuf, pods_cgroup: Option<PathBuf>) -> Result<Save, Error> {
        let mut load =
            |name, attach_type| object::load_connect(ebpf, name).map(|program| (name, attach_type, program));
        let programs = [load("save4", AttachType::Connect4)?, load("save6", AttachType::Connect6)?];
        Ok(Save { programs, cgroup_root, pods_cgroup, last: Mutex::default() })
    }

    /// Attaches the hook, or gives a predecessor's these programs, and says what stands in the way.
    pub fn open(&self, pins: &Pins) {
        if self.attach(pins) {
            return;
        }
        let others = others_at(&self.cgroup_root);
        if !others.is_empty() {
            tracing::warn!(
                "programs of others ({}) see connections before ours do, and no cgroup of the pods was found: Services that \
                 they turn into a backend's address will not be recognised; is --pods-cgroup right?",
                others.into_iter().collect::<Vec<_>>().join(", ")
            );
        }
    }

    /// As `open`, for when a pod comes: with the node's first one its cgroup may have come, too. Says whether there is one.
    pub fn attach(&self, pins: &Pins) -> bool {
        let Some(path) = pods_cgroup(&self.cgroup_root, self.pods_cgroup.as_deref()) else { return false };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let attached = File::open(&path)
            .and_then(|cgroup| Ok((cgroup.metadata()?.ino(), cgroup)))
            .map_err(Error::io(format!("the cgroup {} could not be opened", path.display())))
            .and_then(|(id, cgroup)| {
                if last.replace(id) == Some(id) {
                    return Ok(());
                }
                self.programs.iter().try_for_each(|(name, attach_type, program)| {
                    link::attach_or_update(
                        &pins.connect(name),
                        program.as_fd(),
                        cgroup.as_fd(),
                        *attach_type,
                        |info| info.cgroup_id() == id,
                    )
                })
            });
        if let Err(error) = attached {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "Services behind another program's load-balancing will not be recognised");
        }
        true
    }
}

/// The cgroup that all pods' processes are below, if there is one. A kubelet's counts only with processes in it: beside
/// cgroup v1 a runtime may leave all of them in cgroup2's root, and one whose driver was changed leaves an empty one.
pub fn pods_cgroup(root: &Path, chosen: Option<&Path>) -> Option<PathBuf> {
    if let Some(chosen) = chosen {
        return chosen.is_dir().then(|| chosen.to_owned());
    }
    KUBEPODS.iter().map(|name| root.join(name)).find(|path| {
        std::fs::read_to_string(path.join("cgroup.events"))
            .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
    })
}

/// Names of the programs in the connect hooks of a cgroup that are not ours; none where the kernel does not say.
fn others_at(cgroup: &Path) -> BTreeSet<String> {
    let Ok(cgroup) = File::open(cgroup) else { return BTreeSet::new() };
    let ids: Vec<u32> = [AttachType::Connect4, AttachType::Connect6]
        .into_iter()
        .flat_map(|hook| sys::attached_programs(cgroup.as_fd(), hook).unwrap_or_default())
        .collect();
    let programs = aya::programs::loaded_programs().flatten();
    programs
        .filter(|program| ids.contains(&program.id()))
        .map(|program| program.name_as_str().unwrap_or("?").to_owned())
        .filter(|name| name != "connect4" && name != "connect6")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelets_cgroup_counts_with_processes_in_it() {
        let root = tempfile::tempdir().unwrap();
        let make = |name: &str, populated: u8| {
            let path = root.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("cgroup.events"), format!("populated {populated}\nfrozen 0\n")).unwrap();
            path
        };
        assert_eq!(pods_cgroup(root.path(), None), None);
        make("kubepods.slice", 0);
        assert_eq!(pods_cgroup(root.path(), None), None, "nobody is in it");
        let kind = make("kubelet.slice/kubelet-kubepods.slice", 1);
        assert_eq!(pods_cgroup(root.path(), None), Some(kind));
        let cgroupfs = make("kubepods", 1);
        assert_eq!(pods_cgroup(root.path(), None), Some(cgroupfs));
        let systemd = make("kubepods.slice", 1);
        assert_eq!(pods_cgroup(root.path(), None), Some(systemd));
        let chosen = root.path().join("chosen");
        assert_eq!(pods_cgroup(root.path(), Some(&chosen)), None, "not there yet");
        make("chosen", 0);
        assert_eq!(pods_cgroup(root.path(), Some(&chosen)), Some(chosen));
    }
}
