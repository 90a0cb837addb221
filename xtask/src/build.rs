//! Building the workspace's programs, and `demo` and `bench`, which are two of them.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::packages::{self, Purpose};
use crate::{ebpf, run, say, setup, tree};

/// Watch Weft at work: two nodes, real programs, encrypted by one label
#[derive(clap::Args)]
#[command(
    long_about = "Watch Weft at work: two nodes (network namespaces on this machine), real nginx, redis and curl, in the \
        clear, then encrypted by one label, then with an agent killed. Every step checks what it shows; exit code 0 \
        means that all of it held. Cleans up after itself. Needs root to run (not to build): network namespaces, eBPF.",
    after_help = "Examples:\n  cargo xtask demo\n  cargo xtask demo --keep     # leave it running, and print what to type next"
)]
pub struct DemoArguments {
    /// Leave everything running until Ctrl-C, and print commands to try
    #[arg(long)]
    keep: bool,
}

/// Measure Weft beside plain TCP, over the same wire
#[derive(clap::Args)]
#[command(
    long_about = "Measure Weft beside plain TCP, over the same wire, in one run: throughput (iperf3), requests and new \
        connections (wrk), and the agent's memory. Prints a table with the ratios. Builds in release mode, which takes \
        minutes the first time. Needs root to run (not to build): network namespaces, eBPF.",
    after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench --runs 5 requests     # the median of five, works whose name contains it\n  \
        cargo xtask bench -o json > bench.json"
)]
pub struct BenchArguments {
    /// Only works whose name contains this: stream-1, stream-4, requests-1, requests-64, connections-32, memory
    work: Option<String>,
    /// How often to measure each work; the median counts
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Print `json` on standard output instead of a table
    #[arg(short, long, value_name = "FORMAT", value_parser = ["table", "json"], default_value = "table")]
    output: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    Development,
    Release,
}

/// A cargo command in the root of the checkout.
pub fn cargo(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.args(arguments).current_dir(tree::root()?);
    // Set for xtask's own run; build scripts of other packages would see them change and run again.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name == "OUT_DIR" {
            command.env_remove(&*name);
        }
    }
    Ok(command)
}

/// Builds every program of the workspace but this one, and returns the directory they are in.
pub fn programs(profile: Profile) -> Result<PathBuf> {
    // Always the whole workspace: cargo unites features over what is built together, so building one package alone
    // would build its dependencies again.
    let mut command = cargo(&["build", "--workspace", "--exclude", "xtask", "--target-dir"])?;
    command.arg(tree::target()?);
    if profile == Profile::Release {
        command.arg("--release");
    }
    run::pass(&mut command, "building the programs")?;
    Ok(tree::target()?.join(if profile == Profile::Release { "release" } else { "debug" }))
}

/// A command that runs a program as root.
pub fn as_root(program: &PathBuf) -> Result<Command> {
    let elevate = packages::elevation()?;
    let Some((sudo, _)) = elevate.split_first() else { return Ok(Command::new(program)) };
    let mut command = Command::new(sudo);
    command.arg("--preserve-env").arg(program);
    Ok(command)
}

pub fn demo(arguments: &DemoArguments) -> Result<()> {
    packages::require_root("the demo makes network namespaces and loads eBPF programs")?;
    setup::ensure(Purpose::Demo)?;
    ebpf::build()?;
    say::step("Agent, controller and demo");
    let program = programs(Profile::Development)?.join("demo");
    let mut command = as_root(&program)?;
    if arguments.keep {
        command.arg("--keep");
    }
    run::become_program(&mut command)
}

pub fn bench(arguments: &BenchArguments) -> Result<()> {
    packages::require_root("the bench makes network namespaces and loads eBPF programs")?;
    setup::ensure(Purpose::Bench)?;
    ebpf::build()?;
    say::step("Agent, controller and bench, in release mode");
    let program = programs(Profile::Release)?.join("bench");
    let mut command = as_root(&program)?;
    command.args(["--runs", &arguments.runs.to_string(), "--output", &arguments.output]);
    command.args(&arguments.work);
    run::become_program(&mut command)
}
