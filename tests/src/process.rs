//! Programs running inside network namespaces: started with their output in a file of the run directory, ended with
//! the value that stands for them. Which programs there are, and with which arguments, lives in `programs` and `mesh`.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::poll::pause;

/// A program in the background. Dropping it kills it with everything it started in its session.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` (made by `Netns::command`), appending both outputs to `log`.
    pub fn start(name: impl Into<String>, mut command: Command, log: &Path) -> Result<Process> {
        let name = name.into();
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| log.display().to_string())?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {name} ({:?})", command.get_program()))?;
        Ok(Process { name, child, log: log.to_owned() })
    }

    /// Process id, as seen inside the bed.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Sends a signal to the process itself.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.raw_pid(), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// SIGKILL, then waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        // Its session may hold workers of its own; those that ended already are no error.
        let _ = killpg(self.raw_pid(), Signal::SIGKILL);
        let _ = self.child.kill();
        self.child.wait().map(drop).with_context(|| format!("waiting for {}", self.name))
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > timeout {
                bail!("{} still runs after {timeout:?}", self.name);
            }
            pause(Duration::from_millis(10));
        }
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        resident_bytes(self.pid())
    }

    fn raw_pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !crate::bed::keeping() && matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.kill();
        }
    }
}

/// Resident memory of a process in bytes.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .with_context(|| format!("process {pid} has no resident memory"))?;
    Ok(kilobytes * 1024)
}

/// Runs a command to its end, bounded by `timeout`, and returns what it wrote. An exit code that is not zero is left
/// to the caller.
pub fn run_bounded(mut command: Command, timeout: Duration) -> Result<Output> {
    let what = format!("{command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {what}"))?;
    let pid = Pid::from_raw(child.id() as i32);
    let (done, waiter) = std::sync::mpsc::channel();
    // The thread that reads both pipes to their ends; the watch is kept here.
    let reader = std::thread::spawn(move || {
        let output = child.wait_with_output();
        let _ = done.send(());
        output
    });
    let late = waiter.recv_timeout(timeout).is_err();
    if late {
        let _ = killpg(pid, Signal::SIGKILL);
    }
    let output = reader.join().map_err(|_| anyhow::anyhow!("the reader of {what} panicked"))??;
    if late {
        bail!("{what} did not end within {timeout:?}; it had written: {}", text(&output));
    }
    Ok(output)
}

/// As `run_bounded`, and the command must succeed; returns its standard output.
pub fn run_ok(command: Command, timeout: Duration) -> Result<Vec<u8>> {
    let what = format!("{command:?}");
    let output = run_bounded(command, timeout)?;
    if !output.status.success() {
        bail!("{what}: {}; {}", output.status, text(&output));
    }
    Ok(output.stdout)
}

fn text(output: &Output) -> String {
    let shorten = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(2000)]).trim().to_owned();
    format!("stdout: {:?}, stderr: {:?}", shorten(&output.stdout), shorten(&output.stderr))
}
