//! `cargo xtask test`: what CI runs and what a person runs before a commit, in phases that stop at the first failure.

use std::env;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::packages::{self, Purpose};
use crate::{build, ebpf, images, kubernetes, run, say, setup, tree};

/// Check formatting and lints, run the unit tests, build everything, and run the scenarios
#[derive(clap::Args)]
#[command(
    long_about = "Check formatting and lints, build the kernel programs, run the unit tests, build everything, and run the \
        scenarios: stories about a cluster of network namespaces with the real agents and controller in it. With NAME: \
        only build, and run the scenarios whose name contains NAME.\n\n\
        Stops at the first phase that fails. The last line is the sum: N passed, N failed; a phase that fails without \
        counting tests, such as formatting, counts as one. Needs root for the tests that make network namespaces and \
        load eBPF programs (through sudo where there is one); building runs as you.",
    after_help = "Examples:\n  cargo xtask test\n  cargo xtask test race         # scenarios whose name contains `race`\n  \
        cargo xtask test --jobs 1     # one scenario at a time"
)]
pub struct Arguments {
    /// Run only the scenarios whose name contains this
    name: Option<String>,
    /// How many scenarios run at the same time; their own default if not given
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    jobs: Option<u32>,
}

#[derive(Default)]
struct Report {
    passed: u64,
    failed: u64,
    phases: Vec<(&'static str, Duration)>,
}

pub fn main(arguments: &Arguments) -> ExitCode {
    let mut report = Report::default();
    let outcome = phases(arguments, &mut report);
    for (name, took) in &report.phases {
        say::detail(&format!("{name:<16} {:>12}", say::duration(*took)));
    }
    let code = match &outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::failure(&format!("{error:#}"));
            if run::is_interrupt(error) {
                return run::exit_code_of(error);
            }
            report.failed = report.failed.max(1);
            ExitCode::FAILURE
        }
    };
    println!("{} passed, {} failed", report.passed, report.failed);
    code
}

fn phases(arguments: &Arguments, report: &mut Report) -> Result<()> {
    packages::require_root("some tests make network namespaces and load eBPF programs")?;
    let whole = arguments.name.is_none();
    report.phase("setup", |_| setup::ensure(Purpose::Test))?;
    if whole {
        report.phase("format", |_| format())?;
    }
    // Before everything that compiles crates/kernel, which embeds the object.
    report.phase("kernel programs", |_| ebpf::build())?;
    if whole {
        report.phase("lints", |_| lints())?;
        report.phase("unit tests", unit_tests)?;
    }
    report.phase("build", |_| {
        build::programs(build::Profile::Development).and_then(|dir| images::for_tests(&dir))
    })?;
    report.phase("kubernetes", |_| kubernetes::programs().and_then(|_| kubernetes::helm()).map(drop))?;
    report.phase("scenarios", |report| scenarios(arguments, report))
}

impl Report {
    fn phase(&mut self, name: &'static str, work: impl FnOnce(&mut Report) -> Result<()>) -> Result<()> {
        say::step(name);
        let begin = Instant::now();
        let result = work(self);
        self.phases.push((name, begin.elapsed()));
        result.with_context(|| format!("stopped at: {name}"))
    }

    fn add(&mut self, (passed, failed): (u64, u64)) {
        self.passed += passed;
        self.failed += failed;
    }
}

fn format() -> Result<()> {
    run::pass(&mut build::cargo(&["fmt", "--all", "--check"])?, "cargo fmt --all --check")?;
    let kernel = ["fmt", "--all", "--check", "--manifest-path", "ebpf/Cargo.toml"];
    run::pass(&mut build::cargo(&kernel)?, "cargo fmt --all --check in ebpf/")
}

fn lints() -> Result<()> {
    let mut command = build::cargo(&["clippy", "--workspace", "--all-targets", "--target-dir"])?;
    command.arg(tree::target()?).args(["--", "-D", "warnings"]);
    run::pass(&mut command, "cargo clippy --workspace --all-targets -- -D warnings")
}

