//! A host on the bed's network, seen from inside: a pod, a node, or a machine outside the mesh. Commands, background
//! programs and sockets are started here; how a place is wired lives in `topology`.

use std::ffi::OsStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Netns;
use crate::process::{Process, run_bounded, run_ok};
use crate::sockets::Dial;

/// How long a command in the foreground may take unless said otherwise.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Where programs run and which addresses they have there.
#[derive(Clone, Debug)]
pub struct Place {
    pub(crate) name: String,
    pub(crate) netns: Netns,
    pub(crate) dir: PathBuf,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Place {
    /// A name for people, such as `shop/web`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Directory for the files of programs that run here.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// A TCP address of this place over IPv4.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// A TCP address of this place over IPv6.
    pub fn at_v6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    /// A command that will run here.
    pub fn command<S: AsRef<OsStr>>(&self, program: &str, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.netns.command(program);
        command.args(args).current_dir(&self.dir).env("LC_ALL", "C");
        command
    }

    /// Runs a command to its end; it must succeed. Returns its standard output.
    pub fn run<S: AsRef<OsStr>>(&self, program: &str, args: impl IntoIterator<Item = S>) -> Result<Vec<u8>> {
        run_ok(self.command(program, args), COMMAND_TIMEOUT).with_context(|| format!("in {}", self.name))
    }

    /// Runs a command to its end, whatever its exit code.
    pub fn try_run<S: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        run_bounded(self.command(program, args), COMMAND_TIMEOUT).with_context(|| format!("in {}", self.name))
    }

    /// Starts a program in the background, its output in `LABEL.log` of this place's directory.
    pub fn start<S: AsRef<OsStr>>(
        &self,
        label: &str,
        program: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Process> {
        self.start_command(label, self.command(program, args))
    }

    /// As `start`, for a command made by `command` and changed since.
    pub fn start_command(&self, label: &str, command: Command) -> Result<Process> {
        Process::start(format!("{label} in {}", self.name), command, &self.dir.join(format!("{label}.log")))
    }

    /// Connects from here.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.dial(&Dial::to(to))
    }

    /// Connects from here with options.
    pub fn dial(&self, dial: &Dial) -> io::Result<TcpStream> {
        self.netns.run(|| dial.connect()).map_err(io::Error::other)?
    }

    /// Listens here on both address families.
    pub fn listen(&self, port: u16) -> Result<TcpListener> {
        self.netns
            .run(|| crate::sockets::listen(port))?
            .with_context(|| format!("listening on port {port} in {}", self.name))
    }

    /// Waits until something listens on `port` of this place, asked from within, by the kernel's table of sockets.
    pub fn wait_for_port(&self, port: u16, timeout: Duration) -> Result<()> {
        crate::poll::until(timeout, &format!("{} listens on port {port}", self.name), || self.listens(port))
    }

    fn listens(&self, port: u16) -> Result<bool> {
        const LISTEN: &str = "0A";
        let wanted = format!(":{port:04X}");
        self.netns.run(|| {
            for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
                let text = std::fs::read_to_string(table).with_context(|| table.to_owned())?;
                for line in text.lines().skip(1) {
                    let mut fields = line.split_whitespace();
                    if fields.nth(1).is_some_and(|local| local.ends_with(&wanted))
                        && fields.nth(1) == Some(LISTEN)
                    {
                        return Ok(true);
                    }
                }
            }
            Ok(false)
        })?
    }
}
