//! Pinned links: made once, then given new programs.

use crate::{
    Error,
    sys::{self, AttachType},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// Makes sure that `program` runs at `target` and that the link is pinned at `path`. A link that a predecessor pinned
/// there gets the program atomically; one that belongs to another target, or whose target is gone, is replaced.
/// `same_target` says whether a link's target is this one.
pub fn attach_or_update(
    path: &Path,
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: AttachType,
    same_target: impl Fn(&sys::LinkInfo) -> bool,
) -> Result<(), Error> {
    let failed = |what: &str| format!("the link {} could not be {what}", path.display());
    match sys::open_pin(path) {
        Ok(link) => {
            let info = sys::link_info(link.as_fd()).map_err(Error::io(failed("inspected")))?;
            if same_target(&info) {
                return sys::link_update(link.as_fd(), program)
                    .map_err(Error::io(failed("given a new program")));
            }
            detach(path, &link)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io(failed("opened"))(error)),
    }
    let link = sys::link_create(program, target, attach_type).map_err(Error::io(failed("attached")))?;
    // If this fails the link ends with its descriptor: nothing half made stays.
    sys::pin(link.as_fd(), path).map_err(Error::io(failed("pinned")))
}

/// Whether the netns link pinned at `path` still has its namespace.
pub fn is_attached(path: &Path) -> Result<bool, Error> {
    let failed = || format!("the link {} could not be inspected", path.display());
    let link = sys::open_pin(path).map_err(Error::io(failed()))?;
    Ok(sys::link_info(link.as_fd()).map_err(Error::io(failed()))?.netns_inode() != 0)
}

/// Detaches the link pinned at `path` and removes the pin. Nothing pinned there is no error.
pub fn remove(path: &Path) -> Result<(), Error> {
    match sys::open_pin(path) {
        Ok(link) => detach(path, &link),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(format!("the link {} could not be opened", path.display()))(error)),
    }
}

fn detach(path: &Path, link: &OwnedFd) -> Result<(), Error> {
    match sys::link_detach(link.as_fd()) {
        Ok(()) => {}
        // The target is gone, so it is detached already (the kernel says EINVAL or ENOLINK, by kind of link).
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLINK)) => {}
        Err(error) => {
            return Err(Error::io(format!("the link {} could not be detached", path.display()))(error));
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("{} could not be removed", path.display()))(error))
        }
        _ => Ok(()),
    }
}
