//! Runs scenarios side by side, bounds their time, and says how each went.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::Result;
use weft_testbed::bed::keep_everything;
use weft_testbed::cluster::Builder;
use weft_testbed::netns::panic_text;
use weft_testbed::{Bed, Cluster};

/// One story.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// What users filter on.
    pub name: &'static str,
    /// One line for `--list`.
    pub story: &'static str,
    /// It fails when it takes longer.
    pub limit: Duration,
    /// Gets the beginning of a cluster of its own.
    pub run: fn(Builder) -> Result<()>,
}

impl Scenario {
    /// A scenario that takes at most two minutes on a small, busy machine.
    pub const fn new(name: &'static str, story: &'static str, run: fn(Builder) -> Result<()>) -> Scenario {
        Scenario { name, story, limit: Duration::from_secs(120), run }
    }

    /// As it is, but bounded by `seconds`.
    pub const fn within(self, seconds: u64) -> Scenario {
        Scenario { limit: Duration::from_secs(seconds), ..self }
    }
}

/// Why a scenario cannot run here, as an error that counts as skipped: for what a kernel may lack, never for a program
/// that could be installed.
#[derive(Debug)]
pub struct Skipped(pub String);

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub jobs: usize,
    pub keep: bool,
}

#[derive(Debug, Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// Runs all of `scenarios` and returns the exit code. The last line says how many passed.
pub fn run(scenarios: &[Scenario], options: &Options) -> u8 {
    if options.keep {
        keep_everything();
    }
    let queue: Mutex<VecDeque<Scenario>> = Mutex::new(scenarios.iter().copied().collect());
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.min(scenarios.len()) {
            scope.spawn(|| {
                loop {
                    let Some(scenario) = lock(&queue).pop_front() else { return };
                    let start = Instant::now();
                    let result = run_one(&scenario);
                    // The lock also keeps the lines of two scenarios apart.
                    report(&mut lock(&tally), &scenario, start.elapsed(), result);
                }
            });
        }
    });
    if options.keep {
        wait_for_a_person(scenarios);
    }
    let tally = lock(&tally);
    let skipped = if tally.skipped > 0 { format!(", {} skipped", tally.skipped) } else { String::new() };
    println!("{} passed, {} failed{skipped}", tally.passed, tally.failed);
    u8::from(tally.failed > 0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Runs one scenario on a thread of its own. One that hangs loses its processes, so that it cannot disturb the others.
fn run_one(scenario: &Scenario) -> Result<()> {
    let (done, outcome) = channel();
    let (name, run) = (scenario.name, scenario.run);
    std::thread::spawn(move || {
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| run(Cluster::new(name))))
            .unwrap_or_else(|panic| Err(anyhow::anyhow!("panic: {}", panic_text(&panic))));
        let _ = done.send(result);
    });
    match outcome.recv_timeout(scenario.limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => {
            Bed::named(name).kill_processes();
            // With its processes gone it usually fails at once, and knows where it was.
            let place = match outcome.recv_timeout(Duration::from_secs(3)) {
                Ok(Err(error)) => format!("; it was at: {error:#}"),
                _ => String::new(),
            };
            anyhow::bail!("took longer than {:?}{place}", scenario.limit)
        }
        Err(RecvTimeoutError::Disconnected) => anyhow::bail!("its thread ended without a word"),
    }
}

fn report(tally: &mut Tally, scenario: &Scenario, took: Duration, result: Result<()>) {
    let name = scenario.name;
    let seconds = format!("{:.1} s", took.as_secs_f32());
    match result {
        Ok(()) => {
            tally.passed += 1;
            println!("ok    {name} ({seconds})");
        }
        Err(error) if error.is::<Skipped>() => {
            tally.skipped += 1;
            println!("skip  {name} ({seconds}): {error:#}");
        }
        Err(error) => {
            tally.failed += 1;
            let bed = Bed::named(name);
            println!("FAIL  {name} ({seconds}): {error:#}");
            print!("{}", bed.tails());
            if let Some(target) = logs_directory().map(|dir| dir.join(name)) {
                let _ = std::fs::remove_dir_all(&target);
                match bed.save_logs(&target) {
                    Ok(()) => println!("--- all of it is in {}", target.display()),
                    Err(error) => println!("--- the logs could not be saved: {error:#}"),
                }
            }
        }
    }
}

/// Beside the profile's directory: `target/scenario-logs`.
fn logs_directory() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    Some(own.parent()?.parent()?.join("scenario-logs"))
}

fn wait_for_a_person(scenarios: &[Scenario]) {
    println!("everything is left running until Enter or Ctrl-C. To look at it, from another terminal:");
    println!(
        "  nsenter -t {} -m -p bash      # then `ip netns` lists the pods",
        weft_testbed::isolate::host_pid()
    );
    for scenario in scenarios {
        println!("  {}: files in {}", scenario.name, Bed::named(scenario.name).dir().display());
    }
    let _ = std::io::stdin().read_line(&mut String::new());
}
