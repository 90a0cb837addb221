//! The controller's state directory: keys and what must survive a restart. Everything in it is for its owner alone,
//! and a directory that others can enter is refused rather than repaired, since its keys may have been read already.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: others may read it (mode {mode:o}); keys in there may be known to them. If they are not, `chmod {wanted:o} {path}`", path = .path.display())]
    Open { path: PathBuf, mode: u32, wanted: u32 },
    #[error("{path}: belongs to user {owner}, not to the user {user} this runs as")]
    Owner { path: PathBuf, owner: u32, user: u32 },
    #[error("{path}: is no directory")]
    NotADirectory { path: PathBuf },
    #[error("{path}: another weft-control is using this state directory")]
    InUse { path: PathBuf },
    #[error("{path}: {why}")]
    Invalid { path: PathBuf, why: String },
}

const DIRECTORY_MODE: u32 = 0o700;
const PRIVATE: u32 = 0o600;
const PUBLIC: u32 = 0o644;

/// Who may read a file in it. The directory itself lets nobody else in; the mode matters to copies.
#[derive(Debug, Clone, Copy)]
pub enum Access {
    Private,
    Public,
}

#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

/// Held while the controller runs.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "closing it lets go of the lock")] File);

impl StateDir {
    /// Opens the directory, making it if it is not there.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let io = |source| StateError::Io { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path).or_else(|error| {
            match error.kind() {
                io::ErrorKind::AlreadyExists => Ok(()),
                _ => Err(io(error)),
            }
        })?;
        let metadata = fs::metadata(path).map_err(io)?;
        if !metadata.is_dir() {
            return Err(StateError::NotADirectory { path: path.to_owned() });
        }
        check(path, &metadata, DIRECTORY_MODE)?;
        Ok(Self(path.to_owned()))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Makes sure that no second controller writes here.
    pub fn lock(&self) -> Result<Lock, StateError> {
        let path = self.path("lock");
        let io = |source| StateError::Io { path: path.clone(), source };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(PRIVATE)
            .open(&path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => Ok(Lock(file)),
            Err(TryLockError::WouldBlock) => Err(StateError::InUse { path: self.0.clone() }),
            Err(TryLockError::Error(source)) => Err(io(source)),
        }
    }

    /// The content of a file that only the owner may read; None if it is not there.
    pub fn read_private(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path(name);
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StateError::Io { path, source }),
        };
        check(&path, &metadata, PRIVATE)?;
        fs::read(&path).map(Some).map_err(|source| StateError::Io { path, source })
    }

    /// The content of a file; None if it is not there.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path(name);
        match fs::read(&path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StateError::Io { path, source }),
        }
    }

    /// Replaces a file as a whole; when this returns, the new content survives a power cut.
    pub fn write(&self, name: &str, content: &[u8], access: Access) -> Result<(), StateError> {
        self.place(name, content, access, |temporary, path| fs::rename(temporary, path))
    }

    /// Writes a file unless it is there already; false if it was. Two processes may try at the same time.
    pub fn create(&self, name: &str, content: &[u8], access: Access) -> Result<bool, StateError> {
        let mut created = true;
        self.place(name, content, access, |temporary, path| {
            let linked = fs::hard_link(temporary, path);
            fs::remove_file(temporary)?;
            match linked {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    created = false;
                    Ok(())
                }
                other => other,
            }
        })?;
        Ok(created)
    }

    fn place(
        &self,
        name: &str,
        content: &[u8],
        access: Access,
        put: impl FnOnce(&Path, &Path) -> io::Result<()>,
    ) -> Result<(), StateError> {
        let path = self.path(name);
        let temporary = self.path(&format!(".{name}.{}", std::process::id()));
        let mode = match access {
            Access::Private => PRIVATE,
            Access::Public => PUBLIC,
        };
        let place = || {
            // A crash may have left one behind.
            let _ = fs::remove_file(&temporary);
            let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            put(&temporary, &path)?;
            File::open(&self.0)?.sync_all()
        };
        place().map_err(|source| StateError::Io { path, source })
    }
}

fn check(path: &Path, metadata: &fs::Metadata, wanted: u32) -> Result<(), StateError> {
    let path = path.to_owned();
    let user = nix::unistd::geteuid().as_raw();
    if metadata.uid() != user {
        return Err(StateError::Owner { path, owner: metadata.uid(), user });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 { Err(StateError::Open { path, mode, wanted }) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A state directory that goes away with the guard.
    pub(crate) fn temporary() -> (tempfile::TempDir, StateDir) {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        (directory, state)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn is_made_for_its_owner_alone() {
        let (_guard, state) = temporary();
        assert_eq!(mode(&state.0), 0o700);
        state.write("key", b"secret", Access::Private).unwrap();
        state.write("root.pem", b"public", Access::Public).unwrap();
        assert_eq!((mode(&state.path("key")), mode(&state.path("root.pem"))), (0o600, 0o644));
        assert_eq!(fs::read_dir(&state.0).unwrap().count(), 2, "temporary files stay behind");
    }

    #[test]
    fn refuses_what_others_can_read() {
        let (_guard, state) = temporary();
        state.write("key", b"secret", Access::Private).unwrap();
        fs::set_permissions(state.path("key"), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(state.read_private("key"), Err(StateError::Open { mode: 0o640, .. })));
        for bad in [0o750, 0o701, 0o755, 0o777] {
            fs::set_permissions(&state.0, fs::Permissions::from_mode(bad)).unwrap();
            assert!(matches!(StateDir::open(&state.0), Err(StateError::Open { .. })), "{bad:o}");
        }
    }

    #[test]
    fn who_creates_a_file_first_wins() {
        let (_guard, state) = temporary();
        assert!(state.create("key", b"first", Access::Private).unwrap());
        assert!(!state.create("key", b"second", Access::Private).unwrap());
        assert_eq!(state.read_private("key").unwrap().unwrap(), b"first");
        assert_eq!(state.read_private("other").unwrap(), None);
    }

    #[test]
    fn only_one_controller_at_a_time() {
        let (_guard, state) = temporary();
        let lock = state.lock().unwrap();
        assert!(matches!(state.lock(), Err(StateError::InUse { .. })));
        drop(lock);
        state.lock().unwrap();
    }
}
