//! A client without privilege: the running program started again inside a pod, with its rights given up before it
//! connects. It shows what an ordinary process, or one with CAP_NET_RAW alone, can do against capture.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

use crate::kubernetes::NodeCgroups;
use crate::place::Place;
use crate::process::run_bounded;
use crate::sockets::{Dial, canonical};

/// First argument that makes a program of this package a helper. Not for people.
const SUBCOMMAND: &str = "bed-helper";
const NOBODY: u32 = 65534;

/// What a helper may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Privilege {
    /// User nobody, no capability.
    None,
    /// User nobody with CAP_NET_RAW.
    NetRaw,
}

#[derive(Debug, Parser)]
struct Arguments {
    #[arg(long, value_enum)]
    privilege: Privilege,
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    mark: Option<u32>,
    #[arg(long)]
    late_device: Option<String>,
    #[arg(long)]
    device: Option<String>,
    #[arg(long)]
    fast_open: bool,
    #[arg(long)]
    v4_mapped: bool,
    #[arg(long)]
    mptcp: bool,
    #[arg(long)]
    after: Option<SocketAddr>,
    #[arg(long)]
    show_peer: bool,
    /// Sent after the connect.
    #[arg(long)]
    payload: String,
}

/// How such a client fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server answered; what it said first.
    Answered(String),
    /// The connect, or the stream after it, failed.
    Refused(String),
}

/// An attempt by a client without privilege.
#[derive(Clone, Debug)]
pub struct Attempt {
    arguments: Vec<String>,
}

impl Attempt {
    /// Connects to `to`, sends `payload` and a line end, and reads.
    pub fn new(privilege: Privilege, to: SocketAddr, payload: &str) -> Attempt {
        let privilege = match privilege {
            Privilege::None => "none",
            Privilege::NetRaw => "net-raw",
        };
        let arguments = ["--privilege", privilege, "--to", &to.to_string(), "--payload", payload];
        Attempt { arguments: arguments.map(str::to_owned).to_vec() }
    }

    /// Sets SO_MARK.
    pub fn mark(mut self, mark: u32) -> Attempt {
        self.arguments.extend(["--mark".to_owned(), mark.to_string()]);
        self
    }

    /// Sets SO_BINDTODEVICE.
    pub fn device(mut self, device: &str) -> Attempt {
        self.arguments.extend(["--device".to_owned(), device.to_owned()]);
        self
    }

    /// Sets SO_BINDTODEVICE once the connection is open, then waits a second for an answer.
    pub fn late_device(mut self, device: &str) -> Attempt {
        self.arguments.extend(["--late-device".to_owned(), device.to_owned()]);
        self
    }

    /// Sends the payload with the connect (MSG_FASTOPEN).
    pub fn fast_open(mut self) -> Attempt {
        self.arguments.push("--fast-open".to_owned());
        self
    }

    /// Dials an IPv4 address from an IPv6 socket.
    pub fn v4_mapped(mut self) -> Attempt {
        self.arguments.push("--v4-mapped".to_owned());
        self
    }

    /// Uses Multipath TCP.
    pub fn mptcp(mut self) -> Attempt {
        self.arguments.push("--mptcp".to_owned());
        self
    }

    /// Connects the same socket to `first` before, and dissolves that.
    pub fn after(mut self, first: SocketAddr) -> Attempt {
        self.arguments.extend(["--after".to_owned(), first.to_string()]);
        self
    }

    /// Puts getpeername() and a space before what the server said.
    pub fn show_peer(mut self) -> Attempt {
        self.arguments.push("--show-peer".to_owned());
        self
    }

    /// Runs it in `place`.
    pub fn run(&self, place: &Place) -> Result<Outcome> {
        self.outcome(place.command("/proc/self/exe", [SUBCOMMAND]))
    }

    /// Runs it in `place`, as a process of a pod with these cgroups.
    pub fn run_in(&self, place: &Place, pod: &NodeCgroups) -> Result<Outcome> {
        let mut command = place.command("/proc/self/exe", [SUBCOMMAND]);
        pod.enter_before(&mut command);
        self.outcome(command)
    }

