//! Memory of an agent: idle, with a thousand idle connections, and under load. A new cluster for each run, since an
//! allocator does not give everything back.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use weft_testbed::programs::{self, Page};
use weft_testbed::{Cluster, Pod, Server, poll, servers};

use crate::report::{Floor, Series};
use crate::tools;

pub const NAMES: [&str; 3] = ["memory-idle", "memory-load", "memory-1000"];
const CONNECTIONS: usize = 1000;
const LOAD_SECONDS: u32 = 4;
const FLOOR: f64 = 20.0;
const ECHO_PORT: u16 = 7;
const HTTP_PORT: u16 = 80;

/// Measures all three, `runs` times, and says on standard error how it goes.
pub fn measure(runs: u32) -> Result<Vec<Series>> {
    let [idle, load, thousand] = NAMES;
    let mut all = [
        Series::new(idle, "MB RSS", None),
        Series::new(load, "MB RSS", None),
        Series::new(thousand, "MB RSS", Some(Floor::AtMost(FLOOR))),
    ];
    for run in 1..=runs {
        for (series, value) in all.iter_mut().zip(one(run)?) {
            series.add_memory(value.resident, value.anonymous);
            eprintln!("{}", series.progress(run, runs));
        }
    }
    Ok(all.into())
}

/// In MB of 10^6 bytes. `resident` (VmRSS) counts the program's pages in full, though both agents share them, as on a
/// node of its own; `anonymous` (RssAnon) is heap and stacks.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    resident: f64,
    anonymous: f64,
}

impl Memory {
    fn of(pid: u32) -> Result<Memory> {
        let path = format!("/proc/{pid}/status");
        let status = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let field = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kilobytes = line.and_then(|value| value.trim().trim_end_matches(" kB").parse::<f64>().ok());
            Ok(kilobytes.with_context(|| format!("{path} has no {name}"))? * 1024.0 / 1e6)
        };
        Ok(Memory { resident: field("VmRSS:")?, anonymous: field("RssAnon:")? })
    }

    fn or_larger(self, other: Memory) -> Memory {
        if other.resident > self.resident { other } else { self }
    }
}

/// Idle, load, a thousand.
fn one(run: u32) -> Result<[Memory; 3]> {
    let cluster = Cluster::new(&format!("memory-{run}")).node("north").node("south").start()?;
    let client = cluster.pod("mesh/client", "north")?;
    let server = cluster.pod("mesh/server", "south")?;
    let _nginx = programs::nginx(&server, HTTP_PORT, &Page::new("page", 1000))?;
    let _echo = Server::start(&server, ECHO_PORT, servers::echo)?;
    cluster.enroll("mesh", &[&client, &server])?;
    settle();
    let idle = larger(&cluster)?;

    let connections: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|number| open(&client, &server).with_context(|| format!("idle connection {number}")))
        .collect::<Result<_>>()?;
    settle();
    let thousand = larger(&cluster)?;
    drop(connections);
    settle();

    let load = under_load(&cluster, &client, &server)?;
    Ok([idle, load, thousand])
}

/// A connection that has proven to reach the server, and is then idle.
fn open(client: &Pod, server: &Pod) -> Result<TcpStream> {
    let mut stream = client.connect(server.at(ECHO_PORT))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

/// The most seen while 64 connections ask as fast as they can.
fn under_load(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<Memory> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let result = tools::wrk(client, server.at(HTTP_PORT), 64, false, LOAD_SECONDS);
            done.store(true, Ordering::SeqCst);
            result
        });
        let mut most = Memory::default();
        while !done.load(Ordering::SeqCst) {
            most = most.or_larger(larger(cluster)?);
            poll::pause(Duration::from_millis(100));
        }
        load.join().map_err(|_| anyhow!("the thread that makes the load panicked"))??;
        Ok(most)
    })
}

/// Of the larger of the two agents.
fn larger(cluster: &Cluster) -> Result<Memory> {
    cluster.agents().try_fold(Memory::default(), |most, agent| Ok(most.or_larger(Memory::of(agent.pid()?)?)))
}

/// Long enough for what is under way to end.
fn settle() {
    poll::pause(Duration::from_secs(2));
}
