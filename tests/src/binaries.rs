//! Where the programs under test are: beside the running one, as cargo put them there.

use anyhow::{Context, Result, bail};

/// Path of a program of this workspace, built in the same profile as the running one.
pub fn binary(name: &str) -> Result<String> {
    let own = std::env::current_exe().context("own path")?;
    let path = own.parent().context("own directory")?.join(name);
    if !path.is_file() {
        bail!("{} is not there: build it first (cargo build, or cargo xtask test)", path.display());
    }
    Ok(path.to_string_lossy().into_owned())
}
