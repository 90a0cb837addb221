//! Where the processes of pods are: in a cluster nobody tells the path of a pod's network namespace, but the container
//! runtime puts the pod's UID into the names of its cgroups. Needs the node's PID namespace.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

/// Length of a UUID in text. Static pods have 32 hexadecimal digits instead.
const UUID: usize = 36;
const STATIC_UID: usize = 32;

/// Network namespaces in which processes of these pods run, as paths that lead there while such a process lives. One pod
/// can have several, since a container may make more of them: whoever asks compares addresses. One walk over all
/// processes, whatever the number of pods.
pub fn netns_of(uids: &HashSet<String>) -> HashMap<String, Vec<PathBuf>> {
    let mut found: HashMap<String, Vec<PathBuf>> = HashMap::new();
    let mut seen = HashSet::new();
    for process in processes() {
        // A process that ends meanwhile is none to be found.
        let Ok(cgroups) = fs::read_to_string(process.join("cgroup")) else { continue };
        let Some(uid) = pod_uid(&cgroups).filter(|uid| uids.contains(uid)) else { continue };
        let path = process.join("ns/net");
        let Ok(namespace) = fs::metadata(&path) else { continue };
        if seen.insert((uid.clone(), namespace.ino())) {
            found.entry(uid).or_default().push(path);
        }
    }
    found
}

/// Inode numbers of every network namespace that a process is in.
pub fn inhabited() -> HashSet<u64> {
    processes().filter_map(|process| fs::metadata(process.join("ns/net")).ok()).map(|ns| ns.ino()).collect()
}

pub(crate) fn processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .map(|entry| entry.path())
}

/// The UID of the pod that a process belongs to, by its `/proc/PID/cgroup`; see cgroups(7). The kubelet names a pod's
/// cgroup `podUID` with its cgroupfs driver and `kubepods-...-podUID.slice`, the UID's dashes as underscores, with
/// systemd's. Containers of the host have no such parent.
pub(crate) fn pod_uid(cgroups: &str) -> Option<String> {
    cgroups.lines().find_map(|line| {
        let path = line.splitn(3, ':').nth(2)?;
        path.split('/').find_map(|part| uid_in(part.strip_suffix(".slice").unwrap_or(part)))
    })
}

fn uid_in(part: &str) -> Option<String> {
    let uid = match part.strip_prefix("pod") {
        Some(uid) => uid,
        None => {
            part.strip_prefix("kubepods").and_then(|rest| rest.rsplit_once("-pod")).map(|(_, uid)| uid)?
        }
    };
    let uid = uid.replace('_', "-");
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    let valid = match uid.len() {
        UUID => uid.split('-').map(str::len).eq([8, 4, 4, 4, 12]) && uid.split('-').all(digits),
        STATIC_UID => digits(&uid),
        _ => false,
    };
    valid.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f6ba4ce-7b2b-4cbb-a1ef-0b3f2a1f8f3e";

    #[test]
    fn finds_the_uid_in_every_form() {
        let container = "8a4b2c3d".repeat(8);
        let underscored = UID.replace('-', "_");
        for line in [
            format!("0::/kubepods/besteffort/pod{UID}/{container}"),
            format!("0::/kubepods/pod{UID}/{container}"),
            format!("0::/../../kubepods/burstable/pod{UID}/{container}/nested/deeper"),
            format!("9:name=systemd:/lab-node-1/kubepods/burstable/pod{UID}/{container}"),
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{underscored}.slice/cri-containerd-{container}.scope"
            ),
            format!("0::/kubepods.slice/kubepods-pod{underscored}.slice/crio-{container}.scope"),
            format!("12:cpu:/\n11:cpu,cpuacct:/kubepods/pod{UID}/docker-{container}\n0::/"),
            format!("0::/kubelet.slice/kubelet-kubepods.slice/kubepods-burstable-pod{underscored}.slice/x"),
        ] {
            assert_eq!(pod_uid(&line).as_deref(), Some(UID), "{line}");
        }
        let hash = "d2f3a1b4c5d6e7f8091a2b3c4d5e6f70";
        assert_eq!(pod_uid(&format!("0::/kubepods/burstable/pod{hash}/x")).as_deref(), Some(hash));
    }

    #[test]
    fn finds_none_where_there_is_none() {
        for line in [
            "0::/",
            "",
            "nonsense",
            "0::/system.slice/containerd.service",
            "0::/user.slice/podman-1234.scope",
            "0::/kubepods/besteffort/pod0f6ba4ce/x",
            "0::/kubepods/podZZZZa4ce-7b2b-4cbb-a1ef-0b3f2a1f8f3e/x",
            "0::/kubepods/pod0f6ba4ce7-b2b-4cbb-a1ef-0b3f2a1f8f3e/x",
            "0::/machine.slice/libpod-8a4b2c3d8a4b2c3d8a4b2c3d8a4b2c3d8a4b2c3d8a4b2c3d8a4b2c3d8a4b2c3d.scope",
        ] {
            assert_eq!(pod_uid(line), None, "{line}");
        }
    }

    #[test]
    fn this_process_lives_somewhere() {
        let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
        assert!(inhabited().contains(&own));
        assert!(netns_of(&HashSet::from([UID.to_owned()])).is_empty());
    }
}
