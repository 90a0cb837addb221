//! The settings that a captured pod's network namespace needs. They stay when the pod leaves the mesh: they change
//! nothing for packets without a mark, and what they were before is not known any more.

use crate::{Error, Netns};
use std::{fs, io, path::Path};

/// Sets all of them. Cheap if they are set.
pub fn apply(netns: &Netns, with_v6: bool) -> Result<(), Error> {
    netns
        .run(|| {
            // A connection accepted from a marked SYN answers with that mark, and so through lo.
            set("ipv4/tcp_fwmark_accept", |_| 1)?;
            // So do resets: without this, a closed port on the agent's leg to the application is a time-out.
            set("ipv4/fwmark_reflect", |_| 1)?;
            if with_v6 {
                set("ipv6/fwmark_reflect", |_| 1)?;
            }
            // The client bit of TCP Fast Open: a cached cookie would put payload into a SYN that is then refused.
            set("ipv4/tcp_fastopen", |value| value & !1)
        })?
        .map_err(|(name, error)| Error::io(format!("net/{name} could not be set in the pod"))(error))
}

/// Where settings are. /proc/sys/net shows the namespace of the thread that opens the file, whichever procfs it belongs
/// to; in a container its own is read-only, and the node's, which process 1 sees, is not.
const ROOTS: [&str; 2] = ["/proc/sys/net", "/proc/1/root/proc/sys/net"];

/// Writes only what differs, so that a read-only /proc/sys does where nothing is to be changed.
fn set(name: &'static str, change: impl FnOnce(i64) -> i64) -> Result<(), (&'static str, io::Error)> {
    let [own, node] = ROOTS.map(|root| Path::new(root).join(name));
    let text = fs::read_to_string(&own).map_err(|error| (name, error))?;
    let value = text.trim().parse().map_err(|_| (name, io::ErrorKind::InvalidData.into()))?;
    let wanted = change(value);
    if wanted == value {
        return Ok(());
    }
    let result = match fs::write(&own, wanted.to_string()) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            fs::write(&node, wanted.to_string())
        }
        result => result,
    };
    result.map_err(|error| (name, error))
}
