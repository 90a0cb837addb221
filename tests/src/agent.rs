//! The agent of one node as a process, and what it says about itself.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::bed::Bed;
use crate::binaries::binary;
use crate::http::get;
use crate::metrics::Metrics;
use crate::place::Place;
use crate::pod::Pod;
use crate::poll::until;
use crate::process::{Process, run_ok};
use crate::relay::Relay;

const READY_TIMEOUT: Duration = Duration::from_secs(30);
pub(crate) const ENROLL_TIMEOUT: Duration = Duration::from_secs(30);

/// `weft-agent` of one node, running or not. A second one may run beside it during an upgrade.
#[derive(Debug)]
pub struct Agent {
    bed: Bed,
    place: Place,
    pub(crate) relay: Relay,
    control_ca: PathBuf,
    flags: Vec<String>,
    processes: Mutex<Processes>,
}

#[derive(Debug, Default)]
struct Processes {
    current: Option<Process>,
    started: u32,
}

impl Agent {
    pub(crate) fn new(
        bed: &Bed,
        node: &Place,
        relay: Relay,
        control_ca: PathBuf,
        flags: Vec<String>,
    ) -> Agent {
        Agent { bed: bed.clone(), place: node.clone(), relay, control_ca, flags, processes: Mutex::default() }
    }

    /// The node it serves.
    pub fn node(&self) -> &str {
        self.place.name()
    }

    /// Where it finds the controller, on its node.
    pub fn controller_address(&self) -> SocketAddr {
        self.relay.address()
    }

    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Result<()> {
        self.start_unready()?;
        self.wait_ready()
    }

    /// Starts it without waiting.
    pub fn start_unready(&self) -> Result<()> {
        let process = self.spawn()?;
        // Dropped outside the lock: ending the predecessor waits for it.
        let predecessor = self.processes().current.replace(process);
        drop(predecessor);
        Ok(())
    }

    /// Starts a successor beside the running one, which is returned: it goes on until it is ended or dropped.
    pub fn start_successor(&self) -> Result<Process> {
        let process = self.spawn()?;
        self.processes().current.replace(process).with_context(|| format!("no agent runs on {}", self.node()))
    }

    /// Waits until `/readyz` says so.
    pub fn wait_ready(&self) -> Result<()> {
        let ready = SocketAddr::from(([127, 0, 0, 1], 15021));
        until(READY_TIMEOUT, &format!("the agent of {} is ready", self.node()), || {
            ensure!(self.running()?, "the agent of {} ended", self.node());
            let reply = get(&self.place.connect(ready)?, "/readyz")?;
            ensure!(reply.status == 200, "it says {}", reply.body.trim());
            Ok(true)
        })
    }

    /// SIGKILL.
    pub fn kill(&self) -> Result<()> {
        let process = self.processes().current.take();
        process.with_context(|| format!("no agent runs on {}", self.node()))?.kill()
    }

    /// SIGTERM; returns the process so that its end can be watched.
    pub fn terminate(&self) -> Result<Process> {
        let process = self.processes().current.take();
        let process = process.with_context(|| format!("no agent runs on {}", self.node()))?;
        process.signal(Signal::SIGTERM)?;
        Ok(process)
    }

    /// Whether it runs.
    pub fn running(&self) -> Result<bool> {
        self.processes().current.as_mut().map_or(Ok(false), Process::running)
    }

    /// Process id.
    pub fn pid(&self) -> Result<u32> {
        Ok(self
            .processes()
            .current
            .as_ref()
            .with_context(|| format!("no agent runs on {}", self.node()))?
            .pid())
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        crate::process::resident_bytes(self.pid()?)
    }

