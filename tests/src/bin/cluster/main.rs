//! `cluster`: a Kubernetes cluster of two nodes for a person to try things in, with Weft's images on its nodes. `cargo xtask
//! cluster up` starts it in the background; it ends with this process.
#![allow(clippy::disallowed_methods, reason = "no async runtime runs here")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use weft_testbed::binaries::binary;
use weft_testbed::kubernetes::{KubeCluster, obstacle};
use weft_testbed::{isolate, isolated, poll};

/// Runs a cluster until it is told to end. Needs root.
#[derive(Debug, Parser)]
struct Arguments {
    /// Directory for the scripts `kubectl` and `weft`, which appear when the cluster is ready.
    directory: PathBuf,
}

fn main() -> ExitCode {
    weft_testbed::helper::run_if_asked();
    let arguments = Arguments::parse();
    isolated(|| match run(&arguments.directory) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error:#}");
            1
        }
    })
}

fn run(directory: &Path) -> Result<()> {
    if let Some(why) = obstacle() {
        bail!("this machine cannot run nodes: {why}");
    }
    let kube = KubeCluster::start("cluster", &["east", "west"])?;
    let plane = kube.control_plane();
    // `weft` first: whoever waits, waits for `kubectl`.
    for (name, program) in [("weft", binary("weft")?), ("kubectl", plane.program_path("kubectl"))] {
        let script = format!(
            "#!/bin/sh\n\
             exec nsenter -t {} -m -p nsenter --net=/run/netns/{} env KUBECONFIG={} {program} \"$@\"\n",
            isolate::host_pid(),
            plane.place().netns().name(),
            plane.kubeconfig().display(),
        );
        let path = directory.join(name);
        let beside = directory.join(format!(".{name}"));
        std::fs::write(&beside, script).with_context(|| beside.display().to_string())?;
        std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o755))?;
        std::fs::rename(&beside, &path).with_context(|| path.display().to_string())?;
    }
    loop {
        poll::pause(Duration::from_secs(3600));
    }
}
