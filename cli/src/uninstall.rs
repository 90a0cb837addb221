//! `weft uninstall`: takes pods out of the mesh first, as when their labels go, then the CNI plugin out of the nodes, and
//! then removes what was installed. Done in this order no pod is left refusing connections. It can be run again after it
//! was interrupted.

use std::{
    collections::BTreeSet,
    io::{self, BufRead, IsTerminal, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use tokio::time::sleep;
use weft_api::agent::PluginStatus;

use crate::{
    agents::{self, Agents},
    chart::{self, Values},
    cluster::{Cluster, Target, path},
};

const EXAMPLES: &str = "\
Examples:
  Ask first:
    weft uninstall

  In a script:
    weft uninstall --yes

On a node whose agent is gone, run as root what this command cannot do there:
    weft-agent break-glass            # frees the node's pods: they talk in the clear from then on
    /opt/cni/bin/weft-cni uninstall   # takes the CNI plugin out";

/// Take every pod out of the mesh, and Weft out of the cluster.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    target: Target,
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
    /// Go on where a node's agent cannot be asked, or pods stay in the mesh.
    #[arg(long)]
    force: bool,
}

const LOOK: Duration = Duration::from_secs(1);
/// A controller starts, and agents let connections in flight end, well within it.
const PATIENCE: Duration = Duration::from_secs(120);
/// What the controller makes, beside what is installed.
const MADE: [(&str, &str); 4] = [
    ("api/v1", "secrets/weft-ca"),
    ("api/v1", "configmaps/weft-root"),
    ("api/v1", "configmaps/weft-policies"),
    ("apis/coordination.k8s.io/v1", "leases/weft-control"),
];
/// The namespace that nobody else has a use for; any other may be shared.
const OURS: &str = "weft-system";

pub async fn run(arguments: &Arguments) -> Result<ExitCode> {
    let namespace = arguments.target.namespace.as_str();
    let cluster = Cluster::connect(arguments.target.context.as_deref()).await?;
    let control = format!("/apis/apps/v1/namespaces/{namespace}/deployments/weft-control");
    let found = cluster.find(&control).await?;
    if found.is_some() {
        let agents = agents::ask(&cluster, namespace).await?;
        if !arguments.yes && !confirm(&agents)? {
            eprintln!("nothing was changed");
            return Ok(ExitCode::FAILURE);
        }
        step("taking pods out of the mesh");
        // One replica: of two, one would still say "in" while the other says "out", for longer than pods that leave answer
        // tunnels.
        let off = json!({"spec": {"replicas": 1, "template": {"spec": {"containers": [
            {"name": "weft-control", "env": [{"name": "WEFT_MESH_ENABLED", "value": "false"}]}]}}}});
        cluster.patch(&control, &off).await.context("switching the mesh off")?;
        let left = until_empty(&cluster, namespace).await?;
        if !left.is_empty() && !arguments.force {
            bail!(
                "still in the mesh: {}. --force goes on, and leaves them refusing connections",
                left.join(", ")
            );
        }
        step("taking the CNI plugin out of the nodes");
        let failed = retire(&cluster, namespace).await?;
        if !failed.is_empty() && !arguments.force {
            bail!(
                "{}\nsee `weft uninstall --help` for what to run there; --force goes on without",
                failed.join("\n")
            );
        }
    }
    step("removing what was installed");
    remove(&cluster, namespace).await?;
    eprintln!("Weft is gone. Labels weft.dev/mesh of namespaces and pods are as they were");
    Ok(ExitCode::SUCCESS)
}

fn step(what: &str) {
    eprintln!("{what} ...");
}

fn confirm(agents: &Agents) -> Result<bool> {
    let pods: usize =
        agents.values().filter_map(|answer| Some(answer.as_ref().ok()?.status.pods.len())).sum();
    eprintln!(
        "{pods} pods on {} nodes leave the mesh: what they say is in the clear from then on.",
        agents.len()
    );
    if !io::stdin().is_terminal() {
        bail!("nobody can be asked here; say --yes");
    }
    eprint!("Go on? [y/N] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Waits until no agent has a pod; returns those that are left.
async fn until_empty(cluster: &Cluster, namespace: &str) -> Result<Vec<String>> {
    let end = Instant::now() + PATIENCE;
    loop {
        let agents = agents::ask(cluster, namespace).await?;
        let left = agents.iter().flat_map(|(node, answer)| match answer {
            Ok(answer) => answer.status.pods.iter().map(|pod| pod.uid.clone()).collect(),
            Err(why) => vec![format!("perhaps pods of {node}, whose agent does not answer ({why})")],
        });
        let left: Vec<String> = left.collect();
        if left.is_empty() || Instant::now() > end {
            return Ok(left);
        }
        sleep(LOOK).await;
    }
}

/// Has every agent take the plugin out; returns where that failed.
async fn retire(cluster: &Cluster, namespace: &str) -> Result<Vec<String>> {
    let mut failed = Vec::new();
    let mut done = BTreeSet::new();
    for (node, pod) in agents::pods(&cluster.list(&agents::path(namespace)).await?) {
        match cluster.exec(namespace, &pod, "weft-agent", &["/weft-agent", "retire"]).await {
            Ok(_) => drop(done.insert(node)),
            Err(error) => failed.push(format!("{node}: {error:#}")),
        }
    }
    // A node that has had an agent and has none now keeps its plugin.
    let nodes: Vec<Value> = cluster.list("/api/v1/nodes").await?;
    let linux = nodes.iter().filter(|node| node["status"]["nodeInfo"]["operatingSystem"] != "windows");
    for node in linux.filter_map(|node| node["metadata"]["name"].as_str()) {
        if !done.contains(node) && !failed.iter().any(|why| why.starts_with(&format!("{node}: "))) {
            failed.push(format!("{node}: no agent runs there"));
        }
    }
    for (node, answer) in agents::ask(cluster, namespace).await? {
        if let Ok(answer) = answer
            && answer.status.plugin != PluginStatus::NotManaged
        {
            failed.push(format!("{node}: the CNI plugin is still there"));
        }
    }
    Ok(failed)
}

async fn remove(cluster: &Cluster, namespace: &str) -> Result<()> {
    let own = format!("/api/v1/namespaces/{namespace}");
    let installed = chart::objects(&Values::default(), namespace)?;
    // The DaemonSet first: its pods need what they may do until they have ended.
    let mut paths: Vec<String> = installed.iter().rev().map(path).filter(|path| *path != own).collect();
    paths.extend(MADE.map(|(group, object)| format!("/{group}/namespaces/{namespace}/{object}")));
    let agents = agents::path(namespace);
    for path in paths {
        cluster.delete(&path).await?;
        if path.ends_with("/daemonsets/weft-agent") {
            let end = Instant::now() + PATIENCE;
            let is_agent = |pod: &Value| pod["metadata"]["labels"]["app.kubernetes.io/name"] == "weft-agent";
            while cluster.list::<Value>(&agents).await?.iter().any(is_agent) && Instant::now() < end {
                sleep(LOOK).await;
            }
        }
    }
    if namespace != OURS {
        eprintln!("the namespace {namespace} stays, for what else is in it");
        return Ok(());
    }
    cluster.delete(&own).await?;
    let end = Instant::now() + PATIENCE;
    while cluster.find(&own).await?.is_some() {
        if Instant::now() > end {
            bail!(
                "the namespace {namespace} is still being deleted; kubectl get namespace {namespace} -o yaml says why"
            );
        }
        sleep(LOOK).await;
    }
    Ok(())
}
