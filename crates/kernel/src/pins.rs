//! Where things are pinned: `BPFFS/weft/INSTANCE/vLAYOUT/`, with a map or link a file and the pods' links in `pods/`.
//! Checks what a predecessor left there before anything is touched.

use crate::{Error, Options, link};
use aya::maps::MapInfo;
use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};
use weft_ebpf_common::{LAYOUT_VERSION, MAPS, MapShape};

/// The directory of one instance and layout.
#[derive(Debug)]
pub struct Pins {
    dir: PathBuf,
}

/// A pod's pinned sk_lookup link. The slot is in the name, because the program behind the link holds it as a constant
/// and a slot in use must not be given away when its pod's map entry was never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodPin {
    pub cookie: u64,
    pub slot: u32,
}

impl PodPin {
    fn name(&self) -> String {
        format!("sk_lookup_{}_{}", self.cookie, self.slot)
    }

    fn parse(name: &str) -> Option<PodPin> {
        let (cookie, slot) = name.strip_prefix("sk_lookup_")?.split_once('_')?;
        Some(PodPin { cookie: cookie.parse().ok()?, slot: slot.parse().ok()? })
    }
}

impl Pins {
    /// Finds or makes the instance's directory. Refuses another layout's pins and maps of another shape; nothing is
    /// changed then.
    pub fn open(options: &Options) -> Result<Pins, Error> {
        check_bpffs(&options.bpffs)?;
        let instance = options.instance_dir()?;
        let version = format!("v{LAYOUT_VERSION}");
        if let Some(other) = entries(&instance)?.into_iter().find(|name| *name != version) {
            return Err(Error::Layout(instance.join(other)));
        }
        let pins = Pins { dir: instance.join(version) };
        pins.check_maps()?;
        let pods = pins.dir.join("pods");
        fs::DirBuilder::new()
            .recursive(true)
            // Whoever can open these maps can free every pod from the mesh.
            .mode(0o700)
            .create(&pods)
            .map_err(Error::io(format!("{} could not be made", pods.display())))?;
        Ok(pins)
    }

    /// Compares every pinned map with what this build's programs read and write.
    pub fn check_maps(&self) -> Result<(), Error> {
        for shape in &MAPS {
            let path = self.map(shape.name);
            if path.exists() {
                let info = MapInfo::from_pin(&path).map_err(Error::map(shape.name))?;
                check_shape(&path, shape, &info)?;
            }
        }
        Ok(())
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn connect(&self, program: &str) -> PathBuf {
        self.dir.join(program)
    }

    pub fn pod(&self, pin: PodPin) -> PathBuf {
        self.dir.join("pods").join(pin.name())
    }

    /// Every pod that has a link pinned.
    pub fn pods(&self) -> Result<Vec<PodPin>, Error> {
        Ok(entries(&self.dir.join("pods"))?.iter().filter_map(|name| PodPin::parse(name)).collect())
    }
}

/// Removes every pin of the instance, whatever its layout. Links go first, so that no program runs without its maps
/// being what it knows, and of those first the ones that save for others to take.
pub fn remove_all(options: &Options) -> Result<(), Error> {
    check_bpffs(&options.bpffs)?;
    let instance = options.instance_dir()?;
    for version in entries(&instance)? {
        let dir = instance.join(version);
        for name in ["save4", "save6", "connect4", "connect6"] {
            link::remove(&dir.join(name))?;
        }
        let pods = dir.join("pods");
        for name in entries(&pods)? {
            link::remove(&pods.join(name))?;
        }
        remove_tree(&dir)?;
    }
    remove_tree(&instance)?;
    // It stays where other instances are in it.
    let _ = instance.parent().map(fs::remove_dir);
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("{} could not be removed", dir.display()))(error))
        }
        _ => Ok(()),
    }
}

/// The names in a directory; none if there is no such directory.
fn entries(dir: &Path) -> Result<Vec<String>, Error> {
    let failed = || format!("{} could not be listed", dir.display());
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(failed())(error)),
    };
    listing
        .map(|entry| Ok(entry.map_err(Error::io(failed()))?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn check_bpffs(path: &Path) -> Result<(), Error> {
    match nix::sys::statfs::statfs(path) {
        Ok(stat) if stat.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC => Ok(()),
        _ => Err(Error::NotBpffs(path.to_owned())),
    }
}

fn check_shape(path: &Path, shape: &MapShape, info: &MapInfo) -> Result<(), Error> {
    let needed = (shape.map_type as u32, shape.key_size, shape.value_size, shape.max_entries);
    let map_type = info.map_type().map_err(Error::map(shape.name))? as u32;
    let found = (map_type, info.key_size(), info.value_size(), info.max_entries());
    if found == needed {
        return Ok(());
    }
    let words = |(map_type, key, value, entries): (u32, u32, u32, u32)| {
        format!("type {map_type}, key {key}, value {value}, {entries} entries")
    };
    Err(Error::MapShape { path: path.to_owned(), found: words(found), needed: words(needed) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_pin_is_named_after_cookie_and_slot() {
        let pin = PodPin { cookie: 4294967299, slot: 7 };
        assert_eq!(PodPin::parse(&pin.name()), Some(pin));
        for name in ["sk_lookup_1", "sk_lookup_x_1", "other_1_2", "sk_lookup_1_2_3"] {
            assert_eq!(PodPin::parse(name), None, "{name}");
        }
    }
}
