//! `cargo xtask setup`: everything the other commands need from the machine, installed once.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::packages::{self, Purpose};
use crate::{say, toolchain};

/// Install what the other commands need: compilers, linker, and the programs of the test bed
#[derive(clap::Args)]
#[command(
    long_about = "Install what the other commands need: compilers, linker, and the programs of the test bed.\n\n\
        Says first what it will install and why. Programs and libraries come as Debian packages (as root, or through \
        sudo); bpf-linker is built once into ~/.cache/weft. No service of the machine is stopped or configured. Where \
        everything is there it does nothing. The other commands call it for what they need themselves.",
    after_help = "Examples:\n  cargo xtask setup"
)]
pub struct Arguments {}

pub fn main(_: &Arguments) -> Result<()> {
    let begin = Instant::now();
    ensure(Purpose::All)?;
    let (compiler, linker) = toolchain::ensure()?;
    say::success(&format!("kernel programs are built with {}", compiler.name));
    say::success(&format!("and linked by {}", linker.display()));
    say::success(&format!("everything is there ({})", say::duration(begin.elapsed())));
    Ok(())
}

/// Prepares the machine for one command.
pub fn ensure(purpose: Purpose) -> Result<()> {
    packages::install(&packages::missing(packages::of(purpose)))?;
    if purpose != Purpose::BuildEbpf {
        check_platform()?;
    }
    if matches!(purpose, Purpose::Test) {
        check_components()?;
    }
    toolchain::ensure()?;
    Ok(())
}

fn check_platform() -> Result<()> {
    // The agent's own preflight looks closer; this spares a long build where nothing can run.
    if !Path::new("/proc/self/ns/net").exists() {
        bail!("this is not a Linux with network namespaces; Weft runs on Linux 5.17 and later only");
    }
    Ok(())
}

/// rustfmt and clippy of the compiler that runs us.
fn check_components() -> Result<()> {
    let directory =
        env::var_os("CARGO").map(PathBuf::from).and_then(|cargo| cargo.parent().map(Path::to_path_buf));
    let Some(directory) = directory else { return Ok(()) };
    let missing: Vec<&str> =
        ["cargo-fmt", "cargo-clippy"].into_iter().filter(|name| !directory.join(name).exists()).collect();
    if missing.is_empty()
        || missing.iter().all(|name| crate::tree::find_program(name).is_some()) && !under_rustup()
    {
        return Ok(());
    }
    bail!("{} missing; run: rustup component add rustfmt clippy", missing.join(" and "));
}

fn under_rustup() -> bool {
    env::var_os("RUSTUP_TOOLCHAIN").is_some()
}
