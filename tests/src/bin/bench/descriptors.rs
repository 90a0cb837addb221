//! Room for the descriptors of a thousand connections; programs started from here inherit it.

use anyhow::{Result, ensure};

const WANTED: libc::rlim_t = 65_536;

/// Raises the soft limit as far as needed and allowed.
pub fn allow_many() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure outlives the call.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    ensure!(got == 0, "cannot read the limit of open files: {}", std::io::Error::last_os_error());
    if limit.rlim_cur >= WANTED {
        return Ok(());
    }
    limit.rlim_cur = WANTED.min(limit.rlim_max);
    // SAFETY: the structure outlives the call.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    ensure!(set == 0, "cannot raise the limit of open files: {}", std::io::Error::last_os_error());
    Ok(())
}
