//! Stories of which endpoint of a Service a caller is given: near ones, the same one again, one that is ending, itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::{pause, until};
use weft_testbed::sockets::read_line;
use weft_testbed::{Cluster, Moment, Pod, Server, Service, addresses, servers};

use crate::runner::Scenario;
use crate::shop::{GREET, opened};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "service_nearness",
        "internalTrafficPolicy and trafficDistribution: endpoints of the caller's node or zone",
        nearness,
    ),
    Scenario::new("service_affinity", "sessionAffinity: a caller is given the same endpoint again", affinity),
    Scenario::new(
        "service_draining",
        "an endpoint that is ending serves until there is another; a pod calls itself by its Service",
        draining,
    ),
];

const LIMIT: Duration = Duration::from_secs(10);
const NAME: &str = "shop/web";

/// A client on the node `west`, and a server on each of three nodes: `east` is a zone of its own, `west` and `north` are
/// in the same one.
struct Zones {
    _servers: [Server; 3],
    east: Pod,
    west: Pod,
    north: Pod,
    client: Pod,
    service: Service,
    cluster: Cluster,
}

impl Zones {
    fn open(cluster: Builder) -> Result<Zones> {
        let cluster = cluster.node("east").node("west").node("north").start()?;
        for (node, zone) in [("east", "a"), ("west", "b"), ("north", "b")] {
            cluster.directory().node_in(node, zone)?;
        }
        let [east, west, north] = [("shop/east", "east"), ("shop/west", "west"), ("shop/north", "north")]
            .map(|(name, node)| cluster.pod(name, node));
        let (east, west, north, client) = (east?, west?, north?, cluster.pod("shop/client", "west")?);
        let servers = [&east, &west, &north].map(|pod| Server::start(pod, GREET, servers::greet));
        let [one, two, three] = servers;
        let service = cluster.service(NAME, 80, GREET, &[&east, &west, &north])?;
        cluster.enroll("shop", &[&east, &west, &north, &client])?;
        Ok(Zones { _servers: [one?, two?, three?], east, west, north, client, service, cluster })
    }

    /// Writes the Service anew. Every pod is one of `endpoints`, all ready.
    fn serve(&self, spec: Value, endpoints: &[&Pod]) -> Result<()> {
        let endpoints: Vec<_> = endpoints.iter().map(|pod| (*pod, json!({"ready": true}))).collect();
        self.cluster.change_service(NAME, self.service, spec, &endpoints)
    }

    /// Who answers the next call of `caller`.
    fn answers(&self, caller: &Pod, to: SocketAddr) -> Result<IpAddr> {
        let mut stream = caller.connect(to)?;
        let line = read_line(&mut stream)?;
        let (_, local) = line.split_once(' ').with_context(|| format!("greeting {line:?}"))?;
        Ok(local.parse::<SocketAddr>()?.ip())
    }

    /// In the end it is each of `expected`, over both families, and nobody else.
    fn given(&self, what: &str, caller: &Pod, expected: &[&Pod]) -> Result<()> {
        let expected: BTreeSet<IpAddr> = expected.iter().flat_map(|pod| pod.addresses()).collect();
        until(LIMIT, what, || {
            let mut seen = BTreeSet::new();
            for _ in 0..40 {
                for to in [self.service.at(), self.service.at_v6()] {
                    seen.extend(self.answers(caller, to).ok());
                }
            }
            Ok(seen == expected)
        })
    }
}

