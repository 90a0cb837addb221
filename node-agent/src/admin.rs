//! The agent's admin socket, asked from the command line: `weft-agent ready`, `status`, `retire` and `forget-versions`.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use weft_api::agent::{AgentStatus, PluginStatus};

const TIMEOUT: Duration = Duration::from_secs(2);
/// Within the time that `weft uninstall` gives a command.
const RETIREMENT: Duration = Duration::from_secs(8);
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
    ask(stream, "GET", "/readyz").map(drop)
}

/// Prints what the agent says of itself.
pub fn status(socket: &Path) -> anyhow::Result<()> {
    let answer = ask(connect(socket)?, "GET", "/status")?;
    std::io::stdout().write_all(answer.as_bytes()).context("standard output")
}

/// Has the agent prepare its uninstallation; returns when the CNI plugin is out.
#[allow(clippy::disallowed_methods, reason = "no runtime runs in this command")]
pub fn retire(socket: &Path) -> anyhow::Result<()> {
    ask(connect(socket)?, "POST", "/retire")?;
    let end = Instant::now() + RETIREMENT;
    loop {
        let status: AgentStatus = serde_json::from_str(&ask(connect(socket)?, "GET", "/status")?)?;
        match status.plugin {
            PluginStatus::NotManaged => return Ok(()),
            // It may be what was wrong before.
            _ if Instant::now() < end => std::thread::sleep(Duration::from_millis(100)),
            PluginStatus::Failed { error } => bail!("the CNI plugin cannot be taken out: {error}"),
            _ => bail!("the CNI plugin is still being taken out"),
        }
    }
}

/// Has the agent forget how far it has seen the controller's states.
pub fn forget_versions(socket: &Path) -> anyhow::Result<()> {
    ask(connect(socket)?, "POST", "/forget-versions").map(drop)
}

fn connect(socket: &Path) -> anyhow::Result<UnixStream> {
    UnixStream::connect(socket).with_context(|| format!("no agent at {}", socket.display()))
}

/// The body of the answer, where that is a good one. HTTP/1.0, so that it ends with the connection.
fn ask(mut stream: UnixStream, method: &str, path: &str) -> anyhow::Result<String> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("{method} {path} HTTP/1.0\r\nHost: agent\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer).context("the agent's answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the agent's answer has no body")?;
    if head.split(' ').nth(1) != Some("200") {
        bail!("{}", body.trim());
    }
    Ok(body.to_owned())
}
