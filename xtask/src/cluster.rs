//! `cargo xtask cluster`: the tests' Kubernetes cluster, for a person.
#![allow(clippy::disallowed_methods, reason = "no async runtime runs here")]

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::packages::{self, Purpose};
use crate::{build, ebpf, images, kubernetes, run, say, setup, tree};
use anyhow::{Context, Result, bail};
use clap::Subcommand;

/// Run a Kubernetes cluster of two nodes on this machine, to try things in
#[derive(clap::Args)]
#[command(
    long_about = "Run a Kubernetes cluster of two nodes on this machine, as the tests have it: etcd, API server, and two nodes \
        with containerd and a kubelet, in namespaces of their own. The nodes have Weft's images as built from this tree. \
        Nothing of it is left after `down`, or after its process has ended for another reason. Needs root.",
    after_help = "Examples:\n  cargo xtask cluster up\n  target/cluster/weft install | target/cluster/kubectl apply -f -\n  \
        target/cluster/weft check\n  cargo xtask cluster down"
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Subcommand)]
enum Command {
    /// Start it, unless it runs
    Up,
    /// End it
    Down,
}

const READY: Duration = Duration::from_secs(180);
const ENDED: Duration = Duration::from_secs(30);

pub fn main(arguments: &Arguments) -> Result<()> {
    packages::require_root("the cluster's nodes are made of namespaces")?;
    let dir = tree::target()?.join("cluster");
    match arguments.command {
        Command::Up => up(&dir),
        Command::Down => down(&dir),
    }
}

fn up(dir: &Path) -> Result<()> {
    if running(dir).is_some() {
        say::success("it runs already");
        return usage(dir);
    }
    setup::ensure(Purpose::Test)?;
    ebpf::build()?;
    say::step("Programs and images");
    let programs = build::programs(build::Profile::Development)?;
    images::for_tests(&programs)?;
    let assets = kubernetes::programs()?;
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    say::step("The cluster");
    let log = File::create(dir.join("log"))?;
    let mut command = build::as_root(&programs.join("cluster"))?;
    command.arg(dir).env("KUBEBUILDER_ASSETS", assets);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // It outlives this process, and a Ctrl-C in its terminal.
    command.process_group(0);
    let mut child = command.spawn().context("starting it")?;
    fs::write(dir.join("pid"), child.id().to_string())?;
    let start = Instant::now();
    while !dir.join("kubectl").exists() {
        if child.try_wait()?.is_some() || start.elapsed() > READY {
            let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
            let _ = down(dir);
            bail!("it did not come up:\n{log}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    say::success(&format!("two nodes are ready ({})", say::duration(start.elapsed())));
    usage(dir)
}

fn usage(dir: &Path) -> Result<()> {
    let (weft, kubectl) = (dir.join("weft"), dir.join("kubectl"));
    say::detail(&format!("{} get nodes", kubectl.display()));
    say::detail(&format!("{} install | {} apply -f -", weft.display(), kubectl.display()));
    say::detail("cargo xtask cluster down");
    Ok(())
}

fn down(dir: &Path) -> Result<()> {
    let Some(pid) = running(dir) else {
        say::success("it does not run");
        return Ok(());
    };
    run::pass(build::as_root(&"kill".into())?.arg(pid.to_string()), "ending it")?;
    let start = Instant::now();
    while running(dir).is_some() {
        if start.elapsed() > ENDED {
            bail!("process {pid} does not end");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = fs::remove_dir_all(dir);
    say::success("it has ended");
    Ok(())
}

/// Its process, if that is still the one that was started: ids are used again.
fn running(dir: &Path) -> Option<u32> {
    let pid: u32 = fs::read_to_string(dir.join("pid")).ok()?.parse().ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    String::from_utf8_lossy(&line).contains(&*dir.to_string_lossy()).then_some(pid)
}
