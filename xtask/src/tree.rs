//! Where things are: the checkout, cargo's target directory, and the cache outside the tree.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the checkout.
pub fn root() -> Result<PathBuf> {
    // Cargo sets this for `cargo xtask`; the compiled-in value serves a directly started binary.
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let root = manifest.parent().context("xtask's manifest directory has no parent")?;
    Ok(root.to_path_buf())
}

/// Cargo's target directory of the workspace, wherever the user's settings put it: the one this program was built into.
pub fn target() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot find xtask's own executable")?;
    let target =
        program.parent().and_then(Path::parent).context("xtask's executable is not in a target directory")?;
    Ok(target.to_path_buf())
}

/// Flags for the compiler, that it writes fixed names in place of the paths of this checkout, its target directory and
/// cargo's home, in messages and in line tables.
pub fn remapped_paths() -> Result<Vec<OsString>> {
    let cargo = match env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => {
            PathBuf::from(env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?).join(".cargo")
        }
    };
    // Of several that fit the compiler takes the last: the target directory is mostly in the checkout.
    Ok([(cargo, "/cargo"), (root()?, "/weft"), (target()?, "/weft/target")]
        .into_iter()
        .map(|(path, name)| {
            let mut flag = OsString::from("--remap-path-prefix=");
            flag.push(path);
            flag.push("=");
            flag.push(name);
            flag
        })
        .collect())
}

/// Where what setup builds is kept between checkouts: `$XDG_CACHE_HOME/weft`, else `~/.cache/weft`.
pub fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|value| Path::new(value).is_absolute()) {
        Some(base) => PathBuf::from(base),
        None => PathBuf::from(
            env::var_os("HOME")
                .context("neither XDG_CACHE_HOME nor HOME is set, so there is no cache directory")?,
        )
        .join(".cache"),
    };
    Ok(base.join("weft"))
}

/// The file a command name stands for: on PATH, or in the system directories that an ordinary user's PATH leaves out.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok() && path.is_file()
}
