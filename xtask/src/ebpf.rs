//! `cargo xtask build-ebpf`: the kernel object that the agent embeds.
//!
//! The kernel programs are a cargo workspace of their own, built for the BPF target by a compiler of their own
//! (toolchain.rs). The object is copied to `target/bpf/weft.o`, and only when it differs: crates/kernel embeds that file
//! and would be rebuilt, with everything above it, by a mere change of its date.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::packages::Purpose;
use crate::{run, say, setup, toolchain, tree};

/// Build the kernel programs into target/bpf/weft.o
#[derive(clap::Args)]
#[command(
    long_about = "Build the kernel programs into target/bpf/weft.o, which the agent embeds.\n\n\
        Takes a rustup nightly with rust-src if there is one, else Debian's rustc-web, cargo-web and rust-web-src, and \
        says which. What is missing is installed after saying so (needs root or sudo then; building does not).",
    after_help = "Examples:\n  cargo xtask build-ebpf\n\nLook at the result:\n  \
        bpftool btf dump file target/bpf/weft.o\n  llvm-objdump-22 -dr target/bpf/weft.o"
)]
pub struct Arguments {}

pub fn main(_: &Arguments) -> Result<()> {
    setup::ensure(Purpose::BuildEbpf)?;
    build()
}

/// Builds; the toolchain has to be there. Whether anything is to be done is for cargo to decide.
pub fn build() -> Result<()> {
    let begin = Instant::now();
    let (compiler, linker) = toolchain::ensure()?;
    say::step(&format!("Kernel programs, with {}", compiler.name));
    let workspace = tree::root()?.join("ebpf");
    let own_target = workspace.join("target");
    let mut flags: Vec<OsString> = vec![
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH).into(),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
    ];
    // The kernel's type information names the source of every line.
    flags.extend(tree::remapped_paths()?);
    let mut command = Command::new(&compiler.cargo);
    for (name, _) in env::vars_os() {
        if is_for_the_other_compiler(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    let mut path = OsString::from(linker.parent().context("bpf-linker has no directory")?);
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    command
        .current_dir(&workspace)
        .args([
            "build",
            "--release",
            "-Z",
            "build-std=core",
            "--target",
            "bpfel-unknown-none",
            "--target-dir",
        ])
        .arg(&own_target)
        .env("PATH", path)
        .env("RUSTC", &compiler.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_RESOLVER_INCOMPATIBLE_RUST_VERSIONS", "fallback")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(OsStr::new("\x1f")));
    run::pass(&mut command, "building the kernel programs")?;

    let (object, changed) = publish(own_target.join("bpfel-unknown-none/release/weft"))?;
    let news = if changed { "" } else { ", unchanged" };
    say::success(&format!("{} ({}{news})", object.display(), say::duration(begin.elapsed())));
    Ok(())
}

fn publish(built: PathBuf) -> Result<(PathBuf, bool)> {
    let bytes = fs::read(&built).with_context(|| format!("the build left no {}", built.display()))?;
    // There, wherever cargo's target directory is: crates/kernel/build.rs looks for it there.
    let object = tree::root()?.join("target/bpf/weft.o");
    if fs::read(&object).is_ok_and(|old| old == bytes) {
        return Ok((object, false));
    }
    let directory = object.parent().context("the object has no directory")?;
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    // Renamed into place, so that a build that runs beside this one never embeds half an object.
    let part = object.with_extension("o.part");
    fs::write(&part, bytes).with_context(|| format!("cannot write {}", part.display()))?;
    fs::rename(&part, &object).with_context(|| format!("cannot write {}", object.display()))?;
    Ok((object, true))
}

/// What `cargo xtask` itself was started with, and flags meant for the workspace. Settings of registries, network and
/// cargo's home hold for both.
fn is_for_the_other_compiler(name: &str) -> bool {
    const NAMES: [&str; 8] = [
        "CARGO",
        "CARGO_TARGET_DIR",
        "LD_LIBRARY_PATH",
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "OUT_DIR",
    ];
    const PREFIXES: [&str; 6] =
        ["CARGO_BUILD_", "CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_PROFILE_", "CARGO_TARGET_", "RUSTC_"];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::is_for_the_other_compiler;

    #[test]
    fn only_the_users_settings_pass() {
        for (name, removed) in [
            ("RUSTFLAGS", true),
            ("RUSTC_WRAPPER", true),
            ("CARGO", true),
            ("CARGO_PKG_NAME", true),
            ("CARGO_BUILD_TARGET", true),
            ("CARGO_HOME", false),
            ("CARGO_NET_OFFLINE", false),
            ("CARGO_REGISTRIES_OURS_INDEX", false),
            ("RUST_BACKTRACE", false),
            ("PATH", false),
        ] {
            assert_eq!(is_for_the_other_compiler(name), removed, "{name}");
        }
    }
}
