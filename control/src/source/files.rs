//! The files of the directory and their last good versions: reading, complaining once, and merging. No watching, no
//! clock; `directory` decides when to read and what to do about an empty result.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    path::{Path, PathBuf},
};

use weft_api::{Object, ObjectKey};

use super::manifest::{self, Format, Manifest};

/// One file as last seen.
#[derive(Debug, Clone, Default)]
pub struct File {
    /// What was read last, good or not, to notice a change.
    contents: Vec<u8>,
    /// The last good version, which is in force.
    manifest: std::sync::Arc<Manifest>,
    /// Why what is there now is not in force.
    complaint: Option<String>,
}

/// Every file by name.
#[derive(Debug, Clone, Default)]
pub struct Files(BTreeMap<String, File>);

/// All objects in force, and what is to be said about them.
#[derive(Debug, Default)]
pub struct Merged {
    pub objects: BTreeMap<ObjectKey, Object>,
    /// By subject (a file, an object), one line each.
    pub complaints: BTreeMap<String, String>,
    /// `apiVersion kind` of what was skipped.
    pub ignored: BTreeSet<String>,
}

impl Files {
    /// Reads the directory again. Files in `unsettled` are being written: they stay as they are. An error is about the
    /// directory itself.
    pub fn read(&self, directory: &Path, unsettled: &HashSet<PathBuf>) -> io::Result<Files> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let path = entry.path();
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let Some(format) = Format::of(&name) else { continue };
            let known = self.0.get(&name);
            if unsettled.contains(&path) {
                files.extend(known.map(|file| (name, file.clone())));
                continue;
            }
            match fs::read(&path) {
                Ok(contents) => {
                    let file = match known {
                        Some(file) if file.contents == contents && !file.complained_of_reading() => {
                            file.clone()
                        }
                        known => File::take(known, contents, format),
                    };
                    files.insert(name, file);
                }
                // Removed, or renamed away, since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // A directory with such a name is not ours to read.
                Err(error) if error.kind() == io::ErrorKind::IsADirectory => {}
                Err(error) => {
                    let mut file = known.cloned().unwrap_or_default();
                    file.complaint = Some(format!("{UNREADABLE}: {error}"));
                    files.insert(name, file);
                }
            }
        }
        Ok(Files(files))
    }

    /// Files whose present content is not in force, and why.
    pub fn complaints(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().filter_map(|(name, file)| Some((name.as_str(), file.complaint.as_deref()?)))
    }

    /// The objects in force. Where two files define one, the first file by name wins.
    pub fn merge(&self) -> Merged {
        let mut merged = Merged::default();
        let mut owner: BTreeMap<ObjectKey, &str> = BTreeMap::new();
        for (name, file) in &self.0 {
            if let Some(complaint) = &file.complaint {
                merged.complaints.insert(name.clone(), complaint.clone());
            }
            merged.ignored.extend(file.manifest.ignored.iter().cloned());
            for object in &file.manifest.objects {
                let key = object.key();
                match owner.get(&key) {
                    Some(first) => {
                        let complaint =
                            format!("defined in {first} and again in {name}; the one in {first} counts");
                        merged.complaints.entry(key.to_string()).or_insert(complaint);
                    }
                    None => {
                        owner.insert(key.clone(), name);
                        merged.objects.insert(key, object.clone());
                    }
                }
            }
        }
        merged
    }
}

const UNREADABLE: &str = "cannot be read";

impl File {
    fn complained_of_reading(&self) -> bool {
        self.complaint.as_ref().is_some_and(|c| c.starts_with(UNREADABLE))
    }

    /// A new version: in force if it is good, else the last good one stays.
    fn take(known: Option<&File>, contents: Vec<u8>, format: Format) -> File {
        let last_good = known.map(|file| file.manifest.clone()).unwrap_or_default();
        let parsed = match std::str::from_utf8(&contents) {
            Ok(text) if text.trim().is_empty() && !last_good.objects.is_empty() => Err(
                // Many programs truncate a file before they write it.
                "is empty, which is not taken as an order to remove its objects; delete the file for that"
                    .to_owned(),
            ),
            Ok(text) => manifest::parse(text, format).map_err(|error| error.to_string()),
            Err(error) => Err(format!("is not UTF-8: {error}")),
        };
        match parsed {
            Ok(manifest) => File { contents, manifest: manifest.into(), complaint: None },
            Err(complaint) => File { contents, manifest: last_good, complaint: Some(complaint) },
        }
    }
}
