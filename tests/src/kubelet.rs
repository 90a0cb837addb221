//! A stand-in for a node's kubelet: a cgroup of its own, and processes of root's in it that do what probes do. It decides
//! nothing, and tells nobody how probes went.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::helper::{Attempt, Outcome};
use crate::isolate::cgroup2_root;
use crate::kubernetes::NodeCgroups;
use crate::place::Place;
use crate::process::run_ok;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Its cgroup, which ends with the value.
#[derive(Debug)]
pub struct Kubelet {
    name: String,
    cgroups: NodeCgroups,
}

impl Kubelet {
    /// For the nodes of the cluster with this name: they share it.
    pub fn new(cluster: &str) -> Result<Kubelet> {
        let name = format!("{cluster}-kubelet");
        Ok(Kubelet { cgroups: NodeCgroups::unified(&name)?, name })
    }

    /// Its cgroup, as `/proc/PID/cgroup` has it.
    pub fn cgroup(&self) -> Result<String> {
        let directory = self.cgroups.directories().next().context("no directory")?;
        let path = directory.strip_prefix(cgroup2_root()?)?;
        Ok(Path::new("/").join(path).display().to_string())
    }

    /// Comes back in another cgroup of the same name, as service managers do it.
    pub fn restart(&mut self) -> Result<()> {
        self.cgroups.remove(TIMEOUT);
        self.cgroups = NodeCgroups::unified(&self.name)?;
        Ok(())
    }

    /// An HTTP probe from `node`; what the application answered.
    pub fn http(&self, node: &Place, to: SocketAddr, path: &str) -> Result<String> {
        let url = format!("http://{to}{path}");
        self.run(node, "curl", &["--silent", "--show-error", "--fail", "--max-time", "5", &url])
    }

    /// A TCP probe from `node`, of an application that speaks first; the line that it said.
    pub fn tcp(&self, node: &Place, to: SocketAddr) -> Result<String> {
        let script =
            format!("exec 3<>/dev/tcp/{}/{} && read -r -t 5 line <&3 && echo \"$line\"", to.ip(), to.port());
        self.run(node, "bash", &["-c", &script])
    }

    /// Whether somebody in its cgroup who is not root reaches `to` from `node`.
    pub fn unprivileged(&self, node: &Place, attempt: &Attempt) -> Result<Outcome> {
        attempt.run_in(node, &self.cgroups)
    }

    fn run(&self, node: &Place, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command: Command = node.command(program, arguments);
        self.cgroups.enter_before(&mut command);
        let output = run_ok(command, 2 * TIMEOUT).with_context(|| format!("a probe by {}", node.name()))?;
        let text = String::from_utf8(output)?.trim().to_owned();
        ensure!(!text.is_empty(), "the application said nothing");
        Ok(text)
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        if !crate::bed::keeping() {
            self.cgroups.remove(TIMEOUT);
        }
    }
}
