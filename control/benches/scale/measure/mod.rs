//! One measurement: a synthetic cluster in a stand-in for the API server, the real program as a process of its own, and
//! agents on its TLS port. Everything it starts or writes ends with the value that stands for it.

mod agents;
mod api;
mod cluster;
pub mod report;

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use weft_xds::{ControlEndpoint, TokenSource};

use self::{agents::Seen, api::Api, cluster::Cluster, report::Figures};
use crate::support::{Control, get};

/// Until everything is listed and translated, and until every agent has it.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// How long after the last change its arrival is waited for.
const LAST_ARRIVALS: Duration = Duration::from_secs(20);
/// When no agent was sent anything for so long, what led to it is over.
const QUIET: Duration = Duration::from_millis(400);
/// It is not waited for longer than this.
const SETTLE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(20);

type Error = Box<dyn std::error::Error + Send + Sync>;

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub nodes: usize,
    pub pods: usize,
    pub services: usize,
    pub agents: usize,
    /// Pods replaced a second.
    pub churn: usize,
    /// How long pods are replaced.
    pub seconds: usize,
}

impl Sizes {
    fn check(self) -> Result<(), Error> {
        // A node's pods share a /24, some of whose addresses must be free for new ones.
        const PODS_PER_NODE: usize = 200;
        let Self { nodes, pods, services, agents, churn, seconds } = self;
        let problem = match () {
            () if [nodes, pods, services, agents, churn, seconds].contains(&0) => {
                "no size can be zero".to_owned()
            }
            () if nodes > 8192 => "at most 8192 nodes have room for their addresses".to_owned(),
            () if services > 200_000 => "at most 200000 Services have room for their addresses".to_owned(),
            () if pods > nodes * PODS_PER_NODE => format!("at most {PODS_PER_NODE} pods have room on a node"),
            () if services > pods => "every Service needs a pod".to_owned(),
            () if agents > nodes => "an agent needs a node".to_owned(),
            () => return Ok(()),
        };
        Err(problem.into())
    }
}

/// Measures `program`. Says on standard error how it goes if `say`.
pub async fn run(program: &Path, sizes: Sizes, say: bool) -> Result<Figures, Error> {
    sizes.check()?;
    let progress = |text: String| {
        if say {
            eprintln!("{text}")
        }
    };
    let directory = tempfile::tempdir()?;
    let api = Api::default();
    let server = api.serve().await?;
    progress(format!(
        "making {} pods on {} nodes behind {} Services",
        sizes.pods, sizes.nodes, sizes.services
    ));
    let mut cluster = Cluster::fill(api.clone(), sizes);

    let begin = Instant::now();
    let command = command(program, directory.path(), server)?;
    // Starting waits for its first words, which it has only after the API server has answered.
    let control = tokio::task::spawn_blocking(|| Control::start(command)).await?;
    wait(START_TIMEOUT, "weft-control is ready", async || {
        get(&control.ready, "/readyz").await.starts_with("HTTP/1.1 200")
    })
    .await?;
    let mut figures = Figures { sizes, ready: begin.elapsed(), ..Figures::new(sizes) };
    let process = Process(control.child.id());
    figures.memory_ready = process.memory()?.resident;
    progress(format!("ready after {:.1} s", figures.ready.as_secs_f64()));

    let seen = Arc::new(Seen::default());
    let begin = Instant::now();
    for node in 0..sizes.agents {
        let node = cluster::node_name(node * (sizes.nodes / sizes.agents));
        agents::start(&endpoint(directory.path(), &api, &control, &node)?, node, seen.clone())?;
    }
    wait(START_TIMEOUT, "every agent has a first state", async || {
        seen.full.load(Ordering::Relaxed) == sizes.agents || seen.ended.load(Ordering::Relaxed) > 0
    })
    .await?;
    if seen.ended.load(Ordering::Relaxed) > 0 {
        return Err("a stream ended before its agent had all of its first state".into());
    }
    figures.first_state = begin.elapsed();
    figures.first_bytes = seen.first_bytes.load(Ordering::Relaxed) / sizes.agents as u64;
    figures.first_resources = seen.first_resources.load(Ordering::Relaxed) / sizes.agents as u64;
    progress(format!("{} agents in sync after {:.1} s", sizes.agents, figures.first_state.as_secs_f64()));
    // Agents report whom they have enrolled.
    settle(&seen).await;

    progress(format!("replacing {} pods a second for {} s", sizes.churn, sizes.seconds));
    figures.memory_agents = process.memory()?.resident;
    let before = Counts::take(&seen, &api, &control, &process).await?;
    let begin = Instant::now();
    figures.changes = churn(&mut cluster, sizes, &seen).await;
    figures.churned = begin.elapsed();
    let after = Counts::take(&seen, &api, &control, &process).await?;
    let expected = figures.changes * sizes.agents;
    let arrived = async {
        while seen.arrivals() < expected && seen.ended.load(Ordering::Relaxed) == 0 {
            sleep(LOOK).await;
        }
    };
    // What does not arrive in time is counted as lost.
    let _ = timeout(LAST_ARRIVALS, arrived).await;
    // Removals, and that a new pod is enrolled, may come after it.
    settle(&seen).await;
    let end = Counts::take(&seen, &api, &control, &process).await?;

    figures.cores = (after.cpu - before.cpu).as_secs_f64() / figures.churned.as_secs_f64();
    figures.own_cores = (after.own_cpu - before.own_cpu).as_secs_f64() / figures.churned.as_secs_f64();
    figures.messages = end.messages - before.messages;
    figures.bytes = end.bytes - before.bytes;
    figures.reports = end.reports - before.reports;
    figures.writes = end.writes - before.writes;
    figures.conditions = end.conditions - before.conditions;
    figures.states = end.states - before.states;
    figures.arrivals = seen.sorted_arrivals();
    figures.lost = expected.saturating_sub(figures.arrivals.len());
    figures.ended = seen.ended.load(Ordering::Relaxed);
    let memory = process.memory()?;
    (figures.memory_end, figures.memory_peak) = (memory.resident, memory.peak);
    Ok(figures)
}

