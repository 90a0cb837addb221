//! What the tests want of Kubernetes' own programs, built once from the Go modules in `tests/kubernetes` and kept outside
//! the tree: one binary that is every program of a cluster, unless `KUBEBUILDER_ASSETS` has them, and Helm's chart engine,
//! unless `HELM_BIN` names a Helm.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::tree::{self, find_program};
use crate::{run, say};

/// What a cluster with nodes is made of.
const PROGRAMS: [&str; 7] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
];
/// The binary, which acts as the program it is called by.
const BINARY: &str = "hyperkube";
const SIGNS: [&str; 2] = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"];

/// The directory of the programs, after building them where that is needed: some ten minutes, once.
pub fn programs() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from) {
        if is_whole(&given) {
            return Ok(given);
        }
        say::detail(&format!("{} lacks programs of a node; building our own", given.display()));
    }
    let module = tree::root()?.join("tests/kubernetes/hyperkube");
    let version = version(&module, "k8s.io/kubernetes")?;
    let dir = tree::cache()?.join(format!("kubernetes-{version}"));
    if !is_whole(&dir) {
        say::step(&format!("Kubernetes {version} for the tests, built once: about ten minutes"));
        build(&module, &stamps(&version), &dir.join(BINARY))?;
        for program in PROGRAMS {
            let link = dir.join(program);
            let _ = fs::remove_file(&link);
            symlink(BINARY, &link).with_context(|| link.display().to_string())?;
        }
    }
    Ok(dir)
}

/// The program that renders charts as Helm does, after building it where that is needed: some three minutes, once.
pub fn helm() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("HELM_BIN") {
        return Ok(given.into());
    }
    let module = tree::root()?.join("tests/kubernetes/helm");
    let version = version(&module, "helm.sh/helm/v4")?;
    // The program around Helm's packages is ours, and changes without them.
    let mut sources = Sha256::new();
    for file in ["go.mod", "go.sum", "main.go"] {
        sources.update(fs::read(module.join(file)).with_context(|| format!("{file} of the chart engine"))?);
    }
    let sources: String = sources.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let program = tree::cache()?.join(format!("helm-{version}-{sources}/helm"));
    if !program.exists() {
        say::step(&format!("Helm {version}'s chart engine for the tests, built once: about three minutes"));
        build(&module, "", &program)?;
    }
    Ok(program)
}

fn is_whole(dir: &Path) -> bool {
    PROGRAMS.iter().all(|program| dir.join(program).exists())
}

/// The version of a package that a module's go.mod asks for.
fn version(module: &Path, package: &str) -> Result<String> {
    let path = module.join("go.mod");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let version = required(&text, package);
    version.with_context(|| format!("{} requires no {package}", path.display())).map(str::to_owned)
}

fn required<'a>(module: &'a str, package: &str) -> Option<&'a str> {
    let mut lines = module.lines().map(|line| line.trim().trim_start_matches("require "));
    lines.find_map(|line| line.strip_prefix(package)?.strip_prefix(' ')).map(str::trim)
}

/// Linker flags that tell the servers their version. Without them they call themselves v0.0.0-master.
fn stamps(version: &str) -> String {
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let mut flags = String::new();
    for package in SIGNS {
        for (name, value) in [
            ("gitVersion", version),
            ("gitMajor", major),
            ("gitMinor", minor),
            ("gitTreeState", "clean"),
            ("gitCommit", "0000000000000000000000000000000000000000"),
            ("buildDate", "1970-01-01T00:00:00Z"),
        ] {
            flags.push_str(&format!(" -X {package}.{name}={value}"));
        }
    }
    flags
}

/// Builds a Go module's one program; what the compiler says goes to a log beside the program's directory.
fn build(module: &Path, linker_flags: &str, program: &Path) -> Result<()> {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let dir = program.parent().with_context(|| program.display().to_string())?;
    let Some(go) = find_program("go") else {
        bail!("Go 1.26 or newer is needed to build {name} for the tests: https://go.dev/doc/install");
    };
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    // Beside its place first: an interrupted build leaves nothing that looks whole.
    let half = dir.join(".building");
    let mut command = Command::new(go);
    // Of the checkout's state, git may refuse to speak: where another user owns it.
    command.args([
        "build",
        "-trimpath",
        "-buildvcs=false",
        "-ldflags",
        &format!("-s -w{linker_flags}"),
        "-o",
    ]);
    command.arg(&half).arg(".").current_dir(module);
    // No cgo: a static binary, and no C compiler is needed.
    command.env("CGO_ENABLED", "0");
    run::quietly(&mut command, &tree::cache()?.join(format!("{name}.log")), "go build")?;
    fs::rename(&half, program).with_context(|| program.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::required;

    #[test]
    fn the_version_is_that_of_the_module() {
        let module =
            "module hyperkube\n\nrequire (\n\tk8s.io/kubectl v0.0.0\n\tk8s.io/kubernetes v1.37.1\n)\n";
        assert_eq!(required(module, "k8s.io/kubernetes"), Some("v1.37.1"));
        assert_eq!(
            required("module helm\nrequire helm.sh/helm/v4 v4.3.1\n", "helm.sh/helm/v4"),
            Some("v4.3.1")
        );
        assert_eq!(required(module, "k8s.io/kube"), None);
        assert_eq!(required("module other", "k8s.io/kubernetes"), None);
    }
}
