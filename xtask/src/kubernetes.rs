//! The programs of a Kubernetes cluster for the tests: those of `KUBEBUILDER_ASSETS`, or one binary that is all of them,
//! built once from the Go module in `tests/kubernetes/hyperkube` and kept outside the tree.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

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
    let version =
        version(&fs::read_to_string(module.join("go.mod")).context("the Go module of the test cluster")?)?;
    let dir = tree::cache()?.join(format!("kubernetes-{version}"));
    if !is_whole(&dir) {
        build(&module, &version, &dir)?;
    }
    Ok(dir)
}

fn is_whole(dir: &Path) -> bool {
    PROGRAMS.iter().all(|program| dir.join(program).exists())
}

/// The version of Kubernetes that a go.mod asks for.
fn version(module: &str) -> Result<String> {
    let mut versions = module.lines().filter_map(|line| line.trim().strip_prefix("k8s.io/kubernetes "));
    Ok(versions.next().context("go.mod requires no k8s.io/kubernetes")?.trim().to_owned())
}

fn build(module: &Path, version: &str, dir: &Path) -> Result<()> {
    let Some(go) = find_program("go") else {
        bail!(
            "Go 1.26 or newer is needed to build Kubernetes {version} for the tests: https://go.dev/doc/install"
        );
    };
    say::step(&format!("Kubernetes {version} for the tests, built once: about ten minutes"));
    fs::create_dir_all(dir)?;
    // Without these the servers call themselves v0.0.0-master.
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let mut flags = "-s -w".to_owned();
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
    // Beside its place first: an interrupted build leaves nothing that looks whole.
    let half = dir.join(".building");
    let mut command = Command::new(go);
    command.args(["build", "-trimpath", "-ldflags", &flags, "-o"]).arg(&half).arg(".").current_dir(module);
    // No cgo: a static binary, and no C compiler is needed.
    command.env("CGO_ENABLED", "0");
    run::quietly(&mut command, &tree::cache()?.join("kubernetes.log"), "go build")?;
    fs::rename(&half, dir.join(BINARY))?;
    for program in PROGRAMS {
        let link = dir.join(program);
        let _ = fs::remove_file(&link);
        symlink(BINARY, &link).with_context(|| link.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn the_version_is_that_of_the_module() {
        let module =
            "module hyperkube\n\nrequire (\n\tk8s.io/kubectl v0.0.0\n\tk8s.io/kubernetes v1.37.1\n)\n";
        assert_eq!(version(module).ok().as_deref(), Some("v1.37.1"));
        assert!(version("module other").is_err());
    }
}
