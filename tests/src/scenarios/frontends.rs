//! Stories of Services that are dialled at ports of nodes and of external addresses. There is no kube-proxy here: at such
//! a port nobody answers but the mesh.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::manifest::Frontends;
use weft_testbed::traffic::call;
use weft_testbed::{Moment, Place, Server, addresses, servers};

use crate::outside::is_direct;
use crate::runner::Scenario;
use crate::shop::{ECHO, GREET, Shop, marker, must_be_refused, opened};

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "node_ports_and_external_addresses",
    "a Service's ports at nodes and external addresses go by tunnel, and no other port there",
    ports,
)];

/// Nobody's, and no route leads there.
const EXTERNAL: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 9))];
const WEB_NODE_PORT: u16 = 30080;
const PLAIN_NODE_PORT: u16 = 30099;

fn at(place: &Place, port: u16) -> [SocketAddr; 2] {
    [place.at(port), place.at_v6(port)]
}

fn ports(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let other = shop.cluster.pod("shop/other", "west")?;
    let plain = shop.cluster.pod("plain/west", "west")?;
    // Its address is a load balancer's, too.
    let legacy = shop.cluster.outside("legacy")?;
    let nodes = [shop.cluster.node("east")?, shop.cluster.node("west")?];
    for node in nodes {
        shop.cluster.directory().node(node.name(), &node.addresses())?;
    }
    let west = nodes[1];
    let _servers = [
        Server::start(&other, ECHO, servers::echo)?,
        Server::start(west, GREET, servers::greet)?,
        Server::start(west, PLAIN_NODE_PORT, servers::greet)?,
        Server::start(west, 82, servers::greet)?,
        Server::start(&legacy, GREET, servers::greet)?,
    ];
    let frontends = |node_port, external_ips: &[IpAddr], ingress: &[IpAddr]| Frontends {
        node_port,
        external_ips: external_ips.to_vec(),
        ingress: ingress.to_vec(),
    };
    let web = frontends(Some(WEB_NODE_PORT), &EXTERNAL, &legacy.addresses());
    shop.cluster.service_at("shop/web", 80, ECHO, &[&shop.web], web)?;
    // Shares the external addresses, and has a node's own as well.
    let shared = [EXTERNAL, west.addresses()].concat();
    shop.cluster.service_at("shop/other", 81, ECHO, &[&other], frontends(None, &shared, &[]))?;
    // With nobody enrolled behind it, it is none of the mesh's business.
    let unmeshed = frontends(Some(PLAIN_NODE_PORT), &west.addresses(), &[]);
    shop.cluster.service_at("plain/web", 82, ECHO, &[&plain], unmeshed)?;

    let secret = marker("frontends");
    let capture = shop.cluster.capture()?;
    shop.check_echo(&secret).context("before the label")?;
    let unanswered =
        [west.at(WEB_NODE_PORT), west.at_v6(WEB_NODE_PORT), legacy.at(80), (EXTERNAL[0], 80).into()];
    for to in unanswered {
        must_be_refused(&shop.client, to, &secret, Duration::from_secs(5)).context("before the label")?;
    }
    let label = Moment::after_plain_traffic();
    shop.cluster.enroll("shop", &[&shop.web, &shop.client, &other])?;

    let web = [
        at(nodes[0], WEB_NODE_PORT),
        at(west, WEB_NODE_PORT),
        EXTERNAL.map(|ip| (ip, 80).into()),
        at(&legacy, 80),
    ];
    let other_ports = [EXTERNAL.map(|ip| (ip, 81).into()), at(west, 81)];
    for (service, targets) in [("web", web.concat()), ("other", other_ports.concat())] {
        for to in &targets {
            call(&shop.client, *to, &secret).with_context(|| format!("{service} at {to}"))?;
        }
        let labels = [("reporter", "source"), ("security", "mutual_tls"), ("destination_service", service)];
        let counted = opened(shop.east()?, &labels)?;
        ensure!(counted == targets.len() as f64, "{counted} of {} calls are named {service}", targets.len());
    }

    // Every other port there is as without the mesh: one kernel socket at each end.
    let east = opened(shop.east()?, &[])?;
    for to in [at(west, GREET), at(west, PLAIN_NODE_PORT), at(west, 82), at(&legacy, GREET)].concat() {
        ensure!(is_direct(&shop.client, to)?, "something sits between the client and {to}");
    }
    ensure!(opened(shop.east()?, &[])? == east, "an agent was in the path of a port that is nobody's");

    // A port that two Services claim is nobody's, and the ports beside it are as they were.
    shop.cluster.service_at("shop/third", 81, ECHO, &[&shop.web], frontends(None, &EXTERNAL, &[]))?;
    weft_testbed::poll::until(Duration::from_secs(10), "a disputed port is refused", || {
        Ok(call(&shop.client, (EXTERNAL[0], 81).into(), &secret).is_err())
    })?;
    call(&shop.client, (EXTERNAL[0], 80).into(), &secret).context("beside a disputed port")?;
    call(&shop.client, west.at(81), &secret).context("the same port of another address")?;

    let pods = addresses(&[&shop.web, &shop.client, &other]);
    capture.stop()?.encrypted_since(label, &pods, secret.as_bytes(), 14 * secret.len() as u64)
}
