//! Building the workspace's programs, and `demo` and the benches, which are some of them.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

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

/// Measure Weft beside plain TCP, over the same wire; or the controller beside a large cluster
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    long_about = "Measure Weft beside plain TCP, over the same wire, in one run: throughput (iperf3), requests and new \
        connections (wrk), and the agent's memory. Prints a table with the ratios. Builds in release mode, which takes \
        minutes the first time. Needs root to run (not to build): network namespaces, eBPF.",
    after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench --runs 5 requests     # the median of five, works whose name contains it\n  \
        cargo xtask bench -o json > bench.json\n  cargo xtask bench control               # the controller with 50000 pods"
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
    #[command(subcommand)]
    other: Option<OtherBench>,
}

#[derive(clap::Subcommand)]
enum OtherBench {
    Control(ControlBenchArguments),
}

/// Measure the controller beside a large, restless cluster
#[derive(clap::Args)]
#[command(
    long_about = "Measure the controller beside a large, restless cluster: weft-control itself, fed by a stand-in for the API \
        server that makes up nodes, pods and Services and replaces some of the pods every second, with simulated agents on \
        its TLS port. Prints memory, processor time, messages and bytes for each change, and how long a change takes to an \
        agent. Builds in release mode, which takes minutes the first time. Needs no root, and leaves nothing behind.",
    after_help = "Examples:\n  cargo xtask bench control\n  cargo xtask bench control --nodes 100 --pods 3000 --services 300 --seconds 10\n  \
        cargo xtask bench control --agents 200 -o json > control.json"
)]
struct ControlBenchArguments {
    /// Nodes of the cluster
    #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
    nodes: u32,
    /// Pods, all of them in the mesh
    #[arg(long, value_name = "NUMBER", default_value_t = 50_000)]
    pods: u32,
    /// Services, among which the pods are divided
    #[arg(long, value_name = "NUMBER", default_value_t = 5000)]
    services: u32,
    /// Simulated agents, each on a node of its own
    #[arg(long, value_name = "NUMBER", default_value_t = 50)]
    agents: u32,
    /// Pods replaced a second
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    churn: u32,
    /// How long pods are replaced
    #[arg(long, value_name = "NUMBER", default_value_t = 30)]
    seconds: u32,
    /// Print `json` on standard output instead of a table
    #[arg(short, long, value_name = "FORMAT", value_parser = ["table", "json"], default_value = "table")]
    output: String,
}

/// The CNI plugin: its package, and its program.
const PLUGIN: &str = "weft-cni";

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
    let mut command = cargo(&["build", "--workspace", "--exclude", "xtask"])?;
    let dir = place(&mut command, profile)?;
    run::pass(&mut command, "building the programs")?;
    Ok(dir)
}

/// Builds the CNI plugin as nodes get it, linked to no library: the agent copies it to nodes whose C library is another
/// one, or older, or none. Returns its path, which is also that of the plugin as [`programs`] builds it.
pub fn static_plugin(profile: Profile) -> Result<PathBuf> {
    let mut command = cargo(&["rustc", "--package", PLUGIN, "--bin", PLUGIN])?;
    let dir = place(&mut command, profile)?;
    // For this one program: libraries and what runs at build time are as ever.
    command.args(["--", "-C", "target-feature=+crt-static"]);
    run::pass(&mut command, "building the CNI plugin")?;
    Ok(dir.join(PLUGIN))
}

/// Has `command` build with that profile into the target directory, and returns where programs will be.
fn place(command: &mut Command, profile: Profile) -> Result<PathBuf> {
    let target = tree::target()?;
    command.arg("--target-dir").arg(&target);
    match profile {
        Profile::Development => Ok(target.join("debug")),
        Profile::Release => {
            command.arg("--release").env("CARGO_ENCODED_RUSTFLAGS", release_flags()?);
            Ok(target.join("release"))
        }
    }
}

/// Compiler flags of every release build, in cargo's encoding: the user's, and such that a program says nothing of where
/// it was built, so that it is the same from every clone. (Cargo leaves flags with such a mapping out of the hashes in
/// the names of its files and symbols, so that these are the same, too.)
fn release_flags() -> Result<OsString> {
    const SEPARATOR: &str = "\x1f";
    let mut flags = match env::var_os("CARGO_ENCODED_RUSTFLAGS") {
        Some(flags) => vec![flags],
        None => {
            env::var("RUSTFLAGS").iter().flat_map(|flags| flags.split_whitespace()).map(Into::into).collect()
        }
    };
    flags.extend(tree::remapped_paths()?);
    Ok(flags.join(OsStr::new(SEPARATOR)))
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
    if let Some(OtherBench::Control(arguments)) = &arguments.other {
        return bench_control(arguments);
    }
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

fn bench_control(arguments: &ControlBenchArguments) -> Result<()> {
    say::step("Controller and its bench, in release mode");
    let mut command = Command::new(control_bench()?);
    let ControlBenchArguments { nodes, pods, services, agents, churn, seconds, output } = arguments;
    for (flag, number) in [
        ("--nodes", nodes),
        ("--pods", pods),
        ("--services", services),
        ("--agents", agents),
        ("--churn", churn),
        ("--seconds", seconds),
    ] {
        command.args([flag, &number.to_string()]);
    }
    command.args(["--output", output]);
    run::become_program(&mut command)
}

/// Builds the controller and the program that measures it, which knows where the controller is. Returns its path.
fn control_bench() -> Result<PathBuf> {
    // Over the whole workspace for its features, as in `programs`; what is built is this one and what it needs.
    let build =
        ["bench", "--workspace", "--exclude", "xtask", "--bench", "scale", "--no-run", "--target-dir"];
    let mut command = cargo(&build)?;
    command.arg(tree::target()?).arg("--message-format=json-render-diagnostics");
    command.env("CARGO_ENCODED_RUSTFLAGS", release_flags()?);
    let messages = run::output(&mut command, "building the controller and its bench")?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let path = messages
        .filter(|message| message["target"]["kind"][0] == "bench")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    path.context("cargo built no bench")
}
