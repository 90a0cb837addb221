//! `weft-agent ready`: a readiness probe that asks the agent of its own container. While an agent is replaced, two of
//! them share the node's ports, and the predecessor's readiness says nothing about the successor.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

const TIMEOUT: Duration = Duration::from_secs(2);
/// More than the answer ever has.
const MAX_ANSWER: u64 = 16 << 10;

/// Succeeds where the agent behind `socket` is ready, and runs in the same cgroup as this process.
pub fn probe(socket: &Path) -> anyhow::Result<()> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("no agent at {}", socket.display()))?;
    let peer = getsockopt(&stream, PeerCredentials).context("who serves the socket")?.pid();
    let cgroup = |process: &str| std::fs::read_to_string(format!("/proc/{process}/cgroup"));
    let same =
        cgroup(&peer.to_string()).context("the agent's cgroup")? == cgroup("self").context("own cgroup")?;
    ensure!(same, "the socket is still served by another agent");
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer).context("the agent's answer")?;
    if !answer.starts_with("HTTP/1.1 200 ") {
        bail!("{}", answer.rsplit("\r\n\r\n").next().unwrap_or_default().trim());
    }
    Ok(())
}
