//! Network namespaces: making them, naming them under `/run/netns` (so that `ip netns` and the agents find them), and
//! running code and commands inside. What is connected to what lives in `topology`.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// One network namespace, named under `/run/netns` as long as a clone of this lives.
#[derive(Clone, Debug)]
pub struct Netns(Arc<Named>);

#[derive(Debug)]
struct Named {
    name: String,
    file: File,
}

impl Drop for Named {
    fn drop(&mut self) {
        if crate::bed::keeping() {
            return;
        }
        let path = path_of(&self.name);
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_file(&path);
    }
}

fn path_of(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

impl Netns {
    /// Makes a namespace with loopback up and IPv6 that needs no second to settle (no duplicate address detection).
    pub fn create(name: &str) -> Result<Netns> {
        let path = path_of(name);
        File::create_new(&path).with_context(|| format!("network namespace {name}"))?;
        // A thread of its own, because unshare moves the calling thread for good.
        let file = std::thread::scope(|scope| {
            scope
                .spawn(|| -> Result<File> {
                    let none: Option<&str> = None;
                    unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
                    mount(Some("/proc/thread-self/ns/net"), &path, none, MsFlags::MS_BIND, none)
                        .with_context(|| format!("naming the network namespace {name}"))?;
                    for (key, value) in [
                        ("ipv6/conf/all/disable_ipv6", "0"),
                        ("ipv6/conf/default/disable_ipv6", "0"),
                        ("ipv6/conf/default/accept_dad", "0"),
                        ("ipv6/conf/default/accept_ra", "0"),
                    ] {
                        write_sysctl(key, value)?;
                    }
                    Ok(File::open(&path)?)
                })
                .join()
                .map_err(|_| anyhow!("the thread that makes {name} panicked"))?
        })?;
        let netns = Netns(Arc::new(Named { name: name.to_owned(), file }));
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What the `weft.dev/netns` annotation carries.
    pub fn path(&self) -> PathBuf {
        path_of(&self.0.name)
    }

    /// Runs `f` inside, on a thread of its own. Sockets made by `f` belong to this namespace wherever they go later.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<T> {
                setns(&self.0.file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("entering the network namespace {}", self.name()))?;
                Ok(f())
            });
            thread
                .join()
                .map_err(|panic| anyhow!("a helper in {} panicked: {}", self.name(), panic_text(&panic)))?
        })
    }

    /// A command that will run inside, in a session of its own (a terminal's Ctrl-C must reach the bed first).
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let netns: RawFd = self.0.file.as_raw_fd();
        let keep = self.clone();
        let enter = move || {
            let _ = &keep;
            // SAFETY: setns and setsid are plain system calls on a descriptor that `keep` holds open.
            unsafe {
                if libc::setns(netns, libc::CLONE_NEWNET) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                libc::setsid();
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only, no allocation, no lock.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs `ip -batch` inside with one command a line.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let mut child = self
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting ip (is iproute2 installed?)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(batch.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("ip in {}: {}\n{batch}", self.name(), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Writes a network sysctl of this namespace, `key` below `/proc/sys/net`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| write_sysctl(key, value))?
    }

    /// Reads a network sysctl of this namespace, `key` below `/proc/sys/net`.
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let path = Path::new("/proc/sys/net").join(key);
        let text =
            self.run(|| std::fs::read_to_string(&path))?.with_context(|| path.display().to_string())?;
        Ok(text.trim().to_owned())
    }
}

fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net").join(key);
    std::fs::write(&path, value).with_context(|| path.display().to_string())
}

/// What a panic said, as far as it said it in words.
pub fn panic_text(panic: &Box<dyn std::any::Any + Send>) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "(no message)".to_owned())
}