fn nearness(cluster: Builder) -> Result<()> {
    let zones = Zones::open(cluster)?;
    let Zones { east, west, north, client, .. } = &zones;
    let capture = zones.cluster.capture()?;
    let start = Moment::now();
    zones.given("without a wish, everybody", client, &[east, west, north])?;

    zones.serve(json!({"internalTrafficPolicy": "Local"}), &[east, west, north])?;
    zones.given("Local: the caller's node", client, &[west])?;
    zones.serve(json!({"internalTrafficPolicy": "Local"}), &[east, north])?;
    zones.given("Local: nobody on the caller's node", client, &[])?;
    zones.given("Local: another caller's node", north, &[north])?;

    zones.serve(json!({"trafficDistribution": "PreferSameZone"}), &[east, west, north])?;
    zones.given("PreferSameZone: the caller's zone", client, &[west, north])?;
    zones.given("PreferSameZone: another zone", east, &[east])?;
    zones.serve(json!({"trafficDistribution": "PreferClose"}), &[east])?;
    zones.given("PreferClose: nobody in the zone", client, &[east])?;

    zones.serve(json!({"trafficDistribution": "PreferSameNode"}), &[east, west, north])?;
    zones.given("PreferSameNode: the caller's node", client, &[west])?;
    zones.serve(json!({"trafficDistribution": "PreferSameNode"}), &[east, north])?;
    zones.given("PreferSameNode: the caller's zone", client, &[north])?;

    // The node moves, and with it its pods.
    zones.serve(json!({"trafficDistribution": "PreferSameZone"}), &[east, north])?;
    zones.cluster.directory().node_in("north", "a")?;
    zones.given("the zone of a node changes", client, &[east, north])?;
    let enrolled = addresses(&[east, west, north, client]);
    // Every greeting names the server's port.
    capture.stop()?.nothing_in_the_clear(start, &enrolled, format!(":{GREET}").as_bytes())
}

fn affinity(cluster: Builder) -> Result<()> {
    let zones = Zones::open(cluster)?;
    let Zones { east, west, north, client, .. } = &zones;
    let everybody = [east, west, north];
    let sticky = |seconds: u32| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}});
    zones.serve(sticky(600), &everybody)?;
    let mut first = None;
    until(LIMIT, "always the same one", || {
        let once = || zones.answers(client, zones.service.at());
        let one = once()?;
        first = everybody.into_iter().find(|pod| pod.addresses().contains(&one));
        for _ in 0..30 {
            if once()? != one {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    let first = first.context("a stranger answered")?;
    zones.given("IPv6 as well", client, &[first])?;

    // The next agent makes the same choice.
    let agent = zones.cluster.agent("west")?;
    agent.kill()?;
    agent.start()?;
    zones.given("after the agent was replaced", client, &[first])?;

    let others: Vec<&Pod> = everybody.into_iter().filter(|pod| pod.uid() != first.uid()).collect();
    zones.serve(sticky(600), &others)?;
    let mut second = None;
    until(LIMIT, "another one, now that it is gone", || {
        let one = zones.answers(client, zones.service.at())?;
        second = others.iter().copied().find(|pod| pod.addresses().contains(&one));
        Ok(second.is_some())
    })?;
    let second = second.context("a stranger answered")?;
    zones.given("always that one", client, &[second])?;
    zones.serve(sticky(2), &everybody)?;
    zones.given("the first is back, and the caller stays where it is", client, &[second])?;
    // The timeout in force is the one at the time of the last call.
    pause(Duration::from_secs(3));
    zones.given("forgotten after a time without calls", client, &[first])
}

fn draining(cluster: Builder) -> Result<()> {
    let zones = Zones::open(cluster)?;
    let Zones { east, west, north, client, .. } = &zones;
    let ending = json!({"ready": false, "serving": true, "terminating": true});
    let sick = json!({"ready": false, "serving": false, "terminating": false});
    let ready = json!({"ready": true});
    let change =
        |endpoints: &[(&Pod, Value)]| zones.cluster.change_service(NAME, zones.service, json!({}), endpoints);
    change(&[(east, ready), (west, ending.clone()), (north, sick.clone())])?;
    zones.given("the one that is ready", client, &[east])?;
    change(&[(west, ending), (north, sick)])?;
    zones.given("the one that is ending, where nobody is ready", client, &[west])?;

    // A pod is its own Service's only endpoint.
    zones.serve(json!({}), &[west])?;
    zones.given("a pod that calls itself", west, &[west])?;
    let capture = zones.cluster.capture()?;
    let counted = || {
        opened(zones.cluster.agent("west")?, &[("source_workload", "west"), ("destination_workload", "west")])
    };
    let before = counted()?;
    let seen = zones.answers(west, zones.service.at())?;
    ensure!(west.addresses().contains(&seen), "{seen} answered");
    ensure!(counted()? == before + 1.0, "the agent has not counted it");
    let wire = capture.stop()?;
    ensure!(wire.between(&addresses(&[west])).next().is_none(), "a call to itself crossed the wire");
    Ok(())
}
