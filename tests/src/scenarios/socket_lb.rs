//! The story of a CNI that turns a Service's address into a backend's inside connect(), before the mesh sees it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::helper::{Attempt, Outcome, Privilege};
use weft_testbed::kubernetes::NodeCgroups;
use weft_testbed::poll::until;
use weft_testbed::{Moment, Pod, Server, Service, SocketLb, servers, socket_lb};

use crate::runner::Scenario;
use crate::shop::{ECHO, Shop, marker, opened};

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "socket_load_balancing",
    "a stand-in for Cilium's rewrites addresses in connect(): the agent still sees the Service",
    beside,
)];

/// Connects as a process of the enrolled client does; what the server said, after the peer's address.
struct Caller<'a> {
    shop: &'a Shop,
    cgroups: NodeCgroups,
    payload: String,
}

impl Caller<'_> {
    fn attempt(&self, to: SocketAddr) -> Attempt {
        Attempt::new(Privilege::None, to, &self.payload).show_peer()
    }

    /// The attempt must be answered, and getpeername() must say `peer`.
    fn reaches(&self, peer: SocketAddr, attempt: &Attempt) -> Result<()> {
        let outcome = attempt.run_in(&self.shop.client, &self.cgroups)?;
        let expected = Outcome::Answered(format!("{peer} {}", self.payload));
        ensure!(outcome == expected, "{outcome:?} instead of {expected:?}");
        Ok(())
    }

    /// As `reaches`, and the client's agent must have opened one tunnelled connection to that Service for it.
    fn tunnels(&self, peer: SocketAddr, service: &str, attempt: &Attempt) -> Result<()> {
        let labels = [("reporter", "source"), ("security", "mutual_tls"), ("destination_service", service)];
        let count = || opened(self.shop.east()?, &labels);
        let before = count()?;
        self.reaches(peer, attempt)?;
        let tunnelled = count()? - before;
        ensure!(tunnelled == 1.0, "{tunnelled} connections to the service {service} went by tunnel");
        Ok(())
    }

    /// As `reaches`, and no agent may have had a part in it.
    fn passes(&self, peer: SocketAddr, attempt: &Attempt) -> Result<()> {
        let before = opened(self.shop.east()?, &[])?;
        self.reaches(peer, attempt)?;
        ensure!(opened(self.shop.east()?, &[])? == before, "the agent carried what is not the mesh's");
        Ok(())
    }
}

