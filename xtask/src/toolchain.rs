//! The compilers and the linker for the kernel programs: which are there, and how to get them.
//!
//! Rust for the BPF target needs unstable features, the source of `core`, and a linker of its own. A rustup nightly
//! with rust-src is taken where there is one; Debian's packages (a stable compiler with its source, told by
//! RUSTC_BOOTSTRAP to allow what it needs) everywhere else. The workspace's own compiler is not touched by any of this.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::packages::{self, Package, Probe};
use crate::tree::{self, find_program};
use crate::{run, say};

/// The oldest compiler the kernel programs build with.
const OLDEST_RUST: (u32, u32) = (1, 95);
const LINKER_VERSION: &str = "0.13.0";
/// What Debian's compiler is expected to bring, for installing everything in one go; it is asked once it is there.
const DEBIAN_LLVM: u32 = 22;
/// Versions of LLVM this bpf-linker can be built with.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// A compiler that can build the kernel programs.
#[derive(Debug)]
pub struct Compiler {
    pub cargo: PathBuf,
    pub rustc: PathBuf,
    /// For a person to read.
    pub name: String,
    /// Major version of its LLVM; the linker's must not be older.
    pub llvm: u32,
}

impl Compiler {
    pub fn find() -> Option<Compiler> {
        nightly().or_else(debian)
    }

    fn at(binaries: &Path, kind: &str) -> Option<Compiler> {
        let (cargo, rustc) = (binaries.join("cargo"), binaries.join("rustc"));
        let version = run::answer(Command::new(&rustc).arg("-vV").env_remove("LD_LIBRARY_PATH"))?;
        let (release, llvm) = parse_version(&version)?;
        if release < OLDEST_RUST || !cargo.exists() {
            return None;
        }
        let name = format!("{kind} ({})", version.lines().next().unwrap_or_default());
        Some(Compiler { cargo, rustc, name, llvm })
    }
}

/// The newest rustup nightly that has the source of `core`. Found by looking, since asking rustup may install things.
fn nightly() -> Option<Compiler> {
    let home = match env::var_os("RUSTUP_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(env::var_os("HOME")?).join(".rustup"),
    };
    let mut toolchains: Vec<PathBuf> = fs::read_dir(home.join("toolchains"))
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("nightly-"))
        .map(|entry| entry.path())
        .filter(|path| path.join("lib/rustlib/src/rust/library/core").is_dir())
        .collect();
    // `nightly-x86_64-...` sorts after `nightly-2026-...`: the floating one is preferred, then the newest date.
    toolchains.sort();
    toolchains.iter().rev().find_map(|path| Compiler::at(&path.join("bin"), "rustup nightly with rust-src"))
}

fn debian() -> Option<Compiler> {
    if !Path::new("/usr/lib/rustlib/src/rust/library/core").is_dir() {
        return None;
    }
    Compiler::at(Path::new("/usr/bin"), "the system's Rust packages")
}

/// ((major, minor) of Rust, major of LLVM) from the output of `rustc -vV`.
fn parse_version(text: &str) -> Option<((u32, u32), u32)> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let mut release = field("release:")?.split(['.', '-']).map(str::parse::<u32>);
    let llvm = field("LLVM version:")?.split('.').next()?.parse().ok()?;
    Some(((release.next()?.ok()?, release.next()?.ok()?), llvm))
}

/// The linker: one on PATH, else the one setup built earlier.
pub fn linker() -> Option<PathBuf> {
    let works = |path: &PathBuf| {
        let version = run::answer(Command::new(path).arg("--version").env_remove("LD_LIBRARY_PATH"));
        version.is_some_and(|version| version.starts_with("bpf-linker"))
    };
    find_program("bpf-linker")
        .filter(works)
        .or_else(|| Some(own_linker().ok()?.join("bin/bpf-linker")).filter(works))
}

fn own_linker() -> Result<PathBuf> {
    Ok(tree::cache()?.join(format!("bpf-linker-{LINKER_VERSION}")))
}