fn unit_tests(report: &mut Report) -> Result<()> {
    let mut workspace = build::cargo(&["test", "--workspace", "--no-fail-fast", "--target-dir"])?;
    workspace.arg(tree::target()?);
    // What kernel and user space share is tested on the host, in the kernel programs' own workspace.
    let manifest = "ebpf/Cargo.toml";
    let mut common = build::cargo(&["test", "--manifest-path", manifest, "--package", "weft-ebpf-common"])?;
    common.arg("--target-dir").arg(tree::target()?.join("ebpf-common"));
    let mut fine = true;
    for command in [&mut workspace, &mut common] {
        fine &= run::watch(as_root(command)?, |line| report.add(libtest_summary(line).unwrap_or_default()))?;
    }
    if !fine {
        bail!("cargo test failed");
    }
    Ok(())
}

/// Makes cargo run the tests it has built through sudo, where we are not root.
fn as_root(command: &mut Command) -> Result<&mut Command> {
    if let Some(sudo) = packages::elevation()?.first() {
        let target = format!(
            "{}_UNKNOWN_LINUX_{}",
            env::consts::ARCH,
            if cfg!(target_env = "musl") { "MUSL" } else { "GNU" }
        );
        command
            .env(format!("CARGO_TARGET_{}_RUNNER", target.to_uppercase()), format!("{sudo} --preserve-env"));
    }
    Ok(command)
}

fn scenarios(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let program = tree::target()?.join("debug/scenarios");
    let mut command = build::as_root(&program)?;
    if let Some(jobs) = arguments.jobs {
        command.args(["--jobs", &jobs.to_string()]);
    }
    command.args(&arguments.name);
    command.env("KUBEBUILDER_ASSETS", kubernetes::programs()?);
    command.env("HELM_BIN", kubernetes::helm()?);
    let mut counted = None;
    let fine = run::watch(&mut command, |line| counted = scenario_summary(line).or(counted))?;
    report.add(counted.unwrap_or_default());
    match (fine, counted) {
        (true, Some((passed, 0))) if passed > 0 => Ok(()),
        (true, _) => bail!("the scenarios ended without a summary, or ran none"),
        (false, _) => bail!("scenarios failed"),
    }
}

/// (passed, failed) from `test result: ok. 12 passed; 0 failed; 0 ignored; ...`.
fn libtest_summary(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = counts.split("; ");
    Some((count(counts.next()?, " passed")?, count(counts.next()?, " failed")?))
}

/// (passed, failed) from `12 passed, 0 failed`, whatever else it goes on to count.
fn scenario_summary(line: &str) -> Option<(u64, u64)> {
    let mut counts = line.split(", ");
    Some((count(counts.next()?, " passed")?, count(counts.next()?, " failed")?))
}

fn count(text: &str, unit: &str) -> Option<u64> {
    text.strip_suffix(unit)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{libtest_summary, scenario_summary};

    #[test]
    fn summaries_of_libtest_are_counted() {
        for (line, expected) in [
            ("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out", Some((12, 0))),
            ("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured", Some((3, 2))),
            ("test result of something: 3 passed; 2 failed", None),
            ("test pods_are_counted ... ok", None),
            ("12 passed, 0 failed", None),
        ] {
            assert_eq!(libtest_summary(line), expected, "{line}");
        }
    }

    #[test]
    fn the_summary_of_the_scenarios_is_counted() {
        for (line, expected) in [
            ("12 passed, 3 failed", Some((12, 3))),
            ("12 passed, 0 failed, 1 skipped", Some((12, 0))),
            ("ok    bed_carries_plain_traffic (1.2 s)", None),
            ("it said: 12 passed, 3 failed", None),
        ] {
            assert_eq!(scenario_summary(line), expected, "{line}");
        }
    }
}
