//! Putting the plugin on a node and keeping it there: the binary, its settings, and its place in the network configuration.
//! Every file appears whole or not at all: it is written beside its place and renamed within the directory, which is also
//! what a container runtime notices.
//!
//! A `.conflist` gets the plugin as one more entry. A `.conf` or `.json` holds one plugin and has room for no other: for
//! `NAME.conf` there is `NAME.conf.weft.conflist`, a list of that plugin and ours, and then the original is renamed to
//! `NAME.conf.weft-saved`, which no runtime reads. The list's name comes next after the original's, so before, between and
//! after these two steps the runtime finds this network, and no other. If somebody writes `NAME.conf` anew the runtime uses
//! it, without our plugin, until the agent looks again.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::{PLUGIN, conflist, settings, settings::Settings};

/// What the name of the list ends with that stands for a configuration of one plugin.
const LIST: &str = ".weft.conflist";
/// What such a configuration is called meanwhile.
const SAVED: &str = ".weft-saved";

/// The directories of one node.
#[derive(Debug, Clone)]
pub struct Installation {
    /// The runtime's network configurations, under the path that the node knows it by.
    pub conf_dir: PathBuf,
    /// The runtime's plugins.
    pub bin_dir: PathBuf,
}

/// What is wrong.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{0} holds no network configuration yet: is the cluster's CNI plugin installed?")]
    NoNetwork(PathBuf),
    #[error("{path} {source}")]
    Conflist { path: PathBuf, source: conflist::ConflistError },
}

impl Installation {
    /// Copies the plugin from `program`, unless the same is there.
    pub fn put_program(&self, program: &Path) -> Result<(), InstallError> {
        let new = fs::read(program).map_err(at(program))?;
        let to = self.bin_dir.join(PLUGIN);
        if fs::read(&to).is_ok_and(|old| old == new) { Ok(()) } else { write(&to, &new, 0o755) }
    }