/// Makes sure that compiler and linker are there, installing what is missing after saying so. Returns both.
pub fn ensure() -> Result<(Compiler, PathBuf)> {
    if let (Some(compiler), Some(linker)) = (Compiler::find(), linker()) {
        return Ok((compiler, linker));
    }
    let explain = "the kernel programs need either a rustup nightly with its source \
                   (rustup toolchain install nightly --component rust-src) or Debian's rustc-web, cargo-web, rust-web-src";
    packages::install(&missing_packages()).context(explain)?;
    let Some(compiler) = Compiler::find() else {
        bail!("no compiler for the kernel programs found after installing; {explain}")
    };
    let linker = match linker() {
        Some(linker) => linker,
        None => build_linker(compiler.llvm)?,
    };
    Ok((compiler, linker))
}

fn missing_packages() -> Vec<Package> {
    let compiler = Compiler::find();
    let mut wanted = Vec::new();
    if compiler.is_none() {
        let core = || Probe::File("/usr/lib/rustlib/src/rust/library/core/src/lib.rs".to_owned());
        wanted.push(Package::new("rustc-web", "compiler for the kernel programs", core()));
        wanted.push(Package::new(
            "cargo-web",
            "builds the kernel programs",
            Probe::File("/usr/bin/cargo".to_owned()),
        ));
        wanted.push(Package::new("rust-web-src", "source of Rust's core library", core()));
    }
    if linker().is_none() {
        let llvm = compiler.map_or(DEBIAN_LLVM, |compiler| compiler.llvm);
        let within = |file: &str| Probe::File(format!("/usr/lib/llvm-{llvm}/{file}"));
        let header = |name: &str| Probe::File(format!("/usr/include/{name}"));
        let why = "to build bpf-linker";
        wanted.push(Package::new(format!("llvm-{llvm}-dev"), why, within("bin/llvm-config")));
        wanted.push(Package::new(format!("libpolly-{llvm}-dev"), why, within("include/polly")));
        wanted.push(Package::new("zlib1g-dev", why, header("zlib.h")));
        wanted.push(Package::new("libzstd-dev", why, header("zstd.h")));
        wanted.push(Package::new("g++", why, Probe::Program("g++")));
    }
    packages::missing(wanted)
}

fn build_linker(llvm: u32) -> Result<PathBuf> {
    let by_hand =
        format!("install bpf-linker {LINKER_VERSION} built with LLVM {llvm} or newer and put it on PATH");
    if !LINKER_LLVM.contains(&llvm) {
        bail!("the compiler uses LLVM {llvm}, which bpf-linker {LINKER_VERSION} does not know; {by_hand}");
    }
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if !prefix.join("bin/llvm-config").exists() {
        // The compiler Debian's archive holds today may have come with another LLVM than expected.
        packages::install(&missing_packages()).context(by_hand.clone())?;
    }
    let root = own_linker()?;
    say::step(&format!(
        "Building bpf-linker {LINKER_VERSION} into {} (once; a minute or a few)",
        root.display()
    ));
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--no-default-features"])
        .arg("--features")
        .arg(format!("llvm-{llvm}"))
        .arg("--root")
        .arg(&root)
        .env("LLVM_PREFIX", &prefix)
        // Its own, thrown away after: not the workspace's.
        .env_remove("CARGO_TARGET_DIR");
    run::quietly(&mut command, &tree::cache()?.join("bpf-linker.log"), "cargo install bpf-linker")
        .with_context(|| by_hand.clone())?;
    linker().with_context(|| format!("bpf-linker was built and does not run; {by_hand}"))
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn versions_are_read_from_rustc() {
        let debian = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
                      host: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8";
        let nightly = "rustc 1.99.0-nightly (0 2026-08-01)\nrelease: 1.99.0-nightly\nLLVM version: 23.0.0\n";
        for (text, expected) in [
            (debian, Some(((1, 96), 22))),
            (nightly, Some(((1, 99), 23))),
            ("rustc 1.99.0", None),
            ("release: one.two\nLLVM version: 22.1.8", None),
        ] {
            assert_eq!(parse_version(text), expected, "{text}");
        }
    }
}
