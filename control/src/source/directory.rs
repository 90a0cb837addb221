//! A directory of manifests as a source: what is in force, given what is on disk. The last good version of a malformed
//! file stays, and a directory that suddenly holds nothing is not obeyed. `watch` calls it when something may have
//! changed.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    path::{Path, PathBuf},
};

use weft_api::{Object, ObjectKey};

use super::{
    Delta,
    files::{Files, Merged},
};

/// Why the controller does not start on a directory.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error("{path}: cannot read the directory of manifests: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{path}: {} not valid:\n{}", problems(.complaints.len()), lines(.complaints))]
    Malformed { path: PathBuf, complaints: BTreeMap<String, String> },
}

fn problems(count: usize) -> String {
    if count == 1 { "one manifest is".to_owned() } else { format!("{count} manifests are") }
}

fn lines(complaints: &BTreeMap<String, String>) -> String {
    let line = |(subject, complaint): (&String, &String)| format!("  {subject}: {complaint}");
    complaints.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The state of one directory.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    files: Files,
    objects: BTreeMap<ObjectKey, Object>,
    complaints: BTreeMap<String, String>,
    warned_kinds: BTreeSet<String>,
}

impl Directory {
    /// The first reading, which must succeed as a whole: there is no last good version to fall back to.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        let unreadable = |source| DirectoryError::Unreadable { path: path.to_owned(), source };
        let files = Files::default().read(path, &HashSet::new()).map_err(unreadable)?;
        let merged = files.merge();
        let malformed: BTreeMap<_, _> =
            files.complaints().map(|(name, complaint)| (name.to_owned(), complaint.to_owned())).collect();
        if !malformed.is_empty() {
            return Err(DirectoryError::Malformed { path: path.to_owned(), complaints: malformed });
        }
        let mut directory = Self {
            path: path.to_owned(),
            files: Files::default(),
            objects: BTreeMap::new(),
            complaints: BTreeMap::new(),
            warned_kinds: BTreeSet::new(),
        };
        directory.say(&merged);
        directory.files = files;
        directory.objects = merged.objects;
        Ok(directory)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// What is wrong on disk now, by file or object.
    pub fn complaints(&self) -> &BTreeMap<String, String> {
        &self.complaints
    }

    /// Everything in force.
    pub fn all(&self) -> Delta {
        Delta { upserts: self.objects.values().cloned().collect(), deletes: Vec::new() }
    }

    /// Reads the directory again and returns what changed. Files in `unsettled` are being written and stay as they
    /// were.
    pub fn rescan(&mut self, unsettled: &HashSet<PathBuf>) -> Delta {
        let files = match self.files.read(&self.path, unsettled) {
            Ok(files) => files,
            Err(error) => {
                self.refuse(&format!("cannot be read ({error}); what was last in force stays"));
                return Delta::default();
            }
        };
        let merged = files.merge();
        if merged.objects.is_empty() && !self.objects.is_empty() {
            self.refuse("held objects and holds none now; that is not obeyed, what was last in force stays");
            return Delta::default();
        }
        self.say(&merged);
        self.files = files;
        let delta = Delta::between(&self.objects, &merged.objects);
        self.objects = merged.objects;
        delta
    }

    /// Complains about the directory as a whole, once, and keeps what is said about its parts.
    fn refuse(&mut self, complaint: &str) {
        let subject = self.path.display().to_string();
        if self.complaints.get(&subject).is_none_or(|said| said != complaint) {
            tracing::error!(target: "source", "{subject}: {complaint}");
            self.complaints.insert(subject, complaint.to_owned());
        }
    }

    /// Says what is newly wrong and what is wrong no longer.
    fn say(&mut self, merged: &Merged) {
        for (subject, complaint) in &merged.complaints {
            if self.complaints.get(subject) != Some(complaint) {
                tracing::error!(target: "source", "{subject}: {complaint}");
            }
        }
        for subject in self.complaints.keys().filter(|subject| !merged.complaints.contains_key(*subject)) {
            tracing::info!(target: "source", "{subject}: is valid again");
        }
        self.complaints = merged.complaints.clone();
        for kind in &merged.ignored {
            if self.warned_kinds.insert(kind.clone()) {
                tracing::warn!(target: "source", "{kind}: Weft does not read objects of this kind; they are ignored");
            }
        }
    }
}

#[cfg(test)]
mod tests;