    fn outcome(&self, mut command: Command) -> Result<Outcome> {
        command.args(&self.arguments);
        let output = run_bounded(command, Duration::from_secs(30))?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match (text.strip_prefix("answered "), text.strip_prefix("refused ")) {
            (Some(answer), _) => Ok(Outcome::Answered(answer.to_owned())),
            (_, Some(why)) => Ok(Outcome::Refused(why.to_owned())),
            _ => bail!("the helper failed: {}{text}", String::from_utf8_lossy(&output.stderr)),
        }
    }
}

/// Called first by every `main` of this package: where the arguments ask for a helper, does its work and exits.
pub fn run_if_asked() {
    let mut arguments = std::env::args();
    if arguments.nth(1).as_deref() != Some(SUBCOMMAND) {
        return;
    }
    let result = Arguments::try_parse_from(std::iter::once(SUBCOMMAND.to_owned()).chain(arguments))
        .map_err(anyhow::Error::from)
        .and_then(|arguments| attempt(&arguments));
    match result {
        Ok(Outcome::Answered(line)) => println!("answered {line}"),
        Ok(Outcome::Refused(why)) => println!("refused {why}"),
        Err(error) => {
            eprintln!("{error:#}");
            std::process::exit(1);
        }
    }
    std::process::exit(0);
}

fn attempt(arguments: &Arguments) -> Result<Outcome> {
    give_up_privilege(arguments.privilege)?;
    let mut dial = Dial::to(arguments.to);
    if let Some(mark) = arguments.mark {
        dial = dial.mark(mark);
    }
    if let Some(device) = &arguments.device {
        dial = dial.device(device);
    }
    if let Some(first) = arguments.after {
        dial = dial.after(first);
    }
    if arguments.v4_mapped {
        dial = dial.v4_mapped();
    }
    if arguments.mptcp {
        dial = dial.mptcp();
    }
    let line = format!("{}\n", arguments.payload);
    if arguments.fast_open {
        dial = dial.fast_open(line.as_bytes());
    }
    let exchange = || -> std::io::Result<String> {
        let mut stream = dial.connect()?;
        if let Some(device) = &arguments.late_device {
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            socket2::SockRef::from(&stream).bind_device(Some(device.as_bytes()))?;
        }
        if !arguments.fast_open {
            stream.write_all(line.as_bytes())?;
        }
        let answer = crate::sockets::read_line(&mut stream)?;
        if !arguments.show_peer {
            return Ok(answer);
        }
        Ok(format!("{} {answer}", canonical(stream.peer_addr()?)))
    };
    Ok(match exchange() {
        Ok(answer) => Outcome::Answered(answer),
        // Not being allowed to set the option at all would make the attempt worthless.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && arguments.device.is_none() => {
            bail!("an option was refused, or the connect itself: {error}")
        }
        Err(error) => Outcome::Refused(error.to_string()),
    })
}

fn give_up_privilege(privilege: Privilege) -> Result<()> {
    let keep = privilege == Privilege::NetRaw;
    setgroups(&[]).context("setgroups")?;
    setgid(Gid::from_raw(NOBODY)).context("setgid")?;
    if keep {
        nix::sys::prctl::set_keepcaps(true).context("PR_SET_KEEPCAPS")?;
    }
    setuid(Uid::from_raw(NOBODY)).context("setuid")?;
    if keep {
        set_capabilities(1 << CAP_NET_RAW)?;
    }
    let expected = if keep { 1u64 << CAP_NET_RAW } else { 0 };
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff")?.trim();
    ensure!(u64::from_str_radix(effective, 16)? == expected, "still has the capabilities {effective}");
    Ok(())
}

const CAP_NET_RAW: u32 = 13;
const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// capset for the calling thread: exactly `low` of the first 32 capabilities and none of the others.
fn set_capabilities(low: u32) -> Result<()> {
    let header = CapabilityHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let none = CapabilityData { effective: 0, permitted: 0, inheritable: 0 };
    let data = [CapabilityData { effective: low, permitted: low, inheritable: 0 }, none];
    // SAFETY: both structures have the layout of version 3 and outlive the call.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if done != 0 {
        return Err(std::io::Error::last_os_error()).context("capset");
    }
    Ok(())
}
