//! The Debian packages Weft's commands need, how to see that one is there, and how it gets installed.
//!
//! Looking is done by file, not by asking dpkg: it is fast, and a program that came from elsewhere counts too.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::tree::{self, find_program};
use crate::{run, say};

/// How to see that a package's content is there.
#[derive(Clone, Debug)]
pub enum Probe {
    /// A program on PATH or in the system directories.
    Program(&'static str),
    /// A file.
    File(String),
    /// A file in any subdirectory of the first path: (`/usr/lib/postgresql`, `bin/postgres`).
    FileBelow(&'static str, &'static str),
}

impl Probe {
    fn there(&self) -> bool {
        match self {
            Probe::Program(name) => find_program(name).is_some(),
            Probe::File(path) => Path::new(path).exists(),
            Probe::FileBelow(directory, file) => fs::read_dir(directory)
                .is_ok_and(|entries| entries.flatten().any(|entry| entry.path().join(file).exists())),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Package {
    pub name: String,
    pub why: &'static str,
    pub probe: Probe,
}

impl Package {
    pub fn new(name: impl Into<String>, why: &'static str, probe: Probe) -> Package {
        Package { name: name.into(), why, probe }
    }
}

/// Which command the machine is prepared for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    BuildEbpf,
    Test,
    Demo,
    Bench,
    All,
}

/// What a command needs to run besides the toolchains. The compilers' own packages are toolchain.rs's business.
pub fn of(purpose: Purpose) -> Vec<Package> {
    use Probe::{File, FileBelow, Program};
    use Purpose::{All, Bench, Demo, Test};
    let all: [(&[Purpose], &str, &'static str, Probe); 19] = [
        (&[Test, Demo, Bench], "gcc", "the C code of aws-lc", Program("cc")),
        (
            &[Test],
            "libc6-dev",
            "the CNI plugin, which is linked to no shared library",
            FileBelow("/usr/lib", "libc.a"),
        ),
        (&[Test, Demo, Bench], "iproute2", "namespaces and wires of the test bed", Program("ip")),
        (&[Test, Demo, Bench], "procps", "processes and sysctls of the test bed", Program("sysctl")),
        (&[Test, Demo, Bench], "nginx-light", "a web server as workload", Program("nginx")),
        (&[Test, Demo], "redis-server", "a database as workload", Program("redis-server")),
        (&[Test, Demo], "curl", "a client as workload", Program("curl")),
        (
            &[Test],
            "postgresql",
            "a server that speaks first, as workload",
            FileBelow("/usr/lib/postgresql", "bin/postgres"),
        ),
        (&[Test], "default-jdk-headless", "a JVM client as workload", Program("javac")),
        (&[Test], "containerd", "the test cluster's container runtime", Program("containerd")),
        (&[Test], "runc", "starts the test cluster's containers", Program("runc")),
        (
            &[Test],
            "containernetworking-plugins",
            "the test cluster's pod network",
            File("/usr/lib/cni/bridge".to_owned()),
        ),
        (
            &[Test],
            "libfaketime",
            "wrong clocks in the test cluster",
            FileBelow("/usr/lib", "faketime/libfaketimeMT.so.1"),
        ),
        (&[Test], "busybox-static", "applications in the test cluster", Program("busybox")),
        (&[Test], "iptables", "port mappings of the test cluster", Program("iptables")),
        (&[Test], "nftables", "Services of the test cluster", Program("nft")),
        (&[Test], "conntrack", "Services of the test cluster", Program("conntrack")),
        (&[Test, Bench], "wrk", "requests per second", Program("wrk")),
        (&[Test, Bench], "iperf3", "bytes per second", Program("iperf3")),
    ];
    all.into_iter()
        .filter(|(purposes, ..)| purpose == All || purposes.contains(&purpose))
        .map(|(_, name, why, probe)| Package::new(name, why, probe))
        .collect()
}

pub fn missing(packages: Vec<Package>) -> Vec<Package> {
    packages.into_iter().filter(|package| !package.probe.there()).collect()
}

/// Installs packages with apt-get, saying so first. An error tells a person what to do by hand.
pub fn install(packages: &[Package]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    say::step("Installing Debian packages");
    for package in packages {
        say::detail(&format!("{:<22} {}", package.name, package.why));
    }
    let by_hand = format!("apt-get install --no-install-recommends {}", names.join(" "));
    if find_program("apt-get").is_none() {
        bail!(
            "this system has no apt-get; install what provides these Debian packages and try again: {}",
            names.join(", ")
        );
    }
    let elevate = elevation().with_context(|| format!("as root, run: {by_hand}"))?;
    let log = tree::cache()?.join("apt.log");
    let attempt = |arguments: &[&str], what: &str| run::quietly(&mut apt(&elevate, arguments), &log, what);

    let install: Vec<&str> = ["install", "--yes", "--no-install-recommends", "--no-remove"]
        .into_iter()
        .chain(names.iter().copied())
        .collect();
    if !have_package_lists() {
        attempt(&["update"], "apt-get update")?;
    } else if attempt(&install, "apt-get install").is_ok() {
        return still_missing(packages, &by_hand);
    } else {
        say::detail("once more with fresh package lists");
        attempt(&["update"], "apt-get update")?;
    }
    attempt(&install, "apt-get install").with_context(|| format!("by hand: {by_hand}"))?;
    still_missing(packages, &by_hand)
}

fn still_missing(packages: &[Package], by_hand: &str) -> Result<()> {
    let missing: Vec<String> =
        missing(packages.to_vec()).iter().map(|p| format!("{} ({:?})", p.name, p.probe)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!("installed, and yet not found: {}; try by hand: {by_hand}", missing.join(", "))
}

fn have_package_lists() -> bool {
    fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
    })
}

/// The words to put before a command so that root runs it: nothing for root, else sudo.
pub fn elevation() -> Result<Vec<String>> {
    if nix::unistd::geteuid().is_root() {
        return Ok(Vec::new());
    }
    let Some(sudo) = find_program("sudo") else { bail!("this needs root, and there is no sudo") };
    // Asks for the password now and in the foreground, so that nothing waits for it unseen.
    let ready = Command::new(&sudo).arg("--validate").status().is_ok_and(|status| status.success());
    if !ready {
        bail!("this needs root, and sudo refused");
    }
    Ok(vec![sudo.to_string_lossy().into_owned()])
}

/// Says at once, before minutes of building, that root will be needed, and that it is to be had.
pub fn require_root(why: &str) -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    say::detail(&format!("root is needed: {why}; building runs without it"));
    elevation().with_context(|| format!("run this as root ({why})"))?;
    keep_elevated();
    Ok(())
}

/// sudo forgets after some minutes, and a build takes longer: nobody should find it waiting for a password.
fn keep_elevated() {
    std::thread::spawn(|| {
        loop {
            std::thread::park_timeout(Duration::from_secs(60));
            let _ = Command::new("sudo").args(["--non-interactive", "--validate"]).output();
        }
    });
}

fn apt(elevate: &[String], arguments: &[&str]) -> Command {
    // With RUNLEVEL=1 sysvinit's scripts do not start the daemons they install; Weft starts its own, in namespaces.
    let words =
        elevate.iter().map(String::as_str).chain(["env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1"]);
    let words = words.chain(["apt-get", "-o", "DPkg::Lock::Timeout=120", "-o", "Dpkg::Use-Pty=0"]);
    let mut words = words.chain(arguments.iter().copied());
    let mut command = Command::new(words.next().unwrap_or("env"));
    command.args(words);
    command
}
