//! The cluster that most stories begin with: a client on the node `east`, a web server on the node `west`, both in the
//! namespace `shop`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::sockets::ask;
use weft_testbed::{Agent, Cluster, Place, Pod, Server, addresses, servers};

/// Port of the echo server of `web`.
pub const ECHO: u16 = 7000;
/// Port of the server that says whom it sees, then echoes.
pub const GREET: u16 = 7001;

/// The cluster, its pods, and two small servers in `web`. The servers are declared first so that they end first.
pub struct Shop {
    _echo: Server,
    _greeter: Server,
    pub client: Pod,
    pub web: Pod,
    pub cluster: Cluster,
}

impl Shop {
    /// Two nodes with agents; nothing is labelled yet.
    pub fn open(cluster: Builder) -> Result<Shop> {
        Self::furnish(cluster.node("east").node("west").start()?)
    }

    /// As `open`, but only the network and the controller run.
    pub fn open_without_agents(cluster: Builder) -> Result<Shop> {
        Self::furnish(cluster.node("east").node("west").start_without_agents()?)
    }

    /// Open, with both pods enrolled.
    pub fn open_enrolled(cluster: Builder) -> Result<Shop> {
        let shop = Self::open(cluster)?;
        shop.enroll()?;
        Ok(shop)
    }

    fn furnish(cluster: Cluster) -> Result<Shop> {
        let web = cluster.pod("shop/web", "west")?;
        let client = cluster.pod("shop/client", "east")?;
        let echo = Server::start(&web, ECHO, servers::echo)?;
        let greeter = Server::start(&web, GREET, servers::greet)?;
        Ok(Shop { _echo: echo, _greeter: greeter, client, web, cluster })
    }

    /// Labels the namespace and waits until both agents know both pods as enrolled.
    pub fn enroll(&self) -> Result<()> {
        self.cluster.enroll("shop", &[&self.web, &self.client])
    }

    /// The agent of the client's node.
    pub fn east(&self) -> Result<&Agent> {
        self.cluster.agent("east")
    }

    /// The agent of the server's node.
    pub fn west(&self) -> Result<&Agent> {
        self.cluster.agent("west")
    }

    /// Addresses of both pods, for judging a capture.
    pub fn enrolled(&self) -> Vec<IpAddr> {
        addresses(&[&self.web, &self.client])
    }

    /// `web`'s echo server over IPv4 and IPv6.
    pub fn echoes(&self) -> [SocketAddr; 2] {
        [self.web.at(ECHO), self.web.at_v6(ECHO)]
    }

    /// Both echo servers answer the client.
    pub fn check_echo(&self, payload: &str) -> Result<()> {
        for to in self.echoes() {
            weft_testbed::traffic::call(&self.client, to, payload)
                .with_context(|| format!("calling {to}"))?;
        }
        Ok(())
    }
}

/// Text that appears nowhere else: a payload to look for on the wire.
pub fn marker(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("in-the-clear-{what}-{:08x}-{:04}", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst))
}

/// The connect to `to`, or the stream after it, must fail within `limit` without the payload coming back. Returns how.
pub fn must_be_refused(place: &Place, to: SocketAddr, payload: &str, limit: Duration) -> Result<io::Error> {
    let start = Instant::now();
    let error = match weft_testbed::traffic::call(place, to, payload) {
        Ok(()) => bail!("{} reached {to}, which should have been refused", place.name()),
        Err(error) => error,
    };
    let took = start.elapsed();
    ensure!(took <= limit, "{to} was refused to {} only after {took:?}: {error}", place.name());
    Ok(error)
}

/// The connect itself must be refused at once, in the client's own kernel or by the server's reset.
pub fn must_be_refused_at_once(place: &Place, to: SocketAddr) -> Result<()> {
    let start = Instant::now();
    match place.connect(to) {
        Ok(_) => bail!("{} connected to {to}, which should have been refused", place.name()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => bail!("connecting to {to} ended with {error}, not with a refusal"),
    }
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(1), "{to} was refused only after {took:?}");
    Ok(())
}

/// One line there and back on an open stream.
pub fn still_alive(stream: &mut std::net::TcpStream, payload: &str) -> Result<()> {
    let answer = ask(stream, payload).context("an open connection")?;
    ensure!(answer == payload, "an open connection answered {answer:?}");
    Ok(())
}

/// Connections that `agent` has opened so far with these labels.
pub fn opened(agent: &Agent, labels: &[(&str, &str)]) -> Result<f64> {
    Ok(agent.metrics()?.sum("weft_tcp_connections_opened_total", labels))
}
