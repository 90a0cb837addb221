//! Puts a program into mount and PID namespaces of its own, so that whatever it makes (processes, network namespaces,
//! mounts, pins) ends with it, however it ends. Called first by every `main` of this package; builds nothing itself.
//!
//! Three processes share the work. The *outer* one is what the caller started: it owns nothing, forwards SIGINT and
//! SIGTERM, and passes on the exit code. The *init* is PID 1 of the new PID namespace: it dies with the outer one
//! (PR_SET_PDEATHSIG), reaps orphans, and when it ends the kernel kills everything below it. The *inner* one runs the
//! caller's code.

use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, geteuid};

/// To whom this process passes on SIGINT and SIGTERM: read by the signal handler, so a plain atomic.
static FORWARD_TO: AtomicI32 = AtomicI32::new(0);
/// The init's process id as the machine sees it.
static HOST_PID: AtomicI32 = AtomicI32::new(0);

/// Runs `inner` in namespaces of its own and returns the exit code it returned (128 + N where a signal N ended it). Must
/// be called while the process has a single thread. Without root it says so and returns failure.
pub fn isolated(inner: impl FnOnce() -> u8) -> ExitCode {
    match outer(inner) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn outer(inner: impl FnOnce() -> u8) -> Result<u8> {
    if !geteuid().is_root() {
        bail!("the test bed makes network namespaces and loads eBPF programs: run it as root (sudo)");
    }
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("RLIMIT_NOFILE")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("RLIMIT_NOFILE")?;
    forward_signals()?;
    unshare(CloneFlags::CLONE_NEWPID).context("unshare(CLONE_NEWPID): is CAP_SYS_ADMIN missing?")?;
    // SAFETY: the process has one thread, so the child may go on as any program would.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => {
            crate::kubernetes::cgroup::sweep();
            let code = supervise(child);
            crate::kubernetes::cgroup::sweep();
            code
        }
        ForkResult::Child => {
            let code = match init(inner) {
                Ok(code) => code,
                Err(error) => {
                    eprintln!("error: {error:#}");
                    1
                }
            };
            exit_now(code)
        }
    }
}

/// Everything between the fork and the caller's code.
fn init(inner: impl FnOnce() -> u8) -> Result<u8> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
    // Still the machine's /proc, which knows this process by the machine's number.
    if let Some(pid) = std::fs::read_link("/proc/self").ok().and_then(|link| link.to_str()?.parse().ok()) {
        HOST_PID.store(pid, Ordering::SeqCst);
    }
    private_mounts()?;
    // SAFETY: this process, too, still has one thread.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => supervise(child),
        ForkResult::Child => {
            default_signals()?;
            exit_now(std::panic::catch_unwind(std::panic::AssertUnwindSafe(inner)).unwrap_or(1))
        }
    }
}

/// Mounts seen by nobody else: `/proc` of the new PID namespace, and a tmpfs over `/run`, where `ip netns` keeps its
/// names, the bed its files, and each node its bpffs.
fn private_mounts() -> Result<()> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS)")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("mounting /proc")?;
    mount(Some("weft"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
        .context("mounting a tmpfs on /run")?;
    std::fs::create_dir("/run/netns").context("creating /run/netns")?;
    Ok(())
}

/// Waits until `child` ends, reaping whoever else ends meanwhile (PID 1 inherits orphans), and returns its exit code.
fn supervise(child: Pid) -> Result<u8> {
    FORWARD_TO.store(child.as_raw(), Ordering::SeqCst);
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(u8::try_from(code).unwrap_or(1)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Ok(u8::try_from(128 + signal as i32).unwrap_or(1));
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("waitpid"),
        }
    }
}

extern "C" fn forward(signal: libc::c_int) {
    let child = FORWARD_TO.load(Ordering::SeqCst);
    if child > 0 {
        // SAFETY: kill is async-signal-safe.
        unsafe { libc::kill(child, signal) };
    }
}

fn forward_signals() -> Result<()> {
    set_signals(SigHandler::Handler(forward))
}

fn default_signals() -> Result<()> {
    set_signals(SigHandler::SigDfl)
}

fn set_signals(handler: SigHandler) -> Result<()> {
    let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only calls functions that are async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("handling {signal}"))?;
    }
    Ok(())
}

/// Ends the process with `code` after flushing standard output, without running the exit handlers of the parent's
/// image twice.
fn exit_now(code: u8) -> ! {
    use std::io::Write as _;
    let _ = std::io::stdout().flush();
    // SAFETY: _exit never returns and touches no memory of ours.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Process id by which the machine knows the bed's init: `nsenter -t PID -m -p` enters the bed. 0 outside a bed.
pub fn host_pid() -> i32 {
    HOST_PID.load(Ordering::SeqCst)
}

/// Path of the cgroup2 root as this process sees it: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid hosts.
pub fn cgroup2_root() -> Result<std::path::PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    mounts
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .find(|(_, right)| right.starts_with("cgroup2 "))
        .and_then(|(left, _)| left.split(' ').nth(4))
        .map(std::path::PathBuf::from)
        .context("no cgroup2 file system is mounted, so no connect hook can be attached")
}

/// Mounts a bpffs of its own at `path` (which is created), for one node's pins.
pub fn mount_bpffs(path: &std::path::Path) -> Result<()> {
    let none: Option<&str> = None;
    std::fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
    mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), none)
        .with_context(|| format!("mounting a bpffs on {}", path.display()))
}

/// Unmounts what `mount_bpffs` mounted; the pins in it go with it.
pub fn unmount(path: &std::path::Path) {
    let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
}
