//! The run directory of one cluster: where its processes write, and what is shown of it when a scenario fails. It lies
//! on the private tmpfs of the bed, so nobody has to remove it.

use std::collections::HashSet;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How much of the end of a log is shown.
const TAIL_BYTES: u64 = 4096;

static KEEP: AtomicBool = AtomicBool::new(false);

/// From now on nothing is ended when its value is dropped, so that a person can look at it; the bed's end still ends
/// all of it.
pub fn keep_everything() {
    KEEP.store(true, Ordering::SeqCst);
}

pub(crate) fn keeping() -> bool {
    KEEP.load(Ordering::SeqCst)
}

/// The run directory of a cluster with its name.
#[derive(Clone, Debug)]
pub struct Bed {
    name: String,
    dir: PathBuf,
}

impl Bed {
    /// Makes the run directory. `name` must be new in this process tree.
    pub fn new(name: &str) -> Result<Bed> {
        if !Path::new("/run/netns").is_dir() {
            bail!("not inside the bed's own namespaces: call weft_testbed::isolated first");
        }
        let bed = Bed::named(name);
        std::fs::create_dir_all("/run/weft")?;
        std::fs::create_dir(bed.dir()).with_context(|| format!("cluster {name}"))?;
        Ok(bed)
    }

    /// The bed of that name, whether or not it was made yet.
    pub fn named(name: &str) -> Bed {
        Bed { name: name.to_owned(), dir: Path::new("/run/weft").join(name) }
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The run directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A directory below the run directory, made if it is not there.
    pub fn subdir(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.dir.join(path);
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Name of a network namespace of this cluster.
    pub fn netns_name(&self, what: &str) -> String {
        format!("wt-{}-{what}", self.name)
    }

    /// Every log file of the cluster.
    pub fn logs(&self) -> Vec<PathBuf> {
        let mut logs = Vec::new();
        collect_logs(&self.dir, &mut logs);
        logs.sort();
        logs
    }

    /// The ends of all logs, for a person who asks why a scenario failed.
    pub fn tails(&self) -> String {
        let mut text = String::new();
        for log in self.logs() {
            let tail = tail_of(&log).unwrap_or_else(|error| format!("(cannot be read: {error})"));
            if !tail.trim().is_empty() {
                let name = log.strip_prefix(&self.dir).unwrap_or(&log).display().to_string();
                text.push_str(&format!("--- {name}\n{}\n", tail.trim_end()));
            }
        }
        text
    }

    /// Copies all logs to `target`, which outlives the bed.
    pub fn save_logs(&self, target: &Path) -> Result<()> {
        for log in self.logs() {
            let to = target.join(log.strip_prefix(&self.dir).unwrap_or(&log));
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::fs::copy(&log, &to)?;
        }
        Ok(())
    }

    /// Kills every process that lives in one of this cluster's network namespaces: for a scenario that hangs.
    pub fn kill_processes(&self) {
        let prefix = self.netns_name("");
        let namespaces: HashSet<u64> = entries(Path::new("/run/netns"))
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
            .filter_map(|path| std::fs::metadata(path).ok().map(|meta| meta.ino()))
            .collect();
        for process in entries(Path::new("/proc")) {
            let Some(pid) = process.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok()) else {
                continue;
            };
            let inside =
                std::fs::metadata(process.join("ns/net")).is_ok_and(|meta| namespaces.contains(&meta.ino()));
            if inside && pid != std::process::id() as i32 {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn collect_logs(dir: &Path, logs: &mut Vec<PathBuf>) {
    for path in entries(dir) {
        // Not by links: a kubelet leaves some that lead nowhere from outside its node.
        let Ok(kind) = path.symlink_metadata().map(|meta| meta.file_type()) else { continue };
        if kind.is_file() && path.extension().is_some_and(|extension| extension == "log") {
            logs.push(path);
        } else if kind.is_dir() {
            collect_logs(&path, logs);
        }
    }
}

fn tail_of(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let start = length.saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    // Do not begin in the middle of a line.
    Ok(if start > 0 { text.split_once('\n').map(|(_, rest)| rest.to_owned()).unwrap_or(text) } else { text })
}
