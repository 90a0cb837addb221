//! What is measured against plain TCP, and the rounds. Two pairs of pods on the same two nodes: one pair in the mesh,
//! one outside it, so that both take the same wire, kernel and programs.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use weft_testbed::programs::{self, Page};
use weft_testbed::{Cluster, Pod, Process};

use crate::report::{Floor, Series};
use crate::tools;

const SECONDS: u32 = 4;
const HTTP_PORT: u16 = 80;

/// A work that plain TCP does as well.
#[derive(Debug)]
pub struct Work {
    pub name: &'static str,
    kind: Kind,
    floor: Option<f64>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Bulk over so many connections.
    Stream(u32),
    /// Requests by so many kept connections.
    Requests(u32),
    /// Requests by so many clients that open a connection for each.
    Connections(u32),
}

pub const ALL: [Work; 5] = [
    Work { name: "stream-1", kind: Kind::Stream(1), floor: Some(0.29) },
    Work { name: "stream-4", kind: Kind::Stream(4), floor: None },
    Work { name: "requests-1", kind: Kind::Requests(1), floor: Some(0.38) },
    Work { name: "requests-64", kind: Kind::Requests(64), floor: Some(0.26) },
    Work { name: "connections-32", kind: Kind::Connections(32), floor: Some(0.28) },
];

/// One round's result: how much, and p99 where latency applies.
#[derive(Clone, Copy, Debug)]
struct Round {
    rate: f64,
    p99: Option<f64>,
}

/// Client and server pods with servers running.
struct Pair {
    client: Pod,
    server: Pod,
    _servers: [Process; 2],
}

impl Pair {
    fn start(cluster: &Cluster, namespace: &str) -> Result<Pair> {
        let client = cluster.pod(&format!("{namespace}/client"), "north")?;
        let server = cluster.pod(&format!("{namespace}/server"), "south")?;
        let nginx = programs::nginx(&server, HTTP_PORT, &Page::new("page", 1000))?;
        let servers = [nginx, tools::iperf_server(&server)?];
        Ok(Pair { client, server, _servers: servers })
    }

    fn at(&self, port: u16) -> SocketAddr {
        self.server.at(port)
    }

    fn measure(&self, kind: Kind, seconds: u32) -> Result<Round> {
        let requests = |connections, close| -> Result<Round> {
            let found = tools::wrk(&self.client, self.at(HTTP_PORT), connections, close, seconds)?;
            Ok(Round { rate: found.per_second, p99: Some(found.p99) })
        };
        match kind {
            Kind::Stream(streams) => {
                let rate = tools::iperf(&self.client, self.at(tools::IPERF_PORT), streams, seconds)?;
                Ok(Round { rate, p99: None })
            }
            Kind::Requests(connections) => requests(connections, false),
            Kind::Connections(connections) => requests(connections, true),
        }
    }
}

/// Measures `works`, `runs` times each, and says on standard error how it goes.
pub fn measure(works: &[&Work], runs: u32) -> Result<Vec<Series>> {
    let cluster = Cluster::new("bench").node("north").node("south").start()?;
    let direct = Pair::start(&cluster, "plain")?;
    let weft = Pair::start(&cluster, "mesh")?;
    cluster.enroll("mesh", &[&weft.client, &weft.server])?;
    cluster.wait_outside(&[&direct.client, &direct.server])?;

    let mut all = Vec::new();
    for work in works {
        let streams = matches!(work.kind, Kind::Stream(_));
        let mut rates = Series::new(
            work.name,
            if streams { "Gbit/s" } else { "per second" },
            work.floor.map(Floor::Ratio),
        );
        let mut latencies = Series::new(&format!("{}-p99", work.name), "ms", None);
        // Tunnels, caches and the processor's clock settle outside the measurement.
        direct.measure(work.kind, 1).with_context(|| format!("{}, direct", work.name))?;
        weft.measure(work.kind, 1).with_context(|| format!("{} through Weft", work.name))?;
        for run in 1..=runs {
            let (direct, weft) = round(&direct, &weft, work, run)?;
            rates.add(direct.rate, weft.rate);
            if let (Some(direct), Some(weft)) = (direct.p99, weft.p99) {
                latencies.add(direct, weft);
            }
            eprintln!("{}", rates.progress(run, runs));
        }
        all.push(rates);
        if !streams {
            all.push(latencies);
        }
    }
    Ok(all)
}

/// Both in turn; who begins changes from run to run.
fn round(direct: &Pair, weft: &Pair, work: &Work, run: u32) -> Result<(Round, Round)> {
    let plain = || direct.measure(work.kind, SECONDS).with_context(|| format!("{}, direct", work.name));
    let meshed = || weft.measure(work.kind, SECONDS).with_context(|| format!("{} through Weft", work.name));
    if run % 2 == 1 {
        let first = plain()?;
        Ok((first, meshed()?))
    } else {
        let first = meshed()?;
        Ok((plain()?, first))
    }
}