    /// Writes the plugin's settings, unless the same are there.
    pub fn put_settings(&self, settings: &Settings) -> Result<(), InstallError> {
        let to = self.settings();
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).map_err(at(dir))?;
        }
        if Settings::read(&to).is_ok_and(|old| old == *settings) {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(settings).map_err(|error| at(&to)(error.into()))?;
        write(&to, &text, 0o600)
    }

    /// Puts the plugin last in the configuration that the runtime uses, unless it is there. Says whether it was not.
    pub fn join(&self) -> Result<bool, InstallError> {
        let path = self.network()?;
        if path.extension().is_some_and(|extension| extension == "conflist") {
            self.insert(&path)
        } else {
            self.wrap(&path)
        }
    }

    fn insert(&self, path: &Path) -> Result<bool, InstallError> {
        let text = fs::read_to_string(path).map_err(at(path))?;
        // Whoever owns the original may have written to it after it was read, or under the name that it has now.
        if let Some(saved) = original_of(path).map(|original| with(&original, SAVED))
            && let Some(original) =
                absent_is_fine(fs::read_to_string(&saved).map(Some)).map_err(at(&saved))?
            && !conflist::wraps(&text, &original)
        {
            let text = conflist::wrap(&original, &self.settings()).map_err(in_conflist(&saved))?;
            return rewrite(path, &text).map(|()| true);
        }
        match conflist::insert(&text, &self.settings()).map_err(in_conflist(path))? {
            Some(text) => rewrite(path, &text).map(|()| true),
            None => Ok(false),
        }
    }

    fn wrap(&self, path: &Path) -> Result<bool, InstallError> {
        let text = fs::read_to_string(path).map_err(at(path))?;
        let list = with(path, LIST);
        let text = conflist::wrap(&text, &self.settings()).map_err(in_conflist(path))?;
        write(&list, text.as_bytes(), mode_of(path)?)?;
        // Only now, so that there is always one of them. Not there any more: while agents are replaced there are two.
        absent_is_fine(rename(path, &with(path, SAVED))).map_err(at(path))?;
        self.insert(&list).map(|_| true)
    }

    /// Undoes all of it. A part that is not there is no error.
    pub fn remove(&self) -> Result<(), InstallError> {
        for original in self.wrapped()? {
            let saved = with(&original, SAVED);
            // One that is there is newer.
            if fs::symlink_metadata(&original).is_err() {
                absent_is_fine(rename(&saved, &original)).map_err(at(&original))?;
            }
            for path in [saved, with(&original, LIST)] {
                absent_is_fine(fs::remove_file(&path)).map_err(at(&path))?;
            }
        }
        for path in self.networks()? {
            let Ok(text) = fs::read_to_string(&path) else { continue };
            // What is no list has never had us in it.
            if let Ok(Some(text)) = conflist::remove(&text) {
                rewrite(&path, &text)?;
            }
        }
        let settings = self.settings();
        for path in [&settings, &self.bin_dir.join(PLUGIN)] {
            absent_is_fine(fs::remove_file(path)).map_err(at(path))?;
        }
        let dir = settings.parent().unwrap_or(&settings);
        absent_is_fine(fs::remove_dir(dir)).map_err(at(dir))
    }

    /// The configuration that a runtime picks: the first by name, whatever its first character (see ConfFiles in libcni).
    fn network(&self) -> Result<PathBuf, InstallError> {
        self.networks()?.into_iter().next().ok_or_else(|| InstallError::NoNetwork(self.conf_dir.clone()))
    }

    fn networks(&self) -> Result<Vec<PathBuf>, InstallError> {
        let is_network =
            |path: &PathBuf| path.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json");
        Ok(self.files()?.into_iter().filter(is_network).collect())
    }

    /// What configurations of one plugin are called that have a list in their place, or had one.
    fn wrapped(&self) -> Result<BTreeSet<PathBuf>, InstallError> {
        Ok(self.files()?.iter().filter_map(|path| original_of(path)).collect())
    }

    /// Everything in the directory of network configurations that is no directory itself, by name.
    fn files(&self) -> Result<Vec<PathBuf>, InstallError> {
        let entries = fs::read_dir(&self.conf_dir).map_err(at(&self.conf_dir))?;
        let files = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_dir()));
        let mut files: Vec<_> = files.map(|entry| entry.path()).collect();
        files.sort();
        Ok(files)
    }

    fn settings(&self) -> PathBuf {
        self.conf_dir.join(settings::FILE)
    }
}

/// `NAME.conf` of `NAME.conf.weft.conflist` and of `NAME.conf.weft-saved`.
fn original_of(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let original = name.strip_suffix(LIST).or_else(|| name.strip_suffix(SAVED))?;
    Some(path.with_file_name(original))
}

fn with(path: &Path, ending: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(ending);
    path.into()
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> InstallError + use<> {
    let path = path.to_owned();
    move |source| InstallError::Io { path, source }
}

fn in_conflist(path: &Path) -> impl FnOnce(conflist::ConflistError) -> InstallError + use<> {
    let path = path.to_owned();
    move |source| InstallError::Conflist { path, source }
}

fn absent_is_fine<T: Default>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        result => result,
    }
}

/// A file of another component, which may not want everybody to read it.
fn rewrite(path: &Path, text: &str) -> Result<(), InstallError> {
    write(path, text.as_bytes(), mode_of(path)?)
}

fn mode_of(path: &Path) -> Result<u32, InstallError> {
    Ok(fs::metadata(path).map_err(at(path))?.permissions().mode() & 0o7777)
}

fn write(to: &Path, content: &[u8], mode: u32) -> Result<(), InstallError> {
    let name = to.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // The runtime passes it over for its ending.
    let beside = to.with_file_name(format!(".{name}.weft-{}", std::process::id()));
    let put = || {
        absent_is_fine(fs::remove_file(&beside))?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        // Whatever the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        rename(&beside, to)
    };
    put().map_err(at(to))
}

/// Within a directory, and on the disk when it returns: what is done next must not get there first.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    to.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests;
