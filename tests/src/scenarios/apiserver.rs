//! Stories of a real API server: what Weft may ask of it, whom the controller believes, and what happens when the two lose
//! each other. The nodes and pods are the bed's; no kubelet runs, so that a cluster takes seconds.

mod ordinary_pod;
mod outages;
mod rbac;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use weft_testbed::agent::tunnel_in;
use weft_testbed::kubernetes::ApiCluster;
use weft_testbed::netns::panic_text;
use weft_testbed::poll::{pause, until};
use weft_testbed::{Pod, Server, Traffic, servers, traffic};

use crate::runner::Scenario;
use crate::shop::{ECHO, marker};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "kubernetes_api_rbac",
        "controller, agents and plugin do their work with the shipped permissions, and can do nothing else",
        rbac::rbac,
    ),
    Scenario::new(
        "kubernetes_api_ordinary_pod",
        "what a pod's token, and one that is no good, gets from the controller: its own certificate or nothing",
        ordinary_pod::ordinary_pod,
    ),
    Scenario::new(
        "kubernetes_api_lost_delete",
        "what was deleted while the controller could not watch is gone, though no watch ever says so",
        outages::lost_delete,
    ),
    Scenario::new(
        "kubernetes_api_replicas",
        "two controllers are one: one root, equal versions, and either can be killed",
        outages::replicas,
    ),
    Scenario::new(
        "kubernetes_api_restart",
        "the API server is killed: agents serve on, and what changes right after its return arrives",
        outages::restart,
    ),
];

pub const NODES: [&str; 2] = ["east", "west"];
const ENABLED: (&str, &str) = ("weft.dev/mesh", "enabled");
/// How long news may take from the API server to the agents, on a busy machine.
pub const NEWS: Duration = Duration::from_secs(15);

const CONTROL: &str = "weft-system/weft-control";
const AGENT: &str = "weft-system/weft-agent";
const PLUGIN: &str = "weft-system/weft-cni";

const CALLERS: &str = "weft_control_authentication_refused_total";
const CERTIFICATES: &str = "weft_control_certificates_refused_total";

/// A client on `east` and an echo server on `west`, both enrolled, with everything that runs for them.
pub struct Shop {
    _echo: Server,
    pub client: Pod,
    pub web: Pod,
    pub cluster: ApiCluster,
}

impl Shop {
    pub fn start(cluster: ApiCluster) -> Result<Shop> {
        cluster.start_controllers()?;
        Self::open(cluster)
    }

    /// In a cluster whose controllers run.
    fn open(cluster: ApiCluster) -> Result<Shop> {
        cluster.start_agents()?;
        cluster.namespace("shop", &[ENABLED])?;
        let web = cluster.pod("shop/web", "west")?;
        let client = cluster.pod("shop/client", "east")?;
        let echo = Server::start(&web, ECHO, servers::echo)?;
        cluster.wait_enrolled(&[&web, &client])?;
        Ok(Shop { _echo: echo, client, web, cluster })
    }

    /// While `work` goes on, connections of the client succeed, and every agent knows both pods as enrolled.
    fn undisturbed(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let targets = [self.web.at(ECHO), self.web.at_v6(ECHO)];
        let traffic = Traffic::start(&self.client, &targets, &marker("api"), Duration::from_millis(20));
        let stop = AtomicBool::new(false);
        let (worked, watched) = std::thread::scope(|scope| {
            let watching = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::SeqCst) {
                    for (agent, pod) in
                        self.cluster.agents().flat_map(|a| [(a, &self.web), (a, &self.client)])
                    {
                        let known = tunnel_in(&agent.config_dump()?, &pod.uid());
                        let node = agent.node();
                        ensure!(
                            known.as_deref() == Some("hbone"),
                            "{node} knows {} as {known:?}",
                            pod.name()
                        );
                    }
                    pause(Duration::from_millis(20));
                }
                Ok(())
            });
            let worked = work().and_then(|()| traffic.wait_for_success(&targets, 3, NEWS));
            stop.store(true, Ordering::SeqCst);
            (worked, watching.join().map_err(|panic| anyhow!("the watching thread: {}", panic_text(&panic))))
        });
        worked?;
        watched??;
        let calls = traffic.stop();
        let failed: Vec<_> = calls.iter().filter_map(|call| call.error.as_ref()).collect();
        ensure!(failed.is_empty(), "{} of {} connections failed: {failed:?}", failed.len(), calls.len());
        Ok(())
    }

    /// The client's connections are answered now.
    fn serves(&self) -> Result<()> {
        for to in [self.web.at(ECHO), self.web.at_v6(ECHO)] {
            traffic::call(&self.client, to, "served").with_context(|| format!("calling {to}"))?;
        }
        Ok(())
    }

    /// Waits until no agent has heard of that workload.
    fn wait_gone(&self, pod: &Pod) -> Result<()> {
        until(NEWS, &format!("{} is gone everywhere", pod.name()), || {
            for agent in self.cluster.agents() {
                if tunnel_in(&agent.config_dump()?, &pod.uid()).is_some() {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }
}

fn bearer(token: &str) -> Option<String> {
    Some(format!("Bearer {token}"))
}
