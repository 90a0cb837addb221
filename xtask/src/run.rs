//! Running other programs: their signals, their output, their failure.
//!
//! Every child gets a process group of its own and xtask passes SIGINT, SIGTERM and SIGHUP on to it, once, then waits
//! until it has cleaned up. So Ctrl-C does the same on a terminal and from a CI system that signals xtask alone.
#![expect(clippy::disallowed_methods, reason = "no runtime here that a sleep could block")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::say;

/// The process group signals go to. Held locked while a child is started, so that no signal falls between.
static GROUP: Mutex<Option<Pid>> = Mutex::new(None);
/// The signal that ends us, 0 while there is none.
static SIGNALLED: AtomicI32 = AtomicI32::new(0);
/// Signs of life: the first soon, so that nobody wonders, the others now and then.
const FIRST_SIGN: Duration = Duration::from_secs(2);
const NEXT_SIGN: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Interrupted(i32);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0 == SIGINT { "interrupted" } else { "terminated by a signal" })
    }
}

impl std::error::Error for Interrupted {}

/// 128 plus the signal's number after a signal, as shells do; 1 otherwise.
pub fn exit_code_of(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<Interrupted>() {
        Some(Interrupted(signal)) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)),
        None => ExitCode::FAILURE,
    }
}

pub fn is_interrupt(error: &anyhow::Error) -> bool {
    error.is::<Interrupted>()
}

/// To be called once, before any child is started.
pub fn forward_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot listen for signals")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            let first = SIGNALLED.swap(signal, Ordering::SeqCst) == 0;
            let group = GROUP.lock().map_or(None, |group| *group);
            match (group, Signal::try_from(signal)) {
                (Some(group), Ok(signal)) => {
                    if first {
                        say::warning(&format!("{signal}: waiting for what is running to clean up"));
                    }
                    // It may have ended on its own in the meantime.
                    let _ = killpg(group, signal);
                }
                _ => std::process::exit(128 + signal),
            }
        }
    });
    Ok(())
}

fn start(command: &mut Command) -> Result<Child> {
    check_signalled()?;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut group = GROUP.lock().map_err(|_| anyhow::anyhow!("a thread of xtask panicked"))?;
    // A background process group that reads the terminal would be stopped.
    let child = command
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    *group = i32::try_from(child.id()).ok().map(Pid::from_raw);
    Ok(child)
}

fn finish(child: &mut Child) -> Result<ExitStatus> {
    let status = child.wait().context("cannot wait for a child process")?;
    if let Ok(mut group) = GROUP.lock() {
        *group = None;
    }
    check_signalled()?;
    Ok(status)
}

fn check_signalled() -> Result<()> {
    match SIGNALLED.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => Err(Interrupted(signal).into()),
    }
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("was killed by signal {signal}"),
        None => format!("failed with exit code {}", status.code().unwrap_or(-1)),
    }
}

/// Runs to the end with output going where ours goes; an error when it fails.
pub fn pass(command: &mut Command, what: &str) -> Result<()> {
    let status = finish(&mut start(command)?)?;
    if !status.success() {
        bail!("{what} {}", describe(status));
    }
    Ok(())
}

/// Like [`pass`], but hands each line of standard output to `see` after printing it. Returns whether it succeeded.
pub fn watch(command: &mut Command, mut see: impl FnMut(&str)) -> Result<bool> {
    let mut child = start(command.stdout(Stdio::piped()))?;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n') {
            let line = line.context("cannot read a child's output")?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            see(&line);
        }
    }
    Ok(finish(&mut child)?.success())
}

/// Like [`pass`], but returns standard output, once it has ended, instead of passing it on.
pub fn output(command: &mut Command, what: &str) -> Result<String> {
    let mut child = start(command.stdout(Stdio::piped()))?;
    let mut text = String::new();
    if let Some(output) = &mut child.stdout {
        output.read_to_string(&mut text).context("cannot read a child's output")?;
    }
    let status = finish(&mut child)?;
    if !status.success() {
        bail!("{what} {}", describe(status));
    }
    Ok(text)
}

/// Runs a chatty program with its output in `log`; shows its last line every few seconds, and the tail if it fails.
pub fn quietly(command: &mut Command, log: &Path, what: &str) -> Result<()> {
    if let Some(directory) = log.parent() {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut child = start(command.stdout(file.try_clone()?).stderr(file))?;
    let begin = Instant::now();
    let mut next = FIRST_SIGN;
    while child.try_wait()?.is_none() {
        thread::sleep(Duration::from_millis(50));
        if begin.elapsed() >= next {
            next = begin.elapsed() + NEXT_SIGN;
            let last = tail(log, 1).pop().unwrap_or_default();
            say::progress(&format!("{:>4} s  {}", begin.elapsed().as_secs(), last.trim()));
        }
    }
    let status = finish(&mut child)?;
    if status.success() {
        return Ok(());
    }
    for line in tail(log, 15) {
        say::detail(&line);
    }
    bail!("{what} {}; all of its output is in {}", describe(status), log.display())
}

/// Standard output of a short command, or None when it cannot be run or fails.
pub fn answer(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Becomes the program: it gets the terminal, the signals, and gives the exit code.
pub fn become_program(command: &mut Command) -> Result<()> {
    check_signalled()?;
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))
}

fn tail(log: &Path, lines: usize) -> Vec<String> {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let kept: Vec<&str> = text.split(['\n', '\r']).filter(|line| !line.trim().is_empty()).collect();
    kept.iter().skip(kept.len().saturating_sub(lines)).map(|line| (*line).to_owned()).collect()
}