    /// A scrape of its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        let address = SocketAddr::from(([127, 0, 0, 1], 15020));
        Metrics::parse(&get(&self.place.connect(address)?, "/metrics")?.body)
    }

    /// GET on the admin socket, which must be served by this agent and not by a predecessor that drains.
    pub fn admin(&self, path: &str) -> Result<crate::http::Reply> {
        let socket = UnixStream::connect(self.admin_socket()).context("the admin socket")?;
        let peer = getsockopt(&socket, PeerCredentials).context("who serves the admin socket")?.pid();
        ensure!(peer == self.pid()? as i32, "the admin socket is still served by a predecessor");
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        get(&socket, path)
    }

    /// What it knows, as JSON.
    pub fn config_dump(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.admin("/config_dump")?.body).context("the config dump")
    }

    /// Whether it knows the workload `uid` to be reachable by tunnel only.
    pub fn knows_as_enrolled(&self, uid: &str) -> Result<bool> {
        Ok(self.known_tunnel(uid)?.as_deref() == Some("hbone"))
    }

    /// Whether it knows the workload `uid`, and to be outside the mesh.
    pub fn knows_as_outside(&self, uid: &str) -> Result<bool> {
        Ok(self.known_tunnel(uid)?.as_deref() == Some("none"))
    }

    fn known_tunnel(&self, uid: &str) -> Result<Option<String>> {
        Ok(tunnel_in(&self.config_dump()?, uid))
    }

    /// How far the enrolment of its own pod `uid` is, in lower case: `hold`, `published`, ... `None` where it is not.
    pub fn phase_of(&self, uid: &str) -> Result<Option<String>> {
        let dump = self.config_dump()?;
        let pod = dump["pods"].as_array().and_then(|all| all.iter().find(|pod| pod["uid"] == uid)).cloned();
        Ok(pod.and_then(|pod| pod["phase"].as_str().map(str::to_ascii_lowercase)))
    }

    /// What all agents of this node have written so far.
    pub fn log(&self) -> Result<String> {
        let mut text = String::new();
        for number in 1..=self.processes().started {
            text.push_str(&std::fs::read_to_string(self.place.dir().join(log_name(number)))?);
        }
        Ok(text)
    }

    /// The instance name under which it pins.
    pub fn instance(&self) -> String {
        format!("{}-{}", self.bed.name().replace('.', "-"), self.node())
    }

    /// The private bpffs that it pins in.
    pub fn bpffs(&self) -> PathBuf {
        self.place.dir().join("bpffs")
    }

    /// `weft-agent break-glass` on its node.
    pub fn break_glass(&self) -> Result<()> {
        let (instance, bpffs) = (self.instance(), self.bpffs());
        let flags = ["break-glass", "--instance", &instance, "--bpffs", &bpffs.to_string_lossy()];
        let command = self.place.command(&binary("weft-agent")?, flags);
        run_ok(command, Duration::from_secs(10)).map(drop)
    }

    fn admin_socket(&self) -> PathBuf {
        self.place.dir().join("agent.sock")
    }

    pub(crate) fn token_file(&self) -> PathBuf {
        self.place.dir().join("token")
    }

    fn spawn(&self) -> Result<Process> {
        let number = {
            let mut processes = self.processes();
            processes.started += 1;
            processes.started
        };
        let mut command = self.place.command(
            &binary("weft-agent")?,
            [
                "--node",
                self.node(),
                "--control",
                &self.relay.address().to_string(),
                "--control-ca",
                &self.control_ca.to_string_lossy(),
                "--token-file",
                &self.token_file().to_string_lossy(),
                "--instance",
                &self.instance(),
                "--bpffs",
                &self.bpffs().to_string_lossy(),
                "--admin-socket",
                &self.admin_socket().to_string_lossy(),
            ],
        );
        command.args(&self.flags);
        // What a service manager gives; an agent that needs more raises it.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        // SAFETY: the closure makes one system call, no allocation, no lock.
        unsafe { command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, 1024, hard)?)) };
        self.place.start_command(log_name(number).trim_end_matches(".log"), command)
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, Processes> {
        self.processes.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn log_name(number: u32) -> String {
    format!("agent-{number}.log")
}

/// Waits until each of `agents` knows each of `pods` as enrolled, and their own agents have let them go.
pub(crate) fn wait_enrolled(agents: &[&Agent], pods: &[&Pod]) -> Result<()> {
    for pod in pods {
        until(ENROLL_TIMEOUT, &format!("{} is enrolled everywhere", pod.name()), || {
            for agent in agents {
                if !agent.knows_as_enrolled(&pod.uid())? {
                    return Ok(false);
                }
                if agent.node() == pod.node && agent.phase_of(&pod.uid())?.as_deref() != Some("published") {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
    }
    Ok(())
}

/// How an agent reaches the workload `uid`, by its config dump: `hbone` or `none`, or `None` where it has not heard of it.
pub fn tunnel_in(dump: &serde_json::Value, uid: &str) -> Option<String> {
    let workload = dump["workloads"].as_array()?.iter().find(|workload| workload["uid"] == uid)?;
    workload["tunnel"].as_str().map(str::to_ascii_lowercase)
}
