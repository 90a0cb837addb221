//! `cargo xtask images`: OCI images without a container engine. One layer each: a program, the shared libraries it is
//! linked to, and nothing else: no shell. Equal files make equal images.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::build::{self, Profile};
use crate::packages::Purpose;
use crate::tree::{self, find_program};
use crate::{ebpf, say, setup};

/// Make container images of the agent and the controller, without a container engine
#[derive(clap::Args)]
#[command(
    long_about = "Make container images of the agent and the controller, without a container engine, in target/images. \
        Load them on a node with `ctr -n k8s.io images import FILE`, or push them with a tool of yours.",
    after_help = "Examples:\n  cargo xtask images\n  cargo xtask images --repository example.org/weft --tag 0.1.0"
)]
pub struct Arguments {
    /// What stands before the images' names
    #[arg(long, default_value = "localhost")]
    repository: String,
    /// The images' tag
    #[arg(long, default_value = "dev")]
    tag: String,
}

pub fn main(arguments: &Arguments) -> Result<()> {
    setup::ensure(Purpose::BuildEbpf)?;
    ebpf::build()?;
    say::step("Agent and controller, in release mode");
    let programs = build::programs(Profile::Release)?;
    let dir = tree::target()?.join("images");
    for path in product(&programs, &dir, &arguments.repository, &arguments.tag)? {
        let size = fs::metadata(&path)?.len() >> 20;
        say::success(&format!("{} ({size} MB)", path.display()));
    }
    Ok(())
}

/// The images that the tests' clusters get: ours as developed, and a busybox that stands for applications.
pub fn for_tests(programs: &Path) -> Result<()> {
    let dir = tree::target()?.join("test-images");
    product(programs, &dir, "localhost", "dev")?;
    let busybox = find_program("busybox").context("busybox is not installed (Debian: busybox-static)")?;
    let applets = Command::new(&busybox).arg("--list").output().context("busybox --list")?;
    let mut image = Image { user: "", entrypoint: Vec::new(), entries: BTreeMap::new() };
    image.add("bin/busybox", fs::read(&busybox)?);
    for applet in String::from_utf8(applets.stdout)?.split_whitespace().filter(|applet| *applet != "busybox")
    {
        image.entries.insert(format!("bin/{applet}"), Entry::Link("/bin/busybox".to_owned()));
    }
    image.write(&dir.join("busybox.tar"), "localhost/busybox:test")?;
    // The container that holds a pod's namespaces only has to stay.
    let mut pause = Image {
        user: "",
        entrypoint: vec!["/bin/busybox".into(), "sleep".into(), "2147483647".into()],
        entries: BTreeMap::new(),
    };
    pause.add("bin/busybox", fs::read(&busybox)?);
    pause.write(&dir.join("pause.tar"), "localhost/pause:test").map(drop)
}

fn product(programs: &Path, dir: &Path, repository: &str, tag: &str) -> Result<Vec<PathBuf>> {
    // Not root where nothing needs it.
    [("weft-agent", "", &["weft-agent", "weft-cni"][..]), ("weft-control", "65532:65532", &["weft-control"])]
        .into_iter()
        .map(|(name, user, contents)| {
            let mut image = Image { user, entrypoint: vec![format!("/{name}")], entries: BTreeMap::new() };
            for program in contents {
                let path = programs.join(program);
                image.add(program, stripped(&path)?);
                for library in libraries(&path)? {
                    image.add(
                        library.trim_start_matches('/'),
                        fs::read(&library).with_context(|| library.clone())?,
                    );
                }
            }
            image.write(&dir.join(format!("{name}.tar")), &format!("{repository}/{name}:{tag}"))
        })
        .collect()
}

/// The program without what only a debugger needs.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let to = program.with_extension("stripped");
    let status = Command::new("strip").arg("--strip-debug").arg("-o").arg(&to).arg(program).status();
    let status = status.context("strip (Debian: binutils)")?;
    ensure!(status.success(), "strip {} failed", program.display());
    let bytes = fs::read(&to)?;
    fs::remove_file(&to)?;
    Ok(bytes)
}

/// Every shared library that the loader would open for `program`, the loader included.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("ldd (Debian: libc-bin)")?;
    let text = String::from_utf8(output.stdout)?;
    if text.contains("not found") {
        bail!("{} lacks a library:\n{text}", program.display());
    }
    Ok(paths_in(&text))
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, or the path alone; what is no file (the vDSO) has none.
fn paths_in(ldd: &str) -> Vec<String> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(str::to_owned)
        .collect()
}

enum Entry {
    File(Vec<u8>),
    Link(String),
}

/// An image of one layer.
struct Image<'a> {
    user: &'a str,
    entrypoint: Vec<String>,
    /// By path without the leading slash.
    entries: BTreeMap<String, Entry>,
}

impl Image<'_> {
    fn add(&mut self, path: &str, content: Vec<u8>) {
        self.entries.insert(path.to_owned(), Entry::File(content));
    }

    /// Writes an OCI image layout as a tar archive, as `ctr images import` takes it. See the image-spec's
    /// image-layout.md and config.md.
    fn write(&self, to: &Path, name: &str) -> Result<PathBuf> {
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
    fn libraries_are_found_in_what_ldd_prints() {
        let printed = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t\
                       /lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(paths_in(printed), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(paths_in("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn the_same_files_make_the_same_layer() -> Result<()> {
        let image = |content: &[u8]| {
            let mut image = Image { user: "", entrypoint: Vec::new(), entries: BTreeMap::new() };
            image.add("usr/bin/program", content.to_vec());
            image.entries.insert("bin/link".to_owned(), Entry::Link("/usr/bin/program".to_owned()));
            image.layer()
        };
        assert_eq!(image(b"one")?, image(b"one")?);
        assert_ne!(image(b"one")?, image(b"two")?);
        Ok(())
    }
}
