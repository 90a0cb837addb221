//! Container images as files: an OCI image layout of one layer in a tar archive, made of names and bytes alone. Nothing else
//! of the files that it is made of gets in (owners, times, the order in which they were read), so equal files make equal
//! images, with equal digests.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

enum Entry {
    File(Vec<u8>),
    Link(String),
}

/// An image of one layer.
#[derive(Default)]
pub struct Image {
    /// `UID:GID`, or empty for root.
    user: String,
    entrypoint: Vec<String>,
    /// By path without the leading slash.
    entries: BTreeMap<String, Entry>,
}

impl Image {
    /// An empty image whose containers run that command, as that user.
    pub fn new(user: &str, entrypoint: &[&str]) -> Image {
        let entrypoint = entrypoint.iter().map(|word| (*word).to_owned()).collect();
        Image { user: user.to_owned(), entrypoint, entries: BTreeMap::new() }
    }

    /// A file that everybody may read and run.
    pub fn file(&mut self, path: &str, content: Vec<u8>) {
        self.entries.insert(inside(path), Entry::File(content));
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.entries.insert(inside(path), Entry::Link(target.to_owned()));
    }

    /// Writes an OCI image layout as a tar archive, as `ctr images import` takes it. See the image-spec's
    /// image-layout.md and config.md.
    pub fn write(&self, to: &Path, name: &str) -> Result<PathBuf> {
        const OCI: &str = "application/vnd.oci.image.";
        let mut blobs = BTreeMap::new();
        let layer = self.layer()?;
        let layer = blob(&mut blobs, layer, &format!("{OCI}layer.v1.tar"));
        let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {
                "User": self.user,
                "Entrypoint": self.entrypoint,
                "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            },
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let config = blob(&mut blobs, config.to_string().into_bytes(), &format!("{OCI}config.v1+json"));
        let kind = format!("{OCI}manifest.v1+json");
        let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]});
        let mut manifest = blob(&mut blobs, manifest.to_string().into_bytes(), &kind);
        manifest["annotations"] = json!({"io.containerd.image.name": name});
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});

        let mut archive = tar::Builder::new(Vec::new());
        put(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
        put(&mut archive, "index.json", index.to_string().as_bytes(), 0o644)?;
        for (digest, bytes) in &blobs {
            put(&mut archive, &format!("blobs/sha256/{digest}"), bytes, 0o644)?;
        }
        let dir = to.parent().context("the images' directory")?;
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        fs::write(to, archive.into_inner()?).with_context(|| to.display().to_string())?;
        Ok(to.to_owned())
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut directories = BTreeMap::from([("tmp".to_owned(), 0o1777)]);
        for path in self.entries.keys() {
            for parent in Path::new(path).ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty())
            {
                directories.entry(parent.to_string_lossy().into_owned()).or_insert(0o755);
            }
        }
        for (path, mode) in directories {
            let mut header = header(mode);
            header.set_entry_type(tar::EntryType::Directory);
            archive.append_data(&mut header, path, std::io::empty())?;
        }
        for (path, entry) in &self.entries {
            match entry {
                Entry::File(content) => put(&mut archive, path, content, 0o755)?,
                Entry::Link(target) => {
                    let mut header = header(0o777);
                    header.set_entry_type(tar::EntryType::Symlink);
                    archive.append_link(&mut header, path, target)?;
                }
            }
        }
        Ok(archive.into_inner()?)
    }
}

/// As paths are in layers.
fn inside(path: &str) -> String {
    path.trim_start_matches('/').to_owned()
}

/// No time, no owner: nothing that differs from one build to the next.
fn header(mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(0);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn put(archive: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) -> Result<()> {
    let mut header = header(mode);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content).with_context(|| path.to_owned())
}

/// Keeps a blob under its digest and describes it.
fn blob(blobs: &mut BTreeMap<String, Vec<u8>>, content: Vec<u8>, kind: &str) -> Value {
    let digest: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    let descriptor = json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": content.len()});
    blobs.insert(digest, content);
    descriptor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_layer() -> Result<()> {
        let image = |names: [&str; 2], content: &[u8]| {
            let mut image = Image::default();
            for name in names {
                image.file(name, content.to_vec());
            }
            image.link("bin/link", "/usr/bin/program");
            image.layer()
        };
        let (one, other) = ("/usr/bin/program", "/etc/its.conf");
        assert_eq!(image([one, other], b"one")?, image([other, one], b"one")?, "in any order");
        assert_ne!(image([one, other], b"one")?, image([one, other], b"two")?);
        Ok(())
    }
}
