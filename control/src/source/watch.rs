//! Notices changes of the directory: inotify for speed, a look every few seconds for certainty (a watch can be lost
//! with the directory it was on, and some file systems report nothing). Runs on a thread of its own, since all it does
//! is wait and read files.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind},
};

use super::{Delta, directory::Directory};

/// Waiting for things to settle after the first event: a writer's next change usually comes within this.
const QUIET: Duration = Duration::from_millis(50);
/// A directory that never settles is read this often.
const BUSY: Duration = Duration::from_millis(500);
/// Looking without having been told to.
const RESCAN: Duration = Duration::from_secs(3);
/// A writer that neither writes nor closes for this long is taken to have finished.
const WRITER: Duration = Duration::from_secs(2);

/// Watches until `send` returns false. `send` is called with every change, and the number of complaints after it.
pub fn run(mut directory: Directory, mut send: impl FnMut(Delta, usize) -> bool) {
    let mut watch = Watch::new(directory.path());
    loop {
        watch.wait();
        watch.renew(directory.path());
        let delta = directory.rescan(&watch.unsettled());
        if !send(delta, directory.complaints().len()) {
            return;
        }
    }
}

struct Watch {
    events: Receiver<notify::Result<Event>>,
    /// None where the directory cannot be watched: then only the periodic look remains.
    watcher: Option<RecommendedWatcher>,
    /// Which directory the watcher is on: one that was replaced has another inode.
    watched: Option<(u64, u64)>,
    /// Files written to and not closed, by the time of the last write.
    writing: HashMap<PathBuf, Instant>,
}

impl Watch {
    fn new(path: &Path) -> Self {
        let mut watch = Self { events: channel().1, watcher: None, watched: None, writing: HashMap::new() };
        watch.renew(path);
        watch
    }

    /// Puts the watch on the directory that has the path now.
    fn renew(&mut self, path: &Path) {
        let identity = fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
        if identity == self.watched && self.watcher.is_some() {
            return;
        }
        self.watched = identity;
        self.watcher = None;
        if identity.is_none() {
            return;
        }
        let (sender, events) = channel();
        let watcher = notify::recommended_watcher(move |event| {
            // The receiver is gone when this watcher is being replaced.
            let _ = sender.send(event);
        })
        .and_then(|mut watcher| watcher.watch(path, RecursiveMode::NonRecursive).map(|()| watcher));
        match watcher {
            Ok(watcher) => (self.watcher, self.events) = (Some(watcher), events),
            Err(error) => tracing::warn!(
                target: "source",
                "{}: cannot be watched ({error}); changes are noticed every {RESCAN:?}", path.display()
            ),
        }
    }

    /// Returns when something happened and things are quiet again, or when it is time to look anyway.
    fn wait(&mut self) {
        let patience = if self.writing.is_empty() { RESCAN } else { QUIET };
        if !self.next(patience) {
            return;
        }
        let first = Instant::now();
        while first.elapsed() < BUSY && self.next(QUIET) {}
    }

    /// Whether an event came within `patience`.
    fn next(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    if self.note(event) {
                        return true;
                    }
                }
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => {
                    self.watcher = None;
                    #[allow(
                        clippy::disallowed_methods,
                        reason = "a thread of its own, with nothing to wait on"
                    )]
                    std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
                    return false;
                }
            }
        }
    }

    /// Takes in an event; false for those that change nothing, such as our own reading.
    fn note(&mut self, event: notify::Result<Event>) -> bool {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                tracing::warn!(target: "source", "watching: {error}");
                self.watcher = None;
                return true;
            }
        };
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => {
                self.writing.retain(|path, _| !event.paths.contains(path));
                true
            }
            EventKind::Access(_) => false,
            EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) => {
                self.writing.extend(event.paths.into_iter().map(|path| (path, Instant::now())));
                true
            }
            EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => {
                self.writing.retain(|path, _| !event.paths.contains(path));
                true
            }
            _ => true,
        }
    }

    /// Files in the middle of being written.
    fn unsettled(&mut self) -> HashSet<PathBuf> {
        self.writing.retain(|_, last| last.elapsed() < WRITER);
        self.writing.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests;
