//! Putting the plugin on a node and keeping it there: the binary, its settings, and its place in the network configuration.
//! Every file appears whole or not at all: it is written beside its place and renamed within the directory, which is also
//! what a container runtime notices.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::{PLUGIN, conflist, settings, settings::Settings};

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
        let to = self.conf_dir.join(settings::FILE);
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
        let text = fs::read_to_string(&path).map_err(at(&path))?;
        let conflist = |source| InstallError::Conflist { path: path.clone(), source };
        match conflist::insert(&text, &self.conf_dir.join(settings::FILE)).map_err(conflist)? {
            Some(text) => rewrite(&path, &text).map(|()| true),
            None => Ok(false),
        }
    }

    /// Undoes all of it. A part that is not there is no error.
    pub fn remove(&self) -> Result<(), InstallError> {
        for path in self.networks()? {
            let Ok(text) = fs::read_to_string(&path) else { continue };
            // What is no list has never had us in it.
            if let Ok(Some(text)) = conflist::remove(&text) {
                rewrite(&path, &text)?;
            }
        }
        let settings = self.conf_dir.join(settings::FILE);
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
        let entries = fs::read_dir(&self.conf_dir).map_err(at(&self.conf_dir))?;
        let is_network =
            |path: &PathBuf| path.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json");
        let files = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_dir()));
        let mut found: Vec<_> = files.map(|entry| entry.path()).filter(is_network).collect();
        found.sort();
        Ok(found)
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> InstallError + use<> {
    let path = path.to_owned();
    move |source| InstallError::Io { path, source }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// A file of another component, which may not want everybody to read it.
fn rewrite(path: &Path, text: &str) -> Result<(), InstallError> {
    let mode = fs::metadata(path).map_err(at(path))?.permissions().mode();
    write(path, text.as_bytes(), mode & 0o7777)
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
        fs::rename(&beside, to)
    };
    put().map_err(at(to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_as_it_was_after_removal() {
        let dir = tempfile::tempdir().unwrap();
        let node = Installation { conf_dir: dir.path().join("conf"), bin_dir: dir.path().join("bin") };
        for dir in [&node.conf_dir, &node.bin_dir] {
            fs::create_dir(dir).unwrap();
        }
        assert!(matches!(node.join(), Err(InstallError::NoNetwork(_))));
        let list =
            "{\n  \"name\": \"net\",\n  \"plugins\": [\n    {\n      \"type\": \"bridge\"\n    }\n  ]\n}\n";
        let (first, second) = (node.conf_dir.join("10-a.conflist"), node.conf_dir.join("20-b.conflist"));
        fs::write(&first, list).unwrap();
        fs::write(&second, list).unwrap();
        fs::set_permissions(&first, Permissions::from_mode(0o600)).unwrap();
        // None of these is a configuration, for a runtime.
        fs::write(node.conf_dir.join("00-half.conflist.tmp"), "half").unwrap();
        fs::create_dir(node.conf_dir.join("00-directory.conf")).unwrap();

        let program = dir.path().join("program");
        fs::write(&program, "the plugin").unwrap();
        node.put_program(&program).unwrap();
        node.put_settings(&Settings::default()).unwrap();
        assert!(node.join().unwrap());
        assert!(!node.join().unwrap(), "again");
        assert!(fs::read_to_string(&first).unwrap().contains(PLUGIN));
        assert_eq!(fs::read_to_string(&second).unwrap(), list, "the runtime does not use this one");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&node.conf_dir.join(settings::FILE)), 0o600);
        assert_eq!(mode(&node.bin_dir.join(PLUGIN)), 0o755);
        assert_eq!(mode(&first), 0o600, "as it was");

        // Another component writes its configuration anew.
        fs::write(&first, list).unwrap();
        assert!(node.join().unwrap());
        node.remove().unwrap();
        node.remove().unwrap();
        assert_eq!(fs::read_to_string(&first).unwrap(), list);
        assert_eq!(fs::read_dir(&node.bin_dir).unwrap().count(), 0);
        assert!(!node.conf_dir.join("weft.d").exists());
        assert_eq!(mode(&first), 0o600, "still as it was");
    }

    #[test]
    fn the_runtime_picks_the_first_by_name_and_so_do_we() {
        let dir = tempfile::tempdir().unwrap();
        let node = Installation { conf_dir: dir.path().to_owned(), bin_dir: dir.path().to_owned() };
        for name in ["20.conflist", "10.conf", "10.conflist", ".hidden.conflist"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        for name in [".hidden.conflist", "10.conf", "10.conflist", "20.conflist"] {
            assert_eq!(node.network().unwrap(), dir.path().join(name));
            fs::remove_file(dir.path().join(name)).unwrap();
        }
    }
}
