//! Controllers that have not read equally much of a real API server: an agent that loses its own and comes to one that is
//! behind must not be taken back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use weft_testbed::capture::Moment;
use weft_testbed::cluster::Builder;
use weft_testbed::kubernetes::ApiCluster;
use weft_testbed::netns::panic_text;
use weft_testbed::poll::{pause, until};
use weft_testbed::{Pod, Server, Traffic, servers, traffic};

use crate::runner::Scenario;
use crate::shop::{ECHO, marker};

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "kubernetes_api_behind",
    "a controller's watches are stuck while pods join, and the other one dies: agents keep what they have seen",
    behind,
)];

const NODES: [&str; 2] = ["east", "west"];
/// How long news may take from the API server to the agents, on a busy machine.
const NEWS: Duration = Duration::from_secs(15);

fn behind(cluster: Builder) -> Result<()> {
    let cluster = ApiCluster::start(cluster.name(), &NODES, 2)?;
    cluster.start_controllers()?;
    let [own, lagging] = cluster.controllers() else { return Err(anyhow!("not two controllers")) };
    cluster.prefer_first_controller();
    lagging.kill()?;
    cluster.start_agents()?;
    cluster.namespace("shop", &[])?;
    let (web, client) = (cluster.pod("shop/web", "west")?, cluster.pod("shop/client", "east")?);
    let _echo = Server::start(&web, ECHO, servers::echo)?;
    for agent in cluster.agents() {
        until(NEWS, "the pods are known and outside the mesh", || {
            Ok(agent.knows_as_outside(&web.uid())? && agent.knows_as_outside(&client.uid())?)
        })?;
    }
    let (text, targets) = (marker("behind"), [web.at(ECHO), web.at_v6(ECHO)]);
    let capture = cluster.capture()?;
    for to in targets {
        traffic::call(&client, to, &text)?;
    }

    // The second one starts, reads everything, and then hears no more of it without knowing.
    lagging.start()?;
    cluster.door(1)?.hold_open();
    cluster.namespace("shop", &[("weft.dev/mesh", "enabled")])?;
    cluster.wait_enrolled(&[&web, &client])?;
    let start = Moment::after_plain_traffic();
    let calls = Traffic::start(&client, &targets, &text, Duration::from_millis(20));
    calls.wait_for_success(&targets, 3, NEWS)?;
    still_enrolled(&cluster, &[&web, &client], || {
        own.kill()?;
        until(NEWS * 2, "the controller that was behind has caught up and serves the agents", || {
            let metrics = lagging.metrics()?;
            ensure!(metrics.sum("weft_control_xds_streams", &[]) >= 2.0, "it serves fewer");
            Ok(metrics.sum("weft_control_pods_enrolled", &[]) >= 2.0)
        })?;
        // It has read again what the agents asked for; of what nobody asked for, the old connections are still all it had.
        let services =
            || lagging.metrics().map(|all| all.sum("weft_control_objects", &[("kind", "Service")]));
        let before = services()?;
        cluster.api().apply(&serde_json::json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"ports": [{"port": 80}]}
        }))?;
        until(NEWS, "a Service is known", || Ok(services()? > before))?;
        // And so goes on by itself, with what is new.
        let late = cluster.pod("shop/late", "east")?;
        cluster.wait_enrolled(&[&late])?;
        calls.wait_for_success(&targets, 3, NEWS)
    })?;
    let log = lagging.log()?;
    ensure!(log.contains("listing namespaces anew: others have seen"), "its watches were not stuck:\n{log}");
    let calls = calls.stop();
    let failed: Vec<_> = calls.iter().filter_map(|call| call.error.as_ref()).collect();
    ensure!(failed.is_empty(), "{} of {} connections failed: {failed:?}", failed.len(), calls.len());
    let enrolled = [web.addresses(), client.addresses()].concat();
    capture.stop()?.nothing_in_the_clear(start, &enrolled, text.as_bytes())
}

/// While `work` goes on, every agent knows each of `pods` as enrolled.
fn still_enrolled(cluster: &ApiCluster, pods: &[&Pod], work: impl FnOnce() -> Result<()>) -> Result<()> {
    let stop = AtomicBool::new(false);
    let (worked, watched) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::SeqCst) {
                for (agent, pod) in
                    cluster.agents().flat_map(|agent| pods.iter().map(move |pod| (agent, pod)))
                {
                    let known = agent.knows_as_enrolled(&pod.uid())?;
                    ensure!(known, "{} was taken back to a state without {}", agent.node(), pod.name());
                }
                pause(Duration::from_millis(20));
            }
            Ok(())
        });
        let worked = work();
        stop.store(true, Ordering::SeqCst);
        (worked, watching.join().map_err(|panic| anyhow!("the watching thread: {}", panic_text(&panic))))
    });
    watched??;
    worked
}
