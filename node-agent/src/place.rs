//! Which network namespace is a pod's: by path where a directory of manifests names it, else by its processes.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    path::PathBuf,
};

use weft_kernel::{Netns, locate};

use crate::convert::NetnsHint;

/// The one of `paths` that has every address of a pod: any other namespace is somebody else's.
pub fn owner_of(addresses: &[IpAddr], paths: &[PathBuf]) -> Result<Netns, String> {
    let mut why = String::new();
    for path in paths {
        let opened = Netns::open(path).and_then(|netns| Ok((netns.addresses()?, netns)));
        why = match opened {
            Ok((owned, netns)) => match addresses.iter().find(|a| !owned.contains(a)) {
                None => return Ok(netns),
                Some(missing) => format!("{} does not have the pod's address {missing}", path.display()),
            },
            Err(error) => error.to_string(),
        };
    }
    Err(why)
}

/// Where processes of these pods run, for those that have to be searched for.
pub fn locate_all<'a>(hints: impl Iterator<Item = &'a NetnsHint>) -> HashMap<String, Vec<PathBuf>> {
    let uid = |hint: &NetnsHint| match hint {
        NetnsHint::PodUid(uid) => Some(uid.clone()),
        _ => None,
    };
    let uids: HashSet<_> = hints.filter_map(uid).collect();
    if uids.is_empty() { HashMap::new() } else { locate::netns_of(&uids) }
}

/// Paths that may lead to the pod's network namespace.
pub fn candidates(hint: &NetnsHint, located: &HashMap<String, Vec<PathBuf>>) -> Vec<PathBuf> {
    match hint {
        NetnsHint::Path(path) => vec![path.clone()],
        NetnsHint::PodUid(uid) => located.get(uid).cloned().unwrap_or_default(),
        NetnsHint::Unknown => Vec::new(),
    }
}
