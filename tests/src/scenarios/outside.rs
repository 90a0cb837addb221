//! Stories of what the mesh leaves alone, and of pods that join and leave it while they run.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::{pause, until};
use weft_testbed::programs::{self, Page, curl, curl_page};
use weft_testbed::sockets::read_line;
use weft_testbed::{Moment, Place, Server, servers};

use crate::runner::Scenario;
use crate::shop::{GREET, Shop, marker, opened, still_alive};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "outside_untouched",
        "what lies outside the mesh keeps plain kernel TCP, end to end",
        untouched,
    ),
    Scenario::new(
        "plaintext_from_outside",
        "is let in, with its true address, and called what it is",
        let_in,
    ),
    Scenario::new(
        "label_and_unlabel_running",
        "open connections live on, new ones follow the label",
        relabel,
    ),
];

/// Whether the connection that `from` opens to a greeting server at `to` is one kernel socket at each end, with nobody
/// between: then the server sees exactly the client's address and port.
pub fn is_direct(from: &Place, to: SocketAddr) -> Result<bool> {
    let mut stream = from.connect(to).with_context(|| format!("{} to {to}", from.name()))?;
    let own = stream.local_addr()?;
    let line = read_line(&mut stream)?;
    still_alive(&mut stream, "and on")?;
    Ok(line.split(' ').next() == Some(own.to_string().as_str()))
}

fn untouched(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let legacy = shop.cluster.outside("legacy")?;
    let plain_east = shop.cluster.pod("plain/east", "east")?;
    let plain_west = shop.cluster.pod("plain/west", "west")?;
    let _servers = [
        Server::start(&legacy, GREET, servers::greet)?,
        Server::start(&plain_west, GREET, servers::greet)?,
        Server::start(&shop.client, GREET, servers::greet)?,
    ];
    shop.enroll()?;
    shop.cluster.wait_outside(&[&plain_east, &plain_west])?;
    shop.check_echo("the mesh works")?;
    ensure!(
        !is_direct(&shop.client, shop.web.at(GREET))?,
        "a tunnelled connection looks direct: this proves nothing"
    );
    let east = opened(shop.east()?, &[])?;

    let pairs: [(&Place, [SocketAddr; 2]); 5] = [
        (&shop.client, [legacy.at(GREET), legacy.at_v6(GREET)]),
        (&shop.client, [plain_west.at(GREET), plain_west.at_v6(GREET)]),
        (&plain_east, [plain_west.at(GREET), plain_west.at_v6(GREET)]),
        (&plain_east, [legacy.at(GREET), legacy.at_v6(GREET)]),
        (&legacy, [plain_west.at(GREET), plain_west.at_v6(GREET)]),
    ];
    for (from, targets) in pairs {
        for to in targets {
            ensure!(is_direct(from, to)?, "something sits between {} and {to}", from.name());
        }
    }
    ensure!(
        opened(shop.east()?, &[])? == east,
        "an agent was in the path of a connection that leaves the mesh"
    );
    // A refusal from outside is a refusal at connect, as without the mesh.
    let refused = shop.client.connect(legacy.at(9)).map_err(|error| error.kind());
    ensure!(
        refused.as_ref().err() == Some(&std::io::ErrorKind::ConnectionRefused),
        "a closed port outside the mesh: {refused:?}"
    );
    Ok(())
}

fn let_in(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let legacy = shop.cluster.outside("legacy")?;
    let plain = shop.cluster.pod("plain/east", "east")?;
    let page = Page::new(&marker("plaintext"), 100_000);
    let _nginx = programs::nginx(&shop.web, 80, &page)?;
    shop.enroll()?;
    shop.cluster.wait_outside(&[&plain])?;

    let labels = [("reporter", "destination"), ("security", "plaintext"), ("destination_workload", "web")];
    let before = opened(shop.west()?, &labels)?;
    for from in [&legacy, &*plain] {
        for (server, own) in
            [(shop.web.at(80), from.v4.to_string()), (shop.web.at_v6(80), from.v6.to_string())]
        {
            curl_page(from, server, &page)?;
            let seen = String::from_utf8_lossy(&curl(from, server, "/who")?).into_owned();
            ensure!(seen == own, "nginx sees {seen} where {own} called");
        }
    }
    until(Duration::from_secs(5), "eight plaintext connections are counted and logged", || {
        let counted = opened(shop.west()?, &labels)? - before;
        ensure!(counted == 8.0, "{counted} of 8 were counted");
        let log = shop.west()?.log()?;
        let logged = |place: &Place| {
            let own = place.v4.to_string();
            log.lines()
                .any(|line| line.contains("access") && line.contains("plaintext") && line.contains(&own))
        };
        ensure!(logged(&legacy) && logged(&plain), "the access log does not call them plaintext");
        Ok(true)
    })
}

fn relabel(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let secret = marker("relabel");
    let greet = shop.web.at(GREET);
    let secure = [("security", "mutual_tls"), ("reporter", "source")];
    let open = |what: &str| -> Result<std::net::TcpStream> {
        let mut stream = shop.client.connect(greet).with_context(|| what.to_owned())?;
        read_line(&mut stream)?;
        Ok(stream)
    };
    let mut before = open("before the label")?;
    ensure!(is_direct(&shop.client, greet)?, "something is in the path before the label");

    shop.enroll()?;
    still_alive(&mut before, "opened before the label").context("after the label")?;
    let tunnels = opened(shop.east()?, &secure)?;
    let mut during = open("with the label")?;
    ensure!(opened(shop.east()?, &secure)? == tunnels + 1.0, "with the label, no tunnel was used");
    still_alive(&mut during, "opened with the label")?;

    shop.cluster.unlabel_namespace("shop")?;
    shop.cluster.wait_outside(&[&shop.web, &shop.client])?;
    until(Duration::from_secs(15), "new connections are plain again", || is_direct(&shop.client, greet))?;
    // Longer than any grace that the agents give.
    for _ in 0..5 {
        pause(Duration::from_secs(1));
        still_alive(&mut before, "opened before the label").context("after unlabelling")?;
        still_alive(&mut during, "opened with the label").context("after unlabelling")?;
    }
    drop(during);

    // When the last tunnelled connection is gone, nothing of the mesh is left in the pods.
    for pod in [&shop.client, &shop.web] {
        until(Duration::from_secs(20), &format!("{} is as it was", pod.name()), || {
            for family in ["-4", "-6"] {
                let rules = pod.run("ip", [family, "rule"])?;
                ensure!(!String::from_utf8_lossy(&rules).contains("0x111"), "the policy rule is still there");
                let routes = pod.try_run("ip", [family, "route", "show", "table", "100"])?.stdout;
                ensure!(routes.is_empty(), "a route is left: {}", String::from_utf8_lossy(&routes));
            }
            Ok(true)
        })?;
    }
    still_alive(&mut before, "opened before the label").context("in the end")?;

    // And back in, to the same end as the first time.
    let capture = shop.cluster.capture()?;
    weft_testbed::traffic::call(&shop.client, shop.echoes()[0], &secret).context("out of the mesh")?;
    let label = Moment::after_plain_traffic();
    shop.enroll()?;
    shop.check_echo(&secret).context("labelled again")?;
    capture.stop()?.encrypted_since(label, &shop.enrolled(), secret.as_bytes(), 4 * secret.len() as u64)
}
