//! Which process is the kubelet: a stand-in that sleeps, in namespaces and cgroups of its own.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod testbed;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::Duration,
};
use testbed::Cgroup;
use weft_kernel::{
    Options,
    kubelet::{Unrecognised, find},
};

/// Set for the part that has a PID namespace of its own, whose first process stands for the node's: no other test's kubelet
/// is seen there.
const INSIDE: &str = "WEFT_TEST_INSIDE";

#[test]
fn what_is_a_kubelet_and_what_is_not() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let status: ExitStatus = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "what_is_a_kubelet_and_what_is_not", "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

/// A sleeping process, ended with the value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts what `wrapper` makes of `program` in `cgroup`, and waits until it sleeps.
fn start(wrapper: &[&str], program: &Path, cgroup: &Path) -> Process {
    let script = format!("echo 0 > {}/cgroup.procs; exec \"$@\"", cgroup.display());
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh"]).args(wrapper).arg(program).arg("60");
    let process = Process(command.spawn().unwrap());
    let exe = PathBuf::from(format!("/proc/{}/exe", process.0.id()));
    // Where the wrapper stays, its child is the one.
    let stays = wrapper.contains(&"--fork");
    for _ in 0..500 {
        if stays || fs::read_link(&exe).is_ok_and(|exe| exe == program) {
            std::thread::sleep(Duration::from_millis(if stays { 300 } else { 0 }));
            return process;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{} was not started", program.display());
}

fn inside() {
    let directory = tempfile::tempdir().unwrap();
    let sleep = fs::canonicalize("/bin/sleep").unwrap();
    let [kubelet, other] = ["kubelet", "cubelet"].map(|name| directory.path().join(name));
    for program in [&kubelet, &other] {
        fs::copy(&sleep, program).unwrap();
    }
    // For the one that runs as nobody.
    Command::new("chmod").args(["755"]).arg(directory.path()).status().unwrap();
    let cgroup = Cgroup::new();
    let options = Options::default();
    let looked = || find(&options, None);
    assert!(matches!(looked(), Err(Unrecognised::NotFound)), "{:?}", looked());

    let running = start(&[], &kubelet, cgroup.path());
    let found = looked().unwrap();
    assert_eq!((found.cgroup(), found.cgroup_id()), (Path::new(cgroup.name()), cgroup.id()));
    assert_eq!(find(&options, Some(&found)).unwrap(), found, "looked at alone");
    {
        // As where containers are left in the cgroup2 cgroup of their runtime.
        let _container = start(&["unshare", "--mount"], &other, cgroup.path());
        assert!(matches!(looked(), Err(Unrecognised::Shared { .. })), "{:?}", looked());
    }
    looked().unwrap();
    drop(running);
    assert!(matches!(find(&options, Some(&found)), Err(Unrecognised::NotFound)), "gone");

    // In a cgroup of its own each, or it is not its namespaces that make the difference.
    let kubepods = cgroup.below("kubepods");
    let pod = kubepods.below("pod0f6ba4ce-7b2b-4cbb-a1ef-0b3f2a1f8f3e");
    for (what, wrapper, program, place) in [
        ("another name", &[][..], &other, cgroup.path()),
        ("in a mount namespace of its own", &["unshare", "--mount"], &kubelet, cgroup.path()),
        (
            "in a PID namespace of its own",
            &["unshare", "--pid", "--fork", "--kill-child"],
            &kubelet,
            cgroup.path(),
        ),
        (
            "in a user namespace of its own",
            &["unshare", "--user", "--map-root-user"],
            &kubelet,
            cgroup.path(),
        ),
        ("not root's", &["setpriv", "--reuid", "65534", "--clear-groups"], &kubelet, cgroup.path()),
        ("in a pod's cgroup", &[], &kubelet, pod.path()),
    ] {
        let _process = start(wrapper, program, place);
        assert!(matches!(looked(), Err(Unrecognised::NotFound)), "{what}: {:?}", looked());
    }
    {
        let _process = start(&[], &kubelet, cgroup.root());
        assert!(matches!(looked(), Err(Unrecognised::InRoot(_))), "{:?}", looked());
    }

    // By name nothing is asked of processes, but it has to be a cgroup of cgroup2 below its root.
    let named = |path: &str| find(&Options { kubelet_cgroup: Some(path.into()), ..Options::default() }, None);
    assert_eq!(named(cgroup.name()).unwrap().cgroup_id(), cgroup.id());
    for path in ["/", "/weft-test-absent", "", "/.", "/../../../tmp"] {
        assert!(matches!(named(path), Err(Unrecognised::NoCgroup(_))), "{path}: {:?}", named(path));
    }
}