fn beside(cluster: Builder) -> Result<()> {
    let node = NodeCgroups::unified(cluster.name())?;
    let kubepods = node.pods().next().context("no directory")?;
    let shop = Shop::open_without_agents(
        cluster.agent_flag("--pods-cgroup").agent_flag(&kubepods.display().to_string()),
    )?;
    let db = shop.cluster.pod("plain/db", "west")?;
    let _db_echo = Server::start(&db, ECHO, servers::echo)?;
    let web_service = shop.cluster.service("shop/web", 80, ECHO, &[&shop.web])?;
    let db_service = shop.cluster.service("plain/db", 80, ECHO, &[&db])?;
    let odd_service = shop.cluster.service("plain/odd", 80, ECHO, &[&db])?;

    // There before the agents, as a CNI is. Nobody listens at a Service's address, and nobody else translates it.
    let _socket_lb = SocketLb::attach(
        &shop.client,
        &[
            to_pod(&web_service, &shop.web),
            to_pod(&db_service, &db),
            // Its choice is its own: in the mesh, though as far as the mesh knows none of the Service's backends is.
            to_pod(&odd_service, &shop.web),
        ]
        .concat(),
    )?;
    for agent in shop.cluster.agents() {
        agent.start()?;
    }
    until(Duration::from_secs(5), "the agent says that Services will be hidden", || {
        let log = shop.east()?.log()?;
        Ok(log.lines().any(|line| line.contains("WARN") && line.contains(socket_lb::NAME)))
    })?;
    // As on a node on which the first pod starts.
    let cgroups = node.pod("client")?;
    shop.enroll()?;
    shop.cluster.wait_outside(&[&db])?;

    let secret = marker("socket-lb");
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    let caller = Caller { shop: &shop, cgroups, payload: secret.clone() };
    let web = &shop.web;
    services_are_recognised(&caller, &web_service)?;
    for (to, backend) in [(db_service.at(), db.at(ECHO)), (db_service.at_v6(), db.at_v6(ECHO))] {
        let other = Caller { payload: "not of the mesh".to_owned(), cgroups: node.pod("client")?, ..caller };
        other.passes(backend, &other.attempt(to)).with_context(|| format!("outside the mesh, {to}"))?;
        // A socket's earlier life does not count.
        let first = if to.is_ipv4() { web_service.at() } else { web_service.at_v6() };
        other.reaches(backend, &other.attempt(backend).after(first)).context("after the Service")?;
    }
    for (to, backend) in [(odd_service.at(), web.at(ECHO)), (odd_service.at_v6(), web.at_v6(ECHO))] {
        caller
            .tunnels(backend, "unknown", &caller.attempt(to))
            .with_context(|| format!("{to}, let go, with an enrolled backend"))?;
        let first = if to.is_ipv4() { db_service.at() } else { db_service.at_v6() };
        caller.tunnels(backend, "unknown", &caller.attempt(backend).after(first)).context("after db")?;
    }

    shop.east()?.kill()?;
    for to in [web_service.at(), web_service.at_v6(), odd_service.at(), odd_service.at_v6()] {
        let outcome = caller.attempt(to).run_in(&shop.client, &caller.cgroups)?;
        let at_once = matches!(&outcome, Outcome::Refused(why) if why.contains("os error 111"));
        ensure!(at_once, "without an agent, {to}: {outcome:?}");
    }
    shop.east()?.start()?;
    shop.cluster.wait_enrolled(&[web, &shop.client])?;
    services_are_recognised(&caller, &web_service).context("the agent restarted")?;

    // All pods' cgroup goes, as it does with the last pod, and comes again with a new one.
    node.remove(Duration::from_secs(5));
    let again = Caller { cgroups: node.pod("client")?, payload: secret.clone(), shop: &shop };
    let late = shop.cluster.pod("shop/late", "east")?;
    shop.cluster.wait_enrolled(&[&late])?;
    services_are_recognised(&again, &web_service).context("in a new cgroup")?;

    let named = format!("dst.addr={} ", web_service.at());
    until(Duration::from_secs(5), "the access log names the Service", || {
        let log = shop.east()?.log()?;
        Ok(log.lines().any(|line| line.contains(&named) && line.contains("dst.service=\"web\"")))
    })?;
    let recording = capture.stop()?;
    ensure!(!recording.find(b"not of the mesh").is_empty(), "what went in the clear was not seen");
    recording.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())?;
    node.remove(Duration::from_secs(5));
    Ok(())
}

fn to_pod(service: &Service, pod: &Pod) -> [(SocketAddr, SocketAddr); 2] {
    [(service.at(), pod.at(ECHO)), (service.at_v6(), pod.at_v6(ECHO))]
}

/// Every kind of socket that dials it reaches it, sees its address as the peer's, and is counted under its name.
fn services_are_recognised(caller: &Caller<'_>, service: &Service) -> Result<()> {
    let (v4, v6) = (service.at(), service.at_v6());
    let mut dials = vec![
        ("IPv4", v4, caller.attempt(v4)),
        ("IPv6", v6, caller.attempt(v6)),
        ("v4-mapped", v4, caller.attempt(v4).v4_mapped()),
    ];
    if caller.shop.client.netns().read_sysctl("mptcp/enabled").is_ok_and(|value| value == "1") {
        dials.push(("MPTCP", v4, caller.attempt(v4).mptcp()));
    }
    for (what, peer, attempt) in dials {
        caller.tunnels(peer, "web", &attempt).with_context(|| format!("the Service over {what}"))?;
    }
    Ok(())
}
