//! The agent's admin socket, asked from the command line: `weft-agent ready` and `weft-agent status`.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

const TIMEOUT: Duration = Duration::from_secs(2);
/// More than an answer ever has: a few hundred bytes a pod.
const MAX_ANSWER: u64 = 1 << 20;

/// A readiness probe. Succeeds where the agent behind `socket` is ready, and runs in the same cgroup as this process:
/// while an agent is replaced, two of them share the node's ports, and the predecessor's readiness says nothing about the
/// successor.
pub fn ready(socket: &Path) -> anyhow::Result<()> {
    let stream = connect(socket)?;
    let peer = getsockopt(&stream, PeerCredentials).context("who serves the socket")?.pid();
    let cgroup = |process: &str| std::fs::read_to_string(format!("/proc/{process}/cgroup"));
    let same =
        cgroup(&peer.to_string()).context("the agent's cgroup")? == cgroup("self").context("own cgroup")?;
    ensure!(same, "the socket is still served by another agent");
    get(stream, "/readyz").map(drop)
}

/// Prints what the agent says of itself.
pub fn status(socket: &Path) -> anyhow::Result<()> {
    let answer = get(connect(socket)?, "/status")?;
    std::io::stdout().write_all(answer.as_bytes()).context("standard output")
}

fn connect(socket: &Path) -> anyhow::Result<UnixStream> {
    UnixStream::connect(socket).with_context(|| format!("no agent at {}", socket.display()))
}

/// The body of the answer, where that is a good one. HTTP/1.0, so that it ends with the connection.
fn get(mut stream: UnixStream, path: &str) -> anyhow::Result<String> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: agent\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer).context("the agent's answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the agent's answer has no body")?;
    if head.split(' ').nth(1) != Some("200") {
        bail!("{}", body.trim());
    }
    Ok(body.to_owned())
}
