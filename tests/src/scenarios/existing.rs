//! The story of connections that are older than the enrolment of their pods.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::until;
use weft_testbed::sockets::read_line;
use weft_testbed::{Agent, Dial, Place, Pod, Server, servers};

use crate::outside::is_direct;
use crate::runner::Scenario;
use crate::shop::{GREET, Shop, still_alive};

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "existing_connections",
    "live on and are counted; an annotation has them cut, and no others",
    existing,
)];

/// Agents look again every five seconds.
const SOON: Duration = Duration::from_secs(15);
const CUT: &str = "weft.dev/cut-existing-connections";

/// The Namespace `shop`, with the label or without, and what the annotation says.
fn write_namespace(shop: &Shop, mesh: &str, cut: &str) -> Result<()> {
    let metadata =
        format!("{{name: shop, labels: {{weft.dev/mesh: {mesh}}}, annotations: {{{CUT}: {cut:?}}}}}");
    let text = format!("apiVersion: v1\nkind: Namespace\nmetadata: {metadata}\n");
    shop.cluster.directory().write("namespace-shop.yaml", &text)
}

fn greeted(from: &Place, dial: &Dial) -> Result<TcpStream> {
    let mut stream = from.dial(dial)?;
    read_line(&mut stream)?;
    Ok(stream)
}

fn all_alive(streams: &mut [TcpStream], what: &str) -> Result<()> {
    streams.iter_mut().try_for_each(|stream| still_alive(stream, what).with_context(|| what.to_owned()))
}

/// Waits until the agent says so of the pod, in its status and its metrics.
fn counted(agent: &Agent, pod: &Pod, expected: u64) -> Result<()> {
    until(SOON, &format!("{expected} connections of {} are counted", pod.name()), || {
        let dump = agent.config_dump()?;
        let pods = dump["pods"].as_array().context("no pods")?;
        let status = pods.iter().find(|status| status["uid"] == pod.uid()).context("no such pod")?;
        ensure!(status["connections_before_enrollment"] == expected, "it says {status}");
        let name = pod.name().rsplit('/').next().unwrap_or_default();
        let labels = [("workload", name), ("namespace", "shop")];
        let gauge = agent.metrics()?.sum("weft_connections_before_enrollment", &labels);
        ensure!(gauge == expected as f64, "the metric says {gauge}");
        Ok(true)
    })
}

fn existing(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let (client, web) = (&shop.client, &shop.web);
    let legacy = shop.cluster.outside("legacy")?;
    let plain = shop.cluster.pod("plain/west", "west")?;
    let _servers =
        [Server::start(&legacy, GREET, servers::greet)?, Server::start(&plain, GREET, servers::greet)?];
    let to_web = Dial::to(web.at(GREET));
    let mut old = vec![
        greeted(client, &to_web)?,
        greeted(client, &Dial::to(web.at_v6(GREET)))?,
        greeted(client, &to_web.v4_mapped())?,
    ];
    // As old, but not between pods of the mesh.
    let mut others = vec![
        greeted(client, &Dial::to(legacy.at(GREET)))?,
        greeted(client, &Dial::to(plain.at(GREET)))?,
        greeted(client, &Dial::to(plain.at_v6(GREET)))?,
        greeted(&legacy, &Dial::to(web.at(GREET)))?,
        greeted(&plain, &Dial::to(web.at_v6(GREET)))?,
    ];
    shop.enroll()?;
    shop.cluster.wait_outside(&[&plain])?;
    let both = || -> Result<[(&Agent, &Pod); 2]> { Ok([(shop.east()?, client), (shop.west()?, web)]) };
    let count = |expected| both()?.iter().try_for_each(|(agent, pod)| counted(agent, pod, expected));
    count(3)?;
    all_alive(&mut old, "older than the enrolment")?;
    drop(old.pop());
    count(2).context("one has ended")?;

    // What goes by the tunnel is none of them, for an agent either that finds it there.
    let mut tunnelled = vec![greeted(client, &Dial::to(web.at(GREET)))?];
    let mut predecessors = Vec::new();
    for (agent, _) in both()? {
        predecessors.push(agent.start_successor()?);
    }
    shop.cluster.wait_enrolled(&[web, client])?;
    count(2).context("by new agents")?;
    tunnelled.push(greeted(client, &Dial::to(web.at_v6(GREET)))?);
    all_alive(&mut old, "older than the enrolment")?;

    // Cut on demand, of pods that have long been in the mesh.
    write_namespace(&shop, "enabled", "true")?;
    count(0).context("with the annotation")?;
    for stream in &mut old {
        ensure!(still_alive(stream, "cut?").is_err(), "a connection is said to be cut, and goes on");
    }
    all_alive(&mut tunnelled, "by the tunnel")?;
    all_alive(&mut others, "not between pods of the mesh")?;
    let direct = is_direct(client, web.at(GREET)).context("the client's next attempt")?;
    ensure!(!direct, "the client's next attempt took no tunnel");

    // And as soon as both are in the mesh, where it was there before the label.
    write_namespace(&shop, "disabled", "true")?;
    shop.cluster.wait_outside(&[web, client])?;
    until(SOON, "new connections are plain again", || is_direct(client, web.at(GREET)))?;
    let mut old = greeted(client, &Dial::to(web.at(GREET)))?;
    write_namespace(&shop, "enabled", "true")?;
    shop.cluster.wait_enrolled(&[web, client])?;
    until(SOON, "the connection is cut", || Ok(still_alive(&mut old, "cut?").is_err()))?;
    all_alive(&mut others, "not between pods of the mesh")
}