async fn churn(cluster: &mut Cluster, sizes: Sizes, seen: &Seen) -> usize {
    let changes = sizes.churn * sizes.seconds;
    let mut tick = interval(Duration::from_secs(1) / sizes.churn as u32);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for _ in 0..changes {
        tick.tick().await;
        cluster.replace_a_pod(|uid| seen.expect(uid));
    }
    changes
}

async fn settle(seen: &Seen) {
    let quiet = async {
        let mut last = None;
        while last != Some(seen.messages.load(Ordering::Relaxed)) {
            last = Some(seen.messages.load(Ordering::Relaxed));
            sleep(QUIET).await;
        }
    };
    // A controller that never rests is measured as it is.
    let _ = timeout(SETTLE, quiet).await;
}

fn command(program: &Path, directory: &Path, server: SocketAddr) -> Result<Command, Error> {
    let kubeconfig = serde_json::json!({"apiVersion": "v1", "kind": "Config", "current-context": "a",
        "clusters": [{"name": "a", "cluster": {"server": format!("http://{server}")}}],
        "users": [{"name": "a", "user": {"token": "t"}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a", "namespace": "weft-system"}}]});
    let path = directory.join("kubeconfig");
    fs::write(&path, kubeconfig.to_string())?;
    let mut command = Command::new(program);
    command.arg("--kubernetes").env("KUBECONFIG", path);
    for flag in ["--listen", "--metrics-listen", "--ready-listen"] {
        command.args([flag, "127.0.0.1:0"]);
    }
    Ok(command)
}

fn endpoint(directory: &Path, api: &Api, control: &Control, node: &str) -> Result<ControlEndpoint, Error> {
    let token = directory.join(node);
    fs::write(&token, format!("weft.{node}.bench"))?;
    let root =
        api.get("configmaps", "weft-system/weft-root").ok_or("weft-control has not published its root")?;
    let root: serde_json::Value = serde_json::from_slice(&root)?;
    Ok(ControlEndpoint {
        address: control.agents.clone(),
        ca: root["data"]["root.pem"].as_str().unwrap_or_default().as_bytes().to_owned().into(),
        server_name: "weft-control".to_owned(),
        token: TokenSource::file(token),
        seen: None,
    })
}

async fn wait(within: Duration, what: &str, holds: impl AsyncFn() -> bool) -> Result<(), Error> {
    let held = async {
        while !holds().await {
            sleep(LOOK).await;
        }
    };
    timeout(within, held).await.map_err(|_| format!("not within {within:?}: {what}").into())
}

/// What only ever grows.
#[derive(Debug, Clone, Copy)]
struct Counts {
    cpu: Duration,
    own_cpu: Duration,
    messages: u64,
    bytes: u64,
    reports: u64,
    writes: u64,
    conditions: u64,
    states: u64,
}

impl Counts {
    async fn take(seen: &Seen, api: &Api, control: &Control, process: &Process) -> Result<Self, Error> {
        let metrics = get(&control.metrics, "/metrics").await;
        let states = metrics.lines().find_map(|line| line.strip_prefix("weft_control_snapshots_total "));
        Ok(Self {
            cpu: process.cpu()?,
            own_cpu: Process(std::process::id()).cpu()?,
            messages: seen.messages.load(Ordering::Relaxed),
            bytes: seen.bytes.load(Ordering::Relaxed),
            reports: seen.reports.load(Ordering::Relaxed),
            writes: api.writes(),
            conditions: api.conditions(),
            states: states.and_then(|count| count.parse().ok()).ok_or("no weft_control_snapshots_total")?,
        })
    }
}

/// A process, by its id.
#[derive(Debug, Clone, Copy)]
struct Process(u32);

/// In bytes.
#[derive(Debug, Clone, Copy)]
struct Memory {
    resident: u64,
    /// The most there was.
    peak: u64,
}

impl Process {
    fn memory(self) -> Result<Memory, Error> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
        };
        let missing = "no resident memory in /proc";
        Ok(Memory { resident: field("VmRSS:").ok_or(missing)?, peak: field("VmHWM:").ok_or(missing)? })
    }

    /// Spent so far, by all threads, in user and kernel mode.
    fn cpu(self) -> Result<Duration, Error> {
        // In USER_HZ, which is 100 on every architecture Linux runs on.
        const TICK: Duration = Duration::from_millis(10);
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        // The name, in parentheses, may hold anything. utime and stime are the 12th and 13th fields after it.
        let (_, fields) = stat.rsplit_once(')').ok_or("no process name in /proc")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u32>);
        Ok(TICK * ticks.sum::<Result<u32, _>>()?)
    }
}
